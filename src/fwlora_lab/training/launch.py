"""Workers started by a Hydra launcher plugin: joblib on one machine, submitit on a SLURM cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fwlora_lab.config import hydra_bridge
from fwlora_lab.errors import UserError
from fwlora_lab.training.stop_signals import Terminated, sigterm_raises

_LAUNCHER = "hydra/launcher="
_SETTINGS = "hydra.launcher."


def leave_with(parent: int) -> None:
    """End this process, a child of the process `parent`, within a second after that one ended, however it ended.

    A parent that is killed cannot end its children itself.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_SECONDS_FOR_CHECKPOINTS = 10


class _Task:
    """What a worker does, as Hydra calls it; a class of its own so that it can be sent to another machine.

    `parent` is the process that the worker must not outlive; None where a scheduler starts and ends the workers. Until
    its work is done, a worker of such a parent has a file in `pids`, called by its number.
    """

    def __init__(self, work: Callable[[], Any], parent: int | None, pids: Path) -> None:
        self.work = work
        self.parent = parent
        self.pids = pids

    def __call__(self, _: object) -> Any:
        if self.parent in (None, os.getpid()):  # joblib with one worker, or with threads, starts no process
            return self.work()
        leave_with(self.parent)
        file = self.pids / str(os.getpid())
        file.touch()
        try:
            with sigterm_raises():
                return self.work()
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _sigterm_reaches(pids: Path) -> Iterator[None]:
    """Let SIGTERM end the workers first, which write checkpoints: a launcher that is ended kills them at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        for file in pids.iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.name), signal.SIGTERM)
        deadline = time.monotonic() + _SECONDS_FOR_CHECKPOINTS
        while any(pids.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        raise Terminated

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def launch(work: Callable[[], Any], workers: int, overrides: Sequence[str], folder: Path) -> list[Any]:
    """Call `work` in each of `workers` processes that a launcher starts, wait for all, and return their results.

    An exception in a worker is raised here. joblib's processes end with this one, however it ends: after SIGTERM they
    write checkpoints first. A cluster's jobs are left to their scheduler.

    Args:
        overrides: `hydra/launcher=NAME`, joblib by default, and `hydra.launcher.KEY=VALUE`.
        folder: for the launcher's own files.

    Raises:
        UserError: the launcher is unknown, or one of its settings is wrong.
    """
    if any("_target_" in override or "${" in override for override in overrides):
        raise UserError("hydra.launcher: _target_ and ${…} are refused: a launcher is chosen by its name")
    overrides = [*overrides]
    if not any(override.startswith(_LAUNCHER) for override in overrides):
        overrides.insert(0, f"{_LAUNCHER}joblib")
    on_this_machine = f"{_LAUNCHER}joblib" in overrides
    if on_this_machine and not any(override.startswith(f"{_SETTINGS}n_jobs=") for override in overrides):
        overrides.append(f"{_SETTINGS}n_jobs={workers}")
    try:
        with tempfile.TemporaryDirectory(prefix="fwlora-") as name, _sigterm_reaches(pids := Path(name)):
            task = _Task(work, os.getpid() if on_this_machine else None, pids)
            return hydra_bridge.launch(task, workers, overrides, folder)
    except hydra_bridge.LauncherError as error:
        raise UserError(
            f"{' '.join(overrides)}: {str(error).rstrip('.')}. The launchers joblib, submitit_local and "
            "submitit_slurm come with pip install 'fwlora[workers]'"
        ) from error
