"""What a folder of records says: its runs as a study, with summaries, paired comparisons and verdicts.

A study that was planned has a study.json; where there is none, tasks, budgets and methods are read off the records.
Whatever is missing, failed, broken or in training is known by that name and never becomes a number. Metrics are
fractions.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fwlora_lab.analysis import claims, statistics, verdicts
from fwlora_lab.analysis.read import SHARED, RunResult, StudyResults, percent
from fwlora_lab.errors import UserError
from fwlora_lab.records.record import Record

BOOTSTRAP_SEED = 0
DRAWS = 10_000
LEVEL = 0.95
SECONDS = ("train_seconds", "fisher_step_seconds", "steady_step_seconds", "eval_seconds")  # what ratios are given of
Key = tuple[str, float]  # task and budget


@dataclass(frozen=True)
class Group:
    """All runs on one task at one budget, and what they say about each other."""

    task: str
    budget: float
    metric: str
    runs: dict[str, list[RunResult]]
    cell: verdicts.ScoreCell
    summaries: dict[str, statistics.Summary]
    comparisons: list[statistics.Comparison]
    ratios: dict[str, dict[str, statistics.PairedRatio]]  # by the kind of seconds and by method

    @property
    def where(self) -> str:
        return f"{self.task} at {percent(self.budget)}"

    def done(self, method: str) -> list[Record]:
        return [run.done for run in self.runs.get(method, ()) if run.done]


@dataclass(frozen=True)
class Analysis:
    """The numbers of a study.

    `adjusted` are Holm's p-values of the comparisons by task, budget and method, one family over the whole study.
    `notes` say what to know before believing the numbers; `seconds_doubt` why seconds do not compare, "" where they do.
    """

    study: StudyResults
    groups: list[Group]
    adjusted: dict[tuple[str, float, str], float | None]
    verdicts: list[verdicts.Verdict]
    notes: list[str]
    seconds_doubt: str

    @property
    def methods(self) -> list[str]:
        """In the order of the plan's cells, which decides their colours."""
        return list(dict.fromkeys(cell.method for cell in self.study.plan.cells))

    @property
    def reference(self) -> str:
        return self.study.plan.reference

    def adjusted_p(self, group: Group, method: str) -> float | None:
        return self.adjusted.get((group.task, group.budget, method))

    def cells(self) -> Iterator[tuple[Group, str, list[Record]]]:
        """Every cell with its complete records."""
        for group in self.groups:
            for method in group.runs:
                yield group, method, group.done(method)


def analyse(study: StudyResults) -> Analysis:
    """Summaries, paired comparisons, ratios of seconds and verdicts of all that is complete.

    Raises:
        UserError: a claim is not well formed or names a metric that no run recorded.
    """
    plan, notes = study.plan, list(study.notes)
    by_place: dict[Key, dict[str, list[RunResult]]] = {}
    for run in study.runs:
        by_place.setdefault((run.cell.task, run.cell.budget), {}).setdefault(run.cell.method, []).append(run)
    cells = {key: _cell(study, key, runs, notes) for key, runs in by_place.items()}
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    groups = [_group(key, by_place[key], cells[key], plan.reference, rng) for key in by_place]
    family = [(g.task, g.budget, c.method) for g in groups for c in g.comparisons]
    p_values = statistics.holm([c.p for g in groups for c in g.comparisons])
    stated = claims.read_claims(plan.claims, "study.json: claims")
    judged = verdicts.judge(stated, cells, plan.command, np.random.default_rng(BOOTSTRAP_SEED), draws=DRAWS)
    adjusted = dict(zip(family, p_values, strict=True))
    return Analysis(study, groups, adjusted, judged, notes + _doubts(study), seconds_doubt(study.done))


def _cell(
    study: StudyResults, key: Key, runs: Mapping[str, Sequence[RunResult]], notes: list[str]
) -> verdicts.ScoreCell:
    records = {method: [run.record for run in of if run.record] for method, of in runs.items()}
    where = f"{key[0]} at {percent(key[1])}"
    try:
        return verdicts.score_cell(records, study.folder)
    except UserError as error:
        notes.append(f"{where}: {error} No interval over examples is given here.")
    try:
        return verdicts.score_cell(records)
    except UserError as error:
        notes[-1] = f"{where} is not compared: {error}"
        return verdicts.ScoreCell({})


