"""The report's tables of scores, comparisons, seconds, parameters, runs and verdicts.

Metrics are given in points (hundredths), seconds in seconds, ratios as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fwlora_lab.analysis.intervals import Interval
from fwlora_lab.analysis.statistics import Comparison
from fwlora_lab.analysis.study import LEVEL, Analysis, Cell
from fwlora_lab.report.cards import losses_first
from fwlora_lab.report.formatting import (
    SECONDS_OF,
    minus,
    p_value,
    points,
    ratio,
    seconds,
    signed_points,
    words,
)
from fwlora_lab.report.table import (
    BUDGET,
    CELL,
    METHOD,
    SEEDS,
    TASK,
    Column,
    Entry,
    Row,
    Table,
    cell_entries,
    count_entry,
    interval_columns,
    interval_entries,
    number_entry,
    plain_entry,
    points_entry,
    text_entry,
)


def mean_of(values: Iterable[float]) -> float | None:
    """None without a value."""
    values = [*values]
    return sum(values) / len(values) if values else None


_SCORES = (
    *CELL,
    Column("metric", "metric", numeric=False),
    SEEDS,
    Column("mean_points", "mean, points"),
    Column("sd_points", "sd, points"),
    *interval_columns("low_points", "high_points", "95 % interval, points"),
    Column("every_seed", "every seed, points", numeric=False),
)


def scores_table(analysis: Analysis) -> Table:
    """Every cell's mean of the primary metric."""
    rows = [_scores_row(cell) for cell in analysis.cells]
    return Table("scores-table", "Mean over seeds, after the last epoch", _SCORES, rows)


def _scores_row(cell: Cell) -> Row:
    summary = cell.summary
    every_seed = " ".join(f"{100 * score:.2f}" for score in summary.by_seed.values())
    return {
        **cell_entries(cell),
        "metric": text_entry(words(cell.metric)),
        "seeds": count_entry(summary.n),
        "mean_points": points_entry(summary.mean),
        "sd_points": points_entry(summary.sd),
        **interval_entries("low_points", "high_points", summary.interval, points, 100),
        "every_seed": Entry(minus(every_seed) or "–", every_seed),
    }


_COMPARISONS = (
    *CELL,
    Column("pairs", "pairs"),
    Column("mean_difference_points", "mean difference, points"),
    *interval_columns("t_low_points", "t_high_points", "95 % t interval, points"),
    *interval_columns("two_way_low_points", "two_way_high_points", "95 % two-way interval, points"),
    Column("p", "p, paired t"),
    Column("sign_flip_p", "p, sign flip"),
    Column("holm_p", "p, Holm"),
    Column("hedges_g", "Hedges g"),
    Column("remark", "remark", numeric=False),
)


def comparisons_table(analysis: Analysis) -> Table:
    """Paired differences from the reference, the largest loss first."""
    compared = [(cell, cell.comparison) for cell in analysis.cells if cell.comparison]
    compared.sort(key=lambda pair: math.inf if pair[1].mean is None else pair[1].mean)
    caption = f"Paired differences from {analysis.reference}, largest loss first"
    rows = [_comparison_row(cell, comparison) for cell, comparison in compared]
    return Table("comparisons-table", caption, _COMPARISONS, rows)


def _comparison_row(cell: Cell, comparison: Comparison) -> Row:
    flip, remark = comparison.sign_flip, comparison.undefined_reason or ""
    if flip and flip.smallest > 1 - LEVEL:
        remark = f"{comparison.n} pairs: the sign flip's p cannot be below {flip.smallest:g}"
    flip_p = flip.p if flip else None
    return {
        **cell_entries(cell),
        "pairs": count_entry(comparison.n),
        "mean_difference_points": points_entry(comparison.mean, signed_points),
        **interval_entries("t_low_points", "t_high_points", comparison.interval, signed_points, 100),
        **interval_entries("two_way_low_points", "two_way_high_points", comparison.two_way, signed_points, 100),
        "p": Entry(p_value(comparison.p), comparison.p),
        "sign_flip_p": Entry(p_value(flip_p), flip_p),
        "holm_p": Entry(p_value(cell.adjusted_p), cell.adjusted_p),
        "hedges_g": number_entry(comparison.hedges_g, "+.2f"),
        "remark": text_entry(remark),
    }


