"""Loads texts and labels from CSV and JSON Lines files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fwlora_lab.catalog.tasks import FILE_METRICS, TaskSpec
from fwlora_lab.data.task import Examples
from fwlora_lab.data.text_files import column_of, read_text, refuse, refuse_file
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean

if TYPE_CHECKING:
    from fwlora_lab.config.schema import DatasetConfig


_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")  # "01" and "1" are two labels
# What spreadsheets and pandas write for a cell without a value, and read as one.
_MISSING = frozenset(("", "nan", "NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "null", "NULL", "None"))


@dataclass(frozen=True)
class FileRow:
    """One example of a file."""

    number: int  # the line on which the row ends, counted from 1
    texts: tuple[str, ...]
    label: str | int


def load_files(cfg: DatasetConfig) -> tuple[TaskSpec, Examples, Examples, str]:
    """Read `cfg.train_file` and `cfg.eval_file`; the classes are the distinct labels of the training file.

    Raises:
        UserError: the files do not hold a classification task; the message names the file, the line and the column.
    """
    text = (cfg.text_column,) if isinstance(cfg.text_column, str) else tuple(cfg.text_column or ())
    label = str(cfg.label_column)
    paths = [Path(str(name)).expanduser() for name in (cfg.train_file, cfg.eval_file)]
    read = _read_csv if cfg.name == "csv" else _read_jsonl
    rows = [read(path, text, label) for path in paths]
    if paths[0].samefile(paths[1]):
        raise UserError(
            f"dataset.train_file, dataset.eval_file: both are {paths[0]}, so the model would be "
            "evaluated on what it was trained on; split the file in two"
        )
    rows = _with_one_spelling(paths[0], rows, label)
    classes = _classes(paths[0], rows[0], label)
    spec = TaskSpec(
        name=paths[0].stem,
        kind="classification",
        labels=tuple(str(c) for c in classes),
        text_fields=1 if len(text) == 1 else 2,
        metrics=FILE_METRICS,
        primary=FILE_METRICS[0],
    )
    numbers = {value: i for i, value in enumerate(classes)}
    train, dev = (_examples(path, part, label, numbers) for path, part in zip(paths, rows, strict=True))
    return spec, train, dev, f"{cfg.name} files {paths[0]} and {paths[1]}"


def _with_one_spelling(path: Path, parts: list[list[FileRow]], column: str) -> list[list[FileRow]]:
    """The rows with one spelling for labels that mean the same: `1` and `1.0`, `True` and `true`.

    `path` is the file of the first part.

    Raises:
        UserError: two labels differ only in the case of their letters, which may or may not mean the same.
    """
    labels = {row.label for part in parts for row in part}
    spelt = [label for label in labels if isinstance(label, str)]
    if all(_WHOLE_NUMBER.fullmatch(label) for label in spelt):
        key = {label: str(int(float(label))) for label in spelt}
    else:
        key = {label: label.casefold() for label in spelt}
        if not set(key.values()) <= {"true", "false"}:
            _refuse_other_cases(path, parts[0], column)
            return parts
    shortest = {k: min((s for s in spelt if key[s] == k), key=lambda s: (len(s), s)) for k in key.values()}
    return [
        [replace(row, label=shortest[key[row.label]] if isinstance(row.label, str) else row.label) for row in part]
        for part in parts
    ]


def _refuse_other_cases(path: Path, rows: list[FileRow], column: str) -> None:
    first: dict[str, FileRow] = {}
    for row in rows:
        other = first.setdefault(str(row.label).casefold(), row)
        if other.label != row.label:
            refuse(
                path,
                row.number,
                column,
                f"the label {row.label!r} and the label {other.label!r} of line {other.number} differ only in the case "
                "of their letters; write one of them, or give two classes different names",
            )


def _classes(path: Path, rows: list[FileRow], column: str) -> list[str | int]:
    """The distinct labels, in numerical order if all are whole numbers, else in alphabetical order."""
    count = Counter(row.label for row in rows)
    if len({type(label) for label in count}) > 1:
        line = min((type(row.label).__name__, row.number) for row in rows)[1]
        refuse(path, line, column, "some labels are strings and some are numbers; write one kind")
    if len(count) == 1:
        only = next(iter(count))
        refuse_file(
            path,
            f"all {len(rows)} labels in column {column!r} are {only!r}, so there is nothing to "
            "learn; use data with two classes or more",
        )
    if len(count) > max(20, len(rows) // 2):
        refuse_file(
            path,
            f"column {column!r} holds {len(count)} different labels in {len(rows)} rows, which is "
            "not a classification task; check dataset.label_column",
        )
    labels = sorted(count, key=str)
    whole = all(isinstance(label, int) or _is_whole(label) for label in labels)
    return sorted(labels, key=int) if whole else labels


def _is_whole(label: str) -> bool:
    # "01" and "1" are two labels, so only the canonical spelling counts as a number.
    return _WHOLE_NUMBER.fullmatch(label) is not None and "." not in label and label != "-0"


def _examples(path: Path, rows: list[FileRow], column: str, numbers: dict[str | int, int]) -> Examples:
    labels = []
    for row in rows:
        if row.label not in numbers:
            known = [str(name) for name in numbers]
            refuse(
                path,
                row.number,
                column,
                f"the label {row.label!r} does not occur in the training file"
                f"{did_you_mean(str(row.label), known)}; its labels are {', '.join(known[:10])}",
            )
        labels.append(numbers[row.label])
    texts = tuple(r.texts[0] if len(r.texts) == 1 else (r.texts[0], r.texts[1]) for r in rows)
    return Examples(texts, np.array(labels, dtype=np.int64))


def _read_csv(path: Path, text: tuple[str, ...], label: str) -> list[FileRow]:
    content = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # the module's own limit is no fault of the file
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    rows = []
    header: list[str] | None = None
    columns: list[int] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                columns = [column_of(path, header, name) for name in (*text, label)]
                continue
            if len(cells) != len(header):
                refuse(
                    path,
                    reader.line_num,
                    None,
                    f"{len(cells)} cells instead of {len(header)} ({', '.join(header)}); put a "
                    'text that holds a comma into "quotes"',
                )
            *fields, value = (cells[c] for c in columns)
            value = value.strip()
            _refuse_missing(path, reader.line_num, label, value)
            rows.append(_row(path, reader.line_num, text, fields, value))
    except csv.Error as error:
        refuse(
            path,
            reader.line_num,
            None,
            f"this is not valid CSV ({error}); often a quotation mark is not closed, or not "
            'doubled inside a "quoted" text',
        )
    if not rows:
        refuse_file(path, "there is no example in it")
    return rows


def _read_jsonl(path: Path, text: tuple[str, ...], label: str) -> list[FileRow]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            refuse(path, number, None, f"this is not valid JSON ({error}); write one object per line")
        if not isinstance(record, dict):
            kind = type(record).__name__
            refuse(path, number, None, f'this is of type {kind}; write an object like {{"{text[0]}": ...}}')
        missing = next((name for name in (*text, label) if name not in record), None)
        if missing is not None:
            refuse(path, number, missing, f"the key is missing{did_you_mean(missing, record)}; add it")
        for name in text:
            if not isinstance(record[name], str):
                refuse(path, number, name, f"the text is {record[name]!r}; it must be a string")
        value = record[label]
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str):
            value = value.strip()
            _refuse_missing(path, number, label, value)
        if not isinstance(value, str | int):
            refuse(
                path,
                number,
                label,
                f"the label is {value!r}; it must be a non-empty string or a whole number",
            )
        rows.append(_row(path, number, text, [record[name] for name in text], value))
    if not rows:
        refuse_file(path, "there is no example in it")
    return rows


def _refuse_missing(path: Path, line: int, column: str, value: str) -> None:
    if value in _MISSING:
        reads = f" (it reads {value!r})" if value else ""
        refuse(
            path,
            line,
            column,
            f"the label is missing{reads}; fill it or drop the row, and give a class of that name another one",
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {double!r} occurs twice")
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _row(path: Path, number: int, names: tuple[str, ...], fields: Sequence[str], label: str | int) -> FileRow:
    texts = tuple(field.strip() for field in fields)
    for name, field in zip(names, texts, strict=True):
        if not field:
            refuse(path, number, name, "the text is empty; fill it or drop the row")
        try:
            field.encode()
        except UnicodeEncodeError:
            refuse(path, number, name, "the text holds half a surrogate pair (\\ud800 to \\udfff)")
    return FileRow(number, texts, label)
