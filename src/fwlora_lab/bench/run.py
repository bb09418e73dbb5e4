"""`fwlora bench`: what training costs, contestant beside contestant in one process, as ratios with intervals.

Every contestant trains on the same batches, drawn beforehand with the real lengths of CoLA or SST-2; what the word
pieces say does not matter to a clock. A block goes through its contestants forwards and then backwards (ABBA), from a
place that moves on, so that what slows the machine down slows all of them and nobody always follows the same
neighbour. A ratio is taken within each block; reported are the median over blocks and its bootstrap interval. Two
equal contestants are the control: how far their ratio is from 1 is what the measurement can resolve.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from fwlora_lab.bench.cases import LaneCase, PeftLoop, Roofline, TrainerBaseline
from fwlora_lab.bench.measure import AT_LEAST, BenchCase, Result, interval, judge, measure
from fwlora_lab.bench.workload import NEVER, PADDED, WHOLE, K, Workload, backbone_of, token_table
from fwlora_lab.data.tokens import epoch_batches
from fwlora_lab.errors import UserError
from fwlora_lab.records.environment import cpu_name
from fwlora_lab.training.device import cpu_has_bf16, pick_device

_SECONDS = {False: 600.0, True: 130.0}  # of measuring, by --quick; loading comes on top
_AT_ONCE = {"cpu": 4, "cuda": 16}  # the lanes whose cost is compared with one's
_MEANING = {
    "aa_control": "our LoRA / our LoRA: must be 1 to within 0.5 %",
    "penalty_steady": "FW-LoRA / LoRA, ours, a step after the warm-up",
    "penalty_whole_run": f"FW-LoRA / LoRA, ours, whole run of {WHOLE} steps, sketch, K = {K}",
    "attach_steady": "fwlora.attach on plain PEFT / plain PEFT LoRA, a step after the warm-up",
    "adalora_over_lora": "AdaLoRA / LoRA, ours, a step that allocates",
    "usual_over_ours_one_lane": f"Trainer + PEFT padded to {PADDED} / ours, one run, one lane",
    "usual_over_ours_best": "the same at the best number of lanes",
    "lanes_cost": "a step of {at_once} lanes / a step of one",
    "matmul_share": "share of the best matrix product's rate, at the best number of lanes",
}


def run_bench(course: Workload, quick: bool, say: Callable[[str], object]) -> Result:
    """All comparisons, one group of contestants after another so that memory holds them."""
    generator = np.random.default_rng(0)
    device, seconds = course.device.type, _SECONDS[quick]
    result = Result()

    def add(name: str, *terms: np.ndarray) -> None:
        result.ratios.append(judge(name, *interval(terms, generator), device))

    def note(text: str, *terms: np.ndarray, unit: str = "") -> None:
        center, low, high = interval(terms, generator)
        result.notes.append(f"{text}: {center:.4g}{unit} ({low:.4g} to {high:.4g})")

    def group(title: str, share: float, size: int, make: Callable[[], Mapping[str, BenchCase]], least: int):
        gc.collect()
        began = time.perf_counter()
        times = measure(make(), course.batches, size, share * seconds, least)
        blocks = len(next(iter(times.values())))
        took = time.perf_counter() - began
        say(f"{title}: {blocks} blocks of {size} x {course.cfg.training.batch_size} examples, {took:.0f} s")
        return times

    times = group(
        "ours, steady and warm-up",
        0.36,
        1,
        lambda: {
            "lora": LaneCase(course),
            "control": LaneCase(course),
            "steady": LaneCase(course, "fw_lora"),
            "watching": LaneCase(course, "fw_lora", warmup=NEVER - 1),
        },
        least=3,
    )
    lora = times["lora"]
    add("aa_control", times["control"] / lora)
    add("penalty_steady", times["steady"] / lora)
    part = K / WHOLE
    add("penalty_whole_run", (part * times["watching"] + (1 - part) * times["steady"]) / lora)
    note("a step of our LoRA, one lane", 1e3 * lora, unit=" ms")
    note("a step of the warm-up / LoRA, ours, sketch", times["watching"] / lora)

    times = group(
        "plain PEFT",
        0.18,
        1,
        lambda: (
            {"lora": PeftLoop(course), "attach": PeftLoop(course, "fw_lora")}
            | ({} if quick else {"control": PeftLoop(course)})
        ),
        least=2 if quick else 3,
    )
    add("attach_steady", times["attach"] / times["lora"])
    note("a step of plain PEFT LoRA, batches padded to their longest", 1e3 * times["lora"], unit=" ms")
    if not quick:
        note("plain PEFT LoRA / plain PEFT LoRA", times["control"] / times["lora"])

    times = group(
        "AdaLoRA",
        0.12,
        1,
        lambda: (
            {"lora": LaneCase(course), "adalora": LaneCase(course, "adalora")}
            | ({} if quick else {"plain": PeftLoop(course), "peft": PeftLoop(course, "adalora")})
        ),
        least=2 if quick else 3,
    )
    add("adalora_over_lora", times["adalora"] / times["lora"])
    if not quick:
        note("PEFT's AdaLoRA / PEFT's LoRA, plain loop", times["peft"] / times["plain"])
        note("PEFT's LoRA, plain loop / ours, one lane", times["plain"] / times["lora"])
        note("PEFT's AdaLoRA, plain loop / ours, one lane", times["peft"] / times["adalora"])

    at_once = _AT_ONCE[device]
    counts = [1, at_once] if quick else [1, 4, 8, 16]
    size = max(counts)
    ours, floor = {e: LaneCase(course, lanes=e) for e in counts}, Roofline(course)
    named = {**{str(e): contestant for e, contestant in ours.items()}, "floor": floor}
    with_half = not quick and device == "cpu" and cpu_has_bf16()
    if with_half:
        named["half"] = LaneCase(course, lanes=at_once, half=True)
    times = group("lanes", 0.16, size, lambda named=named: named, least=2 if quick else 3)
    # Seconds for the same batches: what a step of e lanes costs is e times as much as its share.
    per_run = {e: times[str(e)] / times["1"] for e in counts}
    best = min(counts, key=lambda e: float(np.median(per_run[e])))
    for e in counts:
        note(f"a run in {e} lanes / a run in one", per_run[e])
        note(f"share of the best matrix product's rate, {e} lanes", times["floor"] / times[str(e)])
        memory = ours[e].memory(course.batches) / 2**20
        result.notes.append(f"memory of a training step, {e} lanes: {memory:.0f} MiB a lane, the frozen encoder apart")
    if with_half:
        note(f"a step with the encoder in bf16 / in fp32, {at_once} lanes", times["half"] / times[str(at_once)])
    rate = 1e-9 * course.flops(course.batches[:size]) / floor.train(course.batches[:size])
    result.notes.append(f"best matrix product: {'x'.join(map(str, floor.shape))}, {rate:.0f} GFLOP/s")
    share = times["floor"] / times[str(best)]
    del ours, floor, named

    times = group(
        "the usual",
        0.10,
        1,
        lambda: {"ours": LaneCase(course), "usual": TrainerBaseline(course)},
        least=1 if quick else 2,
    )
    add("usual_over_ours_one_lane", times["usual"] / times["ours"])
    add("usual_over_ours_best", times["usual"] / times["ours"], 1 / per_run[best])
    add("lanes_cost", at_once * per_run[at_once])
    add("matmul_share", share)
    result.notes.append(f"best number of lanes: {best}")

    times = group(
        "length-grouped Trainer",
        0.08,
        4 if quick else 50,  # batches among which it groups
        lambda: {"ours": LaneCase(course), "grouped": TrainerBaseline(course, grouped=True)},
        least=1,
    )
    note("Trainer + PEFT, length-grouped, padded to the longest / ours, one lane", times["grouped"] / times["ours"])
    return result


def profile_step(
    course: Workload, lanes: int, steps: int = 10, most: int = 14
) -> tuple[float, list[tuple[str, float]]]:
    """Milliseconds of a LoRA step of `lanes` runs, and the share of its time that each kind of operation takes."""
    ours = LaneCase(course, lanes=lanes)
    ours.train(course.batches[: 2 * lanes])
    mine = course.batches[: steps * lanes]
    seconds = ours.train(mine)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if course.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        ours.train(mine)
    own = "self_device_time_total" if course.device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, own)) for event in profiler.key_averages()}
    total = sum(times.values())
    ranked = sorted(((name, time / total) for name, time in times.items()), key=lambda pair: -pair[1])
    return 1e3 * seconds * lanes / len(mine), [*ranked[:most], ("all others", sum(share for _, share in ranked[most:]))]


def bench(
    task: str,
    backbone: str,
    threads: int | None,
    quick: bool = False,
    cpu_time: bool = False,
    as_json: bool = False,
    profile: bool = False,
) -> int:
    """Measure and print: a table, or with `as_json` one object a line and the table on standard error.

    With `profile` the ratios are left out and what a step's time goes into is printed.

    Raises:
        UserError: CPU time is asked for where it is not that of one thread, or a profile as what it is not.
    """
    if profile and (quick or as_json or cpu_time):
        raise UserError("--profile measures no ratios: leave out --quick, --json and --cpu-time.")
    if threads is not None:
        torch.set_num_threads(threads)
    device = pick_device()
    if cpu_time and (device.type != "cpu" or torch.get_num_threads() != 1):
        raise UserError("--cpu-time counts the seconds of one thread of a CPU: add --threads 1, and hide the GPU.")
    console = Console(highlight=False, stderr=as_json, width=None if sys.stdout.isatty() else 140)
    with _quiet(), backbone_of(backbone) as (cfg, found):
        table = token_table(task, found.config)
        batches = epoch_batches(len(table), cfg.training.batch_size, 0, 0)[:-1]
        course = Workload(cfg, found, table, batches, device, time.thread_time if cpu_time else time.perf_counter)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        console.print(
            f"{backbone}, lengths of {task}, batches of {cfg.training.batch_size}; {where}, "
            f"{torch.get_num_threads()} threads, {'CPU' if cpu_time else 'wall-clock'} time, "
            f"torch {torch.__version__}{load}"
        )
        if profile:
            for lanes in (1, _AT_ONCE[device.type]):
                milliseconds, shares = profile_step(course, lanes)
                console.print(f"a step of our LoRA, lanes: {lanes}, {milliseconds:.0f} ms")
                for name, share in shares:
                    console.print(f"  {100 * share:5.1f} %  {name}", markup=False)
            return 0
        result = run_bench(course, quick, lambda text: console.print(f"  {text}"))
    if as_json:
        for ratio in result.ratios:
            print(json.dumps(asdict(ratio)), flush=True)
    _show(result, device.type, console)
    return 0


def _show(result: Result, device: str, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column()
    for title in ("ratio", "95 % interval", "target", ""):
        table.add_column(title, justify="right")
    for r in result.ratios:
        sign = "≥" if r.name in AT_LEAST else "≤"
        meaning = _MEANING[r.name].format(at_once=_AT_ONCE[device])
        table.add_row(
            f"{r.name}: {meaning}",
            f"{r.ratio:.4g}",
            f"{r.low:.4g} to {r.high:.4g}",
            f"{sign} {r.target:g}",
            "met" if r.met else "MISSED",
        )
    console.print(table)
    for text in result.notes:
        console.print(text)
    control = next(r for r in result.ratios if r.name == "aa_control")
    if not control.met:
        console.print(
            f"The control is off by {100 * abs(control.ratio - 1):.2f} %, more than 0.5 %: this machine was not calm "
            "enough, and the ratios near 1 above say nothing. Measure again with nothing else running."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        enable_progress_bar()
        logger.setLevel(level)
