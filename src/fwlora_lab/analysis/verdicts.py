"""Claims as data, and what the records say about each: holds, fails or undecided.

A claim puts a quantity into a region: a paired difference of metrics, a paired ratio of seconds, or a method's own
mean. With an interval of the quantity over seeds the verdict can be read off: the claim holds where the interval lies
inside the region, fails where it lies outside, and is undecided where it crosses the border or where there is no
interval. All claims of a table are one family for Holm's method.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fwlora.config import warmup_in_steps
from fwlora_lab.analysis import intervals, resampling, statistics
from fwlora_lab.analysis.claims import Claim
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import RunDir, load_predictions
from fwlora_lab.records.record import Record

State = Literal["holds", "fails", "undecided"]
FIRST_SEEDS = 10  # asked for where the records cannot yet say how many it takes


@dataclass(frozen=True, eq=False)
class ScoreCell:
    """The runs of one task and one budget: `scores[metric][method][seed]`, seconds among the metrics.

    `predictions` are of the primary metric; `failed[method]` are the seeds that left no score.
    """

    scores: Mapping[str, statistics.Scores]
    predictions: resampling.Predictions | None = None
    failed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def score_cell(runs: Mapping[str, Sequence[Record]], results_dir: str | Path | None = None) -> ScoreCell:
    """The cell of the records `runs[method]` of one task and one budget; predictions are read from `results_dir`.

    Besides the task's metrics it has train_seconds, steady_seconds and eval_seconds, and seconds per optimiser step of
    either phase: steady_step_seconds and fisher_step_seconds. A method without a Fisher phase takes its ordinary step
    all along, so both are the same, and a ratio to it is what the phase costs.

    Raises:
        UserError: the records are not of the same data, split and primary metric, or a file cannot be read.
    """
    done = {method: [r for r in records if r.status == "complete"] for method, records in runs.items()}
    failed = {m: tuple(sorted(r.seed for r in records if r.status == "failed")) for m, records in runs.items()}
    complete = [record for records in done.values() for record in records]
    for record in complete[1:]:
        for key in ("data_fingerprint", "evaluated_on", "primary_metric"):
            if getattr(record, key) != getattr(complete[0], key):
                raise UserError(
                    f"{record.run_id} (seed {record.seed}) and {complete[0].run_id} (seed {complete[0].seed}) cannot "
                    f"be compared: their {key} differ. Train one of them again, or compare them in two studies."
                )
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for method, records in done.items():
        for record in records:
            for metric, value in (record.metrics | _seconds(record)).items():
                scores.setdefault(metric, {}).setdefault(method, {})[record.seed] = value
    predictions = None
    if complete and results_dir is not None:
        predictions = _predictions(complete[0].primary_metric, done, Path(results_dir))
    return ScoreCell(scores, predictions, {method: seeds for method, seeds in failed.items() if seeds})


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim.

    `estimate` and the intervals are of the claim's θ. `interval` has the nominal 95 %; the verdict is read off
    `family_interval`, which is wider because many claims are judged at once; `p` is Holm's adjusted p-value of the
    decision. All three are over seeds, for these examples; `new_examples` is the verdict with the two-way `TwoWay`
    interval (at the level of `family_interval`), for other examples as well. `needed` is the number of seeds that
    would decide with 80 % power if the estimate were true, `settle` the command for it.
    """

    claim: Claim
    state: State
    seeds: tuple[int, ...]
    estimate: float | None
    interval: intervals.Interval | None
    family_interval: intervals.Interval | None
    p: float | None
    new_examples: State | None
    two_way_interval: intervals.Interval | None
    needed: int | None
    settle: str | None
    reason: str

    @property
    def n(self) -> int:
        return len(self.seeds)


def judge(
    claims: Sequence[Claim],
    cells: Mapping[tuple[str, float], ScoreCell],
    command: str,
    rng: np.random.Generator,
    alpha: float = 0.05,
    draws: int = 10_000,
) -> list[Verdict]:
    """The verdict of every claim, from `cells[task, budget]`; all claims together are one family.

    With probability 1 − `alpha` or more no verdict of the table is false. A claim without data stays a member of
    the family, so that leaving out runs makes no verdict easier. `command` is what trains the study, without its
    seeds; `rng` and `draws` are for the bootstrap.

    Raises:
        UserError: a claim's metric is not among those that its runs recorded.
    """
    samples = [_sample(claim, cells.get((claim.scope.task, claim.scope.budget))) for claim in claims]
    regions = [_on_scale(claim, claim.region) for claim in claims]
    decisions = decide([values for _, values in samples], regions, alpha)
    bootstraps: dict[tuple, resampling.TwoWayBootstrap | None] = {}
    verdicts = []
    for claim, (seeds, values), region, decision in zip(claims, samples, regions, decisions, strict=True):
        where = cells.get((claim.scope.task, claim.scope.budget), ScoreCell({}))
        key = (claim.scope, claim.metric, claim.method, claim.reference)
        if key not in bootstraps:
            bootstraps[key] = _bootstrap(claim, where, seeds, rng, draws)
        verdicts.append(_explain(claim, where, seeds, values, region, decision, bootstraps[key], command, alpha))
    return verdicts


