"""What a folder of records says: its runs as a study, with summaries, paired comparisons and verdicts.

A study that was planned has a study.json; where there is none, tasks, budgets and methods are read off the records.
Whatever is missing, failed, broken or in training is known by that name and never becomes a number. Metrics are
fractions.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fwlora_lab import stats, verdicts
from fwlora_lab.errors import UserError
from fwlora_lab.records import Record, RunDir, StudyCell, StudyPlan, find_records, load_plan

BOOTSTRAP_SEED = 0
DRAWS = 10_000
LEVEL = 0.95
SECONDS = ("train_seconds", "fisher_step_seconds", "steady_step_seconds", "eval_seconds")  # what ratios are given of
_SHARED = 0.05  # of the shorter run: two runs that overlap less, as at a handover, did not slow each other

State = Literal["complete", "failed", "broken", "running", "missing"]
Key = tuple[str, float]  # task and budget


# --- what there is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One seed of a cell: its record, where there is one, and otherwise what is known (`message`)."""

    cell: StudyCell
    seed: int
    state: State
    record: Record | None = None
    message: str = ""

    @property
    def done(self) -> Record | None:
        """The record, where it is of a complete run."""
        return self.record if self.state == "complete" else None


@dataclass(frozen=True)
class Study:
    """A results folder as a study: its plan, written or derived, and all of the plan's runs."""

    folder: Path
    plan: StudyPlan
    written: bool  # whether study.json says so
    runs: tuple[Run, ...]
    notes: tuple[str, ...]  # what else was found

    @property
    def done(self) -> list[Record]:
        return [run.done for run in self.runs if run.done]

    def count(self, state: State) -> int:
        return sum(run.state == state for run in self.runs)


def read_study(results_dir: str | Path) -> Study:
    """Everything the folder holds.

    Raises:
        UserError: there is no such folder, no record in it and no plan, or study.json is broken.
    """
    folder = Path(results_dir)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder. `fwlora train` and `fwlora compare` write into results_dir."
        )
    broken: list[str] = []
    found = find_records(folder, broken.append)
    plan = load_plan(folder)
    if plan is None and not found:
        told = f" What is there cannot be read: {broken[0]}" if broken else ""
        raise UserError(f"{folder}: there are no records here, so there is nothing to report.{told}")
    records = {(r.run_id, r.seed): r for r in found}
    notes = []
    if len(records) < len(found):
        notes.append(
            f"{len(found) - len(records)} records stand in two folders (same run id and seed); one of each is used."
        )
    written = plan is not None
    plan = plan or _derived_plan(found)
    runs = []
    for cell in plan.cells:
        for seed in plan.seeds if written else _seeds_at(plan, cell, records):
            runs.append(_run(folder, cell, seed, records.get((cell.run_id, seed)), broken))
    planned = {(run.cell.run_id, run.seed) for run in runs}
    others = [key for key in records if key not in planned]
    if others:
        by_run = {run_id: seeds_text(s for r, s in others if r == run_id) for run_id, _ in others}
        told = ", ".join(f"{run_id} ({seeds})" for run_id, seeds in by_run.items())
        notes.append(f"Not part of this study, and left out: {told}.")
    told_of = {run.message for run in runs}
    notes += [f"Left out: {message}" for message in broken if message not in told_of]
    return Study(folder, plan, written, tuple(runs), tuple(notes))


def _run(folder: Path, cell: StudyCell, seed: int, record: Record | None, broken: Sequence[str]) -> Run:
    if record is not None and record.status == "complete":
        return Run(cell, seed, "complete", record)
    path = RunDir(folder, cell.run_id, seed).path
    if _is_held(path.parent / f".{path.name}.lock"):
        return Run(cell, seed, "running", record)
    if record is not None:
        return Run(cell, seed, "failed", record, record.error.message if record.error else "it does not say why")
    for message in broken:
        if message.startswith(f"{path / 'record.json'}:"):
            return Run(cell, seed, "broken", message=message)
    return Run(cell, seed, "missing")


def _is_held(lock: Path) -> bool:
    """Whether a process holds a run's lock.

    A shared lock is asked for and given back at once. It never displaces a holder; who wants the run in that very
    moment finds it taken and asks again.
    """
    try:
        import fcntl
    except ImportError:  # Windows: a run in training shows as missing
        return False
    try:
        handle = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
    finally:
        os.close(handle)
    return False


