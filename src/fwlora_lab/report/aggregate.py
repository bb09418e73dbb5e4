"""The metrics of runs as AIRAS reads them: one file for each run, and one that compares them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from fwlora_lab.analysis import statistics
from fwlora_lab.analysis.study import Analysis, Cell, Group


def run_metrics(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """For every run id with a complete run: the mean of each metric, then its spread, the seeds and all values."""
    return {cell.records[0].run_id: _run_metrics(cell) for cell in analysis.cells if cell.records}


def _run_metrics(cell: Cell) -> dict[str, Any]:
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for record in cell.records:
        for name, value in record.metrics.items():
            values[name][record.seed] = value
        if record.times is not None:
            values["train_seconds"][record.seed] = record.times.train_seconds
    summaries = statistics.summarize(values)
    return {name: summary.mean for name, summary in summaries.items()} | {
        "seeds": sorted(record.seed for record in cell.records),
        "sd": {name: summary.sd for name, summary in summaries.items()},
        "by_seed": {name: {str(k): v for k, v in summary.by_seed.items()} for name, summary in summaries.items()},
    }


def aggregated_metrics(analysis: Analysis) -> dict[str, Any]:
    """What AIRAS's evaluation writes: metrics[metric][run_id], the best proposed and baseline runs, and their gap.

    AIRAS knows one task and one metric: the top level is the first group that has runs of both kinds, and `cells` has
    all groups. A run is a proposed one if its id contains "proposed" or, if no run's id does, if its method is fw_lora;
    all others, controls included, are baselines.
    """
    metrics: dict[str, dict[str, float]] = defaultdict(dict)
    for run_id, values in run_metrics(analysis).items():
        for name, value in values.items():
            if isinstance(value, float):
                metrics[name][run_id] = value
    run_ids_tell = any("proposed" in cell.run_id for cell in analysis.study.plan.cells)

    def is_proposed(cell: Cell) -> bool:
        return "proposed" in cell.records[0].run_id if run_ids_tell else cell.method == "fw_lora"

    groups = [_best_runs(group, is_proposed) for group in analysis.groups]
    first = next((g for g in groups if g["best_proposed"] and g["best_baseline"]), groups[0])
    top = {key: first[key] for key in ("primary_metric", "best_proposed", "best_baseline", "gap")}
    return top | {"metrics": metrics, "cells": groups}


def _best_runs(group: Group, is_proposed: Callable[[Cell], bool]) -> dict[str, Any]:
    """The best run of either kind, and the gap 100 · (proposed − baseline) / |baseline|."""
    cells = [cell for cell in group.cells if cell.summary.mean is not None]
    proposed = _best([cell for cell in cells if is_proposed(cell)])
    baseline = _best([cell for cell in cells if not is_proposed(cell)])
    gap = None
    if proposed is not None and baseline is not None and baseline["value"] != 0:
        gap = 100 * (proposed["value"] - baseline["value"]) / abs(baseline["value"])
    return {
        "task": group.task,
        "budget_percent": group.budget or None,
        "primary_metric": group.metric,
        "best_proposed": proposed,
        "best_baseline": baseline,
        "gap": gap,
    }


def _best(cells: list[Cell]) -> dict[str, Any] | None:
    """The first cell with the highest mean."""
    if not cells:
        return None
    best = max(cells, key=lambda cell: cell.summary.mean or 0.0)
    return {"run_id": best.records[0].run_id, "value": best.summary.mean}
