"""From the scores of paired runs to differences, intervals and the number of seeds that would tell more.

Scores of one task and one budget have the shape `scores[method][seed]`: a fraction (accuracy, Matthews) or seconds.
Runs of two methods with the same seed are a pair: same head, same order of the data. What a sample cannot tell (one
seed, or no spread at all) is None, and `why` says so; it never becomes a number. All randomness comes from the
`np.random.Generator` that the caller passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from fwlora_lab.analysis.intervals import Interval, undefined_reason
from fwlora_lab.analysis.resampling import Predictions, moments, two_way

Scores = Mapping[str, Mapping[int, float]]
_EXACT = 14  # up to so many pairs all 2^n signs are tried


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
class PairedRatio:
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


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval of the mean of `values` [n], n ≥ 2: x̄ ± t_{n−1} · s/√n."""
    mean, se, df = moments(values)
    half = special.stdtrit(df, (1 + level) / 2) * se
    return Interval(float(mean - half), float(mean + half), level)


def t_above(values: np.ndarray, bound: float) -> float:
    """One-sided p-value of "the mean is at most `bound`" against "it is above", `values` [n], n ≥ 2."""
    mean, se, df = moments(values)
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
    if df < 2 or undefined_reason(differences):
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
    why = undefined_reason(values)
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


def ratio(seconds: Scores, method: str, reference: str, level: float = 0.95) -> PairedRatio:
    """Paired ratios of `seconds[method][seed]`, all positive: exp of the mean and of the t interval of log a/b."""
    seeds, a, b = paired(seconds, method, reference)
    if (a <= 0).any() or (b <= 0).any():
        raise ValueError(f"seconds of {method} and {reference} must be positive to be divided")
    logs = np.log(a / b)
    ratios = dict(zip(seeds, (a / b).tolist(), strict=True))
    mean = float(np.exp(logs.mean())) if seeds else None
    why = undefined_reason(logs)
    if why:
        return PairedRatio(method, reference, ratios, mean, None, None, why)
    low, high, _ = t_interval(logs, level)
    return PairedRatio(
        method, reference, ratios, mean, Interval(math.exp(low), math.exp(high), level), t_test(logs), None
    )


def _summary(by_seed: Mapping[int, float], level: float) -> Summary:
    seeds = {seed: float(by_seed[seed]) for seed in sorted(by_seed)}
    values = np.array(list(seeds.values()))
    why = undefined_reason(values)
    mean = float(values.mean()) if seeds else None
    sd = float(values.std(ddof=1)) if len(seeds) > 1 else None
    return Summary(seeds, mean, sd, None if why else t_interval(values, level), why)
