"""What the records say about each claim: it holds, it fails, or it is undecided.

A claim says that a quantity is in a region: a paired difference of metrics, a paired ratio of seconds, or a method's
own mean. The interval of the quantity over seeds decides: the claim holds if the interval is inside the region, fails
if it is outside, and is undecided if it crosses the border or does not exist. All claims of a study are one family for
Holm's method.

Metrics count seeds. Seconds count independent measurements (`analysis.measurements`): the values of seeds that trained
together are averaged first, as logarithms where they are ratios, and below three measurements nothing is decided.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fwlora_lab.analysis import statistics
from fwlora_lab.analysis.claims import Claim
from fwlora_lab.analysis.decisions import Decision, Region, State, decide, state_of
from fwlora_lab.analysis.group_scores import GroupScores
from fwlora_lab.analysis.intervals import Interval, undefined_reason
from fwlora_lab.analysis.measurements import cluster_means, too_few
from fwlora_lab.analysis.resampling import TwoWayBootstrap, two_way
from fwlora_lab.text import did_you_mean

ALONE = "timing=exclusive"  # the argument of `fwlora compare` that times each run alone
FIRST_SEEDS = 10  # proposed if the records do not say yet how many seeds are needed


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim. Estimate and intervals are of the claim's θ.

    Attributes:
        seeds: those that the verdict is from.
        estimate: None without a seed.
        interval: t interval of the nominal 95 %; None, as all that follows, if the spread over seeds is unknown.
        family_interval: the interval that decides; it is wider, because many claims are judged at once.
        p: Holm's adjusted p-value of the decision.
        new_examples: the state for other evaluation examples as well; all else is for these examples.
        two_way_interval: over seeds and examples, at the level of `family_interval`; it decides `new_examples`.
        seeds_needed: seeds, or for seconds independent measurements, that decide with 80 % power if the estimate is
            true; None also if the claim is decided.
        command: the command line that trains those seeds.
        reason: for the state, in words.
        measurements: how many independent measurements a verdict about seconds is from; None for other metrics.
        doubts: what a reader should know beside the verdict, as sentences.
    """

    claim: Claim
    state: State
    seeds: tuple[int, ...]
    estimate: float | None
    interval: Interval | None
    family_interval: Interval | None
    p: float | None
    new_examples: State | None
    two_way_interval: Interval | None
    seeds_needed: int | None
    command: str | None
    reason: str
    measurements: int | None = None
    doubts: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, eq=False)
class _Sample:
    """The values whose mean is a claim's θ, and its region; logarithms if θ is a ratio.

    values: one for each seed; for seconds one for each independent measurement.
    unknown_metric: a sentence about a metric that no run recorded; "" if it is known.
    """

    claim: Claim
    scores: GroupScores
    seeds: tuple[int, ...]
    values: np.ndarray
    unknown_metric: str = ""

    @property
    def untested(self) -> str | None:
        """Why the values have no test; None if they have one."""
        if self.claim.is_time and (few := too_few(len(self.values), len(self.seeds))):
            return few
        reason = undefined_reason(self.values)
        return reason.replace("seeds are", "measurements are") if reason and self.claim.is_time else reason

    @property
    def region(self) -> Region:
        return region_tested(self.claim)

    @property
    def estimate(self) -> float | None:
        if not self.seeds:
            return None
        mean = float(self.values.mean())
        return math.exp(mean) if self.claim.is_ratio else mean

    def in_units_of_the_claim(self, interval: Interval) -> Interval:
        if not self.claim.is_ratio:
            return interval
        return Interval(math.exp(interval.low), math.exp(interval.high), interval.level)


