"""Seconds count independent measurements: which runs share one, and false verdicts of a method compared with itself.

pytest tests/fwlora_lab/analysis/test_measurements.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import fake_study
import numpy as np
import pytest
import scipy.stats

from fwlora_lab.analysis import statistics
from fwlora_lab.analysis.claims import Claim, read_claims
from fwlora_lab.analysis.group_scores import GroupScores, group_scores
from fwlora_lab.analysis.measurements import cluster_means, clusters, measurements_of
from fwlora_lab.analysis.verdicts import Verdict, judge
from fwlora_lab.records.record import Record

COHORTS = (4, 4, 2)  # ten seeds in four lanes
NAMES = ("a", "b", "c")
KEY = ("cola", 0.2)
COMMAND = "fwlora compare study=mine"
BASE = fake_study.record(fake_study.config(Path("results"), "cola", "lora", engine="lanes"), 0, 0.5)
CLAIM = {
    "metric": "train_seconds",
    "method": "b",
    "reference": "a",
    "relation": "between",
    "margin": [0.99, 1.01],
    "scope": {"task": "cola", "budget": 0.2},
}


def timed(method: str, seed: int, start: float, seconds: float, **change) -> Record:
    """A record that trained from `start` on for `seconds`, in minutes and seconds after the study's beginning."""
    assert BASE.times is not None
    started = fake_study.START + timedelta(minutes=start)
    times = BASE.times.model_copy(update={"train_seconds": seconds, "steady_seconds": seconds})
    fields = dict(run_id=f"cola-0.2-{method}", seed=seed, started=started, times=times)
    return BASE.model_copy(update=fields | {"finished": started + timedelta(seconds=seconds)} | change)


def in_cohorts(noise: np.ndarray, named: bool = True) -> dict[str, list[Record]]:
    """A/A: one method under three names, seeds in cohorts that share lanes; exp(noise[name, cohort]) minutes each."""
    runs: dict[str, list[Record]] = {name: [] for name in NAMES}
    seed = 0
    for cohort, size in enumerate(COHORTS):
        for name, own in zip(NAMES, noise, strict=True):
            start = 60.0 * (3 * cohort + NAMES.index(name))
            seconds = 60.0 * math.exp(own[cohort])
            measurement = f"{name} {cohort}" if named else None
            runs[name] += [timed(name, seed + i, start, seconds, measurement=measurement) for i in range(size)]
        seed += size
    return runs


def a_a_claims() -> tuple[Claim, ...]:
    return read_claims([CLAIM], "claims")


def verdict_of(group: GroupScores, command: str = COMMAND) -> Verdict:
    (found,) = judge(a_a_claims(), {KEY: group}, command, np.random.default_rng(0), draws=10)
    return found


def one_each(runs: Mapping[str, Sequence[Record]]) -> list[list[int]]:
    """The seeds of each measurement of method "a"."""
    return sorted(list(own) for own in clusters(range(10), ["a"], measurements_of(runs)))


def test_runs_that_trained_together_are_one_measurement():
    noise = np.random.default_rng(1).normal(0, 0.3, (3, 3))
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert one_each(in_cohorts(noise)) == expected
    # Records from before the field: what trained at the same time on one machine, in lanes or in several processes.
    old = in_cohorts(noise, named=False)
    assert one_each(old) == expected
    peft = {name: [r.model_copy(update={"engine": "peft"}) for r in records] for name, records in old.items()}
    assert one_each(peft) == expected
    # Equal shares of the same steps are equal to every digit, whatever the clock on the wall says.
    later = [timed("a", seed, 60.0 * seed, 61.5 if seed < 3 else 60.0 + seed) for seed in range(10)]
    assert one_each({"a": later}) == [[0, 1, 2], *([seed] for seed in range(3, 10))]
    other_machine = BASE.machine.model_copy(update={"cpu": "another processor"})
    elsewhere = [timed("a", s, 0.0, 60.0 + s, machine=other_machine if s else BASE.machine) for s in (0, 1)]
    assert len(set(measurements_of({"a": elsewhere})["a"].values())) == 2


def test_a_run_timed_alone_is_a_measurement_and_one_call_of_a_process_is_one():
    alone = [timed("a", seed, 60.0 * seed, 60.0 + seed, measurement=f"m{seed}") for seed in range(10)]
    assert one_each({"a": alone}) == [[seed] for seed in range(10)]
    one_call = [record.model_copy(update={"measurement": "m"}) for record in alone]
    assert one_each({"a": one_call}) == [list(range(10))]


