"""TODO"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        why = error.strerror or type(error).__name__
        raise UserError(
            f"{path}: {why}{did_you_mean(path.name, [b for b in beside if b != path.name])}; check the "
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
