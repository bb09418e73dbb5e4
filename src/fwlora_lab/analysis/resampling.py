"""Bootstrap over seeds and examples at once: how far a difference would hold for other examples as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from fwlora_lab.analysis.intervals import Interval

_CHUNK = 512  # resamples that are held in memory at once


@dataclass(frozen=True, eq=False)
class TwoWayBootstrap:
    """A difference with its uncertainty over other seeds and other examples.

    Attributes:
        estimate: the observed difference.
        se: its standard error in the two-way random-effects model of seeds and examples.
        df: degrees of freedom of `se`.
        shape: the bootstrap distribution [draws], standardised to mean 0 and variance 1.
    """

    estimate: float
    se: float
    df: float
    shape: np.ndarray

    def interval(self, level: float = 0.95) -> Interval:
        """The percentiles of `shape`, scaled to `se` and by Student's quantile over the normal one."""
        tail = (1 - level) / 2
        scale = self.se * special.stdtrit(self.df, 1 - tail) / special.ndtri(1 - tail)
        low, high = np.quantile(self.shape, [tail, 1 - tail])
        return Interval(float(self.estimate + scale * low), float(self.estimate + scale * high), level)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of all runs of one task and budget.

    Attributes:
        metric: the metric that they are scored by.
        labels: [m], the same for all runs.
        outputs: `outputs[method][seed]` [m], classes or, for a regression, values.
    """

    metric: str
    labels: np.ndarray
    outputs: Mapping[str, Mapping[int, np.ndarray]]


def two_way(
    predictions: Predictions,
    method: str,
    reference: str | None,
    seeds: Sequence[int],
    rng: np.random.Generator,
    draws: int = 10_000,
) -> TwoWayBootstrap | None:
    """Bootstrap the mean over `seeds` of metric(method) − metric(reference) over seeds and examples at once.

    Each resample draws seeds and, independently, examples, and computes the metric from its sums over examples (for
    Matthews the confusion counts). Such resamples count the noise of single seed-example cells three times (Owen 2007,
    "The pigeonhole bootstrap"), and the spread of a few seeds is too small. So the distribution is rescaled to the
    unbiased two-way variance (MS_seeds + MS_examples − MS_cells)/(n·m) of the jackknife pseudo-values, with
    Satterthwaite's degrees of freedom. Components of variance below 0 are set to 0, so that with few examples and
    seeds that hardly differ the interval is too wide rather than too narrow.

    Args:
        reference: None resamples the method's own metric.
        draws: number of resamples.

    Returns:
        None if a run's predictions are missing, or if seeds or examples have no spread.

    Raises:
        ValueError: the metric cannot be resampled, or is Matthews or F1 of other labels than 0 and 1.
    """
    names = [method] if reference is None else [method, reference]
    outputs = [[predictions.outputs.get(name, {}).get(seed) for seed in seeds] for name in names]
    found = [[o for o in row if o is not None] for row in outputs]
    if len(seeds) < 2 or len(predictions.labels) < 2 or any(len(row) < len(seeds) for row in found):
        return None
    features, value = _metric(predictions.metric)
    sums = np.stack([features(np.stack(row), predictions.labels) for row in found])  # [methods, n, m, k]
    n, m = sums.shape[1:3]

    def contrast(means: np.ndarray) -> np.ndarray:  # [methods, ..., k] -> [...]
        values = value(means)
        return values[0] if reference is None else values[0] - values[1]

    whole = contrast(sums.mean(axis=2))  # [n]
    total = sums.sum(axis=2, keepdims=True)
    without = contrast((total - sums) / (m - 1))  # [n, m]: each example left out
    variance, df = _two_way_variance(m * whole[:, None] - (m - 1) * without)
    if not variance > 0:
        return None
    drawn = _resample(sums, contrast, rng, draws)
    spread = drawn.std()
    if not spread > 1e-12:
        return None
    return TwoWayBootstrap(float(whole.mean()), math.sqrt(variance), df, (drawn - drawn.mean()) / spread)


def can_be_resampled(metric: str, classes: int) -> bool:
    """Whether `two_way` can resample this metric for this number of classes (1 for a regression)."""
    return metric in _METRICS and (classes == 2 or metric not in ("matthews_correlation", "f1"))


def _resample(
    sums: np.ndarray, contrast: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator, draws: int
) -> np.ndarray:
    methods, n, m, k = sums.shape
    flat = np.ascontiguousarray(sums.transpose(2, 0, 1, 3)).reshape(m, -1)
    drawn = []
    for start in range(0, draws, _CHUNK):
        rows = min(_CHUNK, draws - start)
        examples = rng.integers(m, size=(rows, m)) + m * np.arange(rows)[:, None]
        weights = np.bincount(examples.ravel(), minlength=rows * m).reshape(rows, m) / m
        by_seed = contrast((weights @ flat).reshape(rows, methods, n, k).swapaxes(0, 1))  # [rows, n]
        seeds = rng.integers(n, size=(rows, n))
        drawn.append(np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1))
    return np.concatenate(drawn)


def _two_way_variance(values: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of `values` [n, m] over random rows and columns, and its degrees of freedom."""
    n, m = values.shape
    centred = values - values.mean()
    rows, columns = centred.mean(axis=1), centred.mean(axis=0)
    ms_rows = m * float(rows @ rows) / (n - 1)
    ms_columns = n * float(columns @ columns) / (m - 1)
    rest = centred - rows[:, None] - columns
    ms_rest = float((rest**2).sum()) / ((n - 1) * (m - 1))
    # A component of variance is not negative.
    ms_rows, ms_columns = max(ms_rows, ms_rest), max(ms_columns, ms_rest)
    total = ms_rows + ms_columns - ms_rest
    if total <= 1e-15:
        return 0.0, 0.0
    parts = ms_rows**2 / (n - 1) + ms_columns**2 / (m - 1) + ms_rest**2 / ((n - 1) * (m - 1))
    return total / (n * m), max(total**2 / parts, n - 1.0)


