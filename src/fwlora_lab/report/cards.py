"""Verdicts as the page shows them: numbers in words, and a line with the claim's region and the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fwlora_lab.analysis.claims import Claim
from fwlora_lab.analysis.results import seeds_text
from fwlora_lab.analysis.study import Analysis
from fwlora_lab.analysis.verdicts import Verdict
from fwlora_lab.report.formatting import interval_text, minus, p_value, scaled

_ORDER = ("fails", "undecided", "holds")


@dataclass(frozen=True)
class Strip:
    """A claim drawn on a line; all numbers are percent of the line's length.

    Attributes:
        region: where the claim is true, (start, length).
        borders: of the region, each with its label.
        interval: t interval at the nominal level, (start, length).
        family: the interval that decides, (start, length).
    """

    region: tuple[float, float]
    borders: list[tuple[float, str]]
    interval: tuple[float, float] | None
    family: tuple[float, float] | None
    estimate: float


@dataclass(frozen=True)
class Card:
    """A verdict with its numbers in words.

    Attributes:
        numbers: by what they are.
        strip: None without an estimate.
        seconds_doubt: why the verdict's seconds may not compare methods; "" if they do, or if it is not about seconds.
    """

    verdict: Verdict
    numbers: dict[str, str]
    strip: Strip | None
    seconds_doubt: str

    @property
    def text(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in self.numbers.items())


def losses_first(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Claims that fail, then undecided ones, then those that hold."""
    return sorted(verdicts, key=lambda verdict: _ORDER.index(verdict.state))


def cards(analysis: Analysis) -> list[Card]:
    """The verdicts, losses first."""
    return [
        _card(v, analysis.seconds_doubt if v.claim.is_ratio and v.n else "") for v in losses_first(analysis.verdicts)
    ]


def _unit(claim: Claim) -> tuple[float, str, Callable[[float], str]]:
    """The factor from a claim's θ to the number that is shown, its unit, and how such a number is written."""
    if claim.is_ratio:
        return 1.0, f"× {claim.reference}", lambda v: f"{v:.3f}"
    if claim.is_time:
        return 1.0, "s", lambda v: minus(f"{v:.4g}")
    return 100.0, "points", lambda v: minus(f"{v:{'+' if claim.reference else ''}.2f}")


def _card(v: Verdict, seconds_doubt: str) -> Card:
    factor, unit, show = _unit(v.claim)
    numbers = {}
    if v.estimate is not None:
        numbers["estimate"] = f"{show(factor * v.estimate)} {unit}"
    for name, interval in (
        ("{:.4g} % interval", v.interval),
        ("Holm’s {:.4g} % interval", v.family_interval),
        ("over seeds and examples ({:.4g} %)", v.two_way_interval),
    ):
        if interval is not None:
            ends = interval_text(interval, lambda value: show(factor * value))
            numbers[name.format(100 * interval.level)] = f"{ends} {unit}"
    if v.p is not None:
        numbers["p, Holm"] = p_value(v.p)
    if v.measurements is not None and v.n:
        numbers["independent measurements"] = str(v.measurements)
    numbers["seeds"] = f"{v.n} ({seeds_text(v.seeds).split(' ', 1)[1]})" if v.n else "none"
    return Card(v, numbers, _strip(v, factor, show), seconds_doubt)


def _strip(v: Verdict, factor: float, show: Callable[[float], str]) -> Strip | None:
    if v.estimate is None:
        return None
    estimate = factor * v.estimate
    interval, family = scaled(v.interval, factor), scaled(v.family_interval, factor)
    low, high = (factor * border for border in v.claim.region)
    borders = [b for b in (low, high) if math.isfinite(b)]
    shown = [estimate, *borders, *(interval or ()), *(family or ())]
    margin = 0.08 * (max(shown) - min(shown)) or 0.05 * abs(estimate) or 1.0
    left, right = min(shown) - margin, max(shown) + margin

    def at(value: float) -> float:
        return round(100 * (min(max(value, left), right) - left) / (right - left), 2)

    def part(ends: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if ends is None else (at(ends[0]), round(at(ends[1]) - at(ends[0]), 2))

    region = (at(low), round(at(high) - at(low), 2))
    return Strip(region, [(at(b), show(b)) for b in borders], part(interval), part(family), at(estimate))
