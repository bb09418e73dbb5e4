"""`fwlora report`: from the records in a results folder to one page that opens from disk, and the files beside it.

results_dir/
    report.html                          everything, in one file that loads nothing
    report.md                            the same numbers without figures
    comparison/aggregated_metrics.json   in AIRAS's form
    comparison/seeds.csv                 every run, planned or found, with its metrics and seconds
    comparison/comparisons.csv           paired differences from the reference
    comparison/verdicts.csv              the study's claims
    comparison/table.tex                 a table for a paper (booktabs)
    <run_id>/metrics.json                means over the run's seeds, where AIRAS looks for them
    <run_id>/seed-<n>/adapter/README.md  a model card, unless a person wrote one

All of it follows from the records (and study.json, where there is one) and nothing else: the same records give the
same bytes. Metrics are fractions in records and points (hundredths) here.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import yaml

from fwlora_lab import figures, stats, verdicts
from fwlora_lab.errors import UserError
from fwlora_lab.records import Record, RunDir, StudyCell, StudyPlan, find_records, load_plan, load_predictions

BOOTSTRAP_SEED = 0
DRAWS = 10_000
_LEVEL = 0.95
_RATIOS = {
    "train_seconds": "training",
    "fisher_step_seconds": "a step of the Fisher phase",
    "steady_step_seconds": "a steady step",
    "eval_seconds": "evaluation",
}
_LARGEST_PLOT = 1_500_000  # bytes of a search's plot that is put into the page

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
        return [run.record for run in self.runs if run.done and run.record]

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
        told = ", ".join(
            f"{run_id} ({_seeds_text([s for r, s in others if r == run_id])})" for run_id in _unique(others)
        )
        notes.append(f"Not part of this study, and left out: {told}.")
    told_of = {run.message for run in runs}
    notes += [f"Left out: {message}" for message in broken if message not in told_of]
    return Study(folder, plan, written, tuple(runs), tuple(notes))


def _unique(keys: Iterable[tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(run_id for run_id, _ in keys))


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
    tasks = {run_id: _task(records[0]) for run_id, records in runs.items()}
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
        reference=next((m for m in methods if m == "lora"), methods[0]),
        seeds=sorted({r.seed for r in found}),
        selection={},
        cells=cells,
    )


def _task(record: Record) -> str:
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
        return f"{self.task} at {_percent(self.budget)}"

    def done(self, method: str) -> list[Record]:
        return [run.record for run in self.runs.get(method, ()) if run.done and run.record]


@dataclass(frozen=True)
class Analysis:
    """The numbers of a study. `adjusted` are Holm's p-values by group and method, one family over the whole study."""

    study: Study
    groups: list[Group]
    adjusted: dict[tuple[str, float, str], float | None]
    verdicts: list[verdicts.Verdict]
    notes: list[str]
    seconds_doubt: str = ""

    def adjusted_p(self, group: Group, method: str) -> float | None:
        return self.adjusted.get((group.task, group.budget, method))

    @cached_property
    def methods(self) -> list[str]:
        """In the order of the plan's cells, which decides their colours."""
        return list(dict.fromkeys(cell.method for cell in self.study.plan.cells))


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
    doubt = _seconds_doubt(study.done)
    notes += _doubts(study)
    return Analysis(study, groups, dict(zip(family, p_values, strict=True)), judged, notes, doubt)


def _cell(study: Study, key: Key, runs: Mapping[str, Sequence[Run]], notes: list[str]) -> verdicts.Cell:
    records = {method: [run.record for run in of if run.record] for method, of in runs.items()}
    where = f"{key[0]} at {_percent(key[1])}"
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
    comparisons = [stats.compare(scores, m, reference, rng, cell.predictions, _LEVEL, DRAWS) for m in others]
    ratios = {
        kind: {m: stats.ratio(cell.scores[kind], m, reference, _LEVEL) for m in others}
        for kind in _RATIOS
        if kind in cell.scores
    }
    return Group(
        *key,
        metric=metric,
        runs=runs,
        cell=cell,
        summaries=stats.summarize({m: scores.get(m, {}) for m in runs}, _LEVEL),
        comparisons=comparisons,
        ratios=ratios,
    )


def _in_lanes(record: Record) -> bool:
    asked = record.config.get("training", {}).get("engine") == "lanes"
    return asked and not any(w.startswith("training.engine=lanes does not know") for w in record.warnings)


def _overlapping(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    ordered = sorted(records, key=lambda r: (r.started, r.run_id, r.seed))
    return [
        (a, b)
        for i, a in enumerate(ordered)
        for b in ordered[i + 1 :]
        if b.started < a.finished and a.machine == b.machine
    ]


def _seconds_doubt(records: Sequence[Record]) -> str:
    """Why the seconds of these runs are no measure of one method against another; "" where nothing speaks for that."""
    pairs = _overlapping(records)
    lanes = {(r.run_id, r.seed) for pair in pairs for r in pair if all(map(_in_lanes, pair))}
    mixed = {
        (r.run_id, r.seed)
        for pair in pairs
        for r in pair
        if all(map(_in_lanes, pair)) and pair[0].run_id != pair[1].run_id
    }
    busy = {(r.run_id, r.seed) for pair in pairs for r in pair if not all(map(_in_lanes, pair))}
    said = []
    if mixed:
        said.append(
            f"{len(mixed)} of {len(records)} runs trained in lanes side by side with runs of other methods. Their "
            "seconds are an even share of what all lanes took together: good for planning, no measure of one method "
            "against another."
        )
    elif lanes:
        said.append(
            f"{len(lanes)} of {len(records)} runs trained in lanes beside other seeds of the same run. Their seconds "
            "are an even share of what all lanes took together, and change with the number of lanes."
        )
    if busy:
        said.append(
            f"{len(busy)} of {len(records)} runs shared the machine with another run of this study: seconds measured "
            "on a busy machine say little."
        )
    return " ".join(said)


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


def headline(analysis: Analysis) -> str:
    """One sentence that says what the study found, losses first."""
    study, counts = analysis.study, Counter(v.state for v in analysis.verdicts)
    parts = []
    if analysis.verdicts:
        n = len(analysis.verdicts)
        parts.append(
            f"of {n} claim{'s' if n > 1 else ''} {counts['fails']} fail{'s' if counts['fails'] == 1 else ''}, "
            f"{counts['undecided']} {'is' if counts['undecided'] == 1 else 'are'} undecided and {counts['holds']} "
            f"hold{'s' if counts['holds'] == 1 else ''}"
        )
    told, silent = [], 0
    for group in analysis.groups:
        for c in group.comparisons:
            p = analysis.adjusted_p(group, c.method)
            if c.mean is None or p is None or p >= 1 - _LEVEL:
                silent += 1
                continue
            side = "below" if c.mean < 0 else "above"
            told.append(
                (c.mean, f"{c.method} ends {abs(100 * c.mean):.2f} points {side} {c.reference} on {group.where}")
            )
    told.sort(key=lambda pair: pair[0])
    parts += [text for _, text in told[:4]]
    if len(told) > 4:
        parts.append(f"{len(told) - 4} more methods differ from {study.plan.reference}")
    if silent and study.done:
        subject = "no other difference" if told else "no difference" if silent > 1 else "the one difference"
        if silent == 1 and not told:
            parts.append(f"the one difference from {study.plan.reference} cannot be told from chance")
        else:
            parts.append(f"{subject} from {study.plan.reference} can be told from chance")
    if not study.done:
        parts = ["no run is complete yet"]
    elif not parts:
        parts = [f"there is nothing to compare with {study.plan.reference}"]
    sentence = "; ".join(parts)
    left = len(study.runs) - len(study.done)
    if left and study.done:
        sentence = f"so far, with {len(study.done)} of {len(study.runs)} runs: {sentence}"
    return f"{sentence[0].upper()}{sentence[1:]}."


# --- numbers as people read them ----------------------------------------------------------------


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _percent(budget: float) -> str:
    return f"{budget:g} %" if budget > 0 else "a budget not known"


def _points(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else _minus(f"{100 * value:{'+' if signed else ''}.2f}")


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _span(interval: stats.Interval | None, show: Callable[[float], str]) -> str:
    return "–" if interval is None else f"{show(interval.low)} to {show(interval.high)}"


def _seeds_text(seeds: Iterable[int]) -> str:
    """Seeds with runs of three and more drawn together: 0–5, 7."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    shown = [f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return f"seed{'s' if sum(map(len, parts)) > 1 else ''} {', '.join(shown)}" if shown else "no seed"


def _words(metric: str) -> str:
    return metric.replace("_", " ")


# --- tables and figures -------------------------------------------------------------------------


class Entry(NamedTuple):
    """A cell of a table: what is shown, and what it is sorted by and copied as."""

    text: str
    value: str | float | int | None


class Column(NamedTuple):
    """A column's name in a CSV file, its heading, and whether it holds numbers."""

    key: str
    heading: str
    number: bool = True


@dataclass(frozen=True)
class Table:
    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Entry]]

    @property
    def csv(self) -> str:
        return _csv([[c.key for c in self.columns], *([entry.value for entry in row] for row in self.rows)])


