"""Whether means are inside or outside their regions, decided for a whole family of claims at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fwlora_lab.analysis import statistics
from fwlora_lab.analysis.intervals import Interval, undefined_reason

State = Literal["holds", "fails", "undecided"]
Region = tuple[float, float]  # from the lowest to the highest value, either may be infinite


@dataclass(frozen=True)
class Decision:
    """Whether one mean is in its region.

    Attributes:
        p: Holm's adjusted p-value; None if the sample has no test.
        level: of the t interval from which the state can be read: inside the region, outside, or across its border.
    """

    state: State
    p: float | None
    level: float


def decide(samples: Sequence[np.ndarray | None], regions: Sequence[Region], alpha: float = 0.05) -> list[Decision]:
    """Decide for the mean of each of `samples` [n] whether it is in its region, as one family.

    A claim's p-value is twice the one-sided p of its weaker border ("holds") or of its better crossed one ("fails"):
    p < α exactly if the t interval of level 1 − α is inside or outside. Holm's method takes the claims in the order of
    their p-values, the k-th of K at α/(K − k + 1), and stops at the first that is not decided. A sample without a test
    (None, or one without a spread) is a member of the family.
    """
    tests = [None if v is None or undefined_reason(v) else _test(v, r) for v, r in zip(samples, regions, strict=True)]
    adjusted = statistics.holm([None if test is None else test[0] for test in tests])
    order = sorted((test[0], i) for i, test in enumerate(tests) if test is not None)
    size = len(samples)
    first_open = next((k for k, (_, i) in enumerate(order) if (adjusted[i] or 0) >= alpha), len(order))
    ranks = {i: min(k, first_open) for k, (_, i) in enumerate(order)}
    decisions = []
    for i, test in enumerate(tests):
        p = adjusted[i]
        level = 1 - alpha / (size - ranks.get(i, min(first_open, size - 1)))
        state: State = test[1] if test is not None and p is not None and p < alpha else "undecided"
        decisions.append(Decision(state, p, level))
    return decisions


def _test(values: np.ndarray, region: Region) -> tuple[float, State]:
    """Two-sided p-value, and the state that it speaks for."""
    holds = 2 * statistics.t_within(values, *region)
    fails = 2 * statistics.t_outside(values, *region)
    return min(1.0, holds, fails), "holds" if holds < fails else "fails"


def state_of(interval: Interval, region: Region) -> State:
    """The state that an interval shows: inside the region, outside, or across its border."""
    low, high = region
    if low < interval.low and interval.high < high:
        return "holds"
    return "fails" if interval.high < low or interval.low > high else "undecided"
