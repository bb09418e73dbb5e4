"""Statistics of paired runs: means, differences, intervals, tests, effect sizes, and how many seeds a test needs.

Scores of one task and one budget have the form `scores[method][seed]`: a fraction (accuracy, Matthews) or seconds.
Runs of two methods with the same seed are a pair: they start from the same head and see the data in the same order.
What is undefined for a sample (one seed, or no spread) is None, and `undefined_reason` says why; it never becomes a
number. All randomness comes from the `np.random.Generator` that the caller passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from fwlora_lab.analysis.intervals import Interval, undefined_reason
from fwlora_lab.analysis.measurements import Measurements, cluster_means, too_few
from fwlora_lab.analysis.resampling import Predictions, two_way

Scores = Mapping[str, Mapping[int, float]]
_EXACT_PAIRS = 14  # up to this many pairs the sign-flip test tries all 2^n signs


@dataclass(frozen=True)
class Summary:
    """One method's scores.

    Attributes:
        by_seed: the score of each seed.
        mean: None without a seed.
        sd: standard deviation (n − 1); None below two seeds.
        interval: Student's t interval of the mean.
        undefined_reason: why there is no interval.
    """

    by_seed: dict[int, float]
    mean: float | None
    sd: float | None
    interval: Interval | None
    undefined_reason: str | None

    @property
    def n(self) -> int:
        return len(self.by_seed)


@dataclass(frozen=True)
class SignFlip:
    """A sign-flip test.

    Attributes:
        p: two-sided p-value.
        exact: whether all sign patterns were tried, and not a random sample of them.
        smallest: the smallest p-value that this many pairs can have.
    """

    p: float
    exact: bool
    smallest: float


@dataclass(frozen=True)
class Comparison:
    """A method compared with the reference by paired differences of scores.

    Attributes:
        differences: method − reference for each seed that both have.
        mean: of the differences; None without a pair.
        sd: standard deviation (n − 1); None below two pairs.
        interval: Student's t interval of the mean.
        p: two-sided p-value of the paired t-test.
        sign_flip: a test that does not assume normality.
        hedges_g: paired Cohen's d_z with Hedges' small-sample correction; None below three pairs.
        two_way: interval over seeds and examples at once; None also if predictions are missing.
        undefined_reason: why interval, tests and effect size are None.
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
    undefined_reason: str | None

    @property
    def n(self) -> int:
        return len(self.differences)


@dataclass(frozen=True)
class PairedRatio:
    """Seconds of a method divided by those of the reference.

    Attributes:
        ratios: method / reference for each seed that both have.
        measurements: how many of the ratios are independent: seeds that trained together share one measurement.
        mean: geometric mean over measurements; None without a pair.
        interval: t interval of the logarithms' mean over measurements, as ratios.
        p: two-sided p-value of the t-test of the logarithms.
        undefined_reason: why interval and p are None.
    """

    method: str
    reference: str
    ratios: dict[int, float]
    measurements: int
    mean: float | None
    interval: Interval | None
    p: float | None
    undefined_reason: str | None

    @property
    def n(self) -> int:
        return len(self.ratios)


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval of the mean of `values` [n], n ≥ 2: x̄ ± t_{n−1} · s/√n."""
    mean, se, df = _moments(values)
    half = special.stdtrit(df, (1 + level) / 2) * se
    return Interval(float(mean - half), float(mean + half), level)


def t_above(values: np.ndarray, bound: float) -> float:
    """One-sided p-value of "the mean is at most `bound`" against "it is above", `values` [n], n ≥ 2."""
    mean, se, df = _moments(values)
    return float(special.stdtr(df, (bound - mean) / se))


def t_within(values: np.ndarray, low: float, high: float) -> float:
    """One-sided p-value of "the mean is outside (low, high)" against "it is inside", `values` [n], n ≥ 2.

    With two finite bounds this is TOST (Schuirmann 1987), the test of equivalence: below α exactly if the interval of
    level 1 − 2α is inside. With one of them infinite it is one t-test, such as that of non-inferiority.
    """
    return max(_at_most(values, low), _at_least(values, high))


def t_outside(values: np.ndarray, low: float, high: float) -> float:
    """One-sided p-value of "the mean is inside [low, high]", by the bound that the data contradict most."""
    return min(1 - _at_most(values, low), 1 - _at_least(values, high))


def _at_most(values: np.ndarray, bound: float) -> float:
    """p-value of "the mean is at most `bound`"; 0 for −∞."""
    return 0.0 if bound == -math.inf else t_above(values, bound)


def _at_least(values: np.ndarray, bound: float) -> float:
    """p-value of "the mean is at least `bound`"; 0 for ∞."""
    return 0.0 if bound == math.inf else t_above(-values, -bound)


def t_test(values: np.ndarray, null: float = 0.0) -> float:
    """Two-sided p-value of Student's test of the mean of `values` [n], n ≥ 2; of differences it is the paired t."""
    above = t_above(values, null)
    return 2 * min(above, 1 - above)


