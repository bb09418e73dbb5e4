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

import errno
import json
import os
import platform
import shutil
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from fwlora_lab.errors import UserError
from fwlora_lab.runconfig import RunConfig, fingerprint, in_fingerprint, to_yaml

SCHEMA_VERSION = 1

Status = Literal["missing", "complete", "failed", "different"]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Failure(_Row):
    """Why a run failed."""

    type: str
    message: str
    traceback: str


class Machine(_Row):
    """Where a run ran, and in which precision its encoder computed. `device` is the accelerator's name, or "cpu"."""

    cpu: str
    cores: int
    threads: int
    device: str
    precision: Literal["fp32", "bf16"] = "fp32"


class BackboneInfo(_Row):
    """The pretrained encoder: where it came from and how many parameters it has."""

    name: str
    source: str
    commit: str | None
    parameters: int


class Parameters(_Row):
    """Parameters asked for and used.

    `adapters` is what remains at the end of the run, `adapters_trained` the most that was trained
    at any time (AdaLoRA starts with more), `percent` is 100·adapters/backbone, `head` is counted
    apart.
    """

    asked_percent: float | None
    backbone: int
    adapters: int
    adapters_trained: int
    head: int
    percent: float


class Epoch(_Row):
    """The end of an epoch: its mean training loss, and metrics and loss of the evaluation."""

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    metrics: dict[str, float]
    loss: float | None


class Times(_Row):
    """Seconds. Training leaves evaluation out; it is `fisher` + `steady`, the sum of `phases`.

    With training.engine=lanes they are the run's even share of what all lanes took together: good for planning,
    no measure of one method against another.
    """

    train_seconds: float
    fisher_seconds: float
    steady_seconds: float
    eval_seconds: float
    phases: dict[str, float]


class MatrixRow(_Row):
    """One frozen matrix: its adapter's rank, F, importance and penalty weight where the method has
    them, and `delta_norm` = ‖ΔW‖_F at the end of the run."""

    name: str
    rank: int
    fisher: float | None = None
    importance: float | None = None
    weight: float | None = None
    delta_norm: float | None = None


class Record(_Row):
    """Everything known about one run (one config, one seed); `complete` or `failed`, never half."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    seed: int
    arm: str
    status: Literal["complete", "failed"]
    error: Failure | None = None
    started: datetime
    finished: datetime
    command: str
    versions: dict[str, str]
    git_commit: str | None
    machine: Machine
    config: dict[str, Any]
    config_fingerprint: str
    data_fingerprint: str
    data_source: str
    evaluated_on: str
    primary_metric: str
    backbone: BackboneInfo
    parameters: Parameters | None = None
    epochs: list[Epoch] = []
    times: Times | None = None
    steps: int = 0
    total_steps: int
    examples_per_second: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    matrices: list[MatrixRow] = []
    warnings: list[str] = []

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation; empty where there was none."""
        return self.epochs[-1].metrics if self.epochs else {}


class StudyCell(_Row):
    """The runs of one method on one task at one budget: those with this run_id, one for each seed."""

    task: str
    budget: float
    method: str
    run_id: str


class StudyPlan(_Row):
    """What a study consists of, whether or not it has been trained yet.

    `command` trains it, seeds= left out. `budgets` are in percent of the backbone's
    parameters; `methods` gives each method's description, in the study's order; `reference` is the method that the
    others are compared with; `selection` says how hyper-parameters were chosen; `claims` are those of `verdicts`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    study: str
    command: str
    tasks: list[str]
    budgets: list[float]
    methods: dict[str, str]
    reference: str
    seeds: list[int]
    selection: dict[str, Any]
    cells: list[StudyCell]
    claims: list[dict[str, Any]] = []


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
            raise _cannot_write(self.parent, error) from error
        try:
            self._clear_leftovers()
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
        new = self.parent / f".{self._name}.{os.getpid()}.tmp"
        old = self.parent / f".{self._name}.{os.getpid()}.old"
        try:
            new.mkdir(parents=True)
            (new / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
            _write_json(new / "record.json", record.model_dump(mode="json"))
            if record.status == "complete":
                _write_json(new / "metrics.json", _flat_metrics(record))
            if logits is not None and labels is not None:
                np.savez(new / "predictions.npz", logits=logits.astype(np.float32), labels=labels)
            if save_adapter is not None:
                save_adapter(new / "adapter")
            if self.path.exists():
                self.path.rename(old)
            new.rename(self.path)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not self.path.exists():
                old.rename(self.path)
            if _is_disk_trouble(error):
                raise _cannot_write(self.path, error) from error
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for old in self.parent.glob(f".{self._name}.*.old"):
            # Killed between the two renames: the former run is still the run.
            if self.path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(self.path)
        for half in self.parent.glob(f".{self._name}.*.tmp"):
            shutil.rmtree(half, ignore_errors=True)


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


def load_plan(results_dir: str | Path) -> StudyPlan | None:
    """The plan of the study in `results_dir`; None where there is none. UserError where it is broken."""
    file = Path(results_dir) / "study.json"
    try:
        return StudyPlan.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{file}: not a study's plan of this version ({str(error).splitlines()[0]}). Delete it, and "
            "`fwlora compare` writes it anew."
        ) from error


def write_plan(results_dir: str | Path, plan: StudyPlan) -> None:
    """Write study.json in one piece; UserError where that cannot be done."""
    file = Path(results_dir) / "study.json"
    half = file.with_name(f".study.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_json(half, plan.model_dump(mode="json"))
        half.replace(file)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise _cannot_write(file, error) from error


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


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torch", "transformers", "peft", "fwlora")
    found = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def git_commit() -> str | None:
    """The commit of the working directory, with "-dirty" where tracked files were changed."""

    def git(*words: str) -> str:
        command = ("git", *words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _flat_metrics(record: Record) -> dict[str, float]:
    seconds = {} if record.times is None else {"train_seconds": record.times.train_seconds}
    loss = record.epochs[-1].loss
    return record.metrics | ({} if loss is None else {"loss": loss}) | seconds


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _is_disk_trouble(error: BaseException) -> bool:
    # safetensors wraps the system's error in a class of its own and keeps only its text.
    return isinstance(error, OSError) or "(os error " in str(error)


def _cannot_write(path: Path, error: BaseException) -> UserError:
    number = getattr(error, "errno", None)
    full = number in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error)
    cause = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    cure = "Free some space" if full else "Choose a folder that can be written"
    return UserError(f"{path}: cannot write results: {cause}. {cure}, or set results_dir=DIR.")
