"""TODO"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fwlora_lab.analysis import statistics
from fwlora_lab.analysis.study import Analysis


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
            summaries = statistics.summarize(values)
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
