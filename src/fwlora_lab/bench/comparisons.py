"""The comparisons that the bench makes: which cases train side by side, and which ratios come out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fwlora_lab.bench.cases import LaneCase, PeftLoop, Roofline, TrainerBaseline
from fwlora_lab.bench.measure import BenchCase, Result, interval, judge, measure
from fwlora_lab.bench.workload import NEVER, WHOLE, K, Workload
from fwlora_lab.training.device import cpu_has_bf16

SECONDS = {False: 600.0, True: 130.0}  # of measuring, by --quick; loading comes on top
COMPARED_LANES = {"cpu": 4, "cuda": 16}  # the lanes whose cost is compared with one lane's

Cases = Mapping[str, BenchCase]
Times = Mapping[str, np.ndarray]


@dataclass
class Summary:
    """Ratios and notes so far, and what later comparisons need of earlier ones.

    best_lanes: the number of lanes at which a run costs least; per_run: seconds of a run in that many lanes, as a share
    of its seconds in one, by block.
    """

    device: str
    result: Result = field(default_factory=Result)
    best_lanes: int = 1
    per_run: np.ndarray = field(default_factory=lambda: np.ones(1))
    last_ratios: list[tuple[str, np.ndarray]] = field(default_factory=list)
    _generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, name: str, *terms: np.ndarray) -> None:
        """Judge the product of the terms' medians against the target of that name."""
        self.result.ratios.append(judge(name, *interval(terms, self._generator), self.device))

    def note(self, text: str, *terms: np.ndarray, unit: str = "") -> None:
        """Report a figure that has no target."""
        center, low, high = interval(terms, self._generator)
        self.result.notes.append(f"{text}: {center:.4g}{unit} ({low:.4g} to {high:.4g})")


@dataclass(frozen=True)
class Comparison:
    """Cases that train side by side on the same batches.

    share: of the measuring time; size: batches a block; least: blocks at least; cases: made only when they are
    measured, so that memory holds one comparison at a time; summarize: what is read from their seconds.
    """

    title: str
    share: float
    size: int
    least: int
    cases: Callable[[], Cases]
    summarize: Callable[[Summary, Times, Cases], None]


def run_bench(workload: Workload, quick: bool, report: Callable[[str], object]) -> Result:
    """Measure all comparisons, one after another; `report` gets a line for each."""
    summary = Summary(workload.device.type)
    for comparison in comparisons(workload, quick):
        gc.collect()
        began = time.perf_counter()
        cases = comparison.cases()
        seconds = comparison.share * SECONDS[quick]
        times = measure(cases, workload.batches, comparison.size, seconds, comparison.least)
        blocks, took = len(next(iter(times.values()))), time.perf_counter() - began
        examples = workload.cfg.training.batch_size
        report(f"{comparison.title}: {blocks} blocks of {comparison.size} x {examples} examples, {took:.0f} s")
        comparison.summarize(summary, times, cases)
        del cases
    return summary.result


def comparisons(workload: Workload, quick: bool) -> list[Comparison]:
    """What is compared, in order; `quick` leaves out PEFT's AdaLoRA and most numbers of lanes."""
    return [
        _penalty(workload),
        _attach(workload, quick),
        _adalora(workload, quick),
        _lanes(workload, quick),
        _trainer(workload, quick),
        _grouped_trainer(workload, quick),
    ]


def _penalty(workload: Workload) -> Comparison:
    def cases() -> Cases:
        return {
            "lora": LaneCase(workload),
            "control": LaneCase(workload),
            "penalty": LaneCase(workload, "fw_lora"),
            "warmup": LaneCase(workload, "fw_lora", warmup=NEVER - 1),
        }

    def summarize(summary: Summary, times: Times, _: Cases) -> None:
        lora, part = times["lora"], K / WHOLE
        summary.add("aa_control", times["control"] / lora)
        summary.add("penalty_steady", times["penalty"] / lora)
        summary.add("penalty_whole_run", (part * times["warmup"] + (1 - part) * times["penalty"]) / lora)
        summary.note("a step of our LoRA, one lane", 1e3 * lora, unit=" ms")
        summary.note("a step of the warm-up / LoRA, ours, sketch", times["warmup"] / lora)

    return Comparison("ours, warm-up and penalty", 0.36, 1, 3, cases, summarize)


def _attach(workload: Workload, quick: bool) -> Comparison:
    def cases() -> Cases:
        control = {} if quick else {"control": PeftLoop(workload)}
        return {"lora": PeftLoop(workload), "attach": PeftLoop(workload, "fw_lora"), **control}

    def summarize(summary: Summary, times: Times, _: Cases) -> None:
        lora = times["lora"]
        summary.add("attach_steady", times["attach"] / lora)
        summary.note("a step of plain PEFT LoRA, batches padded to their longest", 1e3 * lora, unit=" ms")
        if not quick:
            summary.note("plain PEFT LoRA / plain PEFT LoRA", times["control"] / lora)

    return Comparison("plain PEFT", 0.18, 1, 2 if quick else 3, cases, summarize)


