"""An analysis as a reader sees it: a headline, verdicts, tables and figures, every one with its numbers as CSV.

Metrics are given in points (hundredths), seconds in seconds, ratios as such.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import numpy as np

from fwlora_lab import figures, stats, verdicts
from fwlora_lab.analysis import LEVEL, Analysis, Group, in_lanes, percent, seeds_text, task_of
from fwlora_lab.records import Epoch, Record

_SECONDS_OF = {
    "train_seconds": "training",
    "fisher_step_seconds": "a step of the Fisher phase",
    "steady_step_seconds": "a steady step",
    "eval_seconds": "evaluation",
}
_PHASES = {"fisher_seconds": "Fisher phase", "steady_seconds": "steady steps", "eval_seconds": "evaluation"}


# --- numbers as people read them ----------------------------------------------------------------


def minus(text: str) -> str:
    return text.replace("-", "−")


def points(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else minus(f"{100 * value:{'+' if signed else ''}.2f}")


def _signed(value: float | None) -> str:
    return points(value, signed=True)


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def span(interval: stats.Interval | None, show: Callable[[float], str]) -> str:
    return "–" if interval is None else f"{show(interval.low)} to {show(interval.high)}"


def words(metric: str) -> str:
    return metric.replace("_", " ")


def seeds_word(seeds: Sequence[int]) -> str:
    """Seeds as a command line takes them: 0..5, or 0,2,7."""
    first, last = min(seeds), max(seeds)
    whole = len(seeds) > 2 and sorted(seeds) == list(range(first, last + 1))
    return f"{first}..{last}" if whole else ",".join(map(str, seeds))


def headline(analysis: Analysis) -> str:
    """One sentence that says what the study found, losses first."""
    study, counts = analysis.study, Counter(v.state for v in analysis.verdicts)
    if not study.done:
        return "No run is complete yet."
    parts = []
    if n := len(analysis.verdicts):
        fails, open_, holds = counts["fails"], counts["undecided"], counts["holds"]
        parts.append(
            f"of {n} claim{'s' * (n > 1)} {fails} fail{'s' * (fails == 1)}, {open_} {'is' if open_ == 1 else 'are'} "
            f"undecided and {holds} hold{'s' * (holds == 1)}"
        )
    clocked = sum(v.claim.is_ratio and v.state != "undecided" for v in analysis.verdicts)
    if clocked and analysis.seconds_doubt:
        parts.append(f"{clocked} of these verdicts {'is' if clocked == 1 else 'are'} about time, by no fair clock")
    told, silent = [], 0
    for group in analysis.groups:
        for c in group.comparisons:
            p = analysis.adjusted_p(group, c.method)
            if c.mean is None:  # no pairs
                continue
            if p is None or p >= 1 - LEVEL:
                silent += 1
                continue
            gap = f"{points(abs(c.mean))} points {'below' if c.mean < 0 else 'above'} {c.reference}"
            told.append((c.mean, f"on {group.where} {c.method} ends {gap}"))
    parts += [text for _, text in sorted(told, key=lambda pair: pair[0])[:4]]
    if len(told) > 4:
        parts.append(f"{len(told) - 4} more comparisons with {analysis.reference} differ")
    if silent:
        which = "no other difference" if told else "no difference"
        parts.append(f"{which} from {analysis.reference} can be told from chance")
    sentence = "; ".join(parts) or f"there is nothing to compare with {analysis.reference}"
    if len(study.done) < len(study.runs):
        sentence = f"so far, with {len(study.done)} of {len(study.runs)} runs: {sentence}"
    return f"{sentence[0].upper()}{sentence[1:]}."


def markdown(text: object) -> str:
    """Text as Markdown shows it in a table: on one line, and nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


def shipped(name: str) -> str:
    """A file of the package's folder of templates."""
    return resources.files("fwlora_lab").joinpath("templates", name).read_text("utf-8")


