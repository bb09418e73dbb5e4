"""The folder of a run: written in one piece, found again, read, and compared with what a run would leave today.

results_dir/<run_id>/seed-<n>/
    config.yaml       the resolved run config; `fwlora train run=<this file>` trains the run again
    record.json       a `Record`, which has the SHA-256 of the other files and of itself
    metrics.json      the final metrics as one flat object
    predictions.npz   logits [n, classes] float32 and labels [n] of the last evaluation
    adapter/          the adapter and the head, as PEFT's `PeftModel.from_pretrained` reads them
    checkpoints/      in place of all these, while the run is not over

results_dir/study.json lists the runs that a study consists of, and its claims: a `StudyPlan`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from pydantic import ValidationError

from fwlora_lab.config.fingerprint import fingerprint, in_fingerprint
from fwlora_lab.config.keys import leaves_of
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.errors import UserError
from fwlora_lab.files import cannot_write, clear_leftovers, is_unchanged, json_text, seal, write_folder_atomic
from fwlora_lab.records.record import Record, Status
from fwlora_lab.text import without_secrets

_SEED_FOLDER = re.compile(r"seed-\d+")
# The record has the hash of itself, and the report writes the adapter's card anew.
UNHASHED = ("record.json", "adapter/README.md")
ADVICE = "set results_dir=DIR"  # what a user can do if results cannot be written


class RunFolder:
    """The folder of one run and seed, `results_dir/run_id/seed-N`.

    Args:
        results_dir: where the runs of an experiment are kept.
        run_id: the run's name, one folder name.
        seed: the run's seed.

    Raises:
        UserError: the run id is not a folder's name.
    """

    def __init__(self, results_dir: str | Path, run_id: str, seed: int) -> None:
        if run_id in ("", ".", "..") or Path(run_id).name != run_id:
            raise UserError(f"run_id: {run_id!r} cannot name a folder: leave '/' and '..' out.")
        self.path = Path(results_dir) / run_id / f"seed-{seed}"
        self._lock_file = self.path.with_name(f".{self.path.name}.lock")

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Hold the run's lock, under which all its writing happens; yields whether it is held.

        On entry, leftovers of writers that were killed are removed.

        Args:
            wait: until the other process that holds the lock releases it; otherwise False is yielded.

        Raises:
            UserError: the folder cannot be made or written.
        """
        try:
            self._lock_file.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._lock_file)
            lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            yield False
            return
        except OSError as error:
            raise cannot_write(self._lock_file.parent, error, ADVICE) from error
        try:
            clear_leftovers(self.path)
            yield True
        finally:
            lock.release()

    def is_locked(self) -> bool:
        """Whether a process holds the run's lock, which means that it trains the run. False on Windows.

        This asks for a shared lock and releases it at once. That cannot take the lock from a process that holds it; a
        process that asks for it in the same moment finds it held and has to ask again.
        """
        try:
            import fcntl
        except ImportError:  # Windows: a run in training is shown as missing
            return False
        try:
            handle = os.open(self._lock_file, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
        finally:
            os.close(handle)
        return False

    def write(
        self,
        record: Record,
        cfg: RunConfig,
        *,
        logits: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        save_adapter: Callable[[Path], None] | None = None,
    ) -> Record:
        """Write the run in one piece, in place of a former one; the record as it is written, with hashes.

        Args:
            record: a failed one needs nothing else.
            logits, labels: [n, classes] and [n], of the last evaluation.
            save_adapter: writes the adapter into the folder whose path it gets.

        Raises:
            UserError: the disk is full or the folder cannot be written. Nothing half-written is left, and the former
                run stays.
        """

        def fill(folder: Path) -> None:
            (folder / "config.yaml").write_text(without_secrets(to_yaml(cfg)), encoding="utf-8")
            if record.status == "complete":
                (folder / "metrics.json").write_text(json_text(_flat_metrics(record)), encoding="utf-8")
            if logits is not None and labels is not None:
                np.savez(folder / "predictions.npz", logits=logits.astype(np.float32), labels=labels)
            if save_adapter is not None:
                save_adapter(folder / "adapter")
            written = record.model_copy(update={"files": hashes_of(folder)})
            text = json_text(seal(written.model_dump(mode="json")))
            (folder / "record.json").write_text(text, encoding="utf-8")

        write_folder_atomic(self.path, fill, ADVICE)
        return load_record(self.path)


def hashes_of(folder: Path) -> dict[str, str]:
    """sha256 (hex) of every file of a run's folder by its path in the folder, without those of `UNHASHED`."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file_sha256(file) for name, file in files.items() if name not in UNHASHED}


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class ChangedRecord(UserError):
    """A record that is not what its run wrote, or not where its run wrote it."""


def load_record(path: str | Path) -> Record:
    """The record at `path`, a `record.json` or the folder that it is in.

    Raises:
        UserError: there is none, or it cannot be read.
        ChangedRecord: it was changed after it was written, or its folder was renamed.
    """
    path = Path(path)
    file = path if path.name == "record.json" else path / "record.json"
    try:
        content = _read(file)
        record = Record.model_validate_json(content)
        _refuse_changes(file, content, record)
        return record
    except FileNotFoundError:
        raise UserError(f"{path}: there is no record here.") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{file}: not a record of this version ({where}: {first['msg']}). "
            "Delete the folder, or train the run again with again=true."
        ) from error


def _read(file: Path) -> bytes:
    """The file's content; a folder that is being replaced just now may be absent for a moment (see `files`)."""
    for _ in range(20):
        try:
            return file.read_bytes()
        except FileNotFoundError:
            if not any(file.parent.parent.glob(f".{file.parent.name}.*.old")):
                break
            time.sleep(0.01)
    return file.read_bytes()


def _refuse_changes(file: Path, content: bytes, record: Record) -> None:
    if not is_unchanged(json.loads(content)):
        raise ChangedRecord(
            f"{file}: was changed after its run wrote it (its sha256 is another). Put the original back, or delete the "
            "folder and train the run again."
        )
    folder = file.absolute().parent
    if _SEED_FOLDER.fullmatch(folder.name):
        place = (folder.parent.name, int(folder.name.removeprefix("seed-")))
        if place != (record.run_id, record.seed):
            raise ChangedRecord(
                f"{file}: is the record of {record.run_id} seed {record.seed}, in the folder of {place[0]} seed "
                f"{place[1]}: the folder was renamed or copied. Move it to {record.run_id}/seed-{record.seed}, or "
                "delete it."
            )


def load_predictions(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, classes] float32 and labels [n] of the last evaluation of the run in the folder `path`.

    Raises:
        UserError: they cannot be read.
    """
    file = Path(path) / "predictions.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays["logits"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: the predictions cannot be read ({error}).") from error


@dataclass(frozen=True)
class BrokenRecord:
    """A record that cannot be read: its file, and a message that names the file and says why."""

    path: Path
    message: str


class FoundRecords(NamedTuple):
    """The records of a results folder, by run id and seed, and the files that cannot be read."""

    records: list[Record]
    broken: list[BrokenRecord]


def find_records(results_dir: str | Path) -> FoundRecords:
    """All records in `results_dir`; both lists are empty if the folder does not exist."""
    records, broken = [], []
    for file in sorted(Path(results_dir).glob("*/seed-*/record.json")):
        try:
            records.append(load_record(file))
        except UserError as error:
            broken.append(BrokenRecord(file, str(error)))
    return FoundRecords(sorted(records, key=lambda record: (record.run_id, record.seed)), broken)


def status_of(cfg: RunConfig, seed: int, data_fingerprint: str | None, weights: str | None = None) -> Status:
    """Whether a run is trained already.

    Args:
        data_fingerprint: of the data that the run would be trained on; None accepts any.
        weights: sha256 of the encoder's files; None accepts any.

    Returns:
        "different" for a complete run of another config, other data or another encoder; "failed" also for a record
        that cannot be read.

    Raises:
        ChangedRecord: the record was changed after it was written, or its folder was renamed. The run is not trained
            again without a word.
    """
    folder = RunFolder(cfg.results_dir, cfg.run_id, seed).path
    if not (folder / "record.json").exists():
        return "missing"
    try:
        record = load_record(folder)
    except ChangedRecord:
        raise
    except UserError:
        return "failed"
    if record.status == "failed":
        return "failed"
    if differences(cfg, record, data_fingerprint, weights):
        return "different"
    return "complete"


def differences(cfg: RunConfig, record: Record, data_fingerprint: str | None, weights: str | None = None) -> list[str]:
    """What in `record` differs from a run of `cfg` on this data and encoder; empty if nothing does."""
    out = []
    if record.config_fingerprint != fingerprint(cfg):
        asked = dict(leaves_of(cfg.model_dump(mode="json")))
        recorded = dict(leaves_of(record.config))
        for key in sorted(asked.keys() | recorded.keys()):
            if asked.get(key) != recorded.get(key) and in_fingerprint(key):
                out.append(f"{key}: {recorded.get(key)!r} there, {asked.get(key)!r} asked for")
        if not out:
            out.append("config fingerprint (written by another version of the config schema)")
    if data_fingerprint is not None and record.data_fingerprint != data_fingerprint:
        out.append("the data (its texts, labels or split)")
    if None not in (weights, record.backbone.weights) and record.backbone.weights != weights:
        out.append(f"the encoder's files (those of {record.backbone.source} were replaced)")
    return out


def _flat_metrics(record: Record) -> dict[str, float]:
    seconds = {} if record.times is None else {"train_seconds": record.times.train_seconds}
    loss = record.epochs[-1].loss
    return record.metrics | ({} if loss is None else {"loss": loss}) | seconds