def judge(
    claims: Sequence[Claim],
    groups: Mapping[tuple[str, float], GroupScores],
    command: str,
    rng: np.random.Generator,
    alpha: float = 0.05,
    draws: int = 10_000,
) -> list[Verdict]:
    """The verdict of every claim; all claims together are one family.

    With probability 1 − `alpha` or more no verdict is false. A claim without data stays a member of the family, so
    that leaving out runs makes no verdict easier. A claim about a metric that no run recorded cannot be judged: it is
    undecided, and its reason says so.

    Args:
        groups: scores by task and budget.
        command: the command line that trains the study, without its seeds.
        draws: of the bootstrap over seeds and examples.
    """
    samples = [_sample(claim, groups.get((claim.scope.task, claim.scope.budget), GroupScores({}))) for claim in claims]
    decisions = decide([None if s.untested else s.values for s in samples], [s.region for s in samples], alpha)
    bootstraps: dict[tuple, TwoWayBootstrap | None] = {}
    verdicts = []
    for sample, decision in zip(samples, decisions, strict=True):
        claim = sample.claim
        # Claims about the same quantity share its bootstrap.
        quantity = (claim.scope, claim.metric, claim.method, claim.reference)
        if quantity not in bootstraps:
            bootstraps[quantity] = _bootstrap(sample, rng, draws)
        if sample.untested:
            verdict = _without_spread(sample, command)
        else:
            verdict = _decided(sample, decision, bootstraps[quantity], command, alpha)
        verdicts.append(replace(verdict, measurements=len(sample.values)) if claim.is_time else verdict)
    return verdicts


def region_tested(claim: Claim) -> Region:
    """The claim's region on the scale of the test, which is logarithmic for ratios."""
    low, high = claim.region
    if not claim.is_ratio:
        return low, high
    return -math.inf if low <= 0 else math.log(low), math.inf if high == math.inf else math.log(high)


def _sample(claim: Claim, group: GroupScores) -> _Sample:
    if not group.by_metric:
        return _Sample(claim, group, (), np.array([]))
    if claim.metric not in group.by_metric:
        known = sorted(group.by_metric)
        unknown = (
            f"cannot be judged: no run on {claim.scope.task} at {claim.scope.budget:g} % recorded "
            f"{claim.metric!r}{did_you_mean(claim.metric, known)}; they recorded {', '.join(known)}."
        )
        return _Sample(claim, group, (), np.array([]), unknown)
    scores = group.by_metric[claim.metric]
    if claim.reference is None:
        by_seed = scores.get(claim.method, {})
        seeds = tuple(sorted(by_seed))
        values = np.array([by_seed[seed] for seed in seeds], dtype=float)
    else:
        seeds, a, b = statistics.paired(scores, claim.method, claim.reference)
        values = np.log(a / b) if claim.is_ratio else a - b
    if claim.is_time:
        values = cluster_means(seeds, values, _methods_of(claim), group.measurements)
    return _Sample(claim, group, seeds, values)


def _bootstrap(sample: _Sample, rng: np.random.Generator, draws: int) -> TwoWayBootstrap | None:
    claim, predictions = sample.claim, sample.scores.predictions
    if predictions is None or predictions.metric != claim.metric:
        return None
    return two_way(predictions, claim.method, claim.reference, sample.seeds, rng, draws)


def _without_spread(sample: _Sample, command: str) -> Verdict:
    """The verdict of too few or equal seeds or measurements, or of none."""
    by_method = sample.scores.by_metric.get(sample.claim.metric, {})
    without_runs = [name for name in _methods_of(sample.claim) if not by_method.get(name)]
    settled_by = None
    if sample.unknown_metric:
        reason = sample.unknown_metric
    elif without_runs:
        reason = f"no finished run of {' and '.join(without_runs)}."
    else:
        reason = f"{sample.untested}."
    if not sample.unknown_metric:
        seeds = max(FIRST_SEEDS, 2 * len(sample.seeds))
        settled_by = _with_seeds(_including(command, sample.claim), seeds, sample.seeds)
        if sample.claim.is_time:
            settled_by = _alone(settled_by)
            reason += f" More seeds with {ALONE}, which times each run alone, are a measurement each."
    return Verdict(
        claim=sample.claim,
        state="undecided",
        seeds=sample.seeds,
        estimate=sample.estimate,
        interval=None,
        family_interval=None,
        p=None,
        new_examples=None,
        two_way_interval=None,
        seeds_needed=None,
        command=settled_by,
        reason=f"{reason}{_failed_seeds(sample)}",
    )


