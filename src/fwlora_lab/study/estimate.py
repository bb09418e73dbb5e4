"""The dry run of a study: what of it is complete, what is left to do, and about how long that takes."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fwlora.config import warmup_in_steps
from fwlora_lab.config.checks import check_warmup
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.display.width import shorten
from fwlora_lab.errors import UserError
from fwlora_lab.search.session import open_study
from fwlora_lab.search.trials import finished
from fwlora_lab.study.inventory import take_inventory
from fwlora_lab.study.plan import PlannedCell, PlannedStudy
from fwlora_lab.study.run import tune_cell
from fwlora_lab.training.device import pick_device
from fwlora_lab.training.jobs import RunSpec, examples_per_step, steps_per_epoch
from fwlora_lab.training.resources import ResourceCache
from fwlora_lab.training.scheduler import train_runs

_MAX_NAME_WIDTH = 37
_PROBE_STEPS = 12
_PROBE_WARMUP = 0.5  # FW-LoRA's two phases get half of the probe's steps each


@dataclass(frozen=True)
class Estimate:
    """A cell's runs that are complete, its runs and trials to do, and about how many seconds they take one process."""

    cell: PlannedCell
    done: int
    runs: int
    trials: int
    seconds: float


def estimate(plan: PlannedStudy, resources: ResourceCache | None = None) -> Iterator[Estimate]:
    """Each cell in turn, its seconds from a few real steps; writes nothing in the results folder.

    Every cell is measured twice, a round of all cells after the other, and the lower value counts: what else the
    machine does for a moment then hardly makes one method look slower than the others.
    """
    resources = resources or ResourceCache(pick_device())
    trials = {cell.cfg.run_id: _missing_trials(cell) for cell in plan.cells}
    # Tuned values are part of a run's config: complete runs can be told only when the tuning is finished.
    ready = [tune_cell(cell, resources) for cell in plan.cells if not trials[cell.cfg.run_id]]
    inventory = take_inventory(ready, plan.seeds, resources)
    missing = {cell.cfg.run_id: len(inventory.missing(cell, plan.seeds)) for cell in plan.cells}
    to_do = [cell for cell in plan.cells if missing[cell.cfg.run_id] or trials[cell.cfg.run_id]]
    first = {cell.cfg.run_id: _seconds_of_a_run(cell.cfg, plan.seeds[0], resources) for cell in to_do}
    for cell in plan.cells:
        runs, to_tune, seconds = missing[cell.cfg.run_id], trials[cell.cfg.run_id], 0.0
        if cell in to_do:
            again = _seconds_of_a_run(cell.cfg, plan.seeds[0], resources)
            seconds = (runs + to_tune) * min(first[cell.cfg.run_id], again)
        yield Estimate(cell, len(plan.seeds) - runs, runs, to_tune, seconds)


def dry_run_lines(plan: PlannedStudy) -> Iterator[str]:
    """The estimates as a table that fits 80 columns, each line as soon as its cell is measured."""
    name_width = min(max(len(cell.name) for cell in plan.cells), _MAX_NAME_WIDTH)
    columns = f"{{:{name_width}}}  {{:>8}}  {{:>9}}  {{:>11}}  {{:>7}}"
    yield columns.format("cell", "complete", "runs left", "trials left", "minutes")
    total = 0.0
    for row in estimate(plan):
        name = shorten(row.cell.name, name_width)
        yield columns.format(name, row.done, row.runs, row.trials, f"{row.seconds / 60:.1f}")
        total += row.seconds
    seeds = ", ".join(map(str, plan.seeds))
    yield from textwrap.wrap(f"about {total / 60:.0f} minutes in one process, seeds {seeds}; nothing was trained", 80)


def _missing_trials(cell: PlannedCell) -> int:
    """How many trials the tuning of this cell has yet to train; a study that does not exist is not made."""
    if cell.search is None:
        return 0
    n_trials = cell.search.optuna.n_trials
    if not (cell.search.folder / "study.db").exists():
        return n_trials
    return max(0, n_trials - len(finished(open_study(cell.search).trials())))


def _seconds_of_a_run(cfg: RunConfig, seed: int, resources: ResourceCache) -> float:
    """From the same run over a few batches, alone.

    On a CPU, runs that train at the same time hardly change each other's time per run; on a GPU it gets less.
    """
    examples = len(resources.task(cfg.dataset).train)
    steps = steps_per_epoch(cfg, examples) * cfg.training.epochs
    changes: dict[str, Any] = {
        "dataset.train_examples": max(min(examples, _PROBE_STEPS * examples_per_step(cfg)), 2),
        "training.epochs": 1,
        "training.save_adapter": False,
    }
    warmup = 0
    if cfg.method_name == "fw_lora":
        check_warmup(cfg, steps, examples)
        warmup = warmup_in_steps(cfg.fw_lora.warmup_steps, steps)
        changes |= {"fw_lora.warmup_steps": _PROBE_WARMUP, "fw_lora.fisher_start": 0}
    with tempfile.TemporaryDirectory() as folder:
        probe = with_values(cfg, changes | {"results_dir": folder})
        (record,) = train_runs([RunSpec(probe, seed)], resources=resources)
    if record.times is None or record.error is not None:
        message = record.error.message if record.error else "no time was recorded"
        raise UserError(f"{cfg.run_id}: the probe failed: {message}")
    times = record.times
    probe_warmup = round(_PROBE_WARMUP * record.steps) if warmup else 0
    seconds = times.eval_seconds * cfg.training.epochs
    seconds += times.steady_seconds / max(1, record.steps - probe_warmup) * (steps - warmup)
    if probe_warmup:
        seconds += times.warmup_seconds / probe_warmup * warmup
    return seconds
