"""TODO"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fwlora.config import warmup_in_steps
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.data.load import load_task
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import status_of
from fwlora_lab.search.trials import is_counted
from fwlora_lab.study.plan import PlannedCell, PlannedStudy
from fwlora_lab.study.run import tune_cell
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_runs

_PROBE_STEPS = 12


@dataclass(frozen=True)
class Estimate:
    """What of a cell is there, what is to do, and about how many seconds that takes one process."""

    cell: PlannedCell
    done: int
    runs: int
    trials: int
    seconds: float


def estimate(plan: PlannedStudy) -> Iterator[Estimate]:
    """Each cell in turn, its seconds from a few real steps; writes nothing in the results folder."""
    for cell in plan.cells:
        task = load_task(cell.cfg.dataset)
        done = sum(status_of(cell.cfg, seed, None) == "complete" for seed in plan.seeds) if cell.search is None else 0
        trials = 0
        if cell.search is not None:
            # Tuned values are part of a run's config: what is there counts once the tuning is through.
            path = cell.search.folder / "study.db"
            finished = 0
            if path.exists():
                shared = cell.search.shared_study()
                finished = sum(t.state.is_finished() and is_counted(t) for t in shared.trials())
                if finished >= cell.search.optuna.n_trials:
                    tuned = tune_cell(cell, 1)
                    done = sum(status_of(tuned.cfg, seed, task.fingerprint) == "complete" for seed in plan.seeds)
            trials = max(0, cell.search.optuna.n_trials - finished)
        runs = len(plan.seeds) - done
        seconds = 0.0
        if runs or trials:
            seconds = (runs + trials) * _seconds_of_a_run(cell.cfg, len(task.train), plan.seeds[0])
        yield Estimate(cell, done, runs, trials, seconds)


def _seconds_of_a_run(cfg: RunConfig, examples: int, seed: int) -> float:
    """From the same run over a few batches, alone: on a CPU neighbours hardly change its share, on a GPU it is less."""
    training = cfg.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    steps = -(-examples // per_step) * training.epochs
    few = min(examples, _PROBE_STEPS * per_step)
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {
            "results_dir": folder,
            "dataset.train_examples": max(few, 2),
            "training.epochs": 1,
            "training.save_adapter": False,
        }
        fisher = 0
        if cfg.method_name == "fw_lora":
            fisher = warmup_in_steps(cfg.fw_lora.warmup_steps, steps)
            changes |= {"fw_lora.warmup_steps": 0.5, "fw_lora.fisher_start": 0}
        probe = with_values(cfg, changes)
        (record,) = train_runs([RunSpec(probe, seed)])
    if record.times is None or record.error is not None:
        message = record.error.message if record.error else "no time was recorded"
        raise UserError(f"{cfg.run_id}: the probe failed: {message}")
    times = record.times
    of_fisher = round(0.5 * record.steps) if fisher else 0
    seconds = times.eval_seconds * training.epochs
    seconds += times.steady_seconds / max(1, record.steps - of_fisher) * (steps - fisher)
    if of_fisher:
        seconds += times.warmup_seconds / of_fisher * fisher
    return seconds
