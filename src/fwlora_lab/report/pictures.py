"""The report's pictures of scores, differences, learning curves and seconds, each with its numbers as text and CSV."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fwlora_lab.analysis.results import percent
from fwlora_lab.analysis.study import Analysis, Cell, Group
from fwlora_lab.files import csv_text
from fwlora_lab.records.record import Epoch
from fwlora_lab.report import figures, svg
from fwlora_lab.report.formatting import (
    PHASES,
    interval_text,
    minus,
    points,
    scaled,
    seconds,
    signed_points,
    words,
)


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        id: unique on the page.
        svg: the drawing, with ids of its own that are unique on the page too.
        text: what it shows, for those who do not see it.
        csv: its numbers.
    """

    id: str
    title: str
    svg: str
    text: str
    csv: str


def make_picture(
    id_: str, title: str, drawing: str, description: Iterable[str], rows: Iterable[Sequence[object]]
) -> Picture:
    """A picture of an SVG, the parts of its description and the rows of its CSV, the first of which is the header."""
    return Picture(id_, title, svg.with_ids(drawing, id_), f"{title}. {'; '.join(description)}.", csv_text(rows))


def slug(*parts: object) -> str:
    """An id for the page: the same for the same parts, and different for others."""
    text = "-".join(map(str, parts))
    return f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def colours(analysis: Analysis) -> dict[str, int]:
    """Each method's colour, by its place in the plan."""
    return {method: i for i, method in enumerate(analysis.methods)}


def score_pictures(analysis: Analysis) -> list[Picture]:
    """Each task's metric: over the budgets or, if there is one budget, every seed of each method."""
    pictures, colour = [], colours(analysis)
    for task in dict.fromkeys(group.task for group in analysis.groups):
        groups = [g for g in analysis.groups if g.task == task and any(cell.summary.n for cell in g.cells)]
        if not groups:
            continue
        metric = words(groups[0].metric)
        if len(groups) > 1:
            curves = [c for method in analysis.methods if (c := _over_budgets(groups, method, colour[method])).x]
            drawing = figures.against_budget(curves, f"{metric}, points")
            title = f"{task}: {metric} against the budget"
        else:
            lines = [_score_line(cell, colour[cell.method]) for cell in _with_score(groups[0].cells)]
            drawing = figures.dots(lines, f"{metric}, points")
            title = f"{task}: {metric} at {percent(groups[0].budget)}"
        cells = _with_score(cell for group in groups for cell in group.cells)
        header = ["budget_percent", "method", "seeds", "mean_points", "low_points", "high_points"]
        rows = [header, *map(_score_row, cells)]
        pictures.append(make_picture(slug("score", task), title, drawing, map(_score_text, cells), rows))
    return pictures


def _with_score(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.summary.mean is not None]


def _mean_points(cell: Cell) -> float:
    """The mean of a cell that has one."""
    assert cell.summary.mean is not None
    return 100 * cell.summary.mean


def _score_row(cell: Cell) -> list[object]:
    ends = scaled(cell.summary.interval, 100) or (None, None)
    return [cell.budget, cell.method, cell.summary.n, _mean_points(cell), *ends]


def _score_text(cell: Cell) -> str:
    summary = cell.summary
    interval = f", 95 % interval {interval_text(summary.interval, points)}" if summary.interval else ""
    score = f"{points(summary.mean)} points ({summary.n} seeds{interval})"
    return f"{cell.method} at {percent(cell.budget)} {score}"


def _score_line(cell: Cell, colour: int) -> figures.Row:
    summary = cell.summary
    by_seed, interval = _hundredfold(summary.by_seed), scaled(summary.interval, 100)
    return figures.Row(cell.method, colour, by_seed, _mean_points(cell), interval)


def _hundredfold(by_seed: Mapping[int, float]) -> dict[int, float]:
    return {seed: 100 * value for seed, value in by_seed.items()}


def _over_budgets(groups: Sequence[Group], method: str, colour: int) -> figures.Curve:
    cells = _with_score(cell for group in groups for cell in group.cells if cell.method == method)
    return figures.Curve(
        label=method,
        colour=colour,
        x=[cell.budget for cell in cells],
        mean=[_mean_points(cell) for cell in cells],
        intervals=[scaled(cell.summary.interval, 100) for cell in cells],
        seeds={i: [(cell.budget, 100 * v) for v in cell.summary.by_seed.values()] for i, cell in enumerate(cells)},
    )