@dataclass(frozen=True)
class Decision:
    """A claim's state, its adjusted p-value (None without a test), and the level of the interval that shows it."""

    state: State
    p: float | None
    level: float


def decide(
    samples: Sequence[np.ndarray], regions: Sequence[tuple[float, float]], alpha: float = 0.05
) -> list[Decision]:
    """Put the mean of each of `samples` [n] inside or outside its region, as one family.

    A claim's p-value is twice the one-sided p of its weaker border ("holds") or of its better crossed one ("fails"):
    p < α exactly where the t interval of level 1 − α lies inside or outside. Holm's method takes the claims from the
    smallest p on, the k-th of K at α/(K − k + 1), and ends at the first that is not decided.
    """
    tested = [None if intervals.undefined_reason(v) else _p_value(v, r) for v, r in zip(samples, regions, strict=True)]
    adjusted = statistics.holm([None if t is None else t[0] for t in tested])
    order = sorted((t[0], i) for i, t in enumerate(tested) if t is not None)
    size = len(samples)
    first_open = next((k for k, (_, i) in enumerate(order) if (adjusted[i] or 0) >= alpha), len(order))
    ranks = {i: min(k, first_open) for k, (_, i) in enumerate(order)}
    decisions = []
    for i, test in enumerate(tested):
        p = adjusted[i]
        level = 1 - alpha / (size - ranks.get(i, min(first_open, size - 1)))
        state: State = test[1] if test is not None and p is not None and p < alpha else "undecided"
        decisions.append(Decision(state, p, level))
    return decisions


def _p_value(values: np.ndarray, region: tuple[float, float]) -> tuple[float, State]:
    low, high = region
    above_low = 0.0 if low == -math.inf else statistics.t_above(values, low)  # p of "θ ≤ low"
    below_high = 0.0 if high == math.inf else statistics.t_above(-values, -high)
    holds = 2 * max(above_low, below_high)
    fails = 2 * min(1 - above_low, 1 - below_high)
    return min(1.0, holds, fails), "holds" if holds < fails else "fails"


def _place(interval: intervals.Interval, region: tuple[float, float]) -> State:
    low, high = region
    if low < interval.low and interval.high < high:
        return "holds"
    return "fails" if interval.high < low or interval.low > high else "undecided"


def _sample(claim: Claim, where: ScoreCell | None) -> tuple[tuple[int, ...], np.ndarray]:
    """The seeds and, on the scale of the test (logarithms of ratios), the values whose mean is θ."""
    if where is None or not where.scores:
        return (), np.array([])
    if claim.metric not in where.scores:
        raise UserError(
            f"claims: no run on {claim.scope.task} at {claim.scope.budget:g} % recorded {claim.metric!r}; "
            f"they recorded {', '.join(sorted(where.scores))}."
        )
    scores = where.scores[claim.metric]
    if claim.reference is None:
        own = scores.get(claim.method, {})
        seeds = tuple(sorted(own))
        return seeds, np.array([own[seed] for seed in seeds], dtype=float)
    seeds, a, b = statistics.paired(scores, claim.method, claim.reference)
    return seeds, np.log(a / b) if claim.is_ratio else a - b


def _on_scale(claim: Claim, region: tuple[float, float]) -> tuple[float, float]:
    if not claim.is_ratio:
        return region
    low, high = region
    return -math.inf if low <= 0 else math.log(low), math.inf if high == math.inf else math.log(high)


def _shown(claim: Claim, interval: intervals.Interval) -> intervals.Interval:
    if not claim.is_ratio:
        return interval
    return intervals.Interval(math.exp(interval.low), math.exp(interval.high), interval.level)


def _bootstrap(
    claim: Claim, where: ScoreCell, seeds: tuple[int, ...], rng: np.random.Generator, draws: int
) -> resampling.TwoWayBootstrap | None:
    if where.predictions is None or where.predictions.metric != claim.metric:
        return None
    return resampling.two_way(where.predictions, claim.method, claim.reference, seeds, rng, draws)