def ratios_table(analysis: Analysis) -> Table:
    """Paired ratios of seconds to the reference."""
    columns = (
        *CELL,
        Column("seconds_of", "seconds of", numeric=False),
        Column("pairs", "pairs"),
        Column("measurements", "measurements"),
        Column("ratio", f"× {analysis.reference}"),
        *interval_columns("low", "high", "95 % interval"),
        Column("p", "p, paired t"),
        Column("remark", "remark", numeric=False),
    )
    rows = [
        _ratio_row(cell, kind)
        for group in analysis.groups
        for kind in SECONDS_OF
        for cell in group.cells
        if _has_ratio(cell, kind)
    ]
    return Table("ratios-table", "Paired ratios of seconds", columns, rows)


def _has_ratio(cell: Cell, kind: str) -> bool:
    if kind not in cell.ratios or not cell.ratios[kind].n:
        return False
    return kind != "fisher_step_seconds" or any(r.times and r.times.warmup_seconds for r in cell.records)


def _ratio_row(cell: Cell, kind: str) -> Row:
    found = cell.ratios[kind]
    return {
        **cell_entries(cell),
        "seconds_of": Entry(SECONDS_OF[kind], kind),
        "pairs": count_entry(found.n),
        "measurements": count_entry(found.measurements),
        "ratio": Entry(ratio(found.mean), found.mean),
        **interval_entries("low", "high", found.interval, ratio),
        "p": Entry(p_value(found.p), found.p),
        "remark": text_entry(found.undefined_reason or ""),
    }


_WARMUP = Column("warmup_seconds", "Fisher phase, s")
_STEADY = Column("steady_seconds", "steady steps, s")
_TRAINING = Column("train_seconds", "training, s")
_EVALUATION = Column("eval_seconds", "evaluation, s")
_RUN_SECONDS = (_WARMUP, _STEADY, _TRAINING, _EVALUATION)
_SECONDS = (
    Column("warmup_seconds", "Fisher phase, s"),
    Column("steady_seconds", "steady steps, s"),
    Column("train_seconds", "training, s"),
    Column("eval_seconds", "evaluation, s"),
)
_SECONDS = (
    *CELL,
    SEEDS,
    *_RUN_SECONDS,
    Column("steady_step_milliseconds", "a steady step, ms"),
    Column("peak_memory_mebibytes", "peak memory, MiB"),
)


def seconds_table(analysis: Analysis) -> Table:
    """Every cell's seconds, mean over seeds."""
    rows = [_seconds_row(cell) for cell in analysis.cells if any(r.times for r in cell.records)]
    return Table("seconds-table", "Mean seconds of a run", _SECONDS, rows)


def _seconds_row(cell: Cell) -> Row:
    timed = [r for r in cell.records if r.times]
    means = {c.key: mean_of(getattr(r.times, c.key) for r in timed) for c in _RUN_SECONDS}
    return {
        **cell_entries(cell),
        "seeds": count_entry(len(timed)),
        **{key: Entry(seconds(mean), mean) for key, mean in means.items()},
        "steady_step_milliseconds": number_entry(mean_of(1000 * s for s in cell.step_seconds.values()), ".1f"),
        "peak_memory_mebibytes": number_entry(
            mean_of(r.peak_memory_bytes / 2**20 for r in timed if r.peak_memory_bytes), ",.0f"
        ),
    }


_PARAMETERS = (
    *CELL,
    Column("asked_parameters", "asked for"),
    Column("adapters", "adapters at the end"),
    Column("percent_used", "% of the backbone"),
    Column("adapters_trained", "most while training"),
    Column("ranks", "ranks", numeric=False),
    Column("head", "head, counted separately"),
    Column("backbone", "backbone"),
)


def parameters_table(analysis: Analysis) -> Table:
    """Numbers of parameters, asked for and used."""
    rows = [_parameters_row(cell) for cell in analysis.cells if any(r.parameters for r in cell.records)]
    return Table("parameters-table", "Trained parameters, mean over seeds", _PARAMETERS, rows)


