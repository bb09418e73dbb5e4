"""Train a study's batches of runs in several processes, whose events reach the process that shows the progress.

The parent hands out batches one at a time, over a pipe of its own to each worker. Nothing is shared between workers, no
queue and no lock, so a worker that is killed at any moment cannot make another one wait.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.training.device import pick_device
from fwlora_lab.training.events import Event, EventCallback, Note
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.launch import leave_with
from fwlora_lab.training.resources import ResourceCache
from fwlora_lab.training.scheduler import train_runs
from fwlora_lab.training.stop_signals import Terminated, sigterm_raises


@dataclass(frozen=True)
class BatchDone:
    """A worker's message: its batch is over, with the error that ended it, if any."""

    error: Exception | None = None


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    batch: Sequence[RunSpec] | None = None  # what it trains


def train_in_processes(batches: Sequence[Sequence[RunSpec]], workers: int, on_event: EventCallback) -> None:
    """Train each batch in one of `workers` processes; after an error, batches that have not begun are left out.

    If a worker is killed, another one trains its batch, from the runs' checkpoints, after all others.

    Raises:
        UserError: all workers were killed, or a batch could not be trained.
        KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM. The workers have written checkpoints.
    """
    crew = _Crew(batches, on_event)
    try:
        for _ in range(workers):
            crew.hire(max(1, (os.cpu_count() or 1) // workers))
        crew.work()
    except (KeyboardInterrupt, Terminated):
        crew.stop(at_once=False)
        raise
    finally:
        crew.stop(at_once=True)


class _Crew:
    """The workers, and the batches that none of them has been given yet."""

    def __init__(self, batches: Sequence[Sequence[RunSpec]], on_event: EventCallback) -> None:
        self._waiting = collections.deque(batches)
        self._on_event = on_event
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("spawn")

    def hire(self, threads: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, threads, os.getpid()), daemon=True)
        process.start()
        theirs.close()  # so that the end of the worker is the end of what can be read
        self._workers.append(_Worker(process, ours))

    def work(self) -> None:
        """Hand out batches and pass on events until nothing is left to train."""
        failure: Exception | None = None
        self._hand_out()
        while busy := [worker for worker in self._workers if worker.batch is not None]:
            for worker in _with_news(busy):
                match _receive(worker):
                    case Event() as event:
                        self._on_event(event)
                    case BatchDone(error):
                        worker.batch = None
                        if error is not None:
                            failure = failure or error
                            self._waiting.clear()
                    case None:
                        self._replace(worker, failure is None)
            self._hand_out()
        while self._workers:
            worker = self._workers.pop()
            with contextlib.suppress(OSError):
                worker.connection.send(None)
            worker.process.join()
        if failure is not None:
            raise failure
        if self._waiting:
            raise UserError(
                "the worker processes were killed (out of memory?). Finished runs are kept; run the same command again "
                "to continue. A smaller workers= needs less memory."
            )

    def stop(self, at_once: bool) -> None:
        """End all workers, before or after their checkpoints are written."""
        for worker in self._workers:
            worker.connection.close()  # nobody listens from here on, and a worker must not wait for that
            (worker.process.kill if at_once else worker.process.terminate)()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            if worker.batch is None and self._waiting:
                worker.batch = self._waiting.popleft()
                try:
                    worker.connection.send([(run.cfg.model_dump_json(), run.seed) for run in worker.batch])
                except OSError:
                    self._replace(worker, True)

    def _replace(self, worker: _Worker, goes_on: bool) -> None:
        """Let the others train what a worker had that has ended; one process less may be what the memory allows."""
        self._workers.remove(worker)
        worker.process.join()
        if worker.batch is not None and goes_on:
            first = worker.batch[0]
            text = "a worker process was killed (out of memory?); its runs are trained by another one"
            self._on_event(Note(first.cfg.run_id, first.seed, text))
            self._waiting.append(worker.batch)


def _with_news(workers: Sequence[_Worker]) -> list[_Worker]:
    ready = multiprocessing.connection.wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _receive(worker: _Worker) -> Any:
    """A worker's next message; None if it has ended, also in the middle of a message."""
    try:
        return worker.connection.recv()
    except Exception:  # what is left of a torn message may fail to load in any way
        return None


def work(connection: Connection, threads: int, parent: int) -> None:
    """What a worker process does: train the batches that the parent sends, until it sends None.

    Data and backbones are kept from batch to batch.
    """
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and passes it on as SIGTERM
    leave_with(parent)
    torch.set_num_threads(threads)
    resources = ResourceCache(pick_device())

    def tell(message: Event | BatchDone) -> None:
        with contextlib.suppress(OSError):  # the parent has ended, or listens no more
            connection.send(message)

    with sigterm_raises():
        while (batch := connection.recv()) is not None:
            try:
                runs = [RunSpec(RunConfig.model_validate_json(config), seed) for config, seed in batch]
                train_runs(runs, tell, resources=resources)
            except Exception as error:
                if not isinstance(error, UserError):
                    error.add_note(traceback.format_exc())
                tell(BatchDone(error))
            else:
                tell(BatchDone())
