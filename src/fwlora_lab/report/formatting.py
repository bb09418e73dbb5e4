"""Numbers as they are shown: points, seconds, ratios, p-values, intervals; "–" for a number that there is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fwlora_lab.analysis.intervals import Interval

# Names of the kinds of seconds: those that ratios are of, and the parts of a run.
SECONDS_OF = {
    "train_seconds": "training",
    "fisher_step_seconds": "a step of the Fisher phase",
    "steady_step_seconds": "a steady step",
    "eval_seconds": "evaluation",
}
PHASES = {"warmup_seconds": "Fisher phase", "steady_seconds": "steady steps", "eval_seconds": "evaluation"}


def minus(text: str) -> str:
    """The text with the minus sign of typography in place of hyphens."""
    return text.replace("-", "−")


def points(value: float | None, signed: bool = False) -> str:
    """A fraction in points (hundredths), with two decimals."""
    return "–" if value is None else minus(f"{100 * value:{'+' if signed else ''}.2f}")


def signed_points(value: float | None) -> str:
    """The same for a difference, with its sign."""
    return points(value, signed=True)


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def interval_text(interval: Interval | None, show: Callable[[float], str]) -> str:
    """Both ends, each as `show` writes it."""
    return "–" if interval is None else f"{show(interval.low)} to {show(interval.high)}"


def scaled(interval: Interval | None, factor: float) -> tuple[float, float] | None:
    """Both ends times `factor`, such as 100 for points."""
    return None if interval is None else (factor * interval.low, factor * interval.high)


def words(name: str) -> str:
    """The name of a metric or key as it is shown: `matthews_correlation` as "matthews correlation"."""
    return name.replace("_", " ")


def seeds_argument(seeds: Sequence[int]) -> str:
    """Seeds as the command line takes them: 0..5, or 0,2,7."""
    first, last = min(seeds), max(seeds)
    is_range = len(seeds) > 2 and sorted(seeds) == list(range(first, last + 1))
    return f"{first}..{last}" if is_range else ",".join(map(str, seeds))
