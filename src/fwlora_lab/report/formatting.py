"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fwlora_lab.analysis import intervals


class Entry(NamedTuple):
    """A cell of a table: what is shown, and what it is sorted by and copied as."""

    text: str
    value: str | float | int | None


SECONDS_OF = {
    "train_seconds": "training",
    "fisher_step_seconds": "a step of the Fisher phase",
    "steady_step_seconds": "a steady step",
    "eval_seconds": "evaluation",
}
PHASES = {"warmup_seconds": "Fisher phase", "steady_seconds": "steady steps", "eval_seconds": "evaluation"}


def minus(text: str) -> str:
    return text.replace("-", "−")


def points(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else minus(f"{100 * value:{'+' if signed else ''}.2f}")


def signed(value: float | None) -> str:
    return points(value, signed=True)


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def span(interval: intervals.Interval | None, show: Callable[[float], str]) -> str:
    return "–" if interval is None else f"{show(interval.low)} to {show(interval.high)}"


def words(metric: str) -> str:
    return metric.replace("_", " ")


def seeds_word(seeds: Sequence[int]) -> str:
    """Seeds as a command line takes them: 0..5, or 0,2,7."""
    first, last = min(seeds), max(seeds)
    whole = len(seeds) > 2 and sorted(seeds) == list(range(first, last + 1))
    return f"{first}..{last}" if whole else ",".join(map(str, seeds))


def count_entry(value: int | None) -> Entry:
    return Entry("–" if value is None else f"{value:,}", value)


def number_entry(value: float | None, form: str) -> Entry:
    return Entry("–" if value is None else minus(f"{value:{form}}"), value)


def points_entry(value: float | None, show: Callable[[float], str] = points) -> Entry:
    return Entry("–" if value is None else show(value), None if value is None else 100 * value)


def scaled_entry(interval: intervals.Interval | None, factor: float) -> tuple[float, float] | None:
    return None if interval is None else (factor * interval.low, factor * interval.high)