def _parameters_row(cell: Cell) -> Row:
    counted = [r.parameters for r in cell.records if r.parameters]
    first = counted[0]
    asked = None if first.asked_percent is None else round(first.asked_percent / 100 * first.backbone)
    ranks = sorted({row.rank for r in cell.records for row in r.matrices})
    return {
        **cell_entries(cell),
        "asked_parameters": count_entry(asked),
        "adapters": number_entry(mean_of(p.adapters for p in counted), ",.0f"),
        "percent_used": number_entry(mean_of(p.percent for p in counted), ".4f"),
        "adapters_trained": count_entry(max(p.adapters_trained for p in counted)),
        "ranks": text_entry(" to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else ""),
        "head": count_entry(first.head),
        "backbone": count_entry(first.backbone),
    }


def seeds_table(analysis: Analysis) -> Table:
    """Every run that was planned, with its state and the numbers of its record; metrics as fractions."""
    seconds_columns = (_TRAINING, _WARMUP, _STEADY, _EVALUATION)
    metrics = list(dict.fromkeys(m for r in analysis.study.complete_records for m in r.metrics))
    columns = (
        *CELL,
        Column("run_id", "run", numeric=False),
        Column("seed", "seed"),
        Column("state", "state", numeric=False),
        *(Column(metric, words(metric)) for metric in metrics),
        *seconds_columns,
        Column("adapters", "adapters at the end"),
    )
    rows = []
    for run in analysis.study.runs:
        record = run.complete_record
        times = record.times if record else None
        values = {
            TASK.key: run.cell.task,
            BUDGET.key: run.cell.budget or None,
            METHOD.key: run.cell.method,
            "run_id": run.cell.run_id,
            "seed": run.seed,
            "state": run.state,
            **{metric: record.metrics.get(metric) if record else None for metric in metrics},
            **{column.key: getattr(times, column.key) if times else None for column in seconds_columns},
            "adapters": record.parameters.adapters if record and record.parameters else None,
        }
        rows.append({key: plain_entry(value) for key, value in values.items()})
    return Table("seeds-table", "Every run", columns, rows)


_VERDICTS = (
    Column("verdict", "verdict", numeric=False),
    Column("claim", "claim", numeric=False),
    TASK,
    BUDGET,
    Column("metric", "metric", numeric=False),
    METHOD,
    Column("reference", "reference", numeric=False),
    Column("relation", "relation", numeric=False),
    Column("margin", "margin", numeric=False),
    Column("estimate", "estimate"),
    *interval_columns("low", "high", "95 % interval"),
    Column("holm_level", "holm level"),
    *interval_columns("holm_low", "holm_high", "holm low"),
    Column("p_holm", "p holm"),
    SEEDS,
    Column("measurements", "measurements"),
    Column("seeds_needed", "seeds needed"),
    Column("for_new_examples", "for new examples", numeric=False),
    Column("reason", "reason", numeric=False),
    Column("doubts", "doubts", numeric=False),
    Column("command", "command", numeric=False),
    Column("source", "source", numeric=False),
)


def verdicts_table(analysis: Analysis) -> Table:
    """The verdicts with θ as it is defined: fractions, ratios, seconds. This table is a CSV file only."""
    rows = []
    for verdict in losses_first(analysis.verdicts):
        claim, family = verdict.claim, verdict.family_interval
        margins = claim.margin if isinstance(claim.margin, tuple) else (claim.margin,)
        low, high = _ends(verdict.interval)
        holm_low, holm_high = _ends(family)
        values = {
            "verdict": verdict.state,
            "claim": claim.statement,
            TASK.key: claim.scope.task,
            BUDGET.key: claim.scope.budget,
            "metric": claim.metric,
            METHOD.key: claim.method,
            "reference": claim.reference,
            "relation": claim.relation,
            "margin": " to ".join(f"{margin:g}" for margin in margins),
            "estimate": verdict.estimate,
            "low": low,
            "high": high,
            "holm_level": family.level if family else None,
            "holm_low": holm_low,
            "holm_high": holm_high,
            "p_holm": verdict.p,
            "seeds": verdict.n,
            "measurements": verdict.measurements,
            "seeds_needed": verdict.seeds_needed,
            "for_new_examples": verdict.new_examples,
            "reason": verdict.reason,
            "doubts": " ".join(verdict.doubts),
            "command": verdict.command,
            "source": claim.source,
        }
        rows.append({key: plain_entry(value) for key, value in values.items()})
    return Table("verdicts-table", "Claims", _VERDICTS, rows)


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)
