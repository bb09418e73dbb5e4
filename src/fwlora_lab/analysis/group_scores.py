"""The scores of all methods on one task at one budget, collected from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fwlora.config import warmup_in_steps
from fwlora_lab.analysis.measurements import Measurements, measurements_of
from fwlora_lab.analysis.resampling import Predictions, can_be_resampled
from fwlora_lab.analysis.statistics import Scores
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import RunFolder, load_predictions
from fwlora_lab.records.record import Record

# The seconds of a run by their kind, beside its task's metrics: see `group_scores`.
SECONDS_METRICS = ("train_seconds", "steady_seconds", "eval_seconds", "steady_step_seconds", "fisher_step_seconds")


@dataclass(frozen=True, eq=False)
class GroupScores:
    """What the complete runs of one task and one budget measured.

    Attributes:
        by_metric: `by_metric[metric][method][seed]`; seconds are among the metrics.
        predictions: of the primary metric; None if there are none that can be resampled.
        failed: by method, the seeds that failed and so have no score.
        measurements: by method and seed, which measurement the seconds belong to; seeds that are missing have one of
            their own each.
    """

    by_metric: Mapping[str, Scores]
    predictions: Predictions | None = None
    failed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    measurements: Measurements = field(default_factory=dict)


def group_scores(runs: Mapping[str, Sequence[Record]], results_dir: str | Path | None = None) -> GroupScores:
    """Collect the scores of the records `runs[method]` of one task and one budget.

    Besides the task's metrics these are train_seconds, steady_seconds and eval_seconds, and seconds per optimizer step
    of either phase: steady_step_seconds and fisher_step_seconds. For a method without a warm-up both are the same, so
    that a ratio to it is what a step of the warm-up costs.

    Args:
        results_dir: where predictions are read from; None reads none.

    Raises:
        UserError: the records differ in data, split or primary metric, or predictions cannot be read.
    """
    complete = {method: [r for r in records if r.status == "complete"] for method, records in runs.items()}
    failed = {m: tuple(sorted(r.seed for r in records if r.status == "failed")) for m, records in runs.items()}
    records = [record for of_method in complete.values() for record in of_method]
    _check_comparable(records)
    by_metric: dict[str, dict[str, dict[int, float]]] = {}
    for method, of_method in complete.items():
        for record in of_method:
            for metric, value in (record.metrics | _seconds(record)).items():
                by_metric.setdefault(metric, {}).setdefault(method, {})[record.seed] = value
    predictions = None
    if records and results_dir is not None:
        predictions = _predictions(records[0].primary_metric, complete, Path(results_dir))
    failed = {method: seeds for method, seeds in failed.items() if seeds}
    return GroupScores(by_metric, predictions, failed, measurements_of(complete))


def _check_comparable(records: Sequence[Record]) -> None:
    for record in records[1:]:
        for key in ("data_fingerprint", "evaluated_on", "primary_metric"):
            if getattr(record, key) != getattr(records[0], key):
                raise UserError(
                    f"{record.run_id} (seed {record.seed}) and {records[0].run_id} (seed {records[0].seed}) cannot "
                    f"be compared: their {key} differ. Train one of them again, or compare them in two studies."
                )


def _seconds(record: Record) -> dict[str, float]:
    times = record.times
    if times is None or record.steps == 0 or times.train_seconds <= 0:
        return {}
    seconds = {
        "train_seconds": times.train_seconds,
        "steady_seconds": times.steady_seconds,
        "eval_seconds": times.eval_seconds,
    }
    warmup_steps = 0
    if times.warmup_seconds > 0:
        warmup_steps = warmup_in_steps(record.config["fw_lora"]["warmup_steps"], record.total_steps)
    if 0 <= warmup_steps < record.steps:
        steady_step = times.steady_seconds / (record.steps - warmup_steps)
        seconds["steady_step_seconds"] = steady_step
        seconds["fisher_step_seconds"] = times.warmup_seconds / warmup_steps if warmup_steps else steady_step
    return {name: value for name, value in seconds.items() if value > 0}


def _predictions(metric: str, runs: Mapping[str, Sequence[Record]], folder: Path) -> Predictions | None:
    outputs: dict[str, dict[int, np.ndarray]] = {}
    common_labels = None
    for method, records in runs.items():
        for record in records:
            path = RunFolder(folder, record.run_id, record.seed).path
            if not (path / "predictions.npz").exists():
                continue
            logits, labels = load_predictions(path)
            if not can_be_resampled(metric, logits.shape[1]):
                return None
            if common_labels is not None and not np.array_equal(common_labels, labels):
                raise UserError(f"{path / 'predictions.npz'}: its labels are not those of the other runs.")
            common_labels = labels
            predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
            outputs.setdefault(method, {})[record.seed] = predicted
    return None if common_labels is None else Predictions(metric, common_labels, outputs)