@dataclass(frozen=True)
class Picture:
    """A figure, what it shows in words, and its numbers."""

    id: str
    title: str
    svg: str
    text: str
    csv: str


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _word(text: str) -> Entry:
    return Entry(text, text)


def _in_points(value: float | None, signed: bool = False) -> Entry:
    return Entry(_points(value, signed), None if value is None else 100 * value)


def _bounds(interval: stats.Interval | None, factor: float = 1.0) -> tuple[float, float] | None:
    return None if interval is None else (factor * interval.low, factor * interval.high)


def _two(interval: stats.Interval | None, show: Callable[[float], str], factor: float = 1.0) -> list[Entry]:
    """An interval as two columns: the first shows both ends, the second is there for sorting and copying only."""
    low, high = _bounds(interval, factor) or (None, None)
    return [Entry(_span(interval, show), low), Entry("", high)]


def scores_table(analysis: Analysis) -> Table:
    columns = [
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("method", "method", False),
        Column("metric", "metric", False),
        Column("seeds", "seeds"),
        Column("mean_points", "mean, points"),
        Column("sd_points", "sd, points"),
        Column("low_points", "95 % interval, points"),
        Column("high_points", ""),
        Column("every_seed", "every seed, points", False),
    ]
    rows = []
    for g in analysis.groups:
        for method, s in g.summaries.items():
            every = " ".join(f"{100 * v:.2f}" for v in s.seeds.values())
            rows.append(
                [
                    *_place(g, method),
                    _word(_words(g.metric)),
                    Entry(str(s.n), s.n),
                    _in_points(s.mean),
                    _in_points(s.sd),
                    *_two(s.interval, _points, 100),
                    Entry(_minus(every) or "–", every),
                ]
            )
    return Table("scores-table", "Mean over seeds on the evaluation split, after the last epoch", columns, rows)


def _place(group: Group, method: str) -> list[Entry]:
    budget = Entry(f"{group.budget:g}" if group.budget > 0 else "–", group.budget or None)
    return [_word(group.task), budget, _word(method)]


def comparisons_table(analysis: Analysis) -> Table:
    columns = [
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("method", "method", False),
        Column("pairs", "pairs"),
        Column("mean_difference_points", "mean difference, points"),
        Column("t_low_points", "95 % t interval"),
        Column("t_high_points", ""),
        Column("two_way_low_points", "95 % two-way interval"),
        Column("two_way_high_points", ""),
        Column("p", "p (paired t)"),
        Column("sign_flip_p", "p (sign flip)"),
        Column("holm_p", "p (t, Holm)"),
        Column("hedges_g", "Hedges g"),
        Column("why_not", "remark", False),
    ]
    rows = []
    for g in analysis.groups:
        for c in g.comparisons:
            holm = analysis.adjusted_p(g, c.method)
            flip = c.sign_flip
            remark = c.why or ""
            if flip and flip.smallest > 0.05:
                remark = f"{c.n} pairs: no sign-flip p below {flip.smallest:g} exists"
            rows.append(
                [
                    *_place(g, c.method),
                    Entry(str(c.n), c.n),
                    _in_points(c.mean, signed=True),
                    *_two(c.interval, lambda v: _points(v, True), 100),
                    *_two(c.two_way, lambda v: _points(v, True), 100),
                    Entry(_p(c.p), c.p),
                    Entry(_p(flip.p if flip else None), flip.p if flip else None),
                    Entry(_p(holm), holm),
                    Entry("–" if c.hedges_g is None else _minus(f"{c.hedges_g:+.2f}"), c.hedges_g),
                    _word(remark),
                ]
            )
    rows.sort(key=lambda row: math.inf if row[4].value is None else float(row[4].value))
    caption = f"Paired differences from {analysis.study.plan.reference}, largest loss first"
    return Table("comparisons-table", caption, columns, rows)


def ratios_table(analysis: Analysis) -> Table:
    columns = [
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("method", "method", False),
        Column("seconds", "seconds of", False),
        Column("pairs", "pairs"),
        Column("ratio", f"× {analysis.study.plan.reference}"),
        Column("low", "95 % interval"),
        Column("high", ""),
        Column("p", "p (paired t)"),
    ]
    rows = []
    for g in analysis.groups:
        for kind, by_method in g.ratios.items():
            for method, ratio in by_method.items():
                if ratio.n:
                    rows.append(
                        [
                            *_place(g, method),
                            Entry(_RATIOS[kind], kind),
                            Entry(str(ratio.n), ratio.n),
                            Entry(_times(ratio.mean), ratio.mean),
                            *_two(ratio.interval, _times),
                            Entry(_p(ratio.p), ratio.p),
                        ]
                    )
    return Table("ratios-table", "Paired ratios of seconds", columns, rows)


