"""An analysis as a reader sees it: a headline, verdicts, tables and figures, every one with its numbers as CSV.

Metrics are given in points (hundredths), seconds in seconds, ratios as such.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fwlora_lab.analysis import intervals
from fwlora_lab.analysis.read import seeds_text, task_of
from fwlora_lab.analysis.study import LEVEL, Analysis, Group, in_lanes
from fwlora_lab.records.record import Record
from fwlora_lab.report.cards import cards
from fwlora_lab.report.formatting import (
    SECONDS_OF,
    Entry,
    count_entry,
    minus,
    number_entry,
    p_value,
    points,
    points_entry,
    scaled_entry,
    seconds,
    signed,
    span,
    times,
    words,
)


class Column(NamedTuple):
    """A column's name in a CSV file, its heading ("": not shown, the end of the interval before it), and its kind."""

    key: str
    heading: str
    number: bool


@dataclass(frozen=True)
class Table:
    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Entry]]

    @property
    def csv(self) -> str:
        return to_csv([[c.key for c in self.columns], *([entry.value for entry in row] for row in self.rows)])

    @property
    def shown(self) -> list[Column]:
        return [c for c in self.columns if c.heading]

    def shown_rows(self) -> list[list[tuple[Column, Entry]]]:
        return [[(c, e) for c, e in zip(self.columns, row, strict=True) if c.heading] for row in self.rows]


_HEADINGS = {
    "budget_percent": "budget, %",
    "mean_points": "mean, points",
    "sd_points": "sd, points",
    "low_points": "95 % interval, points",
    "every_seed": "every seed, points",
    "mean_difference_points": "mean difference, points",
    "t_low_points": "95 % t interval, points",
    "two_way_low_points": "95 % two-way interval, points",
    "p": "p, paired t",
    "sign_flip_p": "p, sign flip",
    "holm_p": "p, Holm",
    "hedges_g": "Hedges g",
    "seconds_of": "seconds of",
    "low": "95 % interval",
    "warmup_seconds": "Fisher phase, s",
    "steady_seconds": "steady steps, s",
    "train_seconds": "training, s",
    "eval_seconds": "evaluation, s",
    "steady_step_milliseconds": "a steady step, ms",
    "peak_memory_mebibytes": "peak memory, MiB",
    "asked_parameters": "asked for",
    "adapters": "adapters at the end",
    "percent_used": "% of the backbone",
    "adapters_trained": "most while training",
    "head": "head, apart",
    "fisher_span": "largest F / smallest F",
    "largest_importance_percent": "largest I, %",
    "weight_cv_percent": "spread of the weights, %",
    "rank_correlation": "rank correlation of I and ‖ΔW‖",
    "mean_delta_norm": "mean ‖ΔW‖",
    "run_id": "run",
}
_PLAIN = set(  # not numbers
    "task method metric every_seed remark seconds_of ranks run_id state verdict claim reference relation margin "
    "for_new_examples reason command source".split()
)


def _columns(keys: str, **headings: str) -> list[Column]:
    """Columns by their keys; the end of an interval, a key with `high`, stands beside its beginning in CSV only."""
    return [
        Column(
            k, "" if re.search(r"\bhigh\b", words(k)) else headings.get(k, _HEADINGS.get(k, words(k))), k not in _PLAIN
        )
        for k in keys.split()
    ]


def _word(text: str) -> Entry:
    return Entry(text or "–", text)


def _ends(interval: intervals.Interval | None, show: Callable[[float], str], factor: float = 1.0) -> list[Entry]:
    low, high = scaled_entry(interval, factor) or (None, None)
    return [Entry(span(interval, show), low), Entry("", high)]


