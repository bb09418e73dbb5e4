"""TODO"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.training.events import Event
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.launch import leave_with
from fwlora_lab.training.scheduler import train_runs

_events: Any = None  # a worker's way to tell the process that shows


def _begin_worker(events: Any, threads: int, parent: int) -> None:
    import torch

    global _events
    _events = events
    torch.set_num_threads(threads)
    leave_with(parent)


def _train_in_worker(cohort: Sequence[tuple[str, int]]) -> None:
    runs = [RunSpec(RunConfig.model_validate_json(config), seed) for config, seed in cohort]
    train_runs(runs, _events.put)


def train_in_processes(cohorts: Sequence[Sequence[RunSpec]], jobs: int, hear: Callable[[Event], object]) -> None:
    """Train each cohort in one of `jobs` processes; the first error ends the others after their cohort."""
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def listen() -> None:
        while (event := events.get()) is not None:
            hear(event)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (events, threads, os.getpid()))
    try:
        plain = [[(run.cfg.model_dump_json(), run.seed) for run in cohort] for cohort in cohorts]
        for future in as_completed([pool.submit(_train_in_worker, cohort) for cohort in plain]):
            future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory?). What is finished is kept; the same command goes on; "
            "a smaller --jobs needs less memory."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        events.put(None)
        listener.join(timeout=10)
