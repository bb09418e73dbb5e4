"""Workers started by a Hydra launcher plugin: joblib on one machine, submitit on a SLURM cluster."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fwlora_lab.config import hydra_bridge
from fwlora_lab.errors import UserError

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


class _Task:
    """What a worker does, as Hydra calls it; a class of its own so that it can be sent to another machine.

    `parent` is the process that the worker must not outlive; None where a scheduler starts and ends the workers.
    """

    def __init__(self, work: Callable[[], Any], parent: int | None) -> None:
        self.work = work
        self.parent = parent

    def __call__(self, _: object) -> Any:
        if self.parent not in (None, os.getpid()):  # joblib with one worker, or with threads, starts no process
            leave_with(self.parent)
        return self.work()


def launch(work: Callable[[], Any], workers: int, overrides: Sequence[str], folder: Path) -> list[Any]:
    """Call `work` in each of `workers` processes that a launcher starts, wait for all, and return their results.

    An exception in a worker is raised here. joblib's processes end with this one, however it ends; a cluster's jobs are
    left to their scheduler.

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
    task = _Task(work, os.getpid() if on_this_machine else None)
    try:
        return hydra_bridge.launch(task, workers, overrides, folder)
    except hydra_bridge.LauncherError as error:
        raise UserError(
            f"{' '.join(overrides)}: {str(error).rstrip('.')}. The launchers joblib, submitit_local and "
            "submitit_slurm come with pip install 'fwlora[workers]'"
        ) from error
