"""Confidence intervals, and when a sample of seeds is too small or too uniform to have one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A two-sided confidence interval and its nominal coverage."""

    low: float
    high: float
    level: float


def undefined_reason(values: np.ndarray) -> str | None:
    """Why the spread of `values` [n], and so the uncertainty of their mean, is undefined; None if it is defined."""
    if len(values) == 0:
        return "no seed"
    if len(values) == 1:
        return "one seed only: its spread is unknown"
    # Differences that should be equal differ by rounding.
    if np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return f"all {len(values)} seeds are equal: their spread is unknown"
    return None
