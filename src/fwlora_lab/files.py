"""Files and folders written in one piece: under a temporary name first, then renamed into place; texts of JSON and CSV.

A reader sees the former content or the new one, never half of it, also where the writer is killed.
"""

from __future__ import annotations

import csv
import ctypes
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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

    Where the system can exchange two folders in a single step, a reader finds the former one or the new one at any
    moment. Elsewhere (not on Linux, or on a network's file system) the former one is moved aside first, and comes back
    where the second step fails; a writer killed between the two leaves it aside, and `clear_leftovers` brings it back.
    So only one process at a time may write the folder.

    Raises:
        UserError: the disk is full or the folder cannot be written. The former folder then stays, as it does where
            `fill` raises anything else, which is raised again.
    """
    new, former = _temporary_name(path, "tmp"), _temporary_name(path, "old")
    try:
        new.mkdir(parents=True)
        fill(new)
        if path.exists():
            if _exchange(new, path):
                former = new
            else:
                path.rename(former)
                new.rename(path)
        else:
            new.rename(path)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if former.exists() and not path.exists():
            former.rename(path)
        if isinstance(error, OSError) or _OS_ERROR in str(error):
            raise cannot_write(path, error, advice) from error
        raise
    shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in a single step; False where the system or the file system cannot."""
    try:
        # Python's os module has no name for it.
        done = ctypes.CDLL(None).renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE)
    except (OSError, AttributeError, TypeError):  # no such function: an older C library, or not Linux
        return False
    return done == 0


def clear_leftovers(path: Path) -> None:
    """Remove what killed writers of the folder `path` left beside it, and bring back a former folder moved aside."""
    for former in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            former.rename(path)
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


_HERE, _RENAME_EXCHANGE = -100, 2  # of Linux: AT_FDCWD of fcntl.h, and of renameat2
# safetensors 0.8 wraps the system's error in a class of its own, and only its text holds the number.
_OS_ERROR = "(os error "


def cannot_write(path: Path, error: BaseException, advice: str = "") -> UserError:
    """The error to raise where `path` cannot be written: what the cause is, and what to do."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"{_OS_ERROR}{errno.ENOSPC})" in str(error)
    cause = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    cure = "Free some space" if full else "Choose a folder that can be written"
    return UserError(f"{path}: cannot be written: {cause}. {cure}{f', or {advice}' if advice else ''}.")


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their own hash, `sha256`, in place of a former one."""
    return {**values, "sha256": _own_hash(values)}


def is_unchanged(values: Mapping[str, Any]) -> bool:
    """Whether JSON values are those that `seal` saw; also true of values without a hash, from before there was one."""
    return values.get("sha256") is None or values["sha256"] == _own_hash(values)


def _own_hash(values: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json_text(rest).encode()).hexdigest()


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
