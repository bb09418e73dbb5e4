"""From the scores of paired runs to differences, intervals and the number of seeds that would tell more.

Scores of one task and one budget have the shape `scores[method][seed]`: a fraction (accuracy, Matthews) or seconds.
Runs of two methods with the same seed are a pair: same head, same order of the data. What a sample cannot tell (one
seed, or no spread at all) is None, and `why` says so; it never becomes a number. All randomness comes from the
`np.random.Generator` that the caller passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

Scores = Mapping[str, Mapping[int, float]]

_EXACT = 14  # up to so many pairs all 2^n signs are tried
_CHUNK = 512  # resamples that are held at once


class Interval(NamedTuple):
    """A two-sided confidence interval and its nominal coverage."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Summary:
    """One method's scores: `seeds[seed]`, their mean and standard deviation (n − 1), the t interval of the mean."""

    seeds: dict[int, float]
    mean: float | None
    sd: float | None
    interval: Interval | None
    why: str | None

    @property
    def n(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class SignFlip:
    """Two-sided p-value, and the smallest one that this many pairs could give."""

    p: float
    exact: bool
    smallest: float


@dataclass(frozen=True, eq=False)
class TwoWay:
    """A difference with the uncertainty of drawing other seeds and other examples.

    `se` and `df` are those of the two-way random-effects model, `shape` the bootstrap distribution with mean 0 and
    variance 1; `interval` puts them together.
    """

    estimate: float
    se: float
    df: float
    shape: np.ndarray

    def interval(self, level: float = 0.95) -> Interval:
        """The bootstrap's percentiles, widened to `se` and from the normal to Student's quantile."""
        tail = (1 - level) / 2
        scale = self.se * special.stdtrit(self.df, 1 - tail) / special.ndtri(1 - tail)
        low, high = np.quantile(self.shape, [tail, 1 - tail])
        return Interval(float(self.estimate + scale * low), float(self.estimate + scale * high), level)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Every run's predictions: `outputs[method][seed]` [m] (a class or a regression's value), `labels` [m]."""

    metric: str
    labels: np.ndarray
    outputs: Mapping[str, Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class Comparison:
    """A method against the reference: `differences[seed]` = method − reference, and what they say.

    `p` is the paired t-test's. `hedges_g` is the paired Cohen's d_z with the small-sample correction. `two_way` is None
    where predictions are missing as well.
    """

    method: str
    reference: str
    differences: dict[int, float]
    mean: float | None
    sd: float | None
    interval: Interval | None
    p: float | None
    sign_flip: SignFlip | None
    hedges_g: float | None
    two_way: Interval | None
    why: str | None

    @property
    def n(self) -> int:
        return len(self.differences)


@dataclass(frozen=True)
class Ratio:
    """Seconds of a method over those of the reference: `ratios[seed]`, geometric mean, t interval on the logarithms."""

    method: str
    reference: str
    ratios: dict[int, float]
    mean: float | None
    interval: Interval | None
    p: float | None
    why: str | None

    @property
    def n(self) -> int:
        return len(self.ratios)


# one sample


def why_silent(values: np.ndarray) -> str | None:
    """Why a sample [n] cannot say how uncertain its mean is; None where it can."""
    if len(values) == 0:
        return "no seed"
    if len(values) == 1:
        return "one seed only: its spread is unknown"
    # Differences that should be equal differ by rounding.
    if np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return f"all {len(values)} seeds are equal: their spread is unknown"
    return None


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval of the mean of `values` [n], n ≥ 2: x̄ ± t_{n−1} · s/√n."""
    mean, se, df = _moments(values)
    half = special.stdtrit(df, (1 + level) / 2) * se
    return Interval(float(mean - half), float(mean + half), level)


def t_above(values: np.ndarray, bound: float) -> float:
    """One-sided p-value of "the mean is at most `bound`" against "it is above", `values` [n], n ≥ 2."""
    mean, se, df = _moments(values)
    return float(special.stdtr(df, (bound - mean) / se))


def t_test(values: np.ndarray, null: float = 0.0) -> float:
    """Two-sided p-value of Student's test of the mean of `values` [n], n ≥ 2; of differences it is the paired t."""
    above = t_above(values, null)
    return 2 * min(above, 1 - above)