def render(name: str, **values: Any) -> str:
    """A template with its values; in HTML they are escaped, in Markdown the template does that."""
    page = jinja2.Environment(
        loader=jinja2.FunctionLoader(shipped),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page.filters |= {"md": markdown, "points": points, "percent": percent, "words": words, "seeds_word": seeds_word}
    return page.get_template(name).render(**values)


# --- tables -------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A cell of a table: what is shown, and what it is sorted by and copied as."""

    text: str
    value: str | float | int | None


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
    "fisher_seconds": "Fisher phase, s",
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


def _count(value: int | None) -> Entry:
    return Entry("–" if value is None else f"{value:,}", value)


def _number(value: float | None, form: str) -> Entry:
    return Entry("–" if value is None else minus(f"{value:{form}}"), value)


def _points(value: float | None, show: Callable[[float], str] = points) -> Entry:
    return Entry("–" if value is None else show(value), None if value is None else 100 * value)


def _ends(interval: stats.Interval | None, show: Callable[[float], str], factor: float = 1.0) -> list[Entry]:
    low, high = _scaled(interval, factor) or (None, None)
    return [Entry(span(interval, show), low), Entry("", high)]


def _scaled(interval: stats.Interval | None, factor: float) -> tuple[float, float] | None:
    return None if interval is None else (factor * interval.low, factor * interval.high)


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
            row = [*_place(g, method), _word(words(g.metric)), _count(s.n), _points(s.mean), _points(s.sd)]
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
            row = [*_place(g, c.method), _count(c.n), _points(c.mean, _signed), *_ends(c.interval, _signed, 100)]
            row += _ends(c.two_way, _signed, 100)
            row += [Entry(p_value(p), p) for p in (c.p, flip.p if flip else None, holm)]
            rows.append([*row, _number(c.hedges_g, "+.2f"), _word(remark)])
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
                watched = any(t.times and t.times.fisher_seconds for t in g.done(method))
                if r.n and (watched or kind != "fisher_step_seconds"):
                    row = [
                        *_place(g, method),
                        Entry(_SECONDS_OF[kind], kind),
                        _count(r.n),
                        Entry(times(r.mean), r.mean),
                    ]
                    rows.append([*row, *_ends(r.interval, times), Entry(p_value(r.p), r.p)])
    columns = _columns("task budget_percent method seconds_of pairs ratio low high p", ratio=f"× {analysis.reference}")
    return Table("ratios-table", "Paired ratios of seconds", columns, rows)


def seconds_table(analysis: Analysis) -> Table:
    rows = []
    kinds = ("fisher_seconds", "steady_seconds", "train_seconds", "eval_seconds")
    for g, method, records in analysis.cells():
        timed = [r for r in records if r.times]
        if not timed:
            continue
        means = [_mean(getattr(r.times, kind) for r in timed) for kind in kinds]
        step = _mean(1000 * s for s in g.cell.scores.get("steady_step_seconds", {}).get(method, {}).values())
        memory = _mean(r.peak_memory_bytes / 2**20 for r in timed if r.peak_memory_bytes)
        row = [*_place(g, method), _count(len(timed)), *(Entry(seconds(v), v) for v in means)]
        rows.append([*row, _number(step, ".1f"), _number(memory, ",.0f")])
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
        row = [*_place(g, method), _count(asked), _number(_mean(p.adapters for p in counted), ",.0f")]
        row += [_number(_mean(p.percent for p in counted), ".4f"), _count(max(p.adapters_trained for p in counted))]
        row.append(_word(" to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else ""))
        rows.append([*row, _count(first.head), _count(first.backbone)])
    columns = _columns(
        "task budget_percent method asked_parameters adapters percent_used adapters_trained ranks head backbone"
    )
    return Table("parameters-table", "Trained parameters, mean over seeds", columns, rows)


_USUAL = ("training.learning_rate", "training.epochs", "training.batch_size", "model.lora.alpha", "fw_lora.lambda_fw")
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
    others = tuple(f"{arm}." for arm in ("fw_lora", "adalora") if arm != record.arm)
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
    kinds = ("train_seconds", "fisher_seconds", "steady_seconds", "eval_seconds")
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
        row = [*_place(g, method), _count(len(records)), _number(_mean(spans), ",.0f"), _number(_mean(tops), ".1f")]
        rows.append(
            [*row, _number(_mean(spread), ".1f"), _number(_mean(follows), "+.2f"), _number(_mean(norms), ".3f")]
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


# --- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A figure, what it shows in words, and its numbers."""

    id: str
    title: str
    svg: str
    text: str
    csv: str


def slug(*parts: object) -> str:
    """A name for the page's ids, the same for the same parts and no other."""
    text = "-".join(map(str, parts))
    return f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def colours(analysis: Analysis) -> dict[str, int]:
    return {method: i for i, method in enumerate(analysis.methods)}


def _picture(id_: str, title: str, svg: str, told: Iterable[str], rows: Iterable[Sequence[Any]]) -> Picture:
    return Picture(id_, title, figures.with_ids(svg, id_), f"{title}. {'; '.join(told)}.", to_csv(rows))


def score_pictures(analysis: Analysis) -> list[Picture]:
    """A task's metric over the budgets, or with one budget a plot of its methods' seeds."""
    pictures, colour = [], colours(analysis)
    for task in dict.fromkeys(g.task for g in analysis.groups):
        groups = [g for g in analysis.groups if g.task == task and any(s.n for s in g.summaries.values())]
        if not groups:
            continue
        told: list[str] = []
        rows: list[list[Any]] = [["budget_percent", "method", "seeds", "mean_points", "low_points", "high_points"]]
        for g in groups:
            for method, s in g.summaries.items():
                if s.mean is not None:
                    rows.append([g.budget, method, s.n, 100 * s.mean, *(_scaled(s.interval, 100) or (None, None))])
                    around = f", 95 % interval {span(s.interval, points)}" if s.interval else ""
                    told.append(f"{method} at {percent(g.budget)} {points(s.mean)} points ({s.n} seeds{around})")
        axis, metric = f"{words(groups[0].metric)}, points", words(groups[0].metric)
        if len(groups) > 1:
            curves = [c for m in analysis.methods if (c := _over_budgets(groups, m, colour[m])).x]
            svg, title = figures.against_budget(curves, axis), f"{task}: {metric} against the budget"
        else:
            lines = [
                figures.Row(m, colour[m], _hundredfold(s.seeds), 100 * s.mean, _scaled(s.interval, 100))
                for m, s in groups[0].summaries.items()
                if s.mean is not None
            ]
            svg, title = figures.dots(lines, axis), f"{task}: {metric} at {percent(groups[0].budget)}"
        pictures.append(_picture(slug("score", task), title, svg, told, rows))
    return pictures


def _hundredfold(by_seed: Mapping[int, float]) -> dict[int, float]:
    return {seed: 100 * value for seed, value in by_seed.items()}


def _over_budgets(groups: Sequence[Group], method: str, colour: int) -> figures.Curve:
    there = [(g.budget, s) for g in groups if (s := g.summaries.get(method)) and s.mean is not None]
    return figures.Curve(
        label=method,
        colour=colour,
        x=[budget for budget, _ in there],
        mean=[100 * s.mean for _, s in there if s.mean is not None],
        intervals=[_scaled(s.interval, 100) for _, s in there],
        seeds={i: [(budget, 100 * v) for v in s.seeds.values()] for i, (budget, s) in enumerate(there)},
    )


def difference_pictures(analysis: Analysis) -> list[Picture]:
    pictures, colour = [], colours(analysis)
    for g in analysis.groups:
        lines, told, rows = [], [], [["method", "seed", "difference_points"]]
        for c in g.comparisons:
            if c.mean is None:
                continue
            thick, thin = _scaled(c.interval, 100), _scaled(c.two_way, 100)
            lines.append(
                figures.Row(c.method, colour[c.method], _hundredfold(c.differences), 100 * c.mean, thick, thin)
            )
            rows += [[c.method, seed, 100 * d] for seed, d in c.differences.items()]
            said = f"95 % t interval {span(c.interval, _signed)}" if c.interval else c.why
            said = f"{said}, two-way interval {span(c.two_way, _signed)}" if c.two_way else said
            told.append(f"{c.method} {_signed(c.mean)} points, {said}")
        if lines:
            title = f"{g.where}: paired differences from {analysis.reference}"
            svg = figures.dots(lines, f"points of {words(g.metric)} above the reference", zero=True)
            pictures.append(_picture(slug("difference", g.task, g.budget), title, svg, told, rows))
    return pictures


def curve_pictures(analysis: Analysis) -> list[Picture]:
    pictures = []
    for g in analysis.groups:
        score = _curves(analysis, g, f"{words(g.metric)}, points", lambda e, m=g.metric: e.metrics.get(m), 100)
        loss = _curves(analysis, g, "training loss", lambda e: e.train_loss, 1)
        pictures += [picture for picture in (score, loss) if picture is not None]
    return pictures


def _curves(
    analysis: Analysis, g: Group, axis: str, of: Callable[[Epoch], float | None], factor: float
) -> Picture | None:
    series, told, rows = [], [], [["method", "seed", "epoch", slug(axis)[:-7].replace("-", "_")]]
    for method in g.runs:
        lines = {
            r.seed: [(float(e.epoch), factor * v) for e in r.epochs if (v := of(e)) is not None] for r in g.done(method)
        }
        rows += [[method, seed, int(x), y] for seed, line in lines.items() for x, y in line]
        # A mean over the epochs that every seed has: one over fewer seeds would jump.
        epochs = sorted(set.intersection(*({x for x, _ in line} for line in lines.values()))) if lines else []
        if epochs:
            mean = [sum(dict(line)[x] for line in lines.values()) / len(lines) for x in epochs]
            series.append(figures.Curve(method, colours(analysis)[method], epochs, mean, (), lines))
            ends = [f"{y:.2f} after epoch {x:g}" for x, y in ((epochs[0], mean[0]), (epochs[-1], mean[-1]))]
            told.append(f"{method} from {minus(' to '.join(ends))}")
    if not series:
        return None
    title = f"{g.where}: {axis.removesuffix(', points')} after each epoch"
    return _picture(slug("curve", axis, g.task, g.budget), title, figures.curves(series, "epoch", axis), told, rows)


def seconds_pictures(analysis: Analysis) -> list[Picture]:
    pictures, colour = [], colours(analysis)
    for g in analysis.groups:
        bars, told = [], []
        for method in g.runs:
            timed = [r.times for r in g.done(method) if r.times]
            if timed:
                means = [sum(getattr(t, kind) for t in timed) / len(timed) for kind in _PHASES]
                bars.append((method, colour[method], means))
                parts = (f"{name} {seconds(v)} s" for name, v in zip(_PHASES.values(), means, strict=True))
                told.append(f"{method} {', '.join(parts)}")
        if bars:
            title = f"{g.where}: seconds of a run"
            svg = figures.stacks(bars, list(_PHASES.values()), "seconds, mean over seeds")
            rows = [["method", *_PHASES], *([method, *means] for method, _, means in bars)]
            pictures.append(_picture(slug("seconds", g.task, g.budget), title, svg, told, rows))
    return pictures


def matrix_maps(analysis: Analysis) -> list[tuple[str, list[Picture]]]:
    """By group: the importance that a method gave the matrices, and what every method's ‖ΔW‖ became."""
    out = []
    for g in analysis.groups:
        pictures = []
        for key, symbol, factor in (("importance", "importance I, %", 100), ("delta_norm", "‖ΔW‖", 1)):
            maps = {m: _means(g.done(m), key, factor) for m in g.runs}
            top = max((v for values in maps.values() for v in values.values()), default=0.0)
            pictures += [_map(g, m, key, f"{m}: {symbol}", values, top) for m, values in maps.items() if values]
        if pictures:
            out.append((g.where, pictures))
    return out


def place_of(name: str) -> tuple[str, str]:
    """A matrix's layer and kind: 'bert.encoder.layer.3.attention.self.query' -> ('3', 'query')."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if not found:
        return "–", name
    return found[1], found[2].removesuffix(".dense").removeprefix("attention.self.")


def _means(records: Sequence[Record], key: str, factor: float) -> dict[str, float]:
    """Each matrix's mean over the runs that have a number for it."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for row in record.matrices:
            if (value := getattr(row, key)) is not None:
                values[row.name].append(factor * value)
    return {name: sum(of) / len(of) for name, of in values.items()}


def _map(g: Group, method: str, key: str, title: str, values: Mapping[str, float], top: float) -> Picture:
    places = {name: place_of(name) for name in values}
    layers = sorted({layer for layer, _ in places.values()}, key=lambda s: (s.isdigit(), int(s) if s.isdigit() else 0))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid: list[list[float | None]] = [[None] * len(kinds) for _ in layers]
    for name, (layer, kind) in places.items():
        grid[layers.index(layer)][kinds.index(kind)] = values[name]
    ordered = sorted(values, key=lambda name: -values[name])
    largest = (f"{kind} of layer {layer} {values[n]:.3g}" for n in ordered[:3] for layer, kind in [places[n]])
    told = [
        f"{g.where}, {len(values)} matrices from {values[ordered[-1]]:.3g} to {values[ordered[0]]:.3g}",
        f"largest: {', '.join(largest)}",
    ]
    rows = [["matrix", "layer", "kind", key], *([n, *places[n], values[n]] for n in values)]
    id_ = slug("map", key, g.task, g.budget, method)
    return _picture(id_, title, figures.heat(grid, layers, kinds, top), told, rows)


# --- verdicts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """A claim on a line, in percent of its length: region and intervals (start, length), borders and estimate."""

    region: tuple[float, float]
    borders: list[tuple[float, str]]
    interval: tuple[float, float] | None
    family: tuple[float, float] | None
    estimate: float


@dataclass(frozen=True)
class Card:
    """A verdict in words; `doubt` says why its seconds may not compare."""

    verdict: verdicts.Verdict
    numbers: dict[str, str]
    strip: Strip | None
    doubt: str

    @property
    def text(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in self.numbers.items())


def cards(analysis: Analysis) -> list[Card]:
    """The verdicts, losses first."""
    order = ("fails", "undecided", "holds")
    found = sorted(analysis.verdicts, key=lambda v: order.index(v.state))
    return [_card(v, analysis.seconds_doubt if v.claim.is_ratio and v.n else "") for v in found]


def _unit(claim: verdicts.Claim) -> tuple[float, str, Callable[[float], str]]:
    """The factor from a claim's θ to what is shown, the unit, and how a number is written."""
    if claim.is_ratio:
        return 1.0, f"× {claim.reference}", lambda v: f"{v:.3f}"
    if claim.is_time:
        return 1.0, "s", lambda v: minus(f"{v:.4g}")
    return 100.0, "points", lambda v: minus(f"{v:{'+' if claim.reference else ''}.2f}")


def _card(v: verdicts.Verdict, doubt: str) -> Card:
    factor, unit, show = _unit(v.claim)
    numbers = {}
    if v.estimate is not None:
        numbers["estimate"] = f"{show(factor * v.estimate)} {unit}"
    for name, interval in (
        ("{:.4g} % interval", v.interval),
        ("Holm’s {:.4g} % interval", v.family_interval),
        ("over seeds and examples ({:.4g} %)", v.two_way_interval),
    ):
        if interval is not None:
            told = span(interval, lambda value: show(factor * value))
            numbers[name.format(100 * interval.level)] = f"{told} {unit}"
    if v.p is not None:
        numbers["p, Holm"] = p_value(v.p)
    numbers["seeds"] = f"{v.n} ({seeds_text(v.seeds).split(' ', 1)[1]})" if v.n else "none"
    return Card(v, numbers, _strip(v, factor, show), doubt)


def _strip(v: verdicts.Verdict, factor: float, show: Callable[[float], str]) -> Strip | None:
    if v.estimate is None:
        return None
    estimate, interval, family = factor * v.estimate, _scaled(v.interval, factor), _scaled(v.family_interval, factor)
    low, high = (factor * border for border in v.claim.region)
    borders = [b for b in (low, high) if math.isfinite(b)]
    seen = [estimate, *borders, *(interval or ()), *(family or ())]
    room = 0.08 * (max(seen) - min(seen)) or 0.05 * abs(estimate) or 1.0
    left, right = min(seen) - room, max(seen) + room

    def at(value: float) -> float:
        return round(100 * (min(max(value, left), right) - left) / (right - left), 2)

    def part(ends: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if ends is None else (at(ends[0]), round(at(ends[1]) - at(ends[0]), 2))

    region = (at(low), round(at(high) - at(low), 2))
    return Strip(region, [(at(b), show(b)) for b in borders], part(interval), part(family), at(estimate))


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


# --- how it was done ----------------------------------------------------------------------------


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
