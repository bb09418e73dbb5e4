"""TODO"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fwlora_lab.analysis.read import percent
from fwlora_lab.analysis.study import Analysis, Group
from fwlora_lab.records.record import Epoch, Record
from fwlora_lab.report import figures
from fwlora_lab.report.formatting import PHASES, minus, points, scaled_entry, seconds, signed, span, words
from fwlora_lab.report.tables import to_csv


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
                    rows.append([g.budget, method, s.n, 100 * s.mean, *(scaled_entry(s.interval, 100) or (None, None))])
                    around = f", 95 % interval {span(s.interval, points)}" if s.interval else ""
                    told.append(f"{method} at {percent(g.budget)} {points(s.mean)} points ({s.n} seeds{around})")
        axis, metric = f"{words(groups[0].metric)}, points", words(groups[0].metric)
        if len(groups) > 1:
            curves = [c for m in analysis.methods if (c := _over_budgets(groups, m, colour[m])).x]
            svg, title = figures.against_budget(curves, axis), f"{task}: {metric} against the budget"
        else:
            lines = [
                figures.Row(m, colour[m], _hundredfold(s.seeds), 100 * s.mean, scaled_entry(s.interval, 100))
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
        intervals=[scaled_entry(s.interval, 100) for _, s in there],
        seeds={i: [(budget, 100 * v) for v in s.seeds.values()] for i, (budget, s) in enumerate(there)},
    )


def difference_pictures(analysis: Analysis) -> list[Picture]:
    pictures, colour = [], colours(analysis)
    for g in analysis.groups:
        lines, told, rows = [], [], [["method", "seed", "difference_points"]]
        for c in g.comparisons:
            if c.mean is None:
                continue
            thick, thin = scaled_entry(c.interval, 100), scaled_entry(c.two_way, 100)
            lines.append(
                figures.Row(c.method, colour[c.method], _hundredfold(c.differences), 100 * c.mean, thick, thin)
            )
            rows += [[c.method, seed, 100 * d] for seed, d in c.differences.items()]
            said = f"95 % t interval {span(c.interval, signed)}" if c.interval else c.why
            said = f"{said}, two-way interval {span(c.two_way, signed)}" if c.two_way else said
            told.append(f"{c.method} {signed(c.mean)} points, {said}")
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
                means = [sum(getattr(t, kind) for t in timed) / len(timed) for kind in PHASES]
                bars.append((method, colour[method], means))
                parts = (f"{name} {seconds(v)} s" for name, v in zip(PHASES.values(), means, strict=True))
                told.append(f"{method} {', '.join(parts)}")
        if bars:
            title = f"{g.where}: seconds of a run"
            svg = figures.stacks(bars, list(PHASES.values()), "seconds, mean over seeds")
            rows = [["method", *PHASES], *([method, *means] for method, _, means in bars)]
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
