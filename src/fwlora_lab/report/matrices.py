"""What the records say about single matrices: how unequal importance and weights are, and where updates are large."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from fwlora_lab.analysis.study import Analysis, Cell
from fwlora_lab.records.record import Record
from fwlora_lab.report import figures
from fwlora_lab.report.pictures import Picture, make_picture, slug
from fwlora_lab.report.table import CELL, SEEDS, Column, Row, Table, cell_entries, count_entry, number_entry
from fwlora_lab.report.tables import mean_of

_CONTRAST = (
    *CELL,
    SEEDS,
    Column("fisher_span", "largest F / smallest F"),
    Column("largest_importance_percent", "largest I, %"),
    Column("weight_cv_percent", "spread of the weights, %"),
    Column("rank_correlation", "rank correlation of I and ‖ΔW‖"),
    Column("mean_delta_norm", "mean ‖ΔW‖"),
)


def contrast_table(analysis: Analysis) -> Table:
    """How unequal importance and weights are, and whether updates follow importance."""
    rows = [_contrast_row(cell) for cell in analysis.cells if any(_values(r, "delta_norm") for r in cell.records)]
    return Table("contrast-table", "How unequal the matrices are, mean over seeds", _CONTRAST, rows)


def _contrast_row(cell: Cell) -> Row:
    records = cell.records
    fisher = [values for r in records if (values := _values(r, "fisher")) and min(values) > 0]
    importance = [values for r in records if (values := _values(r, "importance"))]
    weights = [values for r in records if (values := _values(r, "weight")) and np.mean(values) > 0]
    norms = [values for r in records if (values := _values(r, "delta_norm"))]
    correlations = [value for r in records if (value := rank_correlation(r)) is not None]
    spreads = (100 * float(np.std(values) / np.mean(values)) for values in weights)
    return {
        **cell_entries(cell),
        "seeds": count_entry(len(records)),
        "fisher_span": number_entry(mean_of(max(values) / min(values) for values in fisher), ",.0f"),
        "largest_importance_percent": number_entry(mean_of(100 * max(values) for values in importance), ".1f"),
        "weight_cv_percent": number_entry(mean_of(spreads), ".1f"),
        "rank_correlation": number_entry(mean_of(correlations), "+.2f"),
        "mean_delta_norm": number_entry(mean_of(float(np.mean(values)) for values in norms), ".3f"),
    }


def _values(record: Record, key: str) -> list[float]:
    """A number of every matrix that has it."""
    return [value for row in record.matrices if (value := getattr(row, key)) is not None]


def rank_correlation(record: Record) -> float | None:
    """Spearman's correlation of importance and ‖ΔW‖ over the matrices; None if one of them has no spread."""
    pairs = [(m.importance, m.delta_norm) for m in record.matrices]
    known = [(i, norm) for i, norm in pairs if i is not None and norm is not None]
    if len(known) < 3:
        return None
    ranks = []
    for values in np.array(known).T:
        unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        if len(unique) < 2:
            return None
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])  # ties share their mean rank
    return float(np.corrcoef(*ranks)[0, 1])


def matrix_maps(analysis: Analysis) -> list[tuple[str, list[Picture]]]:
    """By group, maps of layers and kinds of matrices: the importance where a method has it, and every method's ‖ΔW‖."""
    maps = []
    for group in analysis.groups:
        pictures = []
        for key, symbol, factor in (("importance", "importance I, %", 100), ("delta_norm", "‖ΔW‖", 1)):
            means = [(cell, values) for cell in group.cells if (values := _means(cell.records, key, factor))]
            # All maps of a set have the same colour scale.
            top = max((value for _, values in means for value in values.values()), default=0.0)
            for cell, values in means:
                pictures.append(_map(group.name, cell, key, f"{cell.method}: {symbol}", values, top))
        if pictures:
            maps.append((group.name, pictures))
    return maps


def _means(records: Sequence[Record], key: str, factor: float) -> dict[str, float]:
    """Each matrix's mean over the runs that have a number for it."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for row in record.matrices:
            if (value := getattr(row, key)) is not None:
                values[row.name].append(factor * value)
    return {name: sum(of_matrix) / len(of_matrix) for name, of_matrix in values.items()}


def _map(group_name: str, cell: Cell, key: str, title: str, values: Mapping[str, float], top: float) -> Picture:
    positions = {name: layer_and_kind(name) for name in values}
    layers = sorted({layer for layer, _ in positions.values()}, key=_layer_order)
    kinds = list(dict.fromkeys(kind for _, kind in positions.values()))
    grid: list[list[float | None]] = [[None] * len(kinds) for _ in layers]
    for name, (layer, kind) in positions.items():
        grid[layers.index(layer)][kinds.index(kind)] = values[name]
    ordered = sorted(values, key=lambda name: -values[name])
    largest = ", ".join(f"{positions[n][1]} of layer {positions[n][0]} {values[n]:.3g}" for n in ordered[:3])
    description = [
        f"{group_name}, {len(values)} matrices from {values[ordered[-1]]:.3g} to {values[ordered[0]]:.3g}",
        f"largest: {largest}",
    ]
    rows = [["matrix", "layer", "kind", key], *([name, *positions[name], values[name]] for name in values)]
    id_ = slug("map", key, cell.task, cell.budget, cell.method)
    return make_picture(id_, title, figures.heat(grid, layers, kinds, top), description, rows)


def _layer_order(layer: str) -> tuple[bool, int]:
    return layer.isdigit(), int(layer) if layer.isdigit() else 0


def layer_and_kind(name: str) -> tuple[str, str]:
    """A matrix's layer and kind: 'bert.encoder.layer.3.attention.self.query' -> ('3', 'query')."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if not found:
        return "–", name
    return found[1], found[2].removesuffix(".dense").removeprefix("attention.self.")
