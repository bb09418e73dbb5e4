"""The report's table of hyper-parameters."""

from __future__ import annotations

import json
import re
from typing import Any

from fwlora_lab.analysis.study import Analysis, Cell
from fwlora_lab.config.keys import leaves_of
from fwlora_lab.records.record import Record
from fwlora_lab.report.table import CELL, Column, Entry, Table, cell_entries

# Settings that readers ask for first; they are shown even if all cells have the same.
_ALWAYS_SHOWN = (
    "training.learning_rate",
    "training.epochs",
    "training.batch_size",
    "model.lora.alpha",
    "fw_lora.penalty_strength",
)
# Names, places and what the table's first columns say already.
_NOT_A_SETTING = re.compile(
    r"run_id|results_dir|method|optuna(\..*)?|training\.(seed|save_adapter|checkpoint_minutes)|model\.(name|parameter_budget_percent)"
    r"|dataset\..*"
)


def settings_table(analysis: Analysis) -> Table:
    """The hyper-parameters of every cell: those that are always shown, and all that differ between cells."""
    found = [
        (cell, _settings(record))
        for cell in analysis.cells
        if (record := next((run.record for run in cell.runs if run.record), None))
    ]
    keys = [key for key in _ALWAYS_SHOWN if any(s.get(key) is not None for _, s in found)]
    for key in dict.fromkeys(key for _, settings in found for key in settings):
        if key not in keys and len({json.dumps(s[key]) for _, s in found if key in s}) > 1:
            keys.append(key)
    headings = (Column(key, key.removeprefix("training.").removeprefix("model."), numeric=False) for key in keys)
    rows = [_row(cell, settings, keys) for cell, settings in found]
    return Table("settings-table", "Hyper-parameters of every cell", (*CELL, *headings), rows)


def _row(cell: Cell, settings: dict[str, Any], keys: list[str]) -> dict[str, Entry]:
    return cell_entries(cell) | {key: _entry(settings, key) for key in keys}


def _entry(settings: dict[str, Any], key: str) -> Entry:
    if key not in settings:  # another method's
        return Entry("–", None)
    value = settings[key]
    text = "not set" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return Entry(text, value)


def _settings(record: Record) -> dict[str, Any]:
    """The settings that have an effect on the run, without the blocks of other methods."""
    other_methods = tuple(f"{method}." for method in ("fw_lora", "adalora") if method != record.method)
    return {
        key: value
        for key, value in leaves_of(record.config)
        if not _NOT_A_SETTING.fullmatch(key) and not key.startswith(other_methods)
    }