def _accuracy_features(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (predicted == labels)[..., None].astype(float)


def _accuracy(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def _f1_features(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    p, y = _binary(predicted), np.broadcast_to(_binary(labels), predicted.shape)
    return np.stack([p * y, p + y], axis=-1)


def _f1(means: np.ndarray) -> np.ndarray:
    return np.divide(2 * means[..., 0], means[..., 1], out=np.zeros(means.shape[:-1]), where=means[..., 1] > 0)


def _matthews_features(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    p, y = _binary(predicted), np.broadcast_to(_binary(labels), predicted.shape)
    return np.stack([p * y, p, y], axis=-1)


def _matthews(means: np.ndarray) -> np.ndarray:
    # The four cells of the confusion matrix follow from these three means.
    both, p, y = means[..., 0], means[..., 1], means[..., 2]
    return _correlation(both - p * y, p * (1 - p) * y * (1 - y))


def _pearson_features(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    x, y = _standardised(predicted), np.broadcast_to(_standardised(labels), predicted.shape)
    return np.stack([x, y, x * y, x * x, y * y], axis=-1)


def _pearson(means: np.ndarray) -> np.ndarray:
    x, y, xy, xx, yy = np.moveaxis(means, -1, 0)
    return _correlation(xy - x * y, np.clip(xx - x * x, 0, None) * np.clip(yy - y * y, 0, None))


def _correlation(covariance: np.ndarray, variances: np.ndarray) -> np.ndarray:
    # The correlation of constant predictions is undefined; the official scores give 0.
    defined = variances > 1e-12
    return np.where(defined, covariance / np.sqrt(np.where(defined, variances, 1.0)), 0.0)


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = centred.std(axis=-1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros(centred.shape), where=spread > 1e-12)


def _binary(values: np.ndarray) -> np.ndarray:
    if not np.isin(values, (0, 1)).all():
        raise ValueError("matthews_correlation and f1 are resampled for the classes 0 and 1 only")
    return values.astype(float)


_METRICS = {
    "accuracy": (_accuracy_features, _accuracy),
    "f1": (_f1_features, _f1),
    "matthews_correlation": (_matthews_features, _matthews),
    "pearson": (_pearson_features, _pearson),
}


def _metric(name: str) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """The metric as a function of means over examples: features of predictions and labels, value of their means."""
    if name not in _METRICS:
        raise ValueError(f"{name} cannot be resampled from sums over examples; {', '.join(_METRICS)} can")
    return _METRICS[name]
