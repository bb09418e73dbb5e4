"""Train a study's batches of runs in several processes, whose events reach the process that shows the progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.training.device import pick_device
from fwlora_lab.training.events import EventCallback
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.launch import leave_with
from fwlora_lab.training.resources import ResourceCache
from fwlora_lab.training.scheduler import train_runs
from fwlora_lab.training.stop_signals import Terminated


@dataclass
class Worker:
    """What a worker process keeps from batch to batch: the queue for events, what it loaded, and whether it ends."""

    events: Any  # a multiprocessing queue
    resources: ResourceCache
    is_stopped: bool = False


_worker: Worker | None = None  # set once in each worker process


def _start_worker(events: Any, threads: int, parent: int) -> None:
    import torch

    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and passes it on as SIGTERM
    leave_with(parent)
    torch.set_num_threads(threads)
    _worker = Worker(events, ResourceCache(pick_device()))


def _train_in_worker(batch: Sequence[tuple[str, int]]) -> None:
    assert _worker is not None
    runs = [RunSpec(RunConfig.model_validate_json(config), seed) for config, seed in batch]
    if _worker.is_stopped:
        raise Terminated  # the pool hands out one batch in advance
    try:
        train_runs(runs, _worker.events.put, resources=_worker.resources)
    except Terminated:
        _worker.is_stopped = True
        raise


def train_in_processes(batches: Sequence[Sequence[RunSpec]], workers: int, on_event: EventCallback) -> None:
    """Train each batch in one of `workers` processes; after an error, batches that have not begun are left out.

    Raises:
        UserError: a worker process was killed, or a batch could not be trained.
        KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM. The workers have written checkpoints.
    """
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)

    def forward_events() -> None:
        while (event := events.get()) is not None:
            on_event(event)

    forwarder = threading.Thread(target=forward_events, daemon=True)
    forwarder.start()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (events, threads, os.getpid()))
    try:
        plain = [[(run.cfg.model_dump_json(), run.seed) for run in batch] for batch in batches]
        for future in as_completed([pool.submit(_train_in_worker, batch) for batch in plain]):
            future.result()
    except (KeyboardInterrupt, Terminated):
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory?). Finished runs are kept; run the same command again to "
            "continue. A smaller workers= needs less memory."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        events.put(None)
        forwarder.join(timeout=10)