def seconds_table(analysis: Analysis) -> Table:
    columns = [
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("method", "method", False),
        Column("seeds", "seeds"),
        Column("fisher_seconds", "Fisher phase, s"),
        Column("steady_seconds", "steady steps, s"),
        Column("train_seconds", "training, s"),
        Column("eval_seconds", "evaluation, s"),
        Column("steady_step_milliseconds", "a steady step, ms"),
        Column("peak_memory_mebibytes", "peak memory, MiB"),
    ]
    rows = []
    for g in analysis.groups:
        for method in g.runs:
            timed = [r for r in g.done(method) if r.times]
            if not timed:
                continue
            step = _mean(g.cell.scores.get("steady_step_seconds", {}).get(method, {}).values())
            memory = _mean(r.peak_memory_bytes / 2**20 for r in timed if r.peak_memory_bytes)
            entries = [
                Entry(_seconds(v), v)
                for v in (_mean(getattr(r.times, name) for r in timed) for name in
                          ("fisher_seconds", "steady_seconds", "train_seconds", "eval_seconds"))
            ]  # fmt: skip
            rows.append(
                [
                    *_place(g, method),
                    Entry(str(len(timed)), len(timed)),
                    *entries,
                    Entry("–" if step is None else f"{1000 * step:.1f}", None if step is None else 1000 * step),
                    Entry("–" if memory is None else f"{memory:,.0f}", memory),
                ]
            )
    return Table("seconds-table", "Mean seconds of a run", columns, rows)


def _mean(values: Iterable[float]) -> float | None:
    values = [*values]
    return sum(values) / len(values) if values else None


def parameters_table(analysis: Analysis) -> Table:
    columns = [
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("method", "method", False),
        Column("asked_parameters", "asked for"),
        Column("adapters", "left at the end"),
        Column("percent", "% of the backbone"),
        Column("adapters_trained", "most while training"),
        Column("ranks", "ranks", False),
        Column("head", "head, apart"),
        Column("backbone", "backbone"),
    ]
    rows = []
    for g in analysis.groups:
        for method in g.runs:
            counted = [r for r in g.done(method) if r.parameters]
            if not counted or counted[0].parameters is None:
                continue
            first = counted[0].parameters
            asked = None if first.asked_percent is None else round(first.asked_percent / 100 * first.backbone)
            ranks = [row.rank for r in counted for row in r.matrices]
            span = (
                f"{min(ranks)}"
                if ranks and min(ranks) == max(ranks)
                else f"{min(ranks)} to {max(ranks)}"
                if ranks
                else ""
            )
            used = _mean(r.parameters.adapters for r in counted if r.parameters)
            percent = _mean(r.parameters.percent for r in counted if r.parameters)
            rows.append(
                [
                    *_place(g, method),
                    Entry("–" if asked is None else f"{asked:,}", asked),
                    Entry("–" if used is None else f"{used:,.0f}", used),
                    Entry("–" if percent is None else f"{percent:.4f}", percent),
                    Entry(f"{first.adapters_trained:,}", first.adapters_trained),
                    Entry(span or "–", span),
                    Entry(f"{first.head:,}", first.head),
                    Entry(f"{first.backbone:,}", first.backbone),
                ]
            )
    return Table("parameters-table", "Trained parameters, the mean over seeds", columns, rows)


def settings_table(analysis: Analysis) -> Table:
    """The hyper-parameters of every cell: those that somebody usually asks for, and all that differ."""
    configs = {}
    for g in analysis.groups:
        for method, runs in g.runs.items():
            record = next((run.record for run in runs if run.record), None)
            if record is not None:
                configs[g.task, g.budget, method] = (g, record, _relevant(record))
    always = (
        "training.learning_rate",
        "training.epochs",
        "training.batch_size",
        "model.lora.alpha",
        "fw_lora.lambda_fw",
    )
    keys = [*always]
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (task, _, _), (_, _, settings) in configs.items():
        by_task[task].append(settings)
    for of in [s for _, _, s in configs.values()]:
        for key in of:
            values = {json.dumps(s[key], sort_keys=True) for _, _, s in configs.values() if key in s}
            if key not in keys and len(values) > 1:
                keys.append(key)
    keys = [key for key in keys if any(key in s for _, _, s in configs.values())]
    columns = [Column("task", "task", False), Column("budget_percent", "budget, %"), Column("method", "method", False)]
    columns += [Column(key, key.removeprefix("training.").removeprefix("model."), False) for key in keys]
    rows = []
    for (_, _, method), (g, _, settings) in configs.items():
        row = _place(g, method)
        for key in keys:
            value = settings.get(key)
            text = (
                "–"
                if key not in settings
                else f"{value:.4g}"
                if isinstance(value, float)
                else "not set"
                if value is None
                else str(value)
            )
            row.append(Entry(_minus(text) if isinstance(value, float) else text, value if key in settings else None))
        rows.append(row)
    return Table("settings-table", "Hyper-parameters of every cell", columns, rows)


