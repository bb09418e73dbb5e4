"""How times are measured and judged: blocks of cases in alternating order, ratios with bootstrap intervals, targets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

# The most that a ratio may be, or for the last three the least, by device: CPU and GPU.
AT_MOST = {
    "aa_control": (1.005, 1.005),
    "penalty_steady": (1.005, 1.002),
    "penalty_whole_run": (1.01, 1.005),
    "attach_steady": (1.01, 1.02),
    "adalora_over_lora": (1.15, 1.10),
    "lanes_cost": (3.6, 3.0),
}
AT_LEAST = {
    "usual_over_ours_one_lane": (9.0, 10.0),
    "usual_over_ours_best": (11.0, 30.0),
    "matmul_share": (0.60, 0.30),
}


class BenchCase(Protocol):
    """Trains on whole batches, one optimiser step each, and returns the seconds; `losses` are the last call's."""

    def train(self, batches: Sequence[Tensor]) -> float: ...


@dataclass(frozen=True)
class BenchRatio:
    """One line of the result; `target` bounds it from the side on which it would be bad."""

    name: str
    ratio: float
    low: float
    high: float
    target: float
    met: bool


def order_of(names: Sequence[str], block: int) -> list[str]:
    """A block's order: forwards and then backwards, from a place that moves on."""
    k = block % len(names)
    around = [*names[k:], *names[:k]]
    return around + around[::-1]


def measure(
    cases: Mapping[str, BenchCase], batches: Sequence[Tensor], size: int, seconds: float, least: int = 3
) -> dict[str, np.ndarray]:
    """Seconds by case [blocks], all on the same `size` batches a block; for `seconds`, or `least` blocks."""
    names = list(cases)
    times: dict[str, list[float]] = {name: [] for name in names}
    for case in cases.values():  # what only a first step pays for
        case.train(batches[:size])
    started = time.perf_counter()
    block = 0
    while block < least or (time.perf_counter() - started) * (block + 1) / block < seconds:
        at = block * size % (len(batches) - size + 1)
        mine = batches[at : at + size]
        spent = dict.fromkeys(names, 0.0)
        for name in order_of(names, block):
            spent[name] += cases[name].train(mine) / 2
        for name in names:
            times[name].append(spent[name])
        block += 1
    return {name: np.array(column) for name, column in times.items()}


def interval(
    terms: Sequence[np.ndarray], generator: np.random.Generator, draws: int = 2000
) -> tuple[float, float, float]:
    """The product of the terms' medians over blocks, with its 95 % bootstrap interval; terms are resampled apart."""
    center, spread = 1.0, np.ones(draws)
    for values in terms:
        center *= float(np.median(values))
        spread *= np.median(generator.choice(values, (draws, len(values))), axis=1)
    low, high = np.quantile(spread, [0.025, 0.975])
    return center, float(low), float(high)


def judge(name: str, ratio: float, low: float, high: float, device: str = "cpu") -> BenchRatio:
    """The ratio beside its target."""
    column = 0 if device == "cpu" else 1
    if name in AT_LEAST:
        target = AT_LEAST[name][column]
        return BenchRatio(name, ratio, low, high, target, ratio >= target)
    target = AT_MOST[name][column]
    worst = max(ratio, 1 / ratio) if name == "aa_control" else ratio
    return BenchRatio(name, ratio, low, high, target, worst <= target)


@dataclass
class Result:
    """Ratios by name, and what else a reader wants to know: lines of plain text."""

    ratios: list[BenchRatio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
