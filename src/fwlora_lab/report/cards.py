"""TODO"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fwlora_lab.analysis import claims, verdicts
from fwlora_lab.analysis.read import seeds_text
from fwlora_lab.analysis.study import Analysis
from fwlora_lab.report.formatting import minus, p_value, scaled_entry, span


@dataclass(frozen=True)
class Strip:
    """A claim on a line, in percent of its length: region and intervals (start, length), borders and estimate."""

    region: tuple[float, float]
    borders: list[tuple[float, str]]
    interval: tuple[float, float] | None
    family: tuple[float, float] | None
    estimate: float


@dataclass(frozen=True)
class Card:
    """A verdict in words; `doubt` says why its seconds may not compare."""

    verdict: verdicts.Verdict
    numbers: dict[str, str]
    strip: Strip | None
    doubt: str

    @property
    def text(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in self.numbers.items())


def cards(analysis: Analysis) -> list[Card]:
    """The verdicts, losses first."""
    order = ("fails", "undecided", "holds")
    found = sorted(analysis.verdicts, key=lambda v: order.index(v.state))
    return [_card(v, analysis.seconds_doubt if v.claim.is_ratio and v.n else "") for v in found]


def _unit(claim: claims.Claim) -> tuple[float, str, Callable[[float], str]]:
    """The factor from a claim's θ to what is shown, the unit, and how a number is written."""
    if claim.is_ratio:
        return 1.0, f"× {claim.reference}", lambda v: f"{v:.3f}"
    if claim.is_time:
        return 1.0, "s", lambda v: minus(f"{v:.4g}")
    return 100.0, "points", lambda v: minus(f"{v:{'+' if claim.reference else ''}.2f}")


def _card(v: verdicts.Verdict, doubt: str) -> Card:
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
            told = span(interval, lambda value: show(factor * value))
            numbers[name.format(100 * interval.level)] = f"{told} {unit}"
    if v.p is not None:
        numbers["p, Holm"] = p_value(v.p)
    numbers["seeds"] = f"{v.n} ({seeds_text(v.seeds).split(' ', 1)[1]})" if v.n else "none"
    return Card(v, numbers, _strip(v, factor, show), doubt)


def _strip(v: verdicts.Verdict, factor: float, show: Callable[[float], str]) -> Strip | None:
    if v.estimate is None:
        return None
    estimate, interval, family = (
        factor * v.estimate,
        scaled_entry(v.interval, factor),
        scaled_entry(v.family_interval, factor),
    )
    low, high = (factor * border for border in v.claim.region)
    borders = [b for b in (low, high) if math.isfinite(b)]
    seen = [estimate, *borders, *(interval or ()), *(family or ())]
    room = 0.08 * (max(seen) - min(seen)) or 0.05 * abs(estimate) or 1.0
    left, right = min(seen) - room, max(seen) + room

    def at(value: float) -> float:
        return round(100 * (min(max(value, left), right) - left) / (right - left), 2)

    def part(ends: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if ends is None else (at(ends[0]), round(at(ends[1]) - at(ends[0]), 2))

    region = (at(low), round(at(high) - at(low), 2))
    return Strip(region, [(at(b), show(b)) for b in borders], part(interval), part(family), at(estimate))