def _relevant(record: Record) -> dict[str, Any]:
    left_out = re.compile(
        r"run_id|results_dir|method|optuna(\..*)?|training\.(seed|save_adapter)|model\.(name|parameter_budget_percent)|dataset\..*"
    )
    others = [arm for arm in ("fw_lora", "adalora") if arm != record.arm]
    return {
        key: value
        for key, value in _flat(record.config)
        if not left_out.fullmatch(key) and not any(key.startswith(f"{arm}.") for arm in others)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def seeds_table(analysis: Analysis) -> Table:
    """Every run that was planned, its state, and everything that its record counts."""
    metrics = list(dict.fromkeys(m for r in analysis.study.done for m in r.metrics))
    seconds = ("train_seconds", "fisher_seconds", "steady_seconds", "eval_seconds")
    columns = [
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("method", "method", False),
        Column("run_id", "run", False),
        Column("seed", "seed"),
        Column("state", "state", False),
        *(Column(metric, _words(metric)) for metric in metrics),
        *(Column(name, _words(name)) for name in seconds),
        Column("adapters", "adapter parameters"),
    ]
    rows = []
    for run in analysis.study.runs:
        r = run.done
        values: list[Any] = [
            run.cell.task,
            run.cell.budget or None,
            run.cell.method,
            run.cell.run_id,
            run.seed,
            run.state,
        ]
        values += [r.metrics.get(m) if r else None for m in metrics]
        values += [getattr(r.times, name) if r and r.times else None for name in seconds]
        values.append(r.parameters.adapters if r and r.parameters else None)
        rows.append([Entry("–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v), v) for v in values])
    return Table("seeds-table", "Every run", columns, rows)


def _colours(analysis: Analysis) -> dict[str, int]:
    return {method: i for i, method in enumerate(analysis.methods)}


def _slug(*parts: object) -> str:
    text = "-".join(str(p) for p in parts)
    clean = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return f"{clean[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def score_pictures(analysis: Analysis) -> list[Picture]:
    """A task's metric over the budgets, or with one budget a plot of its methods' seeds."""
    colours, pictures = _colours(analysis), []
    for task in dict.fromkeys(g.task for g in analysis.groups):
        groups = [g for g in analysis.groups if g.task == task and any(s.n for s in g.summaries.values())]
        if not groups:
            continue
        metric = f"{_words(groups[0].metric)}, points"
        told = []
        rows: list[list[Any]] = [["budget_percent", "method", "seeds", "mean_points", "low_points", "high_points"]]
        for g in groups:
            for method, s in g.summaries.items():
                low, high = _bounds(s.interval, 100) or (None, None)
                rows.append([g.budget, method, s.n, None if s.mean is None else 100 * s.mean, low, high])
                if s.mean is not None:
                    span = f", 95 % interval {_span(s.interval, _points)}" if s.interval else ""
                    told.append(f"{method} at {_percent(g.budget)} {_points(s.mean)} points ({s.n} seeds{span})")
        if len(groups) > 1:
            series = []
            for method in analysis.methods:
                there = [(g.budget, g.summaries[method]) for g in groups if method in g.summaries]
                there = [(b, s) for b, s in there if s.mean is not None]
                if there:
                    series.append(
                        figures.Curve(
                            method, colours[method],
                            [b for b, _ in there], [100 * (s.mean or 0.0) for _, s in there],
                            [_bounds(s.interval, 100) for _, s in there],
                            {i: [(b, 100 * v) for v in s.seeds.values()] for i, (b, s) in enumerate(there)},
                        )
                    )  # fmt: skip
            svg = figures.against_budget(series, metric)
            title = f"{task}: {_words(groups[0].metric)} against the budget"
        else:
            svg = figures.dots([_row(m, colours, s) for m, s in groups[0].summaries.items() if s.n], metric)
            title = f"{task}: {_words(groups[0].metric)} at {_percent(groups[0].budget)}"
        pictures.append(Picture(_slug("score", task), title, svg, f"{title}. {'; '.join(told)}.", _csv(rows)))
    return pictures


def _row(method: str, colours: Mapping[str, int], s: stats.Summary) -> figures.Row:
    points = {seed: 100 * v for seed, v in s.seeds.items()}
    return figures.Row(
        method, colours[method], points, None if s.mean is None else 100 * s.mean, _bounds(s.interval, 100)
    )


def difference_pictures(analysis: Analysis) -> list[Picture]:
    colours, pictures = _colours(analysis), []
    for g in analysis.groups:
        there = [c for c in g.comparisons if c.n]
        if not there:
            continue
        rows = [
            figures.Row(
                c.method, colours[c.method],
                {seed: 100 * d for seed, d in c.differences.items()},
                None if c.mean is None else 100 * c.mean,
                _bounds(c.interval, 100), _bounds(c.two_way, 100),
            )
            for c in there
        ]  # fmt: skip
        reference = analysis.study.plan.reference
        told = []
        for c in there:
            told.append(
                f"{c.method} {_points(c.mean, True)} points, "
                + (f"95 % t interval {_span(c.interval, lambda v: _points(v, True))}" if c.interval else f"{c.why}")
                + (f", two-way interval {_span(c.two_way, lambda v: _points(v, True))}" if c.two_way else "")
            )
        numbers = [["method", "seed", "difference_points"]]
        numbers += [[c.method, seed, 100 * d] for c in there for seed, d in c.differences.items()]
        title = f"{g.where}: paired differences from {reference}"
        svg = figures.dots(rows, f"{_words(g.metric)}, points above {reference}"[:48], zero=True)
        pictures.append(
            Picture(_slug("difference", g.task, g.budget), title, svg, f"{title}. {'; '.join(told)}.", _csv(numbers))
        )
    return pictures


def curve_pictures(analysis: Analysis) -> list[Picture]:
    pictures = []
    for g in analysis.groups:
        for what, title, of in (
            (
                "metric",
                f"{_words(g.metric)}, points",
                lambda e, m=g.metric: 100 * e.metrics[m] if m in e.metrics else None,
            ),
            ("loss", "training loss", lambda e: e.train_loss),
        ):
            picture = _curve_picture(analysis, g, what, title, of)
            if picture is not None:
                pictures.append(picture)
    return pictures


def _curve_picture(
    analysis: Analysis, g: Group, what: str, ylabel: str, of: Callable[[Any], float | None]
) -> Picture | None:
    colours = _colours(analysis)
    series, told = [], []
    rows: list[list[Any]] = [["method", "seed", "epoch", ylabel.replace(", ", "_").replace(" ", "_")]]
    for method in g.runs:
        lines: dict[int, list[tuple[float, float]]] = {}
        for record in g.done(method):
            points = [(float(e.epoch), v) for e in record.epochs if (v := of(e)) is not None]
            if points:
                lines[record.seed] = points
                rows += [[method, record.seed, int(x), y] for x, y in points]
        # A mean over the epochs that every seed has: one over fewer seeds would jump.
        epochs = sorted(set.intersection(*({x for x, _ in line} for line in lines.values()))) if lines else []
        if not epochs:
            continue
        mean = [sum(dict(line)[x] for line in lines.values()) / len(lines) for x in epochs]
        series.append(figures.Curve(method, colours[method], epochs, mean, (), lines))
        told.append(
            f"{method} from {mean[0]:.2f} after epoch {epochs[0]:g} to {mean[-1]:.2f} after epoch {epochs[-1]:g}"
        )
    if not series:
        return None
    title = f"{g.where}: {ylabel.removesuffix(', points')} after each epoch"
    svg = figures.curves(series, "epoch", ylabel)
    return Picture(
        _slug("curve", what, g.task, g.budget), title, svg, f"{title}. {_minus('; '.join(told))}.", _csv(rows)
    )


def seconds_pictures(analysis: Analysis) -> list[Picture]:
    colours, pictures = _colours(analysis), []
    parts = {"fisher_seconds": "Fisher phase", "steady_seconds": "steady steps", "eval_seconds": "evaluation"}
    for g in analysis.groups:
        bars, told = [], []
        for method in g.runs:
            timed = [r.times for r in g.done(method) if r.times]
            if timed:
                means = [sum(getattr(t, name) for t in timed) / len(timed) for name in parts]
                bars.append((method, colours[method], means))
                told.append(
                    f"{method} "
                    + ", ".join(f"{name} {_seconds(v)} s" for name, v in zip(parts.values(), means, strict=True))
                )
        if bars:
            title = f"{g.where}: seconds of a run"
            svg = figures.stacks(bars, list(parts.values()), "seconds, mean over seeds")
            rows = [["method", *parts], *([method, *means] for method, _, means in bars)]
            pictures.append(
                Picture(_slug("seconds", g.task, g.budget), title, svg, f"{title}. {'; '.join(told)}.", _csv(rows))
            )
    return pictures


# importance and updates


@dataclass(frozen=True)
class Maps:
    """What became of a group's matrices: heat maps, and how far the penalty's weights differ at all."""

    where: str
    pictures: list[Picture]


def place_of(name: str) -> tuple[str, str]:
    """A matrix's layer and kind: 'bert.encoder.layer.3.attention.self.query' -> ('3', 'query')."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if not found:
        return "–", name
    kind = found[2].removesuffix(".dense")
    return found[1], kind.removeprefix("attention.self.")


def _means(records: Sequence[Record], key: str) -> dict[str, float]:
    """Each matrix's mean over the runs that have a number for it."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for row in record.matrices:
            value = getattr(row, key)
            if value is not None:
                values[row.name].append(value)
    return {name: sum(of) / len(of) for name, of in values.items()}


def matrix_maps(analysis: Analysis) -> list[Maps]:
    out = []
    for g in analysis.groups:
        importance = {m: v for m in g.runs if (v := _means(g.done(m), "importance"))}
        norms = {m: v for m in g.runs if (v := _means(g.done(m), "delta_norm"))}
        top = {"importance": _top(importance), "norm": _top(norms)}
        pictures = []
        for what, symbol, maps in (
            ("importance", "importance I, % of the sum", importance),
            ("norm", "‖ΔW‖ at the end", norms),
        ):
            factor = 100 if what == "importance" else 1
            for method, values in maps.items():
                values = {name: factor * v for name, v in values.items()}
                pictures.append(_map(g, method, what, symbol, values, factor * top[what]))
        if pictures:
            out.append(Maps(g.where, pictures))
    return out


def _top(maps: Mapping[str, Mapping[str, float]]) -> float:
    return max((v for values in maps.values() for v in values.values()), default=0.0)


def _map(g: Group, method: str, what: str, symbol: str, values: Mapping[str, float], top: float) -> Picture:
    places = {name: place_of(name) for name in values}
    layers = sorted(
        {layer for layer, _ in places.values()}, key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0, s)
    )
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid: list[list[float | None]] = [[None] * len(kinds) for _ in layers]
    for name, (layer, kind) in places.items():
        grid[layers.index(layer)][kinds.index(kind)] = values[name]
    ordered = sorted(values, key=lambda name: -values[name])
    title = f"{method}: {symbol}"
    told = ", ".join(f"{' '.join(reversed(places[n]))} {values[n]:.3g}" for n in ordered[:3])
    text = (
        f"{g.where}, {title}: {len(values)} matrices from {values[ordered[-1]]:.3g} to {values[ordered[0]]:.3g}; "
        f"largest (kind, layer, value): {told}."
    )
    rows = [["matrix", "layer", "kind", what], *([n, *places[n], values[n]] for n in values)]
    return Picture(
        _slug("map", what, g.task, g.budget, method), title, figures.heat(grid, layers, kinds, top), text, _csv(rows)
    )


def contrast_table(analysis: Analysis) -> Table:
    """How unequal importance and weights are, and whether updates follow importance."""
    columns = [
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("method", "method", False),
        Column("seeds", "seeds"),
        Column("fisher_span", "largest F / smallest F"),
        Column("largest_importance_percent", "largest I, %"),
        Column("weight_cv_percent", "variation of the penalty's weights, %"),
        Column("rank_correlation", "rank correlation of I and ‖ΔW‖"),
        Column("mean_delta_norm", "mean ‖ΔW‖"),
    ]
    rows = []
    for g in analysis.groups:
        for method in g.runs:
            records = g.done(method)
            if not any(row.delta_norm is not None for r in records for row in r.matrices):
                continue
            spans = [max(f) / min(f) for r in records if (f := _column(r, "fisher")) and min(f) > 0]
            tops = [100 * max(i) for r in records if (i := _column(r, "importance"))]
            spread = [
                100 * float(np.std(w) / np.mean(w)) for r in records if (w := _column(r, "weight")) and np.mean(w) > 0
            ]
            follows = [c for r in records if (c := _rank_correlation(r)) is not None]
            norms = [float(np.mean(n)) for r in records if (n := _column(r, "delta_norm"))]
            span, top, cv, follow, norm = map(_mean, (spans, tops, spread, follows, norms))
            rows.append(
                [
                    *_place(g, method),
                    Entry(str(len(records)), len(records)),
                    Entry("–" if span is None else f"{span:,.0f}", span),
                    Entry("–" if top is None else f"{top:.1f}", top),
                    Entry("–" if cv is None else f"{cv:.1f}", cv),
                    Entry("–" if follow is None else _minus(f"{follow:+.2f}"), follow),
                    Entry("–" if norm is None else f"{norm:.3f}", norm),
                ]
            )
    return Table("contrast-table", "How unequal the matrices are, the mean over seeds", columns, rows)


def _column(record: Record, key: str) -> list[float]:
    return [v for row in record.matrices if (v := getattr(row, key)) is not None]


def _rank_correlation(record: Record) -> float | None:
    """Spearman's, of importance and ‖ΔW‖ over the matrices; None where one of them is the same everywhere."""
    pairs = [
        (m.importance, m.delta_norm) for m in record.matrices if m.importance is not None and m.delta_norm is not None
    ]
    if len(pairs) < 3:
        return None
    ranks = []
    for values in np.array(pairs).T:
        unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        if len(unique) < 2:
            return None
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])  # ties share their mean rank
    return float(np.corrcoef(*ranks)[0, 1])


# --- verdicts as cards --------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """Positions in percent of a line that shows a claim's region, the intervals and the estimate."""

    low: str
    high: str
    region: tuple[float, float]
    borders: list[tuple[float, str]]
    interval: tuple[float, float] | None
    family: tuple[float, float] | None
    estimate: float | None


@dataclass(frozen=True)
class Card:
    """A verdict in words."""

    verdict: verdicts.Verdict
    numbers: list[tuple[str, str]]
    strip: Strip | None
    doubt: str

    @property
    def text(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in self.numbers)


_ORDER: dict[str, int] = {"fails": 0, "undecided": 1, "holds": 2}


def cards(analysis: Analysis) -> list[Card]:
    """The verdicts, losses first."""
    found = sorted(analysis.verdicts, key=lambda v: _ORDER[v.state])
    return [_card(v, analysis.seconds_doubt if v.claim.is_time and v.estimate is not None else "") for v in found]


def _unit(claim: verdicts.Claim) -> tuple[float, str, Callable[[float], str]]:
    """The factor from a claim's θ to what is shown, the unit's name, and how it is written."""
    if claim.is_ratio:
        return 1.0, f"× {claim.reference}", lambda v: f"{v:.3f}"
    if claim.is_time:
        return 1.0, "s", lambda v: _minus(f"{v:.3g}")
    return 100.0, "points", lambda v: _minus(f"{v:{'+' if claim.reference else ''}.2f}")


def _card(v: verdicts.Verdict, doubt: str) -> Card:
    factor, unit, show = _unit(v.claim)

    def span(interval: stats.Interval) -> str:
        return f"{show(factor * interval.low)} to {show(factor * interval.high)} {unit}"

    numbers = []
    if v.estimate is not None:
        numbers.append(("estimate", f"{show(factor * v.estimate)} {unit}"))
    if v.interval is not None:
        numbers.append((f"{100 * v.interval.level:.4g} % interval", span(v.interval)))
    if v.family_interval is not None and v.family_interval.level != (v.interval and v.interval.level):
        numbers.append((f"Holm's {100 * v.family_interval.level:.4g} % interval", span(v.family_interval)))
    if v.two_way_interval is not None:
        numbers.append((f"over seeds and examples ({100 * v.two_way_interval.level:.4g} %)", span(v.two_way_interval)))
    if v.p is not None:
        numbers.append(("p, Holm", _p(v.p)))
    numbers.append(("seeds", f"{v.n} ({_seeds_text(v.seeds).split(' ', 1)[1]})" if v.n else "none"))
    return Card(v, numbers, _strip(v, factor, show), doubt)


def _strip(v: verdicts.Verdict, factor: float, show: Callable[[float], str]) -> Strip | None:
    if v.estimate is None:
        return None
    family, interval = _bounds(v.family_interval, factor), _bounds(v.interval, factor)
    borders = [factor * b for b in v.claim.region if math.isfinite(b)]
    points = [factor * v.estimate, *borders, *(family or ()), *(interval or ())]
    low, high = min(points), max(points)
    room = 0.08 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - room, high + room

    def at(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2)

    def both(ends: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if ends is None else (at(ends[0]), round(at(ends[1]) - at(ends[0]), 2))

    inside = both((factor * v.claim.region[0], factor * v.claim.region[1]))
    assert inside is not None
    marks = [(at(b), show(b)) for b in borders]
    return Strip(show(low), show(high), inside, marks, both(interval), both(family), at(factor * v.estimate))


def verdicts_table(analysis: Analysis) -> Table:
    columns = [
        Column("verdict", "verdict", False),
        Column("claim", "claim", False),
        Column("task", "task", False),
        Column("budget_percent", "budget, %"),
        Column("metric", "metric", False),
        Column("method", "method", False),
        Column("reference", "reference", False),
        Column("relation", "relation", False),
        Column("margin", "margin", False),
        Column("estimate", "estimate"),
        Column("low", "95 % interval"),
        Column("high", ""),
        Column("family_level", "Holm's level"),
        Column("family_low", "Holm's interval"),
        Column("family_high", ""),
        Column("p_holm", "p, Holm"),
        Column("seeds", "seeds"),
        Column("seeds_needed", "seeds needed"),
        Column("for_new_examples", "for new examples", False),
        Column("reason", "reason", False),
        Column("command", "command", False),
        Column("source", "source", False),
    ]
    rows = []
    for card in cards(analysis):
        v, c = card.verdict, card.verdict.claim
        margin = " to ".join(f"{m:g}" for m in c.margin) if isinstance(c.margin, tuple) else f"{c.margin:g}"
        interval, family = v.interval or (None, None, None), v.family_interval or (None, None, None)
        values: list[Any] = [
            v.state,
            c.statement,
            c.scope.task,
            c.scope.budget,
            c.metric,
            c.method,
            c.reference,
            c.relation,
        ]
        values += [margin, v.estimate, interval[0], interval[1], family[2], family[0], family[1], v.p, v.n, v.needed]
        values += [v.new_examples, v.reason, v.settle, c.source]
        rows.append([Entry("–" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x), x) for x in values])
    return Table("verdicts-table", "Claims", columns, rows)


# --- how it was done ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchPlots:
    run_id: str
    plots: list[tuple[str, str]]  # name and svg


def search_plots(study: Study) -> list[SearchPlots]:
    """The plots that `fwlora search` left for the study's runs."""
    out = []
    for run_id in dict.fromkeys(cell.run_id for cell in study.plan.cells):
        for name in dict.fromkeys((run_id, run_id.removesuffix("-best"))):
            plots = []
            for plot in ("history", "slices", "importances"):
                file = study.folder / name / "search" / f"{plot}.svg"
                with suppress(OSError, UnicodeDecodeError):
                    if file.stat().st_size <= _LARGEST_PLOT:
                        svg = figures.foreign(file.read_text(encoding="utf-8"))
                        if svg is not None:
                            plots.append((plot, figures.with_ids(svg, _slug("search", plot, name))))
            if plots:
                out.append(SearchPlots(name, plots))
                break
    return out


def environment(study: Study) -> list[tuple[str, list[tuple[str, int]]]]:
    """What the runs were made with: every value of every kind, and how many runs have it."""
    records = [run.record for run in study.runs if run.record]

    def machine(r: Record) -> str:
        m = r.machine
        return f"{m.device if m.device != 'cpu' else m.cpu}, {m.cores} cores, {m.threads} threads a process"

    def backbone(r: Record) -> str:
        b = r.backbone
        return f"{b.name}: {b.source}{f', commit {b.commit}' if b.commit else ''}, {b.parameters:,} parameters"

    kinds: dict[str, Callable[[Record], str]] = {
        "backbone": backbone,
        "data": lambda r: (
            f"{_task(r)}: {r.data_source}, scored on {r.evaluated_on} (fingerprint {r.data_fingerprint[:12]})"
        ),
        "machine": machine,
        "versions": lambda r: ", ".join(f"{name} {version}" for name, version in sorted(r.versions.items())),
        "engine": lambda r: "lanes" if _in_lanes(r) else "PEFT's layers",
        "source": lambda r: r.git_commit or "no git commit",
    }
    return [(kind, Counter(map(of, records)).most_common()) for kind, of in kinds.items()]


def run_grid(analysis: Analysis) -> tuple[list[int], list[tuple[Group, str, dict[int, Run]]]]:
    """All seeds, and for every cell its run by seed."""
    rows = [(g, method, {run.seed: run for run in runs}) for g in analysis.groups for method, runs in g.runs.items()]
    return sorted({seed for _, _, runs in rows for seed in runs}), rows


def missing_by_run(study: Study) -> list[tuple[str, str]]:
    by_run: dict[str, list[int]] = defaultdict(list)
    for run in study.runs:
        if run.state == "missing":
            by_run[run.cell.run_id].append(run.seed)
    return [(run_id, _seeds_text(seeds)) for run_id, seeds in by_run.items()]


# --- files --------------------------------------------------------------------------------------


def write_report(results_dir: str | Path) -> Path:
    """Write report.html and the files beside it; the page's path.

    Raises:
        UserError: there is nothing to report, a claim is not well formed, or a file cannot be written. The files of
            an earlier report then stay as they were.
    """
    study = read_study(results_dir)
    analysis = analyse(study)
    page = study.folder / "report.html"
    comparison = study.folder / "comparison"
    files = {
        comparison / "aggregated_metrics.json": _json(aggregated_metrics(analysis)),
        comparison / "seeds.csv": seeds_table(analysis).csv,
        comparison / "comparisons.csv": comparisons_table(analysis).csv,
        comparison / "verdicts.csv": verdicts_table(analysis).csv,
        comparison / "table.tex": latex_table(analysis),
        study.folder / "report.md": render_markdown(analysis),
    }
    for run_id, metrics in run_metrics(analysis).items():
        files[study.folder / run_id / "metrics.json"] = _json(metrics)
    files |= model_cards(analysis)
    files[page] = render_page(analysis)
    _write_all(files)
    return page


def _write_all(files: Mapping[Path, str]) -> None:
    """Write all files under temporary names, and only when that went well move them into place."""
    halves = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = next(iter(files))
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            halves[path].write_text(text, encoding="utf-8", newline="\n")
        for path, half in halves.items():
            half.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "the disk is full" if full else error.strerror or str(error)
        cure = "Free some space" if full else "Make the folder writable"
        raise UserError(f"{path}: the report cannot be written: {cause}. {cure}, and ask for it again.") from error
    finally:
        for half in halves.values():
            with suppress(OSError):
                half.unlink(missing_ok=True)


def _json(content: object) -> str:
    return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def run_metrics(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """For every run id with a complete run: the mean of each metric, and beside it spread, seeds and every value."""
    out = {}
    for g in analysis.groups:
        for method in g.runs:
            records = g.done(method)
            values: dict[str, dict[int, float]] = defaultdict(dict)
            for record in records:
                for name, value in record.metrics.items():
                    values[name][record.seed] = value
                if record.times is not None:
                    values["train_seconds"][record.seed] = record.times.train_seconds
            summaries = stats.summarize(values)
            if records:
                out[records[0].run_id] = {name: s.mean for name, s in summaries.items()} | {
                    "seeds": sorted(r.seed for r in records),
                    "sd": {name: s.sd for name, s in summaries.items()},
                    "by_seed": {name: {str(k): v for k, v in s.seeds.items()} for name, s in summaries.items()},
                }
    return out


def aggregated_metrics(analysis: Analysis) -> dict[str, Any]:
    """What AIRAS's evaluation writes: metrics[metric][run_id], the best proposed and baseline runs, and their gap.

    The gap is 100·(proposed − baseline)/|baseline|. AIRAS knows one task and one metric; here the top level is the
    first cell with both kinds of runs, and `cells` has them all. A run is a proposed one where its id says so
    ("proposed"), or, where no run's id does, if its method is fw_lora; all others are baselines, controls among them.
    """
    by_run = run_metrics(analysis)
    metrics: dict[str, dict[str, float]] = defaultdict(dict)
    for run_id, values in by_run.items():
        for name, value in values.items():
            if isinstance(value, float):
                metrics[name][run_id] = value
    named = any("proposed" in cell.run_id for cell in analysis.study.plan.cells)
    cells = []
    for g in analysis.groups:
        best: dict[bool, dict[str, Any] | None] = {True: None, False: None}
        for method, s in g.summaries.items():
            if s.mean is None:
                continue
            run_id = g.done(method)[0].run_id
            proposed = "proposed" in run_id if named else method == "fw_lora"
            there = best[proposed]
            if there is None or s.mean > there["value"]:
                best[proposed] = {"run_id": run_id, "value": s.mean}
        gap = None
        ours, theirs = best[True], best[False]
        if ours is not None and theirs is not None and theirs["value"] != 0:
            gap = 100 * (ours["value"] - theirs["value"]) / abs(theirs["value"])
        cells.append(
            {"task": g.task, "budget_percent": g.budget or None, "primary_metric": g.metric, "best_proposed": ours,
             "best_baseline": theirs, "gap": gap}
        )  # fmt: skip
    first = next((c for c in cells if c["best_proposed"] and c["best_baseline"]), cells[0])
    top = {key: first[key] for key in ("primary_metric", "best_proposed", "best_baseline", "gap")}
    return top | {"metrics": metrics, "cells": cells}


_TEX = {c: f"\\{c}" for c in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": r"\ensuremath{-}",
    "–": "--",
    "×": r"\ensuremath{\times}",
}


def latex(text: str) -> str:
    """Text as LaTeX shows it, on one line; what is not printable becomes a question mark."""
    return "".join(_TEX.get(c, c if c.isprintable() else "?") for c in " ".join(text.split()))


def latex_table(analysis: Analysis) -> str:
    """Means, differences from the reference and ratios of training seconds, for booktabs."""
    reference = analysis.study.plan.reference
    lines = [
        "% Written by `fwlora report`. Needs \\usepackage{booktabs}.",
        "% Metrics in points; intervals are 95 % t intervals over seeds; p is Holm's over all comparisons.",
        r"\begin{tabular}{lrlrrrrr}",
        r"\toprule",
        f"Task & Budget & Method & Seeds & Mean (interval) & Difference from {latex(reference)} & $p$ & Time \\\\",
    ]
    for g in analysis.groups:
        lines.append(r"\midrule")
        compared = {c.method: c for c in g.comparisons}
        for method, s in g.summaries.items():
            c = compared.get(method)
            ratio = g.ratios.get("train_seconds", {}).get(method)
            mean = _points(s.mean) + (f" ({_span(s.interval, _points)})" if s.interval else "")
            difference = "" if c is None else _points(c.mean, True)
            if c is not None and c.interval:
                difference += f" ({_span(c.interval, lambda v: _points(v, True))})"
            time = "1" if c is None else "" if ratio is None else _times(ratio.mean)
            cells = [g.task, _percent(g.budget), method, str(s.n), mean, difference]
            cells += ["" if c is None else _p(analysis.adjusted_p(g, method)), time]
            lines.append(" & ".join(map(latex, cells)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


# --- model cards --------------------------------------------------------------------------------

_HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
_GLUE = "nyu-mll/glue"
_OURS = re.compile(
    r"\n<!-- written by fwlora report from this run's record, sha256 ([0-9a-f]{64}) of what is above;.*-->\n*\Z"
)


def model_cards(analysis: Analysis) -> dict[Path, str]:
    """A card for each adapter that was kept and has none by a person."""
    out = {}
    for g in analysis.groups:
        for method in g.runs:
            for record in g.done(method):
                folder = RunDir(analysis.study.folder, record.run_id, record.seed).path / "adapter"
                if not (folder / "adapter_config.json").is_file():
                    continue
                card = folder / "README.md"
                try:
                    there = card.read_text(encoding="utf-8")
                except FileNotFoundError:
                    there = None
                except (OSError, UnicodeDecodeError):
                    continue
                if there is None or _is_ours(there) or _is_pefts(there):
                    out[card] = model_card(analysis, g, record)
    return out


def _is_ours(text: str) -> bool:
    """Whether this module wrote the card and nobody changed it since."""
    found = _OURS.search(text)
    return found is not None and found[1] == hashlib.sha256(text[: found.start()].encode()).hexdigest()


def _is_pefts(text: str) -> bool:
    """Whether the card is the form that PEFT leaves, with nothing filled in."""
    header, body = _front_matter(text)
    if header is None or not set(header) <= {"base_model", "library_name", "tags", "pipeline_tag"}:
        return False
    try:
        from huggingface_hub import ModelCard, ModelCardData

        form = ModelCard.from_template(ModelCardData()).text
    except (ImportError, OSError, ValueError):
        return False
    body = re.sub(r"\n### Framework versions\n+- PEFT [^\n]*", "", body)
    return body.split() == form.split()


def _front_matter(text: str) -> tuple[dict[str, Any] | None, str]:
    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if not found:
        return None, text
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return None, text
    return (header if isinstance(header, dict) else None), text[found.end() :]


def model_card(analysis: Analysis, g: Group, record: Record) -> str:
    """Metadata as the Hugging Face hub reads it, the record's numbers, how to load the adapter, and its limits."""
    model, data = record.config.get("model", {}), record.config.get("dataset", {})
    asked = str(model.get("pretrained_id", ""))
    on_hub = _HUB_NAMES.get(asked) or (asked if record.backbone.commit else None)
    glue = data.get("name") == "glue"
    method = next((m for m, runs in g.runs.items() if any(r.record is record for r in runs)), record.arm)
    name = f"{record.run_id}-seed-{record.seed}"
    split = {"dev": data.get("eval_split", "validation"), "selection": "train (selection part)"}[record.evaluated_on]
    dataset = {
        "name": f"GLUE {g.task}" if glue else g.task,
        "type": _GLUE if glue else str(data.get("name")),
        "split": split,
    }
    header: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["fwlora", record.arm],
        "metrics": [m for m in record.metrics],
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "text-classification"},
                        "dataset": dataset | ({"config": data.get("subset")} if glue else {}),
                        "metrics": [{"type": m, "value": v} for m, v in record.metrics.items()],
                    }
                ],
            }
        ],
    }
    if on_hub:
        header["base_model"] = on_hub
    if glue:
        header["datasets"] = [_GLUE]
    summary = g.summaries.get(method)
    text = (
        _environment()
        .get_template("card.md")
        .render(
            header=yaml.safe_dump(header, sort_keys=True, allow_unicode=True).strip(),
            record=record,
            method=method,
            group=g,
            summary=summary,
            base=on_hub or "PATH_OF_THE_BASE_MODEL",
            commit=record.backbone.commit,
            classes=_classes(RunDir(analysis.study.folder, record.run_id, record.seed).path),
            description=analysis.study.plan.methods.get(method, ""),
        )
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (
        f"{text}\n<!-- written by fwlora report from this run's record, sha256 {digest} of what is above; a card that "
        "was changed is not written again -->\n"
    )


def _classes(run: Path) -> int | None:
    with suppress(UserError):
        return load_predictions(run)[0].shape[1]
    return None


# --- the page -----------------------------------------------------------------------------------


def _markdown(text: object) -> str:
    """A value as it stands in a Markdown table: one line, nothing that is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


def _environment(html: bool = False) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: resources.files("fwlora_lab").joinpath("page", name).read_text("utf-8")
        ),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": _markdown, "points": _points, "p": _p, "percent": _percent, "words": _words, "seeds_text": _seeds_text,
        "minus": _minus,
    }  # fmt: skip
    return environment


def render_markdown(analysis: Analysis) -> str:
    return (
        _environment()
        .get_template("report.md")
        .render(
            analysis=analysis,
            study=analysis.study,
            headline=headline(analysis),
            cards=cards(analysis),
            tables=[t for t in (scores_table(analysis), comparisons_table(analysis), ratios_table(analysis)) if t.rows],
            failed=[run for run in analysis.study.runs if run.state in ("failed", "broken")],
            missing=missing_by_run(analysis.study),
            environment=environment(analysis.study),
        )
    )


def render_page(analysis: Analysis) -> str:
    study = analysis.study
    templates = resources.files("fwlora_lab").joinpath("page")
    script = templates.joinpath("report.js").read_text("utf-8")
    seeds, grid = run_grid(analysis)
    records = [run.record for run in study.runs if run.record]
    return _environment(html=True).get_template("report.html").render(
        analysis=analysis,
        study=study,
        plan=study.plan,
        headline=headline(analysis),
        counts=Counter(v.state for v in analysis.verdicts),
        cards=cards(analysis),
        verdicts_csv=verdicts_table(analysis).csv,
        scores=_pictures(score_pictures(analysis)),
        scores_table=scores_table(analysis),
        differences=_pictures(difference_pictures(analysis)),
        comparisons_table=comparisons_table(analysis),
        curves=_pictures(curve_pictures(analysis)),
        maps=[(m.where, _pictures(m.pictures)) for m in matrix_maps(analysis)],
        contrast_table=contrast_table(analysis),
        seconds=_pictures(seconds_pictures(analysis)),
        seconds_table=seconds_table(analysis),
        ratios_table=ratios_table(analysis),
        parameters_table=parameters_table(analysis),
        settings_table=settings_table(analysis),
        selection={k: v if isinstance(v, str) else json.dumps(v) for k, v in study.plan.selection.items()},
        searches=search_plots(study),
        seeds=seeds,
        grid=grid,
        seeds_table=seeds_table(analysis),
        failed=[run for run in study.runs if run.state in ("failed", "broken")],
        missing=missing_by_run(study),
        running=[run for run in study.runs if run.state == "running"],
        environment=environment(study),
        commands=Counter(r.command for r in records).most_common(),
        warnings=Counter(w for r in records for w in dict.fromkeys(r.warnings)).most_common(),
        until=max((r.finished for r in records), default=None),
        colours={method: figures.colour_of(i) for method, i in _colours(analysis).items()},
        style=templates.joinpath("report.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        draws=DRAWS,
        bootstrap_seed=BOOTSTRAP_SEED,
    )  # fmt: skip


def _pictures(found: Sequence[Picture]) -> list[Picture]:
    return [Picture(p.id, p.title, figures.with_ids(p.svg, p.id), p.text, p.csv) for p in found]
