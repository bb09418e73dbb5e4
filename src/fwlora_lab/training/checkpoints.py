"""Checkpoints: from them a run that was stopped or killed goes on, bit by bit as if nothing had happened.

results_dir/<run_id>/seed-<n>/checkpoints/step-<k>.pt is what an engine's `state_dict` gave after k steps, behind a line
with its SHA-256. The last two are kept. They go when the record takes the folder's place.

A checkpoint is used by the run that wrote it only: the same settings, data, encoder, code and kind of device.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fwlora
import fwlora_lab
from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.errors import UserError
from fwlora_lab.files import write_all_atomic
from fwlora_lab.records.environment import versions
from fwlora_lab.records.folder import RunFolder
from fwlora_lab.training.active_run import ActiveRun
from fwlora_lab.training.device import in_bf16
from fwlora_lab.training.engine import Engine
from fwlora_lab.training.events import EventCallback, Note
from fwlora_lab.training.jobs import Job

FOLDER = "checkpoints"
_FORMAT = b"fwlora checkpoint 1 "
_KEPT = 2


class Unusable(Exception):
    """A checkpoint that this run cannot go on from; the message says why."""


class Checkpoints:
    """The checkpoints of the runs that a scheduler trains.

    The runs that are in training together are written together: runs that share lanes go on in the same company, on
    which the last bits of a sum depend.
    """

    def __init__(self, device: torch.device, on_event: EventCallback) -> None:
        self._device, self._on_event = device, on_event
        self._files: dict[int, list[Path]] = {}  # by the run's number: those it may go on from, oldest first
        self._written = time.monotonic()

    def restore(self, engine: Engine, run: ActiveRun) -> None:
        """Let a run that was just started go on from its newest usable checkpoint, and say so; without one it stays."""
        key, identity = run.job.key, identity_of(run.job, self._device)
        self._files[run.index] = []
        reasons = []
        for file in sorted(_folder(run.job).glob("step-*.pt"), reverse=True):
            if self._files[run.index]:
                self._files[run.index].insert(0, file)
                continue
            try:
                state = decode(_read(file), identity)
            except Unusable as error:
                reasons.append(f"{file.name}: {error}")
                continue
            engine.load_state_dict(run, state)
            self._files[run.index].append(file)
        if self._files[run.index]:
            text = f"{key[0]} seed {key[1]} goes on from step {run.step} of {run.job.total_steps}"
        else:
            text = f"{key[0]} seed {key[1]} begins anew"
        if reasons:
            text += f" ({'; '.join(reasons)})"
        if reasons or self._files[run.index]:
            self._on_event(Note(*key, text))

    def are_due(self, runs: Sequence[ActiveRun]) -> bool:
        """Whether the time between two checkpoints is over for one of the runs."""
        minutes = min((run.job.cfg.training.checkpoint_minutes for run in runs), default=float("inf"))
        return time.monotonic() - self._written >= 60 * minutes

    def states(self, engine: Engine, runs: Sequence[ActiveRun]) -> dict[ActiveRun, dict[str, Any]]:
        """The runs as they are now, without those that failed or were ended; one may turn out to have diverged."""
        states = {}
        for run in runs:
            if run.failure is not None or run.stopped:
                continue
            try:
                states[run] = engine.state_dict(run)
            except (RuntimeError, MemoryError) as error:
                run.failure = error
        return states

    def write(self, states: Mapping[ActiveRun, dict[str, Any]]) -> bool:
        """Write a checkpoint of every run; where that fails a note says why, and the former ones stay."""
        self._written = time.monotonic()
        files = {
            _folder(run.job) / f"step-{state['run']['step']:08}.pt": encode(state, identity_of(run.job, self._device))
            for run, state in states.items()
        }
        try:
            write_all_atomic(files, durable=True)
        except UserError as error:
            for run in states:
                _remove_empty(run.job)
                self._on_event(Note(*run.job.key, f"there is no checkpoint of this step: {error}"))
            return False
        for run, file in zip(states, files, strict=True):
            kept = [file_ for file_ in self._files.get(run.index, []) if file_ != file]
            self._files[run.index] = [*kept, file][-_KEPT:]
            for other in set(file.parent.iterdir()) - set(self._files[run.index]):
                with suppress(OSError):
                    other.unlink()
        return True


def remove_checkpoints(job: Job) -> None:
    """Remove what a run left that has no record."""
    shutil.rmtree(_folder(job), ignore_errors=True)
    _remove_empty(job)


def adopt_checkpoints(folder: RunFolder, others: Sequence[RunFolder]) -> None:
    """Move the checkpoints of the first of `others` that has some to `folder`, unless it has its own.

    The others were attempts at the same run under other names. One that a process is still training keeps its own.
    """
    if (folder.path / FOLDER).exists():
        return
    for other in others:
        if not (other.path / FOLDER).exists():
            continue
        with other.lock(wait=False) as free:
            if free:
                folder.path.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):
                    (other.path / FOLDER).rename(folder.path / FOLDER)
                    other.path.rmdir()
        return


def _remove_empty(job: Job) -> None:
    for folder in (_folder(job), job.folder.path):
        with suppress(OSError):
            folder.rmdir()


def _folder(job: Job) -> Path:
    return job.folder.path / FOLDER


def identity_of(job: Job, device: torch.device) -> dict[str, str]:
    """What must be the same for a run to go on bit by bit, by the words that a message uses for it."""
    return {
        "other settings": f"{fingerprint(job.cfg)} {job.seed} {job.engine}",
        "other data": job.data.fingerprint,
        "another encoder": f"{job.backbone.source} {job.backbone.commit} {job.backbone.parameters} {job.weights}",
        "another version of the code": f"{_code_fingerprint()} {sorted(versions().items())}",
        "another kind of device": f"{device.type} {'bf16' if in_bf16(job.cfg, device) else 'fp32'}",
    }


@cache
def _code_fingerprint() -> str:
    """sha256 (hex) of this package's own modules."""
    digest = hashlib.sha256()
    for package in (fwlora, fwlora_lab):
        for file in sorted(Path(next(iter(package.__path__))).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def encode(state: Mapping[str, Any], identity: Mapping[str, str]) -> bytes:
    """A checkpoint's bytes: the format, the SHA-256 of what follows, and the state with its run's identity."""
    buffer = io.BytesIO()
    torch.save({"identity": dict(identity), "state": dict(state)}, buffer)
    content = buffer.getvalue()
    return _FORMAT + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def decode(data: bytes, identity: Mapping[str, str]) -> dict[str, Any]:
    """The state in a checkpoint of the run with this identity.

    Raises:
        Unusable: it is damaged, or another run's.
    """
    line, _, content = data.partition(b"\n")
    if not _has_hash(line, content):
        raise Unusable("it is damaged")
    try:
        found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise Unusable(f"it cannot be read: {error}") from error
    others = [name for name, value in identity.items() if found["identity"].get(name) != value]
    if others:
        raise Unusable(f"it was written with {', '.join(others)}")
    return found["state"]


def is_intact(file: Path) -> bool:
    """Whether a checkpoint's content is what its first line has the hash of."""
    try:
        line, _, content = file.read_bytes().partition(b"\n")
    except OSError:
        return False
    return _has_hash(line, content)


def _has_hash(line: bytes, content: bytes) -> bool:
    return line == _FORMAT + hashlib.sha256(content).hexdigest().encode()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unusable(f"it cannot be read: {error.strerror}") from error
