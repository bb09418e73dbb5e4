"""Paired statistics: by hand, against scipy and scikit-learn, and their coverage by simulation.

pytest tests/fwlora_lab/analysis/test_statistics.py
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score, matthews_corrcoef

from fwlora_lab.analysis import resampling, statistics

DRAWS = 2000
TRUE_COVERAGE = pytest.approx(0.95, abs=0.02)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def scores(a, b) -> dict[str, dict[int, float]]:
    return {"new": dict(enumerate(a)), "old": dict(enumerate(b))}


# one sample


def test_summary_keeps_every_seed_and_is_scipys():
    values = [0.61, 0.55, 0.58, 0.6]
    found = statistics.summarize({"lora": {3: 0.55, 1: 0.61, 7: 0.6, 5: 0.58}})["lora"]
    assert list(found.by_seed) == [1, 3, 5, 7] and found.n == 4 and found.undefined_reason is None
    assert found.mean == pytest.approx(0.585) and found.sd == pytest.approx(np.std(values, ddof=1))
    low, high = scipy.stats.t.interval(0.95, 3, loc=0.585, scale=scipy.stats.sem(values))
    assert found.interval == pytest.approx((low, high, 0.95))


@pytest.mark.parametrize("null", [0.0, 0.4, -2.0])
def test_t_is_scipys(null):
    values = rng().normal(0.3, 1, 7)
    assert statistics.t_test(values, null) == pytest.approx(scipy.stats.ttest_1samp(values, null).pvalue)
    want = scipy.stats.ttest_1samp(values, null, alternative="greater").pvalue
    assert statistics.t_above(values, null) == pytest.approx(want)


def test_sign_flip_by_hand():
    # Of the 8 patterns of (1, 2, 4), only +++ and --- reach |7|; +++, ---, -++ and +-- reach 5.
    assert statistics.sign_flip(np.array([1.0, 2.0, 4.0]), rng()) == statistics.SignFlip(2 / 8, True, 2 / 8)
    assert statistics.sign_flip(np.array([-1.0, 2.0, 4.0]), rng()).p == 4 / 8
    assert statistics.sign_flip(np.array([0.0, 0.0, 0.0]), rng()).p == 1.0
    assert statistics.sign_flip(np.array([11.0, 12.0, 14.0]), rng(), null=10.0).p == 2 / 8
    # Sums of equal size that rounding makes unequal still tie.
    assert statistics.sign_flip(np.array([0.1, 0.2, 0.3, 0.3]), rng()).p == 2 / 16


def test_sign_flip_with_many_seeds_is_near_the_exact_one():
    values = rng(3).normal(0.6, 1, 15)
    patterns = (1.0 - 2 * (np.arange(2**15)[:, None] >> np.arange(15) & 1)) @ values
    exact = (np.abs(patterns) >= abs(values.sum()) - 1e-12).mean()
    drawn = statistics.sign_flip(values, rng(), draws=20_000)
    assert not drawn.exact and drawn.p == pytest.approx(exact, abs=0.015) and 0.02 < exact < 0.8
    assert drawn == statistics.sign_flip(values, rng(), draws=20_000), "the same generator, the same p"
    sure = statistics.sign_flip(2 + rng().normal(0, 0.1, 18), rng(), draws=999)
    assert sure.p == sure.smallest == 1 / 1000, "a p-value from draws is never 0"


def test_hedges_correction_is_unbiased():
    draws = rng(1).normal(0.8, 1, (4000, 5))
    plain = draws.mean(axis=1) / draws.std(axis=1, ddof=1)
    corrected = np.array([statistics.hedges_g(row) for row in draws])
    assert corrected.mean() == pytest.approx(0.8, abs=0.03) and plain.mean() > 0.95
    # ν = 2: Γ(1) / (1 · Γ(1/2)) = 1/√π
    assert statistics.hedges_g(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / math.sqrt(math.pi))
    assert statistics.hedges_g(np.array([1.0, 2.0])) is None


def test_equivalence_is_the_90_percent_interval_within_the_margins():
    for values in rng(2).normal(0.2, 1, (40, 9)):
        low, high, _ = statistics.t_interval(values, 0.9)
        margin = 0.9
        assert (statistics.t_within(values, -margin, margin) < 0.05) == (-margin < low and high < margin)
        assert (statistics.t_within(values, -margin, math.inf) < 0.05) == (low > -margin)
    lower = scipy.stats.ttest_1samp(values, -0.9, alternative="greater").pvalue
    upper = scipy.stats.ttest_1samp(values, 0.9, alternative="less").pvalue
    assert statistics.t_within(values, -0.9, 0.9) == pytest.approx(max(lower, upper))
    assert statistics.t_within(values, -0.9, math.inf) == pytest.approx(lower) and lower != pytest.approx(upper)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []
    # What was planned and cannot be computed counts in the family.
    assert statistics.holm([0.01, None, 0.02]) == [pytest.approx(0.03), None, pytest.approx(0.04)]


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 34), (0.8, 15), (1.0, 10), (0.2, 199)])
def test_seeds_needed_is_the_textbooks(effect, seeds):
    assert statistics.seeds_needed(1.0, effect) == seeds
    assert statistics.seeds_needed(0.02, 0.02 * effect) == seeds, "only distance over spread matters"


def test_seeds_needed_reaches_its_power():
    n = statistics.seeds_needed(1.0, 1.2, 1.2)  # both borders of an equivalence test
    assert n is not None and n > (statistics.seeds_needed(1.0, 1.2) or 0)
    for size, enough in ((n, True), (n - 1, False)):
        draws = rng(4).normal(0, 1, (20_000, size))
        half = scipy.stats.t.ppf(0.975, size - 1) * draws.std(axis=1, ddof=1) / math.sqrt(size)
        power = ((draws.mean(axis=1) - half > -1.2) & (draws.mean(axis=1) + half < 1.2)).mean()
        assert (power >= 0.79) if enough else (power < 0.805)
    assert statistics.seeds_needed(1.0, 1.2, alpha=0.005) > statistics.seeds_needed(1.0, 1.2)  # type: ignore[operator]


def test_no_number_of_seeds_is_none():
    assert statistics.seeds_needed(1.0, 0.001) is None
    assert statistics.seeds_needed(1.0, 0.0) is None
    assert statistics.seeds_needed(0.0, 1.0) is None
    assert statistics.seeds_needed(1.0) is None


# pairs


def test_compare_pairs_by_seed_and_knows_which_is_the_reference():
    table = {"new": {1: 0.9, 2: 0.8, 3: 0.95, 9: 0.1}, "old": {3: 0.85, 1: 0.7, 2: 0.75, 4: 0.2}}
    found = statistics.compare(table, "new", "old", rng())
    assert found.differences == pytest.approx({1: 0.2, 2: 0.05, 3: 0.1}) and found.n == 3
    paired = scipy.stats.ttest_rel([0.9, 0.8, 0.95], [0.7, 0.75, 0.85])
    assert found.p == pytest.approx(paired.pvalue)
    assert found.interval == pytest.approx((*paired.confidence_interval(0.95), 0.95))
    assert found.mean == pytest.approx(0.35 / 3) and found.undefined_reason is None
    assert found.sign_flip == statistics.SignFlip(0.25, True, 0.25)
    back = statistics.compare(table, "old", "new", rng())
    assert back.mean == pytest.approx(-0.35 / 3) and back.hedges_g == pytest.approx(-found.hedges_g)


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ([], [], "no seed"),
        ([0.9], [0.8], "one seed only"),
        ([0.9, 0.8, 0.3], [0.8, 0.7, 0.2], "all 3 seeds are equal"),  # 0.1, 0.1 and 0.1, but for rounding
        ([0.5, 0.5], [0.5, 0.5], "all 2 seeds are equal"),
    ],
)
def test_nothing_pretends_to_know(a, b, why):
    found = statistics.compare(scores(a, b), "new", "old", rng())
    assert why in (found.undefined_reason or "")
    assert [found.interval, found.p, found.sign_flip, found.hedges_g, found.two_way] == [None] * 5
    assert statistics.summarize({"one": {0: 0.3}})["one"].interval is None
    assert statistics.summarize({"one": {0: 0.3}})["one"].sd is None
    with pytest.raises(ValueError, match="no test of the mean"):
        statistics.t_test(np.array(a) - np.array(b))


def test_ratio_is_the_geometric_mean():
    found = statistics.ratio(scores([2.0, 8.0], [1.0, 1.0]), "new", "old")
    assert found.mean == pytest.approx(4.0) and found.ratios == pytest.approx({0: 2.0, 1: 8.0})
    noise = rng(5).normal(math.log(1.12), 0.03, 8)
    found = statistics.ratio(scores(np.exp(noise) * 60, np.full(8, 60.0)), "new", "old")
    low, high = scipy.stats.t.interval(0.95, 7, loc=noise.mean(), scale=scipy.stats.sem(noise))
    assert found.interval == pytest.approx((math.exp(low), math.exp(high), 0.95)) and found.n == 8
    one = statistics.ratio(scores([2.0], [1.0]), "new", "old")
    assert (one.mean, one.interval, one.p) == (2.0, None, None) and "1 independent measurement" in (
        one.undefined_reason or ""
    )
    with pytest.raises(ValueError, match="must be positive"):
        statistics.ratio(scores([1.0, 0.0], [1.0, 1.0]), "new", "old")


# seeds and examples


def predictions(metric, labels, a, b) -> resampling.Predictions:
    return resampling.Predictions(metric, labels, {"new": dict(enumerate(a)), "old": dict(enumerate(b))})


@pytest.mark.parametrize(
    ("metric", "official"),
    [
        ("accuracy", lambda y, p: (y == p).mean()),
        ("matthews_correlation", matthews_corrcoef),
        ("f1", lambda y, p: f1_score(y, p, zero_division=0)),
        ("pearson", lambda y, p: 0.0 if np.ptp(p) == 0 else scipy.stats.pearsonr(y, p)[0]),
    ],
)
def test_resampled_metrics_are_the_official_ones(metric, official):
    generator = rng(6)
    labels = (generator.random(60) < 0.7).astype(int)
    predicted = np.where(generator.random((5, 60)) < 0.8, labels, 1 - labels)
    predicted[1] = 1  # one run predicts one class only
    if metric == "pearson":
        labels, predicted = labels + generator.normal(0, 1, 60), predicted + generator.normal(0, 0.5, (5, 60))
        predicted[1] = 3.0
    features, value = resampling._metric(metric)
    for take in (np.arange(60), generator.integers(60, size=60), generator.integers(60, size=60)):
        found = value(features(predicted, labels)[:, take].mean(axis=1))
        np.testing.assert_allclose(found, [official(labels[take], p[take]) for p in predicted], atol=1e-12)


def test_two_way_estimates_the_difference_and_honours_its_generator():
    generator = rng(7)
    labels = generator.integers(2, size=90)
    a = np.where(generator.random((6, 90)) < 0.9, labels, 1 - labels)
    b = np.where(generator.random((6, 90)) < 0.7, labels, 1 - labels)
    both = predictions("matthews_correlation", labels, a, b)
    found = resampling.two_way(both, "new", "old", range(6), rng(), draws=600)
    want = np.mean([matthews_corrcoef(labels, p) - matthews_corrcoef(labels, q) for p, q in zip(a, b, strict=True)])
    assert found is not None and found.estimate == pytest.approx(want) and len(found.shape) == 600
    low, high, level = found.interval(0.95)
    assert 0 < low < found.estimate < high and level == 0.95
    assert found.interval(0.99).low < low and found.interval(0.99).high > high
    again = resampling.two_way(both, "new", "old", range(6), rng(), draws=600)
    assert again is not None and np.array_equal(again.shape, found.shape)
    back = resampling.two_way(both, "old", "new", range(6), rng(), draws=600)
    assert back is not None and back.estimate == pytest.approx(-want)
    own = resampling.two_way(both, "new", None, range(6), rng(), draws=600)
    assert own is not None and own.estimate == pytest.approx(np.mean([matthews_corrcoef(labels, p) for p in a]))
    compared = statistics.compare(scores(a.mean(1), b.mean(1)), "new", "old", rng(), both)
    assert compared.two_way is not None


def test_two_way_without_spread_or_predictions_is_none():
    labels = np.array([0, 1, 1, 0])
    right = np.tile(labels, (3, 1))
    both = predictions("accuracy", labels, right, 1 - right)
    assert resampling.two_way(both, "new", "old", range(3), rng(), 50) is None, "no spread"
    noisy = predictions("accuracy", labels, right, rng(1).integers(2, size=(3, 4)))
    assert resampling.two_way(noisy, "new", "old", range(3), rng(), 50) is not None
    assert resampling.two_way(noisy, "new", "old", [0], rng(), 50) is None, "one seed"
    assert resampling.two_way(noisy, "new", "old", range(4), rng(), 50) is None, "seed 3 left no predictions"
    assert resampling.two_way(noisy, "new", "absent", range(3), rng(), 50) is None
    with pytest.raises(ValueError, match="spearmanr cannot be resampled"):
        resampling.two_way(predictions("spearmanr", labels, right, right), "new", "old", range(3), rng(), 50)
    with pytest.raises(ValueError, match="classes 0 and 1"):
        resampling.two_way(predictions("f1", labels, right + 1, right), "new", "old", range(3), rng(), 50)
    assert resampling.can_be_resampled("accuracy", 3) and not resampling.can_be_resampled("matthews_correlation", 3)


def test_two_way_variance_is_that_of_the_random_effects_model():
    """Unbiased where the model has all three components; a bare bootstrap would be a factor off."""
    generator = rng(8)
    n, m, by_row, by_column, by_cell = 5, 20, 0.3, 0.6, 1.0
    found = []
    for _ in range(DRAWS):
        rows, columns = generator.normal(0, by_row, (n, 1)), generator.normal(0, by_column, m)
        found.append(resampling._two_way_variance(rows + columns + generator.normal(0, by_cell, (n, m)))[0])
    true = by_row**2 / n + by_column**2 / m + by_cell**2 / (n * m)
    assert np.mean(found) == pytest.approx(true, rel=0.05)


# coverage


@pytest.mark.parametrize("effect", [0.0, 0.012])
@pytest.mark.parametrize("n", [2, 10])
def test_coverage_of_the_paired_interval(effect, n):
    """Paired scores whose seeds share a disturbance that is larger than the effect."""
    generator = rng(n)
    shared = generator.normal(0, 0.03, (DRAWS, n))
    a = 0.55 + effect + shared + generator.normal(0, 0.01, (DRAWS, n))
    b = 0.55 + shared + generator.normal(0, 0.015, (DRAWS, n))
    intervals = [statistics.t_interval(row) for row in a - b]
    assert np.mean([i.low < effect < i.high for i in intervals]) == TRUE_COVERAGE
    misses = np.mean([statistics.t_test(row, effect) < 0.05 for row in a - b])
    assert misses == pytest.approx(0.05, abs=0.02)


def test_false_positives_of_the_sign_flip_test():
    draws = rng(9).laplace(0, 1, (DRAWS, 8))  # the test needs symmetry, not a normal distribution
    p = np.array([statistics.sign_flip(row, rng()).p for row in draws])
    assert 0.03 <= (p <= 0.05).mean() <= 0.06
    assert min(p) == 2 / 2**8


def test_coverage_of_the_ratio_of_seconds():
    generator = rng(10)
    machine = generator.lognormal(4, 0.3, (DRAWS, 6))  # a busy machine slows both runs of a pair
    a, b = machine * 1.12 * generator.lognormal(0, 0.04, (DRAWS, 6)), machine * generator.lognormal(0, 0.04, (DRAWS, 6))
    found = [statistics.ratio(scores(x, y), "new", "old").interval for x, y in zip(a, b, strict=True)]
    assert np.mean([i is not None and i.low < 1.12 < i.high for i in found]) == TRUE_COVERAGE


def simulated(generator, metric, shifts, n, m, by_seed):
    """Predictions of two methods whose true metrics, over other seeds and examples, `true_metric` knows.

    A run is right where shift + (seed) + (example) + (example x method) + noise > 0, all normal.
    """
    labels = (generator.random(m) < 0.65).astype(int)
    difficulty = generator.normal(0, 0.8, m)
    outputs = []
    for shift in shifts:
        right = shift + difficulty + generator.normal(0, 0.35, m)
        right = right + generator.normal(0, by_seed, (n, 1)) + generator.normal(0, 0.5, (n, m))
        outputs.append(np.where(right > 0, labels, 1 - labels))
    return predictions(metric, labels, *outputs)


def true_metric(metric, shift, by_seed):
    """The mean over seeds of the metric on endlessly many examples, 65 % of them of class 1."""
    rest = math.sqrt(0.8**2 + 0.35**2 + 0.5**2)
    seed, weight = np.polynomial.hermite_e.hermegauss(40)
    right = scipy.stats.norm.cdf((shift + by_seed * seed) / rest)
    positive = 0.65 * right + 0.35 * (1 - right)
    matthews = 0.65 * (right - positive) / np.sqrt(0.65 * 0.35 * positive * (1 - positive))
    return weight @ (right if metric == "accuracy" else matthews) / weight.sum()


def two_way_coverage(metric, shifts, n, m, by_seed, draws):
    generator = rng(sum(map(ord, metric)) + n)
    true = true_metric(metric, shifts[0], by_seed) - true_metric(metric, shifts[1], by_seed)
    assert (true == 0) == (shifts[0] == shifts[1])
    covered = 0
    for _ in range(draws):
        both = simulated(generator, metric, shifts, n, m, by_seed)
        found = resampling.two_way(both, "new", "old", range(n), generator, 150)
        assert found is not None
        low, high, _ = found.interval()
        covered += low < true < high
    return covered / draws


@pytest.mark.parametrize(
    ("metric", "shifts", "n", "m"),
    [
        ("accuracy", (0.9, 0.9), 6, 90),
        ("accuracy", (1.1, 0.8), 10, 80),
        ("matthews_correlation", (0.7, 0.7), 6, 90),
        ("matthews_correlation", (0.9, 0.6), 6, 90),
    ],
)
def test_coverage_of_the_two_way_interval(metric, shifts, n, m):
    """Of the difference for other seeds and other examples, on a known null and a known effect."""
    assert two_way_coverage(metric, shifts, n, m, 0.25, DRAWS) == TRUE_COVERAGE


def test_the_two_way_interval_errs_on_the_wide_side():
    """Where seeds do not differ at all and there are few of everything, it covers more than it says, but not all."""
    assert 0.94 <= two_way_coverage("matthews_correlation", (0.9, 0.6), 5, 60, 0.0, 500) <= 0.99


def test_every_pattern_of_signs_is_tried_once():
    values = rng(11).normal(0.5, 1, 9)
    sums = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=9)]
    assert statistics.sign_flip(values, rng()).p == np.mean(np.array(sums) >= abs(values.sum()) - 1e-9)
