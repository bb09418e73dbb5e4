"""Everything that the report shows of a study: summaries, paired comparisons, ratios of seconds, verdicts, doubts.

A study that was planned has a study.json; otherwise tasks, budgets and methods are taken from the records. A run that
is missing, failed, broken or in training is called so and never becomes a number. Metrics are fractions.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fwlora_lab.analysis import claims, statistics, verdicts
from fwlora_lab.analysis.doubts import comparison_doubts, settings_doubt
from fwlora_lab.analysis.group_scores import GroupScores, group_scores
from fwlora_lab.analysis.measurements import overlapping
from fwlora_lab.analysis.results import RunResult, StudyResults, percent
from fwlora_lab.errors import UserError
from fwlora_lab.records.record import Record

BOOTSTRAP_SEED = 0
DRAWS = 10_000
LEVEL = 0.95
# The kinds of seconds that ratios are computed of.
SECONDS = ("train_seconds", "fisher_step_seconds", "steady_step_seconds", "eval_seconds")


@dataclass(frozen=True)
class Cell:
    """One method on one task at one budget.

    Attributes:
        summary: of the primary metric.
        comparison: with the reference; None for the reference itself.
        adjusted_p: the comparison's p-value after Holm, over all comparisons of the study.
        ratios: to the reference, by the kind of seconds.
        step_seconds: of the ordinary steps, for each seed.
    """

    task: str
    budget: float
    method: str
    metric: str
    runs: tuple[RunResult, ...]
    summary: statistics.Summary
    comparison: statistics.Comparison | None
    adjusted_p: float | None
    ratios: dict[str, statistics.PairedRatio]
    step_seconds: Mapping[int, float]

    @property
    def records(self) -> list[Record]:
        """Those of complete runs."""
        return [record for run in self.runs if (record := run.complete_record)]


@dataclass(frozen=True)
class Group:
    """All methods on one task at one budget, which are compared with each other.

    Attributes:
        metric: the primary one; "" without a record.
    """

    task: str
    budget: float
    metric: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The group as it is shown, such as `cola at 0.2 %`."""
        return f"{self.task} at {percent(self.budget)}"


@dataclass(frozen=True)
class Analysis:
    """The numbers of a study.

    Attributes:
        notes: what a reader should know before believing the numbers.
        seconds_doubt: why the runs' seconds do not compare methods; "" if nothing speaks against it.
    """

    study: StudyResults
    groups: tuple[Group, ...]
    verdicts: tuple[verdicts.Verdict, ...]
    notes: tuple[str, ...]
    seconds_doubt: str

    @property
    def methods(self) -> list[str]:
        """In the order of the plan's cells, which decides their colours."""
        return list(dict.fromkeys(cell.method for cell in self.study.plan.cells))

    @property
    def reference(self) -> str:
        return self.study.plan.reference

    @property
    def cells(self) -> list[Cell]:
        return [cell for group in self.groups for cell in group.cells]


def analyse(study: StudyResults) -> Analysis:
    """Analyse all runs that are complete.

    Raises:
        UserError: a claim is not well formed.
    """
    plan, notes = study.plan, list(study.notes)
    runs: dict[tuple[str, float], dict[str, list[RunResult]]] = {}
    for run in study.runs:
        runs.setdefault((run.cell.task, run.cell.budget), {}).setdefault(run.cell.method, []).append(run)
    scores = {key: _scores(study, key, runs[key], notes) for key in runs}
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    comparisons = {key: _comparisons(runs[key], scores[key], plan.reference, rng) for key in runs}
    compared = [(key, method) for key in runs for method in comparisons[key]]
    p_values = statistics.holm([comparisons[key][method].p for key, method in compared])
    adjusted = dict(zip(compared, p_values, strict=True))
    groups = []
    for key in runs:
        adjusted_here = {method: p for (place, method), p in adjusted.items() if place == key}
        groups.append(_group(key, runs[key], scores[key], comparisons[key], adjusted_here, plan.reference))
    stated = claims.read_claims(plan.claims, "study.json: claims")
    judged = verdicts.judge(stated, scores, plan.command, np.random.default_rng(BOOTSTRAP_SEED), draws=DRAWS)
    judged = [replace(verdict, doubts=_verdict_doubts(verdict.claim, runs, study)) for verdict in judged]
    notes += _doubts(study.complete_records)
    return Analysis(study, tuple(groups), tuple(judged), tuple(notes), seconds_doubt(study.complete_records))


def _scores(
    study: StudyResults, key: tuple[str, float], runs: Mapping[str, Sequence[RunResult]], notes: list[str]
) -> GroupScores:
    """The group's scores; what keeps them from being compared is added to `notes`."""
    records = {method: [run.record for run in of_method if run.record] for method, of_method in runs.items()}
    name = f"{key[0]} at {percent(key[1])}"
    try:
        return group_scores(records, study.folder)
    except UserError as error:
        unreadable = f"{name}: {error} No interval over examples is given here."
    try:
        scores = group_scores(records)
    except UserError as error:
        notes.append(f"{name} is not compared: {error}")
        return GroupScores({})
    notes.append(unreadable)
    return scores


