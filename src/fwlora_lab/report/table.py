"""A table of the report: its columns, and rows whose entries have a text to show and a value to sort by and to copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fwlora_lab.analysis.intervals import Interval
from fwlora_lab.analysis.study import Cell
from fwlora_lab.files import csv_text
from fwlora_lab.report.formatting import interval_text, minus, points, scaled


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: its name in the CSV file.
        heading: as the page shows it.
        numeric: whether it is sorted and aligned as numbers.
        part_of: the key of the column that shows this one's value too, as the low end of an interval shows the high
            end; such a column is in the CSV file only.
    """

    key: str
    heading: str
    numeric: bool = True
    part_of: str | None = None


class Entry(NamedTuple):
    """One cell of a table: the text that is shown, and the value that it is sorted by and copied as."""

    text: str
    value: str | float | int | None


Row = Mapping[str, Entry]  # by the columns' keys


@dataclass(frozen=True)
class Table:
    """A table with an entry for every column in every row."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    @property
    def csv(self) -> str:
        """All columns, the values as they are."""
        keys = [column.key for column in self.columns]
        return csv_text([keys, *([row[key].value for key in keys] for row in self.rows)])

    @property
    def shown_columns(self) -> list[Column]:
        return [column for column in self.columns if column.part_of is None]


TASK = Column("task", "task", numeric=False)
BUDGET = Column("budget_percent", "budget, %")
METHOD = Column("method", "method", numeric=False)
SEEDS = Column("seeds", "seeds")
CELL = (TASK, BUDGET, METHOD)


def cell_entries(cell: Cell) -> dict[str, Entry]:
    """The entries of the columns `CELL`."""
    return {
        TASK.key: text_entry(cell.task),
        BUDGET.key: Entry(f"{cell.budget:g}" if cell.budget > 0 else "–", cell.budget or None),
        METHOD.key: text_entry(cell.method),
    }


def interval_columns(low: str, high: str, heading: str) -> tuple[Column, Column]:
    """The two ends of an interval, which the page shows in one column."""
    return Column(low, heading), Column(high, "", part_of=low)


def interval_entries(
    low: str, high: str, interval: Interval | None, show: Callable[[float], str], factor: float = 1.0
) -> dict[str, Entry]:
    """The entries of `interval_columns`; the values are multiplied by `factor`, `show` gets them as they are."""
    low_value, high_value = scaled(interval, factor) or (None, None)
    return {low: Entry(interval_text(interval, show), low_value), high: Entry("", high_value)}


def text_entry(text: str) -> Entry:
    return Entry(text or "–", text)


def plain_entry(value: str | float | int | None) -> Entry:
    return Entry("–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value), value)


def count_entry(value: int | None) -> Entry:
    return Entry("–" if value is None else f"{value:,}", value)


def number_entry(value: float | None, form: str) -> Entry:
    """A number in the form of a format specification, such as ".1f"."""
    return Entry("–" if value is None else minus(f"{value:{form}}"), value)


def points_entry(value: float | None, show: Callable[[float], str] = points) -> Entry:
    """A fraction, shown and copied in points."""
    return Entry("–" if value is None else show(value), None if value is None else 100 * value)