def sign_flip(values: np.ndarray, rng: np.random.Generator, null: float = 0.0, draws: int = 10_000) -> SignFlip:
    """Test whether differences `values` [n] are symmetric about `null`.

    p is the share of sign patterns whose |mean| is at least the observed one: of all 2ⁿ, or for many pairs of `draws`
    random ones. A random sample counts the observed pattern as one more draw (Phipson and Smyth 2010), so that p is
    never 0.
    """
    shifted = np.asarray(values, dtype=np.float64) - null
    n = len(shifted)
    observed = abs(shifted.sum())
    reach = observed - 1e-9 * max(float(np.abs(shifted).sum()), 1e-300)  # sums in another order differ by rounding
    if n <= _EXACT_PAIRS:
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
    if df < 2 or undefined_reason(differences):
        return None
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)
    return float(np.mean(differences) / np.std(differences, ddof=1) * correction)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in the given order.

    Rejecting those below α makes any false rejection in the whole family have probability α at most. None stands for a
    comparison that was planned but has no p-value: it stays None and counts as a member of the family.
    """
    adjusted: list[float | None] = list(p_values)
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def seeds_needed(sd: float, *distances: float, alpha: float = 0.05, power: float = 0.8, most: int = 1000) -> int | None:
    """How many seeds Student's test needs to distinguish the mean from all bounds at these `distances` from it.

    The power comes from the noncentral t distribution. With several bounds, as in an equivalence test, the chances of
    missing one are added up (Bonferroni).

    Args:
        sd: standard deviation of one (paired) difference.
        alpha: level of the two-sided test.
        power: chance to distinguish the mean from all bounds.
        most: the largest number that is tried.

    Returns:
        None if more than `most` seeds would be needed, or if no number is enough.
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


def paired(scores: Scores, method: str, reference: str) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """The seeds that both methods have, ascending [n], and their scores in that order: seeds, method's, reference's."""
    a, b = scores.get(method, {}), scores.get(reference, {})
    seeds = tuple(sorted(a.keys() & b.keys()))
    return seeds, np.array([a[s] for s in seeds], dtype=float), np.array([b[s] for s in seeds], dtype=float)


def summarize(scores: Scores, level: float = 0.95) -> dict[str, Summary]:
    """Each method's mean, standard deviation and interval."""
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
    """Compare a method with the reference by the paired differences of their scores.

    Args:
        predictions: of all runs, for the interval over seeds and examples.
        level: of the intervals.
        draws: resamples of the bootstrap, and sign patterns if there are too many to try all.
    """
    seeds, a, b = paired(scores, method, reference)
    values = a - b
    differences = dict(zip(seeds, values.tolist(), strict=True))
    mean = float(values.mean()) if seeds else None
    reason = undefined_reason(values)
    if reason:
        sd = float(values.std(ddof=1)) if len(seeds) > 1 else None
        return Comparison(method, reference, differences, mean, sd, None, None, None, None, None, reason)
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
        undefined_reason=None,
    )


def ratio(
    seconds: Scores, method: str, reference: str, level: float = 0.95, measurements: Measurements | None = None
) -> PairedRatio:
    """Compare the seconds of a method with those of the reference by paired ratios.

    Mean and interval are computed of log(method / reference), averaged within each independent measurement, and
    transformed back.

    Args:
        measurements: which measurement the seconds of a method's seed belong to; None if each seed has its own.

    Raises:
        ValueError: some seconds are not positive.
    """
    seeds, a, b = paired(seconds, method, reference)
    if (a <= 0).any() or (b <= 0).any():
        raise ValueError(f"seconds of {method} and {reference} must be positive to be divided")
    logs = cluster_means(seeds, np.log(a / b), (method, reference), measurements or {})
    ratios = dict(zip(seeds, (a / b).tolist(), strict=True))
    mean = float(np.exp(logs.mean())) if seeds else None
    reason = too_few(len(logs), len(seeds)) or undefined_reason(logs)
    if reason:
        return PairedRatio(method, reference, ratios, len(logs), mean, None, None, reason)
    low, high, _ = t_interval(logs, level)
    interval = Interval(math.exp(low), math.exp(high), level)
    return PairedRatio(method, reference, ratios, len(logs), mean, interval, t_test(logs), None)


def _summary(scores: Mapping[int, float], level: float) -> Summary:
    by_seed = {seed: float(scores[seed]) for seed in sorted(scores)}
    values = np.array(list(by_seed.values()))
    reason = undefined_reason(values)
    mean = float(values.mean()) if by_seed else None
    sd = float(values.std(ddof=1)) if len(by_seed) > 1 else None
    return Summary(by_seed, mean, sd, None if reason else t_interval(values, level), reason)


def _moments(values: np.ndarray) -> tuple[float, float, int]:
    """Mean, standard error and degrees of freedom.

    Raises:
        ValueError: the spread of the values is undefined.
    """
    values = np.asarray(values, dtype=float)
    reason = undefined_reason(values)
    if reason:
        raise ValueError(f"no test of the mean: {reason}")
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)), len(values) - 1