def sign_flip(values: np.ndarray, rng: np.random.Generator, null: float = 0.0, draws: int = 10_000) -> SignFlip:
    """Test whether differences `values` [n] are symmetric about `null`: by all 2ⁿ signs, for many seeds by `draws`.

    p is the share of sign patterns whose |mean| reaches the observed one; a Monte-Carlo p counts the observed pattern
    as one more draw (Phipson and Smyth 2010), so that it is never 0.
    """
    shifted = np.asarray(values, dtype=np.float64) - null
    n = len(shifted)
    observed = abs(shifted.sum())
    reach = observed - 1e-9 * max(float(np.abs(shifted).sum()), 1e-300)  # sums in another order differ by rounding
    if n <= _EXACT:
        signs = 1.0 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        p = float((np.abs(signs @ shifted) >= reach).mean())
        return SignFlip(p, True, min(1.0, 2.0 ** (1 - n)))
    signs = 1.0 - 2 * rng.integers(2, size=(draws, n))
    hits = int((np.abs(signs @ shifted) >= reach).sum())
    return SignFlip((hits + 1) / (draws + 1), False, max(2.0 ** (1 - n), 1 / (draws + 1)))


def hedges_g(differences: np.ndarray) -> float | None:
    """Paired Cohen's d_z = d̄/s of `differences` [n] times Hedges' correction Γ(ν/2) / (√(ν/2) Γ((ν−1)/2)), ν = n − 1.

    None below three pairs, where the correction does not exist.
    """
    df = len(differences) - 1
    if df < 2 or why_silent(differences):
        return None
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)
    return float(np.mean(differences) / np.std(differences, ddof=1) * correction)


def equivalence(differences: np.ndarray, margin: float) -> float:
    """TOST: p-value of "the mean of `differences` [n] lies outside ±`margin`" (Schuirmann 1987), n ≥ 2.

    Below α exactly where the interval of level 1 − 2α lies within the margins.
    """
    return max(t_above(differences, -margin), t_above(-np.asarray(differences), -margin))