def _primary_metric(runs: Mapping[str, Sequence[RunResult]]) -> str:
    records = [run.record for of_method in runs.values() for run in of_method if run.record]
    return records[0].primary_metric if records else ""


def _comparisons(
    runs: Mapping[str, Sequence[RunResult]], scores: GroupScores, reference: str, rng: np.random.Generator
) -> dict[str, statistics.Comparison]:
    """By method, in the order of the runs, which decides what each one draws from `rng`."""
    primary = scores.by_metric.get(_primary_metric(runs), {})
    return {
        method: statistics.compare(primary, method, reference, rng, scores.predictions, LEVEL, DRAWS)
        for method in runs
        if method != reference
    }


def _group(
    key: tuple[str, float],
    runs: Mapping[str, Sequence[RunResult]],
    scores: GroupScores,
    comparisons: Mapping[str, statistics.Comparison],
    adjusted: Mapping[str, float | None],
    reference: str,
) -> Group:
    task, budget = key
    metric = _primary_metric(runs)
    primary = scores.by_metric.get(metric, {})
    summaries = statistics.summarize({method: primary.get(method, {}) for method in runs}, LEVEL)
    cells = []
    for method, of_method in runs.items():
        kinds = [kind for kind in SECONDS if kind in scores.by_metric and method != reference]
        ratios = {kind: _ratio(scores, kind, method, reference) for kind in kinds}
        cell = Cell(
            task=task,
            budget=budget,
            method=method,
            metric=metric,
            runs=tuple(of_method),
            summary=summaries[method],
            comparison=comparisons.get(method),
            adjusted_p=adjusted.get(method),
            ratios=ratios,
            step_seconds=scores.by_metric.get("steady_step_seconds", {}).get(method, {}),
        )
        cells.append(cell)
    return Group(task, budget, metric, tuple(cells))


def _verdict_doubts(
    claim: claims.Claim, runs: Mapping[tuple[str, float], Mapping[str, Sequence[RunResult]]], study: StudyResults
) -> tuple[str, ...]:
    """Why the runs of a claim's two methods compare more than the methods."""
    of_group = runs.get((claim.scope.task, claim.scope.budget), {})
    if claim.reference is None:
        return ()
    names = (claim.method, claim.reference)
    method, reference = ([r for run in of_group.get(name, ()) if (r := run.complete_record)] for name in names)
    if not method or not reference:
        return ()
    found = comparison_doubts(method, reference, names)
    if not claim.is_time and (doubt := settings_doubt(study.plan.selection, method, reference, names)):
        found.append(doubt)
    return tuple(found)


def _ratio(scores: GroupScores, kind: str, method: str, reference: str) -> statistics.PairedRatio:
    return statistics.ratio(scores.by_metric[kind], method, reference, LEVEL, scores.measurements)


def seconds_doubt(records: Sequence[Record]) -> str:
    """Why the seconds of these runs do not measure one method against another; "" if nothing speaks against it.

    Runs of one cell may train in lanes at the same time, as a study trains them: then every method's seconds are
    shared in the same way.
    """
    shared_lanes: set[tuple[str, int]] = set()
    shared_machine: set[tuple[str, int]] = set()
    for a, b in overlapping(records):
        both = {(a.run_id, a.seed), (b.run_id, b.seed)}
        if a.engine == b.engine == "lanes":
            shared_lanes |= both if a.run_id != b.run_id else set()
        else:
            shared_machine |= both
    doubts = []
    if shared_lanes:
        doubts.append(
            f"{len(shared_lanes)} of {len(records)} runs trained in lanes while runs of other methods or tasks trained "
            "too. Their seconds are an equal share of what all lanes took together, or another process slowed them: "
            "good for planning, but they do not measure one method against another."
        )
    if shared_machine:
        doubts.append(
            f"{len(shared_machine)} of {len(records)} runs shared the machine with another run of this study: seconds "
            "measured on a busy machine say little."
        )
    return " ".join(doubts)


def _doubts(records: Sequence[Record]) -> list[str]:
    """What a reader should know before believing the numbers."""
    doubts = []
    on_validation = sorted({r.run_id for r in records if r.evaluated_on != "dev"})
    if on_validation:
        doubts.append(f"Scored on the validation split, not on dev: {', '.join(on_validation)}.")
    dirty = [r for r in records if r.git_commit and r.git_commit.endswith("-dirty")]
    if dirty:
        doubts.append(f"{len(dirty)} of {len(records)} runs were made from source with uncommitted changes.")
    same_in_all_seeds: dict[str, Callable[[Record], str]] = {
        "run configs": lambda r: r.config_fingerprint,
        "data": lambda r: r.data_fingerprint,
        "machines": lambda r: json.dumps(r.machine.model_dump(), sort_keys=True),
        "versions of the software": lambda r: json.dumps(r.versions, sort_keys=True),
    }
    for name, value_of in same_in_all_seeds.items():
        values: dict[str, set[str]] = defaultdict(set)
        for record in records:
            values[record.run_id].add(value_of(record))
        mixed = sorted(run_id for run_id, found in values.items() if len(found) > 1)
        if mixed:
            doubts.append(f"The seeds of one run were made with different {name}: {', '.join(mixed)}.")
    return doubts
