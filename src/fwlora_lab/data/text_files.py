"""Reads text files of data, and the errors that name a file, a line and a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: the file cannot be read, is empty, or is not UTF-8 text; the message names the file and the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        neighbors = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{path}: {reason}{did_you_mean(path.name, [n for n in neighbors if n != path.name])}; check the "
            "path in dataset.root, dataset.train_file and dataset.eval_file"
        ) from error
    if not data.strip():
        refuse_file(path, "it is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        refuse(path, line, None, f"the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        refuse(path, line, None, "it holds a null byte, so this is not a text file; save it as UTF-8")
    return text


def refuse(path: Path, line: int, column: str | None, message: str) -> NoReturn:
    """Raise a UserError that names the file, the line (counted from 1) and, if there is one, the column."""
    where = f", column {column!r}" if column is not None else ""
    raise UserError(f"{path}, line {line}{where}: {message}")


def refuse_file(path: Path, message: str) -> NoReturn:
    """Raise a UserError about a file as a whole."""
    raise UserError(f"{path}: {message}")


def column_of(path: Path, header: Sequence[str], name: str) -> int:
    """The position of a column by its name in the file's first line.

    Raises:
        UserError: there is no such column, or several.
    """
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        refuse(path, 1, name, "two columns have this name; rename one")
    separators = [c for c in "\t;|" if len(header) == 1 and c in header[0]]
    cure = f"; it seems to be separated by {separators[0]!r}, save it with commas" if separators else ""
    names = ", ".join(header[:12])
    refuse(path, 1, name, f"there is no such column{did_you_mean(name, header)}; it has {names}{cure}")
