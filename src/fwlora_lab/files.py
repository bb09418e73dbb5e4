"""Files and folders written in one piece: under a temporary name first, then renamed into place; texts of JSON and CSV.

A reader sees the former content or the new one, never half of it, also where the writer is killed.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fwlora_lab.errors import UserError


def write_atomic(path: Path, content: str | bytes, advice: str = "") -> None:
    """Write one file in one piece; a text as UTF-8, its folder is made.

    Args:
        advice: what the user can do besides, e.g. "set results_dir=DIR"; it ends the message of an error.

    Raises:
        UserError: the disk is full or the file cannot be written. The former file then stays.
    """
    write_all_atomic({path: content}, advice)


def write_all_atomic(files: Mapping[Path, str | bytes], advice: str = "", durable: bool = False) -> None:
    """Write several files; each is renamed into place only after all of them were written.

    Args:
        durable: wait until the disk has the contents, so that they also outlast a loss of power.

    Raises:
        UserError: as `write_atomic`; where the disk is full, all former files stay.
    """
    temporary = {path: _temporary_name(path, "tmp") for path in files}
    encoded = {path: content.encode() if isinstance(content, str) else content for path, content in files.items()}
    path = Path()
    try:
        for path, data in encoded.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(data)
            if durable:
                with temporary[path].open("rb") as file:
                    os.fsync(file.fileno())
        for path, half in temporary.items():
            half.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        raise cannot_write(path, error, advice) from error
    finally:
        for half in temporary.values():
            with suppress(OSError, ValueError):
                half.unlink(missing_ok=True)


def write_folder_atomic(path: Path, fill: Callable[[Path], None], advice: str = "") -> None:
    """Make a folder, let `fill` write into it, and put it into the place of the former one.

    A folder cannot replace another one in a single step: the former one is moved aside first, and comes back where the
    second step fails. A writer killed between the two leaves it aside; `clear_leftovers` brings it back. So only one
    process at a time may write the folder.

    Raises:
        UserError: the disk is full or the folder cannot be written. The former folder then stays, as it does where
            `fill` raises anything else, which is raised again.
    """
    new, former = _temporary_name(path, "tmp"), _temporary_name(path, "old")
    try:
        new.mkdir(parents=True)
        fill(new)
        if path.exists():
            path.rename(former)
        new.rename(path)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if former.exists() and not path.exists():
            former.rename(path)
        if isinstance(error, OSError) or _OS_ERROR in str(error):
            raise cannot_write(path, error, advice) from error
        raise
    shutil.rmtree(former, ignore_errors=True)


def clear_leftovers(path: Path) -> None:
    """Remove what killed writers of the folder `path` left beside it, and bring back a former folder moved aside."""
    for former in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            former.rename(path)
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


# safetensors 0.8 wraps the system's error in a class of its own, and only its text holds the number.
_OS_ERROR = "(os error "


def cannot_write(path: Path, error: BaseException, advice: str = "") -> UserError:
    """The error to raise where `path` cannot be written: what the cause is, and what to do."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"{_OS_ERROR}{errno.ENOSPC})" in str(error)
    cause = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    cure = "Free some space" if full else "Choose a folder that can be written"
    return UserError(f"{path}: cannot be written: {cause}. {cure}{f', or {advice}' if advice else ''}.")


def json_text(content: object) -> str:
    """JSON with sorted keys and an indent of two; raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """The rows as the text of a CSV file; None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _temporary_name(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")