def difference_pictures(analysis: Analysis) -> list[Picture]:
    """Each group's paired differences from the reference."""
    pictures, colour = [], colours(analysis)
    for group in analysis.groups:
        lines, description, rows = [], [], [["method", "seed", "difference_points"]]
        for cell in group.cells:
            comparison = cell.comparison
            if comparison is None or comparison.mean is None:
                continue
            differences = _hundredfold(comparison.differences)
            t_interval, two_way = scaled(comparison.interval, 100), scaled(comparison.two_way, 100)
            mean = 100 * comparison.mean
            lines.append(figures.Row(cell.method, colour[cell.method], differences, mean, t_interval, two_way))
            rows += [[cell.method, seed, difference] for seed, difference in differences.items()]
            text = comparison.undefined_reason
            if comparison.interval:
                text = f"95 % t interval {interval_text(comparison.interval, signed_points)}"
            if comparison.two_way:
                text = f"{text}, two-way interval {interval_text(comparison.two_way, signed_points)}"
            description.append(f"{cell.method} {signed_points(comparison.mean)} points, {text}")
        if lines:
            title = f"{group.name}: paired differences from {analysis.reference}"
            drawing = figures.dots(lines, f"points of {words(group.metric)} above the reference", zero=True)
            id_ = slug("difference", group.task, group.budget)
            pictures.append(make_picture(id_, title, drawing, description, rows))
    return pictures


def curve_pictures(analysis: Analysis) -> list[Picture]:
    """Each group's primary metric and training loss after every epoch."""
    pictures = []
    for group in analysis.groups:
        metric = group.metric

        def score(epoch: Epoch, metric: str = metric) -> float | None:
            value = epoch.metrics.get(metric)
            return None if value is None else 100 * value

        pictures += [
            _curve_picture(analysis, group, words(metric), f"{words(metric)}, points", f"{metric}_points", score),
            _curve_picture(analysis, group, "training loss", "training loss", "training_loss", lambda e: e.train_loss),
        ]
    return [picture for picture in pictures if picture is not None]


def _curve_picture(
    analysis: Analysis, group: Group, name: str, axis: str, column: str, value_of: Callable[[Epoch], float | None]
) -> Picture | None:
    """Curves over the epochs; `column` is the name of their values in the CSV."""
    colour = colours(analysis)
    curves, description, rows = [], [], [["method", "seed", "epoch", column]]
    for cell in group.cells:
        seeds = {
            r.seed: [(float(e.epoch), v) for e in r.epochs if (v := value_of(e)) is not None] for r in cell.records
        }
        rows += [[cell.method, seed, int(epoch), y] for seed, curve in seeds.items() for epoch, y in curve]
        # The mean is over the epochs that every seed has: where one ends earlier, the mean of the others would jump.
        epochs = sorted(set.intersection(*({x for x, _ in curve} for curve in seeds.values()))) if seeds else []
        if epochs:
            mean = [sum(dict(curve)[x] for curve in seeds.values()) / len(seeds) for x in epochs]
            curves.append(figures.Curve(cell.method, colour[cell.method], epochs, mean, (), seeds))
            ends = [f"{y:.2f} after epoch {x:g}" for x, y in ((epochs[0], mean[0]), (epochs[-1], mean[-1]))]
            description.append(f"{cell.method} from {minus(' to '.join(ends))}")
    if not curves:
        return None
    title = f"{group.name}: {name} after each epoch"
    id_ = slug("curve", axis, group.task, group.budget)
    return make_picture(id_, title, figures.curves(curves, "epoch", axis), description, rows)


def seconds_pictures(analysis: Analysis) -> list[Picture]:
    """Each group's seconds by phase, mean over seeds."""
    pictures, colour = [], colours(analysis)
    for group in analysis.groups:
        bars, description = [], []
        for cell in group.cells:
            timed = [record.times for record in cell.records if record.times]
            if timed:
                means = [sum(getattr(times, phase) for times in timed) / len(timed) for phase in PHASES]
                bars.append((cell.method, colour[cell.method], means))
                parts = (f"{name} {seconds(mean)} s" for name, mean in zip(PHASES.values(), means, strict=True))
                description.append(f"{cell.method} {', '.join(parts)}")
        if bars:
            title = f"{group.name}: seconds of a run"
            drawing = figures.stacks(bars, list(PHASES.values()), "seconds, mean over seeds")
            rows = [["method", *PHASES], *([method, *means] for method, _, means in bars)]
            pictures.append(make_picture(slug("seconds", group.task, group.budget), title, drawing, description, rows))
    return pictures