def _decided(
    sample: _Sample, decision: Decision, bootstrap: TwoWayBootstrap | None, command: str, alpha: float
) -> Verdict:
    """The verdict of seeds with a spread: as decided, with its intervals and what would decide an open one."""
    values = sample.values
    two_way_interval = bootstrap.interval(decision.level) if bootstrap is not None else None
    new_examples = None if two_way_interval is None else state_of(two_way_interval, sample.region)
    interval_name = f"Holm's {100 * decision.level:.4g} % interval"
    counted = "independent measurements" if sample.claim.is_time else "seeds"
    seeds_needed = settled_by = None
    if decision.state == "undecided":
        seeds_needed = _seeds_needed(sample, 1 - decision.level)
        if seeds_needed is None:
            reason = (
                f"{interval_name} crosses the margin, and the estimate is so near to it that 1000 {counted} may not do."
            )
        else:
            reason = (
                f"{interval_name} crosses the margin; with this estimate and spread about {seeds_needed} {counted} "
                "decide it."
            )
            # Runs that are there count as they were timed; each new seed is timed alone.
            more = seeds_needed - len(values) + len(sample.seeds)
            settled_by = _with_seeds(command, more, sample.seeds)
            if sample.claim.is_time:
                settled_by = _alone(settled_by)
    else:
        reason = f"{interval_name} over {counted} is {'inside' if decision.state == 'holds' else 'outside'} the margin."
    if new_examples is not None and new_examples != decision.state:
        reason += f" That is for these examples; for new ones it is {new_examples}."
    return Verdict(
        claim=sample.claim,
        state=decision.state,
        seeds=sample.seeds,
        estimate=sample.estimate,
        interval=sample.in_units_of_the_claim(statistics.t_interval(values, 1 - alpha)),
        family_interval=sample.in_units_of_the_claim(statistics.t_interval(values, decision.level)),
        p=decision.p,
        new_examples=new_examples,
        two_way_interval=two_way_interval,
        seeds_needed=seeds_needed,
        command=settled_by,
        reason=reason + _failed_seeds(sample),
    )


def _seeds_needed(sample: _Sample, alpha: float) -> int | None:
    """Seeds or measurements that decide an undecided claim, more than there are; None if 1000 may not be enough."""
    low, high = sample.region
    mean = float(sample.values.mean())
    distances = [abs(mean - bound) for bound in (low, high) if math.isfinite(bound)]
    # A mean inside has to be distinguished from every border, one outside from the nearest.
    if not low < mean < high:
        distances = [min(distances)]
    needed = statistics.seeds_needed(float(sample.values.std(ddof=1)), *distances, alpha=alpha)
    return None if needed is None else max(needed, len(sample.values) + 1)


def _methods_of(claim: Claim) -> list[str]:
    return [name for name in (claim.method, claim.reference) if name is not None]


def _failed_seeds(sample: _Sample) -> str:
    """A sentence about the runs that failed, for the end of a reason; "" if none did."""
    failed = {name: sample.scores.failed[name] for name in _methods_of(sample.claim) if name in sample.scores.failed}
    return "".join(
        f" Left out: {name} failed for seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
        for name, seeds in failed.items()
    )


def _including(command: str, claim: Claim) -> str:
    """The command; where it selects some of the study's tasks, budgets or methods, the claim's are added."""
    needed = {
        "tasks": [claim.scope.task],
        "budgets": [f"{claim.scope.budget:g}"],
        "methods": [claim.method, claim.reference or claim.method],
    }
    arguments = []
    for argument in shlex.split(command):
        key, _, value = argument.partition("=")
        if key in needed:
            argument = f"{key}={','.join(dict.fromkeys([*value.split(','), *needed[key]]))}"
        arguments.append(argument)
    return shlex.join(arguments)


def _with_seeds(command: str, n: int, seeds: Sequence[int]) -> str:
    """The command with `n` seeds, those that exist among them."""
    first = min(seeds, default=0)
    return f"{command} seeds={first}..{max(first + n - 1, max(seeds, default=0))}"


def _alone(command: str) -> str:
    """The command, with each run timed alone."""
    return command if ALONE in shlex.split(command) else f"{command} {ALONE}"