def _plain(value: Any) -> Entry:
    return Entry("–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value), value)


def _place(group: Group, method: str) -> list[Entry]:
    budget = Entry(f"{group.budget:g}" if group.budget > 0 else "–", group.budget or None)
    return [_word(group.task), budget, _word(method)]


def _mean(values: Iterable[float]) -> float | None:
    values = [*values]
    return sum(values) / len(values) if values else None


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def scores_table(analysis: Analysis) -> Table:
    rows = []
    for g in analysis.groups:
        for method, s in g.summaries.items():
            every = " ".join(f"{100 * v:.2f}" for v in s.seeds.values())
            row = [
                *_place(g, method),
                _word(words(g.metric)),
                count_entry(s.n),
                points_entry(s.mean),
                points_entry(s.sd),
            ]
            rows.append([*row, *_ends(s.interval, points, 100), Entry(minus(every) or "–", every)])
    columns = _columns(
        "task budget_percent method metric seeds mean_points sd_points low_points high_points every_seed"
    )
    return Table("scores-table", "Mean over seeds, after the last epoch", columns, rows)


def comparisons_table(analysis: Analysis) -> Table:
    """Paired differences from the reference, the largest loss first."""
    rows = []
    for g in analysis.groups:
        for c in g.comparisons:
            holm, flip, remark = analysis.adjusted_p(g, c.method), c.sign_flip, c.why or ""
            if flip and flip.smallest > 1 - LEVEL:
                remark = f"{c.n} pairs: the sign flip's p cannot be below {flip.smallest:g}"
            row = [
                *_place(g, c.method),
                count_entry(c.n),
                points_entry(c.mean, signed),
                *_ends(c.interval, signed, 100),
            ]
            row += _ends(c.two_way, signed, 100)
            row += [Entry(p_value(p), p) for p in (c.p, flip.p if flip else None, holm)]
            rows.append([*row, number_entry(c.hedges_g, "+.2f"), _word(remark)])
    rows.sort(key=lambda row: math.inf if row[4].value is None else float(row[4].value))
    columns = _columns(
        "task budget_percent method pairs mean_difference_points t_low_points t_high_points two_way_low_points "
        "two_way_high_points p sign_flip_p holm_p hedges_g remark"
    )
    return Table(
        "comparisons-table", f"Paired differences from {analysis.reference}, largest loss first", columns, rows
    )


def ratios_table(analysis: Analysis) -> Table:
    rows = []
    for g in analysis.groups:
        for kind, by_method in g.ratios.items():
            for method, r in by_method.items():
                watched = any(t.times and t.times.warmup_seconds for t in g.done(method))
                if r.n and (watched or kind != "fisher_step_seconds"):
                    row = [
                        *_place(g, method),
                        Entry(SECONDS_OF[kind], kind),
                        count_entry(r.n),
                        Entry(times(r.mean), r.mean),
                    ]
                    rows.append([*row, *_ends(r.interval, times), Entry(p_value(r.p), r.p)])
    columns = _columns("task budget_percent method seconds_of pairs ratio low high p", ratio=f"× {analysis.reference}")
    return Table("ratios-table", "Paired ratios of seconds", columns, rows)


def seconds_table(analysis: Analysis) -> Table:
    rows = []
    kinds = ("warmup_seconds", "steady_seconds", "train_seconds", "eval_seconds")
    for g, method, records in analysis.cells():
        timed = [r for r in records if r.times]
        if not timed:
            continue
        means = [_mean(getattr(r.times, kind) for r in timed) for kind in kinds]
        step = _mean(1000 * s for s in g.cell.scores.get("steady_step_seconds", {}).get(method, {}).values())
        memory = _mean(r.peak_memory_bytes / 2**20 for r in timed if r.peak_memory_bytes)
        row = [*_place(g, method), count_entry(len(timed)), *(Entry(seconds(v), v) for v in means)]
        rows.append([*row, number_entry(step, ".1f"), number_entry(memory, ",.0f")])
    columns = _columns(
        f"task budget_percent method seeds {' '.join(kinds)} steady_step_milliseconds peak_memory_mebibytes"
    )
    return Table("seconds-table", "Mean seconds of a run", columns, rows)


def parameters_table(analysis: Analysis) -> Table:
    rows = []
    for g, method, records in analysis.cells():
        counted = [r.parameters for r in records if r.parameters]
        if not counted:
            continue
        first = counted[0]
        asked = None if first.asked_percent is None else round(first.asked_percent / 100 * first.backbone)
        ranks = sorted({row.rank for r in records for row in r.matrices})
        row = [*_place(g, method), count_entry(asked), number_entry(_mean(p.adapters for p in counted), ",.0f")]
        row += [
            number_entry(_mean(p.percent for p in counted), ".4f"),
            count_entry(max(p.adapters_trained for p in counted)),
        ]
        row.append(_word(" to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else ""))
        rows.append([*row, count_entry(first.head), count_entry(first.backbone)])
    columns = _columns(
        "task budget_percent method asked_parameters adapters percent_used adapters_trained ranks head backbone"
    )
    return Table("parameters-table", "Trained parameters, mean over seeds", columns, rows)


_USUAL = (
    "training.learning_rate",
    "training.epochs",
    "training.batch_size",
    "model.lora.alpha",
    "fw_lora.penalty_strength",
)
_NO_SETTING = re.compile(
    r"run_id|results_dir|method|optuna(\..*)?|training\.(seed|save_adapter)|model\.(name|parameter_budget_percent)"
    r"|dataset\..*"
)


def settings_table(analysis: Analysis) -> Table:
    """The hyper-parameters of every cell: those that are usually asked for, and all that differ."""
    found = []
    for g in analysis.groups:
        for method, runs in g.runs.items():
            record = next((run.record for run in runs if run.record), None)
            if record is not None:
                found.append((g, method, _settings(record)))
    keys = [key for key in _USUAL if any(s.get(key) is not None for _, _, s in found)]
    for key in dict.fromkeys(key for _, _, s in found for key in s):
        if key not in keys and len({json.dumps(s[key]) for _, _, s in found if key in s}) > 1:
            keys.append(key)
    rows = []
    for g, method, settings in found:
        row = _place(g, method)
        for key in keys:
            value = settings.get(key)
            text = "not set" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            row.append(Entry(text, value) if key in settings else Entry("–", None))
        rows.append(row)
    columns = _columns("task budget_percent method")
    columns += [Column(key, key.removeprefix("training.").removeprefix("model."), False) for key in keys]
    return Table("settings-table", "Hyper-parameters of every cell", columns, rows)


def _settings(record: Record) -> dict[str, Any]:
    others = tuple(f"{arm}." for arm in ("fw_lora", "adalora") if arm != record.method)
    flat = dict(_flat(record.config))
    return {k: v for k, v in flat.items() if not _NO_SETTING.fullmatch(k) and not k.startswith(others)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def seeds_table(analysis: Analysis) -> Table:
    """Every run that was planned, its state, and what its record counts; metrics as fractions."""
    metrics = list(dict.fromkeys(m for r in analysis.study.done for m in r.metrics))
    kinds = ("train_seconds", "warmup_seconds", "steady_seconds", "eval_seconds")
    rows = []
    for run in analysis.study.runs:
        r = run.done
        row = [run.cell.task, run.cell.budget or None, run.cell.method, run.cell.run_id, run.seed, run.state]
        row += [r.metrics.get(m) if r else None for m in metrics]
        row += [getattr(r.times, kind) if r and r.times else None for kind in kinds]
        rows.append([*map(_plain, [*row, r.parameters.adapters if r and r.parameters else None])])
    columns = _columns("task budget_percent method run_id seed state")
    columns += [Column(m, words(m), True) for m in metrics] + _columns(f"{' '.join(kinds)} adapters")
    return Table("seeds-table", "Every run", columns, rows)


def contrast_table(analysis: Analysis) -> Table:
    """How unequal importance and weights are, and whether updates follow importance."""
    rows = []
    for g, method, records in analysis.cells():
        norms = [float(np.mean(n)) for r in records if (n := _column(r, "delta_norm"))]
        if not norms:
            continue
        spans = [max(f) / min(f) for r in records if (f := _column(r, "fisher")) and min(f) > 0]
        tops = [100 * max(i) for r in records if (i := _column(r, "importance"))]
        spread = [
            100 * float(np.std(w) / np.mean(w)) for r in records if (w := _column(r, "weight")) and np.mean(w) > 0
        ]
        follows = [c for r in records if (c := rank_correlation(r)) is not None]
        row = [
            *_place(g, method),
            count_entry(len(records)),
            number_entry(_mean(spans), ",.0f"),
            number_entry(_mean(tops), ".1f"),
        ]
        rows.append(
            [
                *row,
                number_entry(_mean(spread), ".1f"),
                number_entry(_mean(follows), "+.2f"),
                number_entry(_mean(norms), ".3f"),
            ]
        )
    columns = _columns(
        "task budget_percent method seeds fisher_span largest_importance_percent weight_cv_percent rank_correlation "
        "mean_delta_norm"
    )
    return Table("contrast-table", "How unequal the matrices are, mean over seeds", columns, rows)


def _column(record: Record, key: str) -> list[float]:
    return [v for row in record.matrices if (v := getattr(row, key)) is not None]


def rank_correlation(record: Record) -> float | None:
    """Spearman's, of importance and ‖ΔW‖ over the matrices; None where one of them is the same everywhere."""
    both = [
        (m.importance, m.delta_norm) for m in record.matrices if m.importance is not None and m.delta_norm is not None
    ]
    if len(both) < 3:
        return None
    ranks = []
    for values in np.array(both).T:
        unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        if len(unique) < 2:
            return None
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])  # ties share their mean rank
    return float(np.corrcoef(*ranks)[0, 1])


def verdicts_table(analysis: Analysis) -> Table:
    """The verdicts with θ as it is defined: fractions, ratios, seconds."""
    rows = []
    for v in (card.verdict for card in cards(analysis)):
        c = v.claim
        margin = " to ".join(f"{m:g}" for m in c.margin) if isinstance(c.margin, tuple) else f"{c.margin:g}"
        interval, family = v.interval or (None, None, None), v.family_interval or (None, None, None)
        row = [v.state, c.statement, c.scope.task, c.scope.budget, c.metric, c.method, c.reference, c.relation, margin]
        row += [v.estimate, *interval[:2], family[2], *family[:2], v.p, v.n, v.needed, v.new_examples, v.reason]
        rows.append([*map(_plain, [*row, v.settle, c.source])])
    columns = _columns(
        "verdict claim task budget_percent metric method reference relation margin estimate low high holm_level "
        "holm_low holm_high p_holm seeds seeds_needed for_new_examples reason command source"
    )
    return Table("verdicts-table", "Claims", columns, rows)


def environment(analysis: Analysis) -> dict[str, list[tuple[str, int]]]:
    """What the runs were made with: every value of every kind, and how many runs have it."""
    records = [run.record for run in analysis.study.runs if run.record]

    def machine(r: Record) -> str:
        m = r.machine
        device = m.cpu if m.device == "cpu" else m.device
        return f"{device}, {m.cores} cores, {m.threads} threads a process, encoder in {m.precision}"

    def backbone(r: Record) -> str:
        b = r.backbone
        return f"{b.name}: {b.source}{f', commit {b.commit}' if b.commit else ''}, {b.parameters:,} parameters"

    def data(r: Record) -> str:
        return f"{task_of(r)}: {r.data_source}, scored on {r.evaluated_on} (fingerprint {r.data_fingerprint[:12]})"

    kinds: dict[str, Callable[[Record], str]] = {
        "backbone": backbone,
        "data": data,
        "machine": machine,
        "versions": lambda r: ", ".join(f"{name} {version}" for name, version in sorted(r.versions.items())),
        "engine": lambda r: "lanes" if in_lanes(r) else "PEFT’s layers",
        "source": lambda r: r.git_commit or "no git commit",
    }
    return {kind: Counter(map(of, records)).most_common() for kind, of in kinds.items() if records}


def missing(analysis: Analysis) -> dict[str, str]:
    """The seeds without a record, by run id."""
    seeds: dict[str, list[int]] = defaultdict(list)
    for run in analysis.study.runs:
        if run.state == "missing":
            seeds[run.cell.run_id].append(run.seed)
    return {run_id: seeds_text(of) for run_id, of in seeds.items()}
