"""What runs and studies leave behind: written in one piece, read by everything that compares runs.

results_dir/<run_id>/seed-<n>/
    config.yaml       the resolved run config; `fwlora train run=<this file>` does the run again
    record.json       a `Record`
    metrics.json      the final metrics, flat
    predictions.npz   logits [n, classes] float32 and labels [n] of the last evaluation
    adapter/          the adapter and the head, as PEFT's `PeftModel.from_pretrained` reads them

results_dir/study.json says which of these runs a study is made of, and what it claims: a `StudyPlan`.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
from pydantic import ValidationError

from fwlora_lab.config.fingerprint import fingerprint, in_fingerprint
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.errors import UserError
from fwlora_lab.files import cannot_write, clear_leftovers, write_folder_atomic
from fwlora_lab.records.record import Record, Status

ADVICE = "set results_dir=DIR"  # what a user can do where results cannot be written


class RunDir:
    """The folder of one run and seed. All writing happens under `lock()`."""

    def __init__(self, results_dir: str | Path, run_id: str, seed: int) -> None:
        if run_id in ("", ".", "..") or Path(run_id).name != run_id:
            raise UserError(f"run_id: {run_id!r} cannot name a folder: leave '/' and '..' out.")
        self.parent = Path(results_dir) / run_id
        self.path = self.parent / f"seed-{seed}"
        self._name = self.path.name

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Hold the run against other processes; yields whether it is held (always so with `wait`).

        Leftovers of writers that were killed are cleared away on entry.

        Raises:
            UserError: the folder cannot be made or written.
        """
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.parent / f".{self._name}.lock")
            lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            yield False
            return
        except OSError as error:
            raise cannot_write(self.parent, error, ADVICE) from error
        try:
            clear_leftovers(self.path)
            yield True
        finally:
            lock.release()

    def write(
        self,
        record: Record,
        cfg: RunConfig,
        *,
        logits: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        save_adapter: Callable[[Path], None] | None = None,
    ) -> None:
        """Write the run under a temporary name and rename it into place of the former one.

        Raises:
            UserError: the disk is full or the folder cannot be written; nothing half-written is
                left, and the former run stays.
        """

        def fill(folder: Path) -> None:
            (folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
            (folder / "record.json").write_text(json_text(record.model_dump(mode="json")), encoding="utf-8")
            if record.status == "complete":
                (folder / "metrics.json").write_text(json_text(_flat_metrics(record)), encoding="utf-8")
            if logits is not None and labels is not None:
                np.savez(folder / "predictions.npz", logits=logits.astype(np.float32), labels=labels)
            if save_adapter is not None:
                save_adapter(folder / "adapter")

        write_folder_atomic(self.path, fill, ADVICE)


def load_record(path: str | Path) -> Record:
    """The record at `path`: a `record.json` or the folder that holds it.

    Raises:
        UserError: there is none, or it is broken.
    """
    path = Path(path)
    file = path / "record.json" if path.is_dir() else path
    try:
        return Record.model_validate_json(file.read_bytes())
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


def load_predictions(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, classes] float32 and labels [n] of the last evaluation of the run in `path`."""
    file = Path(path) / "predictions.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays["logits"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: the predictions cannot be read ({error}).") from error


def find_records(results_dir: str | Path, on_broken: Callable[[str], object] = warnings.warn) -> list[Record]:
    """All records below `results_dir`, by run id and seed; a broken one is told to `on_broken`."""
    found = []
    for file in sorted(Path(results_dir).glob("*/seed-*/record.json")):
        try:
            found.append(load_record(file))
        except UserError as error:
            on_broken(str(error))
    return sorted(found, key=lambda record: (record.run_id, record.seed))


def status_of(cfg: RunConfig, seed: int, data_fingerprint: str | None) -> Status:
    """Whether the run is there already, with this config and this data (None: whatever the data).

    A record that cannot be read counts as failed.
    """
    folder = RunDir(cfg.results_dir, cfg.run_id, seed).path
    if not (folder / "record.json").exists():
        return "missing"
    try:
        record = load_record(folder)
    except UserError:
        return "failed"
    if record.status == "failed":
        return "failed"
    if differences(cfg, record, data_fingerprint):
        return "different"
    return "complete"


def differences(cfg: RunConfig, record: Record, data_fingerprint: str | None) -> list[str]:
    """What keeps `record` from being a record of `cfg` on this data: keys with both values."""
    out = []
    if record.config_fingerprint != fingerprint(cfg):
        asked = dict(_flatten(cfg.model_dump(mode="json")))
        there = dict(_flatten(record.config))
        for key in sorted(asked.keys() | there.keys()):
            if asked.get(key) != there.get(key) and in_fingerprint(key):
                out.append(f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked for")
        if not out:
            out.append("config fingerprint (written by another version of the config schema)")
    if data_fingerprint is not None and record.data_fingerprint != data_fingerprint:
        out.append("the data (its texts, labels or split)")
    return out


def _flat_metrics(record: Record) -> dict[str, float]:
    seconds = {} if record.times is None else {"train_seconds": record.times.train_seconds}
    loss = record.epochs[-1].loss
    return record.metrics | ({} if loss is None else {"loss": loss}) | seconds


def json_text(content: object) -> str:
    """JSON with sorted keys and an indent of two, as all files of a results folder have it."""
    return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
