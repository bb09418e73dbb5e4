"""Methods × budgets × tasks × seeds: what a study trains, in an order that makes its pairs comparable, resumable.

A study is the set of its records: it trains what is missing, leaves what is there, and refuses what was made with
another config or other data. Cells are trained a few seeds at a time, one method after the other, so that a pair's
two runs stand near each other in time, and every lane has a neighbour of its own method: their seconds compare.

results_dir/
    study.json                        the plan, a `records.StudyPlan`
    <task>-<budget>-<method>/         the runs of a cell, as `train` writes them
    <task>-<budget>-<method>/search/  how its hyper-parameters were chosen, as `search` writes it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fwlora_lab.config.validation import with_values
from fwlora_lab.data.load import load_task
from fwlora_lab.display.study_table import StudyTable
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import RunDir, differences, load_record, status_of
from fwlora_lab.records.record import Record
from fwlora_lab.records.study_plan import write_plan
from fwlora_lab.search.results import best_of
from fwlora_lab.search.run import run_search
from fwlora_lab.search.trials import is_counted, params_of
from fwlora_lab.study.plan import PlannedCell, PlannedStudy
from fwlora_lab.study.workers import train_in_processes
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.lane_trainer import max_lanes
from fwlora_lab.training.scheduler import train_runs


def run_study(plan: PlannedStudy, jobs: int = 1) -> list[Record]:
    """Tune where the study tunes, train what is missing, and return the records of all runs, in the plan's order.

    `jobs` processes train at once. A run that fails is kept as failed and the others go on.

    Raises:
        UserError: a record with another config or other data is in the way, a worker died, a cell's trials all failed,
            or results cannot be written.
        KeyboardInterrupt: what is finished is kept; the same call goes on.
    """
    data = {cell.task: load_task(cell.cfg.dataset).fingerprint for cell in plan.cells}
    write_plan(plan.results_dir, plan.as_record())
    plan = replace(plan, cells=tuple(tune_cell(cell, jobs) for cell in plan.cells))
    cohorts = _cohorts(plan, data)
    board = StudyTable({cell.cfg.run_id: cell.name for cell in plan.cells}, plan.seeds, sum(len(c) for c in cohorts))
    for cell in plan.cells:
        for seed in plan.seeds:
            if status_of(cell.cfg, seed, data[cell.task]) == "complete":
                board.there(load_record(_folder(cell, seed)))
    if cohorts:
        with board.live():
            if jobs == 1:
                for cohort in cohorts:
                    train_runs(cohort, board.hear)
            else:
                train_in_processes(cohorts, min(jobs, len(cohorts)), board.hear)
    return [load_record(_folder(cell, seed)) for cell in plan.cells for seed in plan.seeds]


def _folder(cell: PlannedCell, seed: int) -> Path:
    return RunDir(cell.cfg.results_dir, cell.cfg.run_id, seed).path


def _cohorts(plan: PlannedStudy, data: Mapping[str, str]) -> list[list[RunSpec]]:
    """What is missing, as cohorts of one cell's runs: a few seeds of every method, then the next seeds.

    Raises:
        UserError: a finished run has another config or other data.
    """
    at_once = max_lanes()
    groups = dict.fromkeys((cell.task, cell.budget) for cell in plan.cells)
    cohorts = []
    for group in groups:
        cells = [cell for cell in plan.cells if (cell.task, cell.budget) == group]
        for start in range(0, len(plan.seeds), at_once):
            for cell in cells:
                missing = []
                for seed in plan.seeds[start : start + at_once]:
                    status = status_of(cell.cfg, seed, data[cell.task])
                    if status == "different":
                        path = _folder(cell, seed)
                        reasons = differences(cell.cfg, load_record(path), data[cell.task])
                        raise UserError(
                            f"{path} holds a finished run of another kind: {'; '.join(reasons)}. "
                            "Set another results_dir, or delete that folder."
                        )
                    if status != "complete":
                        missing.append(seed)
                if missing:
                    cohorts.append(cell.runs(missing))
    return cohorts


def tune_cell(cell: PlannedCell, jobs: int) -> PlannedCell:
    """The cell with the best of its trials' values; its search goes on where it was stopped."""
    search = cell.search
    if search is None:
        return cell
    shared = search.shared_study()
    shared.bind(search.identity(load_task(search.base.dataset).fingerprint))
    done = sum(trial.state.is_finished() and is_counted(trial) for trial in shared.trials())
    if done < search.optuna.n_trials:
        print(f"tuning {cell.name}: {search.optuna.n_trials} trials", flush=True)
        run_search(search.given, jobs)
    best = best_of(shared.trials(), search.optuna.direction)
    if best is None:
        raise UserError(
            f"{cell.name}: none of its trials was completed, see {search.folder / 'trials.csv'}. "
            "Delete that folder to search anew, or leave the method out with methods=."
        )
    return replace(cell, cfg=with_values(cell.cfg, params_of(best)))