def non_inferiority(differences: np.ndarray, margin: float) -> float:
    """One-sided p-value of "the mean of `differences` [n] (higher is better) is −`margin` or worse", n ≥ 2."""
    return t_above(differences, -margin)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in the order given; with them the whole family errs with probability α at most.

    A None was planned but cannot be computed: it stays None and counts as a member of the family.
    """
    adjusted: list[float | None] = list(p_values)
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def seeds_needed(sd: float, *distances: float, alpha: float = 0.05, power: float = 0.8, most: int = 1000) -> int | None:
    """Seeds that Student's test (two-sided `alpha`) needs to tell the mean from bounds at these `distances` from it.

    Power from the noncentral t; with several bounds, as in an equivalence test, all have to be told from the mean
    (Bonferroni's bound on the chance that one is not). `sd` is that of a single (paired) difference. None where more
    than `most` seeds would be needed, or no number of them.
    """
    if not distances or min(distances) <= 0 or sd <= 0:
        return None

    def enough(n: int) -> bool:
        critical = special.stdtrit(n - 1, 1 - alpha / 2)
        # Chances that are 0 to every digit come back as NaN.
        missed = np.nan_to_num([special.nctdtr(n - 1, d / sd * math.sqrt(n), critical) for d in distances])
        return bool(1 - missed.sum() >= power)

    if not enough(most):
        return None
    low, high = 1, most  # `high` is enough, `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# two samples with the same seeds


def paired(scores: Scores, method: str, reference: str) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """The seeds that both have in `scores[method][seed]`, ascending [n], and both methods' scores in that order."""
    a, b = scores.get(method, {}), scores.get(reference, {})
    seeds = tuple(sorted(a.keys() & b.keys()))
    return seeds, np.array([a[s] for s in seeds], dtype=float), np.array([b[s] for s in seeds], dtype=float)


def summarize(scores: Scores, level: float = 0.95) -> dict[str, Summary]:
    """Mean, standard deviation and every seed of each method in `scores[method][seed]`."""
    return {method: _summary(by_seed, level) for method, by_seed in scores.items()}


def compare(
    scores: Scores,
    method: str,
    reference: str,
    rng: np.random.Generator,
    predictions: Predictions | None = None,
    level: float = 0.95,
    draws: int = 10_000,
) -> Comparison:
    """Everything about the paired differences method − reference of `scores[method][seed]`."""
    seeds, a, b = paired(scores, method, reference)
    values = a - b
    differences = dict(zip(seeds, values.tolist(), strict=True))
    mean = float(values.mean()) if seeds else None
    why = why_silent(values)
    if why:
        sd = float(values.std(ddof=1)) if len(seeds) > 1 else None
        return Comparison(method, reference, differences, mean, sd, None, None, None, None, None, why)
    both = two_way(predictions, method, reference, seeds, rng, draws) if predictions is not None else None
    return Comparison(
        method=method,
        reference=reference,
        differences=differences,
        mean=mean,
        sd=float(values.std(ddof=1)),
        interval=t_interval(values, level),
        p=t_test(values),
        sign_flip=sign_flip(values, rng, draws=draws),
        hedges_g=hedges_g(values),
        two_way=both.interval(level) if both is not None else None,
        why=None,
    )


def ratio(seconds: Scores, method: str, reference: str, level: float = 0.95) -> Ratio:
    """Paired ratios of `seconds[method][seed]`, all positive: exp of the mean and of the t interval of log a/b."""
    seeds, a, b = paired(seconds, method, reference)
    if (a <= 0).any() or (b <= 0).any():
        raise ValueError(f"seconds of {method} and {reference} must be positive to be divided")
    logs = np.log(a / b)
    ratios = dict(zip(seeds, (a / b).tolist(), strict=True))
    mean = float(np.exp(logs.mean())) if seeds else None
    why = why_silent(logs)
    if why:
        return Ratio(method, reference, ratios, mean, None, None, why)
    low, high, _ = t_interval(logs, level)
    return Ratio(method, reference, ratios, mean, Interval(math.exp(low), math.exp(high), level), t_test(logs), None)


# seeds and examples


def two_way(
    predictions: Predictions,
    method: str,
    reference: str | None,
    seeds: Sequence[int],
    rng: np.random.Generator,
    draws: int = 10_000,
) -> TwoWay | None:
    """Bootstrap over seeds and examples at once of the mean over `seeds` of metric(method) − metric(reference).

    Each resample draws seeds and, apart from them, examples, and computes the metric anew from its sums (for Matthews
    the confusion counts). Drawn like this the noise of single cells counts three times (Owen 2007, "The pigeonhole
    bootstrap"), and a few seeds' spread is too small: so the distribution is rescaled to the unbiased two-way variance
    (MS_seeds + MS_examples − MS_cells)/(n·m) of the jackknife pseudo-values, with Satterthwaite's degrees of freedom.
    Components of variance are kept from going below 0, so that with few examples and seeds that hardly differ the
    interval is too wide rather than too narrow. Without a reference it is the method's own metric. None where a run's
    predictions are missing, or where seeds or examples show no spread.

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
    return TwoWay(float(whole.mean()), math.sqrt(variance), df, (drawn - drawn.mean()) / spread)


def can_be_resampled(metric: str, classes: int) -> bool:
    """Whether `two_way` knows this metric for so many classes (1 for a regression)."""
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
    """Variance of the mean of `values` [n, m] over other rows and columns, and its degrees of freedom."""
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
    both, p, y = means[..., 0], means[..., 1], means[..., 2]  # with 1 they give the four confusion counts
    return _correlation(both - p * y, p * (1 - p) * y * (1 - y))


def _pearson_features(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    x, y = _standardised(predicted), np.broadcast_to(_standardised(labels), predicted.shape)
    return np.stack([x, y, x * y, x * x, y * y], axis=-1)


def _pearson(means: np.ndarray) -> np.ndarray:
    x, y, xy, xx, yy = np.moveaxis(means, -1, 0)
    return _correlation(xy - x * y, np.clip(xx - x * x, 0, None) * np.clip(yy - y * y, 0, None))


def _correlation(covariance: np.ndarray, variances: np.ndarray) -> np.ndarray:
    # Constant predictions predict nothing: 0, as in the official score.
    some = variances > 1e-12
    return np.where(some, covariance / np.sqrt(np.where(some, variances, 1.0)), 0.0)


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


def _metric(name: str):
    if name not in _METRICS:
        raise ValueError(f"{name} cannot be resampled from sums over examples; {', '.join(_METRICS)} can")
    return _METRICS[name]


def _moments(values: np.ndarray) -> tuple[float, float, int]:
    values = np.asarray(values, dtype=float)
    why = why_silent(values)
    if why:
        raise ValueError(f"no test of the mean: {why}")
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)), len(values) - 1


def _summary(by_seed: Mapping[int, float], level: float) -> Summary:
    seeds = {seed: float(by_seed[seed]) for seed in sorted(by_seed)}
    values = np.array(list(seeds.values()))
    why = why_silent(values)
    mean = float(values.mean()) if seeds else None
    sd = float(values.std(ddof=1)) if len(seeds) > 1 else None
    return Summary(seeds, mean, sd, None if why else t_interval(values, level), why)
