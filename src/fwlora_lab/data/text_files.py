"""TODO"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from fwlora_lab.errors import UserError


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        why = error.strerror or type(error).__name__
        raise UserError(
            f"{path}: {why}{hint(path.name, [b for b in beside if b != path.name])}; check the "
            "path in dataset.root, dataset.train_file and dataset.eval_file"
        ) from error
    if not data.strip():
        refuse_file(path, "it is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        refuse(path, line, None, f"the byte 0x{data[error.start]:02x} is no UTF-8; save it as UTF-8")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        refuse(path, line, None, "it holds a null byte, so it is no text file; save it as UTF-8")
    return text


def refuse(path: Path, line: int, column: str | None, message: str) -> NoReturn:
    where = f", column {column!r}" if column is not None else ""
    raise UserError(f"{path}, line {line}{where}: {message}")


def refuse_file(path: Path, message: str) -> NoReturn:
    raise UserError(f"{path}: {message}")


def hint(name: str, known: Iterable[str]) -> str:
    folded = {option.lower(): option for option in known}
    close = get_close_matches(name.lower(), folded, n=1)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""