def _adalora(workload: Workload, quick: bool) -> Comparison:
    def cases() -> Cases:
        pefts = {} if quick else {"plain": PeftLoop(workload), "peft": PeftLoop(workload, "adalora")}
        return {"lora": LaneCase(workload), "adalora": LaneCase(workload, "adalora"), **pefts}

    def summarize(summary: Summary, times: Times, _: Cases) -> None:
        summary.add("adalora_over_lora", times["adalora"] / times["lora"])
        if not quick:
            summary.note("PEFT's AdaLoRA / PEFT's LoRA, plain loop", times["peft"] / times["plain"])
            summary.note("PEFT's LoRA, plain loop / ours, one lane", times["plain"] / times["lora"])
            summary.note("PEFT's AdaLoRA, plain loop / ours, one lane", times["peft"] / times["adalora"])

    return Comparison("AdaLoRA", 0.12, 1, 2 if quick else 3, cases, summarize)


def _lanes(workload: Workload, quick: bool) -> Comparison:
    compared = COMPARED_LANES[workload.device.type]
    counts = [1, compared] if quick else [1, 4, 8, 16]
    size = max(counts)
    with_half = not quick and workload.device.type == "cpu" and cpu_has_bf16()

    def cases() -> Cases:
        half = {"half": LaneCase(workload, lanes=compared, half=True)} if with_half else {}
        lanes = {str(count): LaneCase(workload, lanes=count) for count in counts}
        return {**lanes, "roofline": Roofline(workload), **half}

    def summarize(summary: Summary, times: Times, cases: Cases) -> None:
        # Seconds for the same batches: what a step of n lanes costs is n times as much as its share.
        per_run = {count: times[str(count)] / times["1"] for count in counts}
        best = min(counts, key=lambda count: float(np.median(per_run[count])))
        summary.best_lanes, summary.per_run = best, per_run[best]
        for count in counts:
            summary.note(f"a run in {count} lanes / a run in one", per_run[count])
            summary.note(
                f"share of the best matrix product's rate, {count} lanes", times["roofline"] / times[str(count)]
            )
            case = cases[str(count)]
            assert isinstance(case, LaneCase)
            memory = case.memory(workload.batches) / 2**20
            summary.result.notes.append(
                f"memory of a training step, {count} lanes: {memory:.0f} MiB a lane, the frozen encoder apart"
            )
        if with_half:
            text = f"a step with the encoder in bf16 / in fp32, {compared} lanes"
            summary.note(text, times["half"] / times[str(compared)])
        roofline, few = cases["roofline"], workload.batches[:size]
        assert isinstance(roofline, Roofline)
        rate = 1e-9 * workload.flops(few) / roofline.train(few)
        shape = "x".join(map(str, roofline.shape))
        summary.result.notes.append(f"best matrix product: {shape}, {rate:.0f} GFLOP/s")
        # Judged after the Trainer's, so that the table keeps its order.
        summary.last_ratios = [
            ("lanes_cost", compared * per_run[compared]),
            ("matmul_share", times["roofline"] / times[str(best)]),
        ]

    return Comparison("lanes", 0.16, size, 2 if quick else 3, cases, summarize)


def _trainer(workload: Workload, quick: bool) -> Comparison:
    def cases() -> Cases:
        return {"ours": LaneCase(workload), "trainer": TrainerBaseline(workload)}

    def summarize(summary: Summary, times: Times, _: Cases) -> None:
        ratio = times["trainer"] / times["ours"]
        summary.add("usual_over_ours_one_lane", ratio)
        summary.add("usual_over_ours_best", ratio, 1 / summary.per_run)
        for name, values in summary.last_ratios:
            summary.add(name, values)
        summary.result.notes.append(f"best number of lanes: {summary.best_lanes}")

    return Comparison("Trainer, padded", 0.10, 1, 1 if quick else 2, cases, summarize)


def _grouped_trainer(workload: Workload, quick: bool) -> Comparison:
    def cases() -> Cases:
        return {"ours": LaneCase(workload), "grouped": TrainerBaseline(workload, grouped=True)}

    def summarize(summary: Summary, times: Times, _: Cases) -> None:
        text = "Trainer + PEFT, length-grouped, padded to the longest / ours, one lane"
        summary.note(text, times["grouped"] / times["ours"])

    batches_grouped = 4 if quick else 50  # the Trainer groups among so many
    return Comparison("length-grouped Trainer", 0.08, batches_grouped, 1, cases, summarize)
