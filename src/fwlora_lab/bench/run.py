"""`fwlora bench`: what training costs, as ratios with intervals, all cases measured side by side in one process.

Every case trains on the same batches, drawn beforehand with the real lengths of CoLA or SST-2; which word pieces they
hold does not change the time. A block goes through its cases forwards and then backwards (ABBA), each time from the
next case on, so that whatever slows the machine down slows all of them, and no case always follows the same one. A
ratio is taken within each block; the median over blocks is reported with its bootstrap interval. Two equal cases are
the control: the distance of their ratio from 1 is what the measurement can resolve.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from fwlora_lab.bench.cases import LaneCase
from fwlora_lab.bench.comparisons import COMPARED_LANES, run_bench
from fwlora_lab.bench.measure import AT_LEAST, Result
from fwlora_lab.bench.workload import PADDED, WHOLE, K, Workload, backbone_of, token_table
from fwlora_lab.data.tokens import epoch_batches
from fwlora_lab.errors import UserError
from fwlora_lab.records.environment import cpu_name
from fwlora_lab.training.device import pick_device

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


def profile_step(
    workload: Workload, lanes: int, steps: int = 10, most: int = 14
) -> tuple[float, list[tuple[str, float]]]:
    """Milliseconds of a LoRA step of `lanes` runs, and the share of its time that each kind of operation takes."""
    ours = LaneCase(workload, lanes=lanes)
    ours.train(workload.batches[: 2 * lanes])
    mine = workload.batches[: steps * lanes]
    seconds = ours.train(mine)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if workload.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        ours.train(mine)
    own = "self_device_time_total" if workload.device.type == "cuda" else "self_cpu_time_total"
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
        workload = Workload(cfg, found, table, batches, device, time.thread_time if cpu_time else time.perf_counter)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        console.print(
            f"{backbone}, lengths of {task}, batches of {cfg.training.batch_size}; {where}, "
            f"{torch.get_num_threads()} threads, {'CPU' if cpu_time else 'wall-clock'} time, "
            f"torch {torch.__version__}{load}"
        )
        if profile:
            for lanes in (1, COMPARED_LANES[device.type]):
                milliseconds, shares = profile_step(workload, lanes)
                console.print(f"a step of our LoRA, lanes: {lanes}, {milliseconds:.0f} ms")
                for name, share in shares:
                    console.print(f"  {100 * share:5.1f} %  {name}", markup=False)
            return 0
        result = run_bench(workload, quick, lambda text: console.print(f"  {text}"))
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
        meaning = _MEANING[r.name].format(at_once=COMPARED_LANES[device])
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