def test_a_pair_is_independent_only_if_neither_method_shares_its_measurement():
    shared = {"a": {0: "x", 1: "x", 2: "y", 3: "z"}, "b": {0: "p", 1: "q", 2: "q", 3: "r"}}
    assert clusters(range(4), ["a"], shared) == ((0, 1), (2,), (3,))
    assert clusters(range(4), ["a", "b"], shared) == ((0, 1, 2), (3,))
    assert clusters(range(3), ["a"], {}) == ((0,), (1,), (2,))
    means = cluster_means(range(4), np.array([1.0, 2.0, 6.0, 5.0]), ["a", "b"], shared)
    assert means.tolist() == [3.0, 5.0]


def test_the_interval_of_seconds_is_students_over_measurements():
    noise = np.random.default_rng(3).normal(0, 0.3, (3, 3))
    group = group_scores(in_cohorts(noise))
    logs = noise[1] - noise[0]
    low, high = scipy.stats.t.interval(0.95, 2, loc=logs.mean(), scale=scipy.stats.sem(logs))
    found = verdict_of(group)
    assert found.interval == pytest.approx((math.exp(low), math.exp(high), 0.95))
    assert (found.n, found.measurements, found.state) == (10, 3, "undecided")
    assert found.estimate == pytest.approx(math.exp(logs.mean()))
    ratio = statistics.ratio(group.by_metric["train_seconds"], "b", "a", 0.95, group.measurements)
    assert ratio.interval == pytest.approx((math.exp(low), math.exp(high), 0.95))
    assert (ratio.n, ratio.measurements, ratio.mean) == (10, 3, pytest.approx(math.exp(logs.mean())))


def test_too_few_measurements_decide_nothing_and_say_what_does():
    noise = np.array([[0.0, 0.0, 0.0], [1.0, 1.001, 1.002], [0.0, 0.0, 0.0]])  # b is e times slower: no doubt about it
    runs = in_cohorts(noise)
    assert verdict_of(group_scores(runs)).state == "fails"
    fewer = {name: records[:8] for name, records in runs.items()}
    found = verdict_of(group_scores(fewer))
    assert (found.state, found.measurements, found.interval, found.p) == ("undecided", 2, None, None)
    assert found.estimate == pytest.approx(math.exp(1.0005))
    assert "2 independent measurements of seconds only (8 seeds, which shared lanes" in found.reason
    assert found.command == f"{COMMAND} seeds=0..15 timing=exclusive"
    assert verdict_of(group_scores(fewer), f"{COMMAND} timing=exclusive").command == (
        f"{COMMAND} timing=exclusive seeds=0..15"
    )
    ratio = statistics.ratio(
        group_scores(fewer).by_metric["train_seconds"], "b", "a", 0.95, group_scores(fewer).measurements
    )
    assert ratio.interval is None and ratio.p is None and "2 independent measurements" in (ratio.undefined_reason or "")


def test_an_open_claim_about_seconds_asks_for_measurements_and_seeds_timed_alone():
    noise = np.array([[0.0, 0.0, 0.0], [0.1, 0.25, 0.15], [0.0, 0.0, 0.0]])
    found = verdict_of(group_scores(in_cohorts(noise)))
    assert found.state == "undecided" and found.seeds_needed is not None
    assert f"about {found.seeds_needed} independent measurements decide it" in found.reason
    # Three measurements are there in ten seeds; every further seed is one.
    assert found.command == f"{COMMAND} seeds=0..{10 + found.seeds_needed - 3 - 1} timing=exclusive"


def wrong_verdicts(studies: int, clustered: bool) -> int:
    """How many of so many A/A studies fail the claim that b takes as long as a, which is true."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(studies):
        group = group_scores(in_cohorts(generator.normal(0, 0.25, (3, 3))))
        wrong += verdict_of(group if clustered else replace(group, measurements={})).state == "fails"
    return wrong


def test_a_method_compared_with_itself_fails_in_at_most_5_percent():
    studies = 200
    # The most that a true rate of 5 % gives in 97.5 % of all such tests.
    most = int(scipy.stats.binom.ppf(0.975, studies, 0.05))
    assert wrong_verdicts(studies, clustered=True) <= most
    # Seeds counted as if each had been timed by itself: the mistake that this module is there to prevent.
    assert wrong_verdicts(studies, clustered=False) > 0.25 * studies
