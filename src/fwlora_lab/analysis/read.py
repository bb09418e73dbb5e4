"""TODO"""

from __future__ import annotations

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import RunDir, find_records
from fwlora_lab.records.record import Record
from fwlora_lab.records.study_plan import StudyCell, StudyPlan, load_plan

RunStatus = Literal["complete", "failed", "broken", "running", "missing"]


def seeds_at(plan: StudyPlan, cell: StudyCell, records: Mapping[tuple[str, int], Record]) -> list[int]:
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


SHARED = 0.05  # of the shorter run: two runs that overlap less, as at a handover, did not slow each other


@dataclass(frozen=True)
class RunResult:
    """One seed of a cell: its record, where there is one, and otherwise what is known (`message`)."""

    cell: StudyCell
    seed: int
    state: RunStatus
    record: Record | None = None
    message: str = ""

    @property
    def done(self) -> Record | None:
        """The record, where it is of a complete run."""
        return self.record if self.state == "complete" else None


@dataclass(frozen=True)
class StudyResults:
    """A results folder as a study: its plan, written or derived, and all of the plan's runs."""

    folder: Path
    plan: StudyPlan
    written: bool  # whether study.json says so
    runs: tuple[RunResult, ...]
    notes: tuple[str, ...]  # what else was found

    @property
    def done(self) -> list[Record]:
        return [run.done for run in self.runs if run.done]

    def count(self, state: RunStatus) -> int:
        return sum(run.state == state for run in self.runs)


def read_study(results_dir: str | Path) -> StudyResults:
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
        for seed in plan.seeds if written else seeds_at(plan, cell, records):
            runs.append(_run(folder, cell, seed, records.get((cell.run_id, seed)), broken))
    planned = {(run.cell.run_id, run.seed) for run in runs}
    others = [key for key in records if key not in planned]
    if others:
        by_run = {run_id: seeds_text(s for r, s in others if r == run_id) for run_id, _ in others}
        told = ", ".join(f"{run_id} ({seeds})" for run_id, seeds in by_run.items())
        notes.append(f"Not part of this study, and left out: {told}.")
    told_of = {run.message for run in runs}
    notes += [f"Left out: {message}" for message in broken if message not in told_of]
    return StudyResults(folder, plan, written, tuple(runs), tuple(notes))


def _run(folder: Path, cell: StudyCell, seed: int, record: Record | None, broken: Sequence[str]) -> RunResult:
    if record is not None and record.status == "complete":
        return RunResult(cell, seed, "complete", record)
    path = RunDir(folder, cell.run_id, seed).path
    if _is_held(path.parent / f".{path.name}.lock"):
        return RunResult(cell, seed, "running", record)
    if record is not None:
        return RunResult(cell, seed, "failed", record, record.error.message if record.error else "it does not say why")
    for message in broken:
        if message.startswith(f"{path / 'record.json'}:"):
            return RunResult(cell, seed, "broken", message=message)
    return RunResult(cell, seed, "missing")


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
    places = Counter((tasks[r], budgets[r], records[0].method) for r, records in runs.items())
    cells = []
    for run_id, records in runs.items():
        task, budget, arm = tasks[run_id], budgets[run_id] or 0.0, records[0].method
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
        reference=next((c.method for c in cells if runs[c.run_id][0].method == "lora"), methods[0]),
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


def percent(budget: float) -> str:
    return f"{budget:g} %" if budget > 0 else "a budget not known"