def _derived_plan(found: Sequence[Record]) -> StudyPlan:
    """A plan for runs that nobody planned as a study: what was found, without claims."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        runs[record.run_id].append(record)
    tasks = {run_id: task_of(records[0]) for run_id, records in runs.items()}
    budgets = {run_id: _budget(records) for run_id, records in runs.items()}
    for run_id, budget in budgets.items():
        if budget is None:  # no run of it came so far as to count parameters: it stands with its task's others
            known = [b for other, b in budgets.items() if b is not None and tasks[other] == tasks[run_id]]
            budgets[run_id] = min(known, default=0.0)
    places = Counter((tasks[r], budgets[r], records[0].arm) for r, records in runs.items())
    cells = []
    for run_id, records in runs.items():
        task, budget, arm = tasks[run_id], budgets[run_id] or 0.0, records[0].arm
        method = arm if places[task, budget, arm] == 1 else run_id
        cells.append(StudyCell(task=task, budget=budget, method=method, run_id=run_id))
    order = {"lora": 0, "adalora": 1, "fw_lora": 2}
    methods = sorted({c.method for c in cells}, key=lambda m: (order.get(m, 3), m))
    cells.sort(key=lambda c: (c.task, c.budget, methods.index(c.method)))
    return StudyPlan(
        study="",
        command="",
        tasks=list(dict.fromkeys(c.task for c in cells)),
        budgets=sorted({c.budget for c in cells}),
        methods=dict.fromkeys(methods, ""),
        reference=next((c.method for c in cells if runs[c.run_id][0].arm == "lora"), methods[0]),
        seeds=sorted({r.seed for r in found}),
        selection={},
        cells=cells,
    )


def task_of(record: Record) -> str:
    data = record.config.get("dataset", {})
    return str(data.get("subset") or data.get("name") or "unknown")


def _budget(records: Sequence[Record]) -> float | None:
    """The percent asked for, or else the true one to two figures."""
    for record in records:
        asked = record.config.get("model", {}).get("parameter_budget_percent")
        if asked is not None:
            return float(asked)
        if record.parameters is not None:
            return float(f"{record.parameters.percent:.2g}")
    return None


def _seeds_at(plan: StudyPlan, cell: StudyCell, records: Mapping[tuple[str, int], Record]) -> list[int]:
    """In a plan that was derived: the seeds of any method on this task at this budget, for pairs need both."""
    there = {c.run_id for c in plan.cells if (c.task, c.budget) == (cell.task, cell.budget)}
    return sorted({seed for run_id, seed in records if run_id in there})


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds, three and more in a row drawn together: "seeds 0–5, 7"."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    shown = [f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return f"seed{'s' if sum(map(len, parts)) > 1 else ''} {', '.join(shown)}" if shown else "no seed"


def percent(budget: float) -> str:
    return f"{budget:g} %" if budget > 0 else "a budget not known"


# --- what it says -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """All runs on one task at one budget, and what they say about each other."""

    task: str
    budget: float
    metric: str
    runs: dict[str, list[Run]]
    cell: verdicts.Cell
    summaries: dict[str, stats.Summary]
    comparisons: list[stats.Comparison]
    ratios: dict[str, dict[str, stats.Ratio]]  # by the kind of seconds and by method

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

    study: Study
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


def analyse(study: Study) -> Analysis:
    """Summaries, paired comparisons, ratios of seconds and verdicts of all that is complete.

    Raises:
        UserError: a claim is not well formed or names a metric that no run recorded.
    """
    plan, notes = study.plan, list(study.notes)
    by_place: dict[Key, dict[str, list[Run]]] = {}
    for run in study.runs:
        by_place.setdefault((run.cell.task, run.cell.budget), {}).setdefault(run.cell.method, []).append(run)
    cells = {key: _cell(study, key, runs, notes) for key, runs in by_place.items()}
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    groups = [_group(key, by_place[key], cells[key], plan.reference, rng) for key in by_place]
    family = [(g.task, g.budget, c.method) for g in groups for c in g.comparisons]
    p_values = stats.holm([c.p for g in groups for c in g.comparisons])
    claims = verdicts.read_claims(plan.claims, "study.json: claims")
    judged = verdicts.judge(claims, cells, plan.command, np.random.default_rng(BOOTSTRAP_SEED), draws=DRAWS)
    adjusted = dict(zip(family, p_values, strict=True))
    return Analysis(study, groups, adjusted, judged, notes + _doubts(study), seconds_doubt(study.done))


def _cell(study: Study, key: Key, runs: Mapping[str, Sequence[Run]], notes: list[str]) -> verdicts.Cell:
    records = {method: [run.record for run in of if run.record] for method, of in runs.items()}
    where = f"{key[0]} at {percent(key[1])}"
    try:
        return verdicts.cell(records, study.folder)
    except UserError as error:
        notes.append(f"{where}: {error} No interval over examples is given here.")
    try:
        return verdicts.cell(records)
    except UserError as error:
        notes[-1] = f"{where} is not compared: {error}"
        return verdicts.Cell({})


def _group(
    key: Key, runs: dict[str, list[Run]], cell: verdicts.Cell, reference: str, rng: np.random.Generator
) -> Group:
    records = [run.record for of in runs.values() for run in of if run.record]
    metric = records[0].primary_metric if records else ""
    scores = cell.scores.get(metric, {})
    others = [method for method in runs if method != reference]
    comparisons = [stats.compare(scores, m, reference, rng, cell.predictions, LEVEL, DRAWS) for m in others]
    ratios = {
        kind: {m: stats.ratio(cell.scores[kind], m, reference, LEVEL) for m in others}
        for kind in SECONDS
        if kind in cell.scores
    }
    return Group(
        *key,
        metric=metric,
        runs=runs,
        cell=cell,
        summaries=stats.summarize({m: scores.get(m, {}) for m in runs}, LEVEL),
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
            if a.machine == b.machine and together > _SHARED * shorter:
                yield a, b


def _doubts(study: Study) -> list[str]:
    """What a reader should know before believing the numbers."""
    out = []
    on_selection = sorted({r.run_id for r in study.done if r.evaluated_on != "dev"})
    if on_selection:
        out.append(f"Scored on the selection split, not on dev: {', '.join(on_selection)}.")
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