def _explain(
    claim: Claim,
    where: ScoreCell,
    seeds: tuple[int, ...],
    values: np.ndarray,
    region: tuple[float, float],
    decision: Decision,
    bootstrap: resampling.TwoWayBootstrap | None,
    command: str,
    alpha: float,
) -> Verdict:
    names = [name for name in (claim.method, claim.reference) if name is not None]
    lost = {name: where.failed[name] for name in names if name in where.failed}
    left_out = "".join(
        f" Left out: {name} failed for seed{'s' if len(s) > 1 else ''} {', '.join(map(str, s))}."
        for name, s in lost.items()
    )
    mean = float(values.mean()) if seeds else None
    estimate = None if mean is None else math.exp(mean) if claim.is_ratio else mean
    silent = intervals.undefined_reason(values)
    if silent or mean is None:
        without = [n for n in names if not where.scores.get(claim.metric, {}).get(n)]
        why = f"no finished run of {' and '.join(without)}" if without else silent
        settle = _with_seeds(_covering(command, claim), max(FIRST_SEEDS, 2 * len(seeds)), seeds)
        return Verdict(
            claim, "undecided", seeds, estimate, None, None, None, None, None, None, settle, f"{why}.{left_out}"
        )

    family = statistics.t_interval(values, decision.level)
    two_way = bootstrap.interval(decision.level) if bootstrap is not None else None
    new_examples = None if two_way is None else _place(two_way, region)
    needed = settle = None
    family_size = f"Holm's {100 * decision.level:.4g} % interval"
    if decision.state == "undecided":
        inside = region[0] < mean < region[1]
        borders = [abs(mean - b) for b in region if math.isfinite(b)]
        needed = statistics.seeds_needed(
            float(values.std(ddof=1)), *(borders if inside else [min(borders)]), alpha=1 - decision.level
        )
        if needed is None:
            reason = f"{family_size} crosses the margin, and the estimate is so near to it that 1000 seeds may not do."
        else:
            needed = max(needed, len(seeds) + 1)
            reason = f"{family_size} crosses the margin; with this estimate and spread about {needed} seeds decide it."
            settle = _with_seeds(command, needed, seeds)
    else:
        reason = f"{family_size} over seeds lies {'inside' if decision.state == 'holds' else 'outside'} the margin."
    if new_examples is not None and new_examples != decision.state:
        reason += f" That is for these examples; for new ones it is {new_examples}."
    return Verdict(
        claim=claim,
        state=decision.state,
        seeds=seeds,
        estimate=estimate,
        interval=_shown(claim, statistics.t_interval(values, 1 - alpha)),
        family_interval=_shown(claim, family),
        p=decision.p,
        new_examples=new_examples,
        two_way_interval=two_way,
        needed=needed,
        settle=settle,
        reason=reason + left_out,
    )


def _covering(command: str, claim: Claim) -> str:
    """The command, where it names some of the study's tasks, budgets or methods, with those of the claim among them."""
    needed = {
        "tasks": [claim.scope.task],
        "budgets": [f"{claim.scope.budget:g}"],
        "methods": [claim.method, claim.reference or claim.method],
    }
    words = []
    for word in shlex.split(command):
        key, _, value = word.partition("=")
        if key in needed:
            word = f"{key}={','.join(dict.fromkeys([*value.split(','), *needed[key]]))}"
        words.append(word)
    return shlex.join(words)


def _with_seeds(command: str, n: int, seeds: Sequence[int]) -> str:
    first = min(seeds, default=0)
    return f"{command} seeds={first}..{max(first + n - 1, max(seeds, default=0))}"


def _seconds(record: Record) -> dict[str, float]:
    times = record.times
    if times is None or record.steps == 0 or times.train_seconds <= 0:
        return {}
    seconds = {
        "train_seconds": times.train_seconds,
        "steady_seconds": times.steady_seconds,
        "eval_seconds": times.eval_seconds,
    }
    steps = 0
    if times.warmup_seconds > 0:
        warmup = record.config["fw_lora"]["warmup_steps"]
        steps = warmup_in_steps(warmup, record.total_steps)
    if 0 <= steps < record.steps:
        steady = times.steady_seconds / (record.steps - steps)
        seconds["steady_step_seconds"] = steady
        seconds["fisher_step_seconds"] = times.warmup_seconds / steps if steps else steady
    return {name: value for name, value in seconds.items() if value > 0}


def _predictions(metric: str, done: Mapping[str, Sequence[Record]], folder: Path) -> resampling.Predictions | None:
    outputs: dict[str, dict[int, np.ndarray]] = {}
    common = None
    for method, records in done.items():
        for record in records:
            path = RunDir(folder, record.run_id, record.seed).path
            if not (path / "predictions.npz").exists():
                continue
            logits, labels = load_predictions(path)
            if not resampling.can_be_resampled(metric, logits.shape[1]):
                return None
            if common is not None and not np.array_equal(common, labels):
                raise UserError(f"{path / 'predictions.npz'}: its labels are not those of the other runs.")
            common = labels
            predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
            outputs.setdefault(method, {})[record.seed] = predicted
    return None if common is None else resampling.Predictions(metric, common, outputs)
