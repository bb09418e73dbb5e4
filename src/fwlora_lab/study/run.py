"""Train a study: methods x budgets x tasks x seeds, in an order that makes its paired runs comparable.

A study is the set of its records: it trains what is missing, keeps what is complete, and refuses what was made with
another config or other data. Cells are trained a few seeds at a time, one method after the other. So the two runs of a
pair are trained close together in time, and runs share the lane engine only with runs of their own method: their
training times can be compared, and the seeds of one turn are one measurement. With `timing: exclusive` every run trains
alone, and each seed is a measurement.

results_dir/
    study.json                        the plan, a `records.study_plan.StudyPlan`
    <task>-<budget>-<method>/         the runs of a cell, as `train` writes them
    <task>-<budget>-<method>/search/  how its hyper-parameters were chosen, as `search` writes it
"""

from __future__ import annotations

from dataclasses import replace

from fwlora_lab.config.validation import with_values
from fwlora_lab.display.study_table import StudyTable
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import load_record
from fwlora_lab.records.record import Record
from fwlora_lab.records.study_plan import write_plan
from fwlora_lab.search.run import run_session
from fwlora_lab.search.session import open_session
from fwlora_lab.search.trials import params_of
from fwlora_lab.study.inventory import Inventory, run_folder, take_inventory
from fwlora_lab.study.plan import PlannedCell, PlannedStudy
from fwlora_lab.study.workers import train_in_processes
from fwlora_lab.training.device import pick_device
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.lane_trainer import max_lanes
from fwlora_lab.training.resources import ResourceCache
from fwlora_lab.training.scheduler import train_runs


def run_study(plan: PlannedStudy, workers: int = 1, resources: ResourceCache | None = None) -> list[Record]:
    """Tune where the study tunes, train what is missing, and return the records of all runs, in the plan's order.

    A run that fails is kept as failed and the others go on.

    Args:
        workers: how many processes train at once; 1 for runs that are timed alone.
        resources: data, tokens and backbones that this process has loaded already.

    Raises:
        UserError: a record with another config or other data is in the way, a worker died, a cell's trials all failed,
            or results cannot be written.
        KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM. Finished runs are kept, those in training leave checkpoints;
            the same call goes on.
    """
    plan.check_workers(workers)
    resources = resources or ResourceCache(pick_device())
    for cell in plan.cells:
        resources.task(cell.cfg.dataset)  # faults in the data are reported before anything is written
    write_plan(plan.results_dir, plan.as_record())
    plan = replace(plan, cells=tuple(tune_cell(cell, resources, workers) for cell in plan.cells))
    inventory = take_inventory(plan.cells, plan.seeds, resources)
    inventory.refuse_conflicts()
    exclusive = plan.study.timing == "exclusive"
    batches = _single_runs(plan, inventory) if exclusive else _batches_of_runs(plan, inventory, max_lanes())
    names = {cell.cfg.run_id: cell.name for cell in plan.cells}
    table = StudyTable(names, plan.seeds, sum(len(batch) for batch in batches))
    for record in inventory.complete.values():
        table.add_finished(record)
    if batches:
        with table.live():
            if workers == 1:
                for batch in batches:
                    train_runs(batch, table.on_event, resources=resources)
            else:
                train_in_processes(batches, min(workers, len(batches)), table.on_event)
    return [load_record(run_folder(cell, seed)) for cell in plan.cells for seed in plan.seeds]


def _batches_of_runs(plan: PlannedStudy, inventory: Inventory, max_seeds: int) -> list[list[RunSpec]]:
    """What is missing, in batches of one cell's runs: a few seeds of every method, then the next seeds."""
    batches = []
    for group in dict.fromkeys((cell.task, cell.budget) for cell in plan.cells):
        cells = [cell for cell in plan.cells if (cell.task, cell.budget) == group]
        for start in range(0, len(plan.seeds), max_seeds):
            for cell in cells:
                missing = inventory.missing(cell, plan.seeds[start : start + max_seeds])
                if missing:
                    batches.append(cell.runs(missing))
    return batches


def _single_runs(plan: PlannedStudy, inventory: Inventory) -> list[list[RunSpec]]:
    """What is missing, run by run: every method of a seed, in turn forwards and backwards.

    With the order reversed for every other seed, a machine that gets slower or faster treats the methods alike.
    """
    batches = []
    for group in dict.fromkeys((cell.task, cell.budget) for cell in plan.cells):
        cells = [cell for cell in plan.cells if (cell.task, cell.budget) == group]
        for place, seed in enumerate(plan.seeds):
            ordered = cells if place % 2 == 0 else cells[::-1]
            batches += [cell.runs([seed]) for cell in ordered if inventory.missing(cell, [seed])]
    return batches


def tune_cell(cell: PlannedCell, resources: ResourceCache, workers: int = 1) -> PlannedCell:
    """The cell with the values of its best trial; a search that was stopped is continued first.

    Raises:
        UserError: the stored study is one of another search, or none of the trials is complete.
    """
    if cell.search is None:
        return cell
    session = open_session(cell.search, resources)
    if session.missing():
        print(f"tuning {cell.name}: {cell.search.optuna.n_trials} trials", flush=True)
        run_session(session, workers)
    best = session.best()
    if best is None:
        raise UserError(
            f"{cell.name}: none of its trials was completed, see {cell.search.folder / 'trials.csv'}. "
            "Delete that folder to search again, or leave the method out with methods=."
        )
    return replace(cell, cfg=with_values(cell.cfg, params_of(best)))