def _group(
    key: Key, runs: dict[str, list[RunResult]], cell: verdicts.ScoreCell, reference: str, rng: np.random.Generator
) -> Group:
    records = [run.record for of in runs.values() for run in of if run.record]
    metric = records[0].primary_metric if records else ""
    scores = cell.scores.get(metric, {})
    others = [method for method in runs if method != reference]
    comparisons = [statistics.compare(scores, m, reference, rng, cell.predictions, LEVEL, DRAWS) for m in others]
    ratios = {
        kind: {m: statistics.ratio(cell.scores[kind], m, reference, LEVEL) for m in others}
        for kind in SECONDS
        if kind in cell.scores
    }
    return Group(
        *key,
        metric=metric,
        runs=runs,
        cell=cell,
        summaries=statistics.summarize({m: scores.get(m, {}) for m in runs}, LEVEL),
        comparisons=comparisons,
        ratios=ratios,
    )


def in_lanes(record: Record) -> bool:
    asked = record.config.get("training", {}).get("engine") == "lanes"
    return asked and not any(w.startswith("training.engine=lanes does not know") for w in record.warnings)


def seconds_doubt(records: Sequence[Record]) -> str:
    """Why the seconds of these runs are no measure of one method against another; "" where nothing speaks for that.

    Runs of one cell may share lanes, as a study trains them: then every method's seconds are shared alike.
    """
    mixed, busy = set(), set()
    for a, b in _side_by_side(records):
        if in_lanes(a) and in_lanes(b):
            mixed |= {(r.run_id, r.seed) for r in (a, b) if a.run_id != b.run_id}
        else:
            busy |= {(r.run_id, r.seed) for r in (a, b)}
    said = []
    if mixed:
        said.append(
            f"{len(mixed)} of {len(records)} runs trained in lanes while runs of other methods or tasks trained too. "
            "Their seconds are an even share of what all lanes took together, or were measured beside another process: "
            "good for planning, no measure of one method against another."
        )
    if busy:
        said.append(
            f"{len(busy)} of {len(records)} runs shared the machine with another run of this study: seconds measured "
            "on a busy machine say little."
        )
    return " ".join(said)


def _side_by_side(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    ordered = sorted(records, key=lambda r: (r.started, r.run_id, r.seed))
    for i, a in enumerate(ordered):
        for b in ordered[i + 1 :]:
            if b.started >= a.finished:
                break
            together = (min(a.finished, b.finished) - b.started).total_seconds()
            shorter = min(r.finished - r.started for r in (a, b)).total_seconds()
            if a.machine == b.machine and together > SHARED * shorter:
                yield a, b


def _doubts(study: StudyResults) -> list[str]:
    """What a reader should know before believing the numbers."""
    out = []
    on_selection = sorted({r.run_id for r in study.done if r.evaluated_on != "dev"})
    if on_selection:
        out.append(f"Scored on the validation split, not on dev: {', '.join(on_selection)}.")
    dirty = [r for r in study.done if r.git_commit and r.git_commit.endswith("-dirty")]
    if dirty:
        out.append(f"{len(dirty)} of {len(study.done)} runs were made from source with uncommitted changes.")
    for what, values in (
        ("run configs", lambda r: r.config_fingerprint),
        ("data", lambda r: r.data_fingerprint),
        ("machines", lambda r: json.dumps(r.machine.model_dump(), sort_keys=True)),
        ("versions of the software", lambda r: json.dumps(r.versions, sort_keys=True)),
    ):
        seen: dict[str, set[str]] = defaultdict(set)
        for record in study.done:
            seen[record.run_id].add(values(record))
        mixed = sorted(run_id for run_id, found in seen.items() if len(found) > 1)
        if mixed:
            out.append(f"The seeds of one run were made with different {what}: {', '.join(mixed)}.")
    return out
