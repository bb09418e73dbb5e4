"""The runs of a results folder as a study: each run's record or the reason that it has none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import BrokenRecord, RunFolder, find_records
from fwlora_lab.records.record import Record
from fwlora_lab.records.study_plan import StudyCell, StudyPlan, load_plan

RunState = Literal["complete", "failed", "broken", "running", "missing"]
_KNOWN_ORDER = {"lora": 0, "adalora": 1, "fw_lora": 2}  # other methods follow by name


@dataclass(frozen=True)
class RunResult:
    """One seed of a cell.

    Attributes:
        state: "broken" if the record cannot be read; "running" while a process holds the run's lock.
        record: of a complete or failed run; of a running one that failed before.
        message: why a run is failed or broken.
    """

    cell: StudyCell
    seed: int
    state: RunState
    record: Record | None = None
    message: str = ""

    @property
    def complete_record(self) -> Record | None:
        """The record if the run is complete."""
        return self.record if self.state == "complete" else None


@dataclass(frozen=True)
class StudyResults:
    """A results folder as a study.

    Attributes:
        plan: that of study.json, or one derived from the records.
        is_planned: whether there is a study.json.
        runs: one for each cell and seed of the plan.
        notes: what else was found in the folder.
    """

    folder: Path
    plan: StudyPlan
    is_planned: bool
    runs: tuple[RunResult, ...]
    notes: tuple[str, ...]

    @property
    def complete_records(self) -> list[Record]:
        return [record for run in self.runs if (record := run.complete_record)]

    @property
    def records(self) -> list[Record]:
        """Those of complete and of failed runs."""
        return [run.record for run in self.runs if run.record]

    def count(self, state: RunState) -> int:
        return sum(run.state == state for run in self.runs)


def read_study(results_dir: str | Path) -> StudyResults:
    """Read all records and the plan of a results folder.

    Raises:
        UserError: the folder does not exist, has neither records nor a plan, or study.json cannot be read.
    """
    folder = Path(results_dir)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder. `fwlora train` and `fwlora compare` write into results_dir."
        )
    found, broken = find_records(folder)
    written_plan = load_plan(folder)
    if written_plan is None and not found:
        unreadable = f" What is there cannot be read: {broken[0].message}" if broken else ""
        raise UserError(f"{folder}: there are no records here, so there is nothing to report.{unreadable}")
    plan = written_plan or _derived_plan(found)
    records = {(record.run_id, record.seed): record for record in found}
    broken_files = {record.path: record for record in broken}
    runs = []
    for cell in plan.cells:
        for seed in _seeds_of_any_method(plan, cell, records) if written_plan is None else plan.seeds:
            run_folder = RunFolder(folder, cell.run_id, seed)
            unreadable = broken_files.get(run_folder.path / "record.json")
            runs.append(_run_result(run_folder, cell, seed, records.get((cell.run_id, seed)), unreadable))
    notes = _notes(runs, found, records, broken)
    return StudyResults(folder, plan, written_plan is not None, tuple(runs), tuple(notes))


def _run_result(
    folder: RunFolder, cell: StudyCell, seed: int, record: Record | None, broken: BrokenRecord | None
) -> RunResult:
    if record is not None and record.status == "complete":
        return RunResult(cell, seed, "complete", record)
    if folder.is_locked():
        return RunResult(cell, seed, "running", record)
    if record is not None:
        message = record.error.message if record.error else "the record does not say why"
        return RunResult(cell, seed, "failed", record, message)
    if broken is not None:
        return RunResult(cell, seed, "broken", message=broken.message)
    return RunResult(cell, seed, "missing")


def _notes(
    runs: Sequence[RunResult],
    found: Sequence[Record],
    records: Mapping[tuple[str, int], Record],
    broken: Sequence[BrokenRecord],
) -> list[str]:
    """What was found in the folder and is not part of the study."""
    notes = []
    if len(records) < len(found):
        notes.append(
            f"{len(found) - len(records)} records are in two folders (same run id and seed); one of each is used."
        )
    planned = {(run.cell.run_id, run.seed) for run in runs}
    seeds_left_out: dict[str, list[int]] = defaultdict(list)
    for run_id, seed in records:
        if (run_id, seed) not in planned:
            seeds_left_out[run_id].append(seed)
    if seeds_left_out:
        names = ", ".join(f"{run_id} ({seeds_text(seeds)})" for run_id, seeds in seeds_left_out.items())
        notes.append(f"Not part of this study, and left out: {names}.")
    shown = {run.message for run in runs}
    return notes + [f"Left out: {record.message}" for record in broken if record.message not in shown]


def _derived_plan(found: Sequence[Record]) -> StudyPlan:
    """A plan for runs that nobody planned as a study: the tasks, budgets and methods of the records, no claims."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        runs[record.run_id].append(record)
    tasks = {run_id: task_of(records[0]) for run_id, records in runs.items()}
    budgets = _budgets(runs, tasks)
    method_counts = Counter((tasks[r], budgets[r], records[0].method) for r, records in runs.items())
    cells = []
    for run_id, records in runs.items():
        task, budget, method = tasks[run_id], budgets[run_id], records[0].method
        # Two runs of one method on one task at one budget differ in their settings: their run ids tell them apart.
        name = method if method_counts[task, budget, method] == 1 else run_id
        cells.append(StudyCell(task=task, budget=budget, method=name, run_id=run_id))
    methods = sorted({c.method for c in cells}, key=lambda m: (_KNOWN_ORDER.get(m, len(_KNOWN_ORDER)), m))
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


def _seeds_of_any_method(plan: StudyPlan, cell: StudyCell, records: Mapping[tuple[str, int], Record]) -> list[int]:
    """The seeds of any method on the cell's task at its budget, because a pair needs both methods' runs."""
    run_ids = {c.run_id for c in plan.cells if (c.task, c.budget) == (cell.task, cell.budget)}
    return sorted({seed for run_id, seed in records if run_id in run_ids})


def _budgets(runs: Mapping[str, Sequence[Record]], tasks: Mapping[str, str]) -> dict[str, float]:
    """Each run id's budget in percent; 0 if it is unknown."""
    budgets = {run_id: _budget(records) for run_id, records in runs.items()}
    for run_id, budget in budgets.items():
        if budget is None:  # all of its runs failed before their parameters were counted: join the task's other runs
            known = [b for other, b in budgets.items() if b is not None and tasks[other] == tasks[run_id]]
            budgets[run_id] = min(known, default=0.0)
    return {run_id: budget or 0.0 for run_id, budget in budgets.items()}


def _budget(records: Sequence[Record]) -> float | None:
    """The percent that the config asks for, or else the percent that was used, rounded to two digits."""
    for record in records:
        asked = record.config.get("model", {}).get("parameter_budget_percent")
        if asked is not None:
            return float(asked)
        if record.parameters is not None:
            return float(f"{record.parameters.percent:.2g}")
    return None


def task_of(record: Record) -> str:
    """The name of the run's task, such as `cola` or `offline`."""
    data = record.config.get("dataset", {})
    return str(data.get("subset") or data.get("name") or "unknown")


def percent(budget: float) -> str:
    """A budget as it is shown."""
    return f"{budget:g} %" if budget > 0 else "a budget not known"


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds as they are shown, three and more in a row as a range: "seeds 0–5, 7"."""
    ranges: list[list[int]] = []
    for seed in sorted(seeds):
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1].append(seed)
        else:
            ranges.append([seed])
    texts = [f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in ranges]
    return f"seed{'s' if sum(map(len, ranges)) > 1 else ''} {', '.join(texts)}" if texts else "no seed"
