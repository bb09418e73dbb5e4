"""From runs to their records: which runs are trained, when, and on which engine.

What can be refused is refused before the first run loads a weight or writes a file.
"""

from __future__ import annotations

import contextlib
import enum
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fwlora_lab.errors import UserError, is_out_of_memory
from fwlora_lab.records.folder import load_record
from fwlora_lab.records.record import Epoch, Record
from fwlora_lab.training.active_run import ActiveRun
from fwlora_lab.training.checkpoints import Checkpoints, remove_checkpoints
from fwlora_lab.training.device import TooLittleMemory, pick_device
from fwlora_lab.training.engine import Engine
from fwlora_lab.training.events import (
    Evaluated,
    EventCallback,
    Note,
    RunFinished,
    RunRefused,
    RunStarted,
    StopRun,
    ignore_event,
)
from fwlora_lab.training.jobs import Job, RunSpec, refuse_collisions
from fwlora_lab.training.lane_trainer import LaneTrainer, fits, lane_group, max_lanes
from fwlora_lab.training.peft_engine import PeftEngine
from fwlora_lab.training.resources import ResourceCache
from fwlora_lab.training.run_record import write_record
from fwlora_lab.training.stop_signals import StopSignals, Terminated

_SLOW_STEP_SECONDS = 2.0  # a signal does not wait for the end of a step that takes longer


def train_runs(
    runs: Sequence[RunSpec],
    on_event: EventCallback = ignore_event,
    overwrite: bool = False,
    resources: ResourceCache | None = None,
) -> list[Record]:
    """Train the runs that are not there yet and return the records of all, in order.

    A run that fails becomes a failed record, and the others go on; the next call tries it again. A
    run that another process is training is waited for at the end.

    Args:
        runs: what to train.
        on_event: receives an `Event` for whatever happens.
        overwrite: train every run again, whether or not it is there.
        resources: data and encoders to share with other calls; None loads them for this call.

    Raises:
        UserError: before anything is trained where a config, the data or the model cannot be used,
            or a record with another config or data is in the way; later where the weights cannot
            be read or results cannot be written.
        KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM. The runs in progress leave checkpoints, from which the same
            call goes on.
    """
    resources = resources or ResourceCache(pick_device())
    jobs = [resources.job(run) for run in runs]
    refuse_collisions(jobs, overwrite)
    scheduler = Scheduler(jobs, resources, on_event, overwrite)
    waiting = list(range(len(jobs)))
    for wait in (False, True):
        busy: list[int] = []
        alone = [index for index in waiting if lane_group(jobs[index]) is None]
        groups: dict[object, list[int]] = {}
        for index in waiting:
            if (group := lane_group(jobs[index])) is not None:
                groups.setdefault(group, []).append(index)
        # In the order in which the runs were given: a group comes with its first run.
        first = {group[0]: group for group in groups.values()}
        for index in waiting:
            if index in alone:
                busy += scheduler.train(PeftEngine(resources.device), iter([index]), wait)
            elif index in first:
                of_group = [jobs[i] for i in first[index]]
                engine = LaneTrainer(of_group, len(of_group), resources)
                busy += scheduler.train(engine, iter(first[index]), wait)
        waiting = busy
    return [scheduler.records[index] for index in range(len(jobs)) if index in scheduler.records]


def train_on_demand(
    draw: Callable[[], RunSpec | None],
    on_event: EventCallback,
    capacity: Sequence[RunSpec] = (),
    max_concurrent: int | None = None,
    resources: ResourceCache | None = None,
) -> None:
    """Train runs that are decided one at a time: `draw` is asked for the next whenever there is a place to train it.

    Runs are trained whether or not they are there.

    Args:
        draw: the next run; None for now, it is asked again while others train. None with nothing in training ends the
            call.
        on_event: receives an `Event` for whatever happens.
        capacity: runs as large as any that will be drawn, for which the lanes are made wide enough.
        max_concurrent: how many runs train at a time; None for as many as there are lanes.
        resources: data and encoders to share with other calls; None loads them for this call.

    Raises:
        UserError: no run of `capacity` can be trained as it is configured, the weights cannot be read or the results
            cannot be written.
        KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM. The runs in progress leave checkpoints, from which they go on
            when they are drawn again.
    """
    resources = resources or ResourceCache(pick_device())
    largest: list[Job] = []
    refusal: UserError | None = None
    for run in capacity:
        try:
            largest.append(resources.job(run))
        except UserError as error:
            refusal = error
    if refusal is not None and not largest:
        raise refusal
    jobs: list[Job] = []
    scheduler = Scheduler(jobs, resources, on_event, overwrite=True)
    put_off: list[int] = []  # drawn, but of another kind than the lanes in use

    def take() -> int | None:
        while not put_off and (run := draw()) is not None:
            try:
                jobs.append(resources.job(run))
            except UserError as error:
                on_event(RunRefused(run.cfg.run_id, run.seed, str(error)))
            else:
                return len(jobs) - 1
        return None

    def take_fitting(first: int, roomy: Sequence[Job]) -> Iterator[int | None]:
        """The first and all that fit into lanes with this room; what does not fit waits for lanes of its own."""
        yield first
        while True:
            index = take()
            if index is not None and not fits(jobs[index], roomy):
                put_off.append(index)
                index = None
            yield index

    while (index := put_off.pop() if put_off else take()) is not None:
        group = lane_group(jobs[index])
        if group is None:
            scheduler.train(PeftEngine(resources.device), iter([index]), wait=True)
        else:
            roomy = [jobs[index], *(job for job in largest if lane_group(job) == group)]
            engine = LaneTrainer(roomy, max_concurrent or max_lanes(resources.device), resources)
            scheduler.train(engine, take_fitting(index, roomy), wait=True)


class Claim(enum.Enum):
    """What came of asking for a run's folder."""

    BUSY = "another process is training the run"
    DONE = "the run is there already"
    READY = "the folder is locked for this process"


class Scheduler:
    """The jobs of one call and what became of them; `records` by the job's number."""

    def __init__(self, jobs: Sequence[Job], resources: ResourceCache, on_event: EventCallback, overwrite: bool) -> None:
        self.jobs = jobs
        self.records: dict[int, Record] = {}
        self._device = resources.device
        self._on_event = on_event
        self._overwrite = overwrite
        self._noted: set[str] = set()
        self._checkpoints = Checkpoints(resources.device, on_event)
        self._before_step: dict[ActiveRun, dict[str, Any]] | None = None  # the runs' states, in a slow step
        self._step_seconds = math.inf
        self._crowded = False  # a step of several runs did not fit into the memory
        # One for all: they share lanes, or follow each other among the same others.
        self._measurement = uuid.uuid4().hex

    def train(self, engine: Engine, queue: Iterator[int | None], wait: bool) -> list[int]:
        """Train the queue's jobs on the engine, as many at once as it takes; a free place takes the next.

        The queue yields None where it has nothing for now. With `wait`, a job that another process is training is
        waited for; without, it is returned. Ctrl-C and SIGTERM leave checkpoints.
        """
        runs: list[ActiveRun] = []
        with contextlib.ExitStack() as locks, StopSignals() as signals:
            try:
                return self._train(engine, queue, wait, runs, locks, signals)
            except (KeyboardInterrupt, Terminated):
                if not signals.is_hurried:
                    states = self._before_step
                    self._checkpoints.write(self._checkpoints.states(engine, runs) if states is None else states)
                raise

    def _train(
        self,
        engine: Engine,
        queue: Iterator[int | None],
        wait: bool,
        runs: list[ActiveRun],
        locks: contextlib.ExitStack,
        signals: StopSignals,
    ) -> list[int]:
        """The same; `runs` are those in training at any time, whose folders are locked until `locks` closes."""
        busy: list[int] = []
        again: list[int] = []  # had to make room, and go on from their checkpoints
        while True:
            while len(runs) < engine.capacity:
                with signals.held(bool(runs)):
                    if (index := again.pop(0) if again else next(queue, None)) is None:
                        break
                    stack = locks.enter_context(contextlib.ExitStack())
                    claim = self._claim(index, stack, wait)
                    if claim is Claim.READY:
                        runs.append(self._start(engine, index, stack, others=len(runs)))
                        if self._crowded:
                            again += self._make_room(engine, runs)
                        continue
                    if claim is Claim.BUSY:
                        busy.append(index)
                    stack.close()
            if not runs:
                return busy
            with signals.held():
                if self._settle(engine, runs, signals):
                    continue
                if not self._crowded:
                    self._step(engine, runs, signals)
                if not self._crowded:
                    self._settle(engine, runs, signals)
                if self._crowded:
                    again += self._make_room(engine, runs)
            signals.check()

    def _settle(self, engine: Engine, runs: list[ActiveRun], signals: StopSignals) -> bool:
        """Close what is closed between two steps: epochs, checkpoints, runs; whether a run left its place."""
        ended = [run for run in runs if run.at_epoch_end]
        if ended:
            self._evaluate(engine, ended, runs, signals)
            if self._crowded:
                return False
        # A run that is alone and over leaves its record at once. Others need the checkpoint: if this process is killed
        # between the first one's record and the second one's, the second must not train its last steps alone.
        if self._checkpoints.are_due(runs) or (ended and not (len(runs) == 1 and runs[0].is_over)):
            self._checkpoints.write(self._checkpoints.states(engine, runs))
        over = [run for run in runs if run.is_over]
        for run in over:
            runs.remove(run)
            self._finish(engine, run)
        return bool(over)

    def _make_room(self, engine: Engine, runs: list[ActiveRun]) -> list[int]:
        """Take all runs out, so that half as many train at once from now on; the runs' numbers."""
        self._crowded = False
        taken, left = list(runs), max(1, len(runs) // 2)
        for run in taken:
            run.stopped = True  # what it has become since its last checkpoint is left behind
            engine.finish(run)
            runs.remove(run)
            run.resources.close()
        engine.shrink(left)
        text = f"too little memory for {len(taken)} runs at once: from their last checkpoints on, {left} at once"
        self._on_event(Note(*taken[0].job.key, text))
        return [run.index for run in taken]

    def _fail(self, engine: Engine, runs: Sequence[ActiveRun], error: Exception, others: int = 0) -> None:
        """Let these runs fail with the error; if it is too little memory, only one that had it to itself does."""
        if not is_out_of_memory(error):
            for run in runs:
                run.failure = error
        elif len(runs) + others > 1:
            self._crowded = True
        else:
            (run,) = runs
            try:
                needed = engine.memory(run)
            except Exception:  # the run was not in yet
                needed = None
            run.failure = TooLittleMemory(error, needed, self._device)

    def _claim(self, index: int, stack: contextlib.ExitStack, wait: bool) -> Claim:
        """Lock the job's folder, for as long as `stack` is open; a run that is there is filed at once."""
        job = self.jobs[index]
        if not stack.enter_context(job.folder.lock(wait=wait)):
            self._on_event(Note(*job.key, "another process is training this run: it is waited for at the end"))
            return Claim.BUSY
        if not self._overwrite and job.is_complete():
            remove_checkpoints(job)  # of a call that was training it again
            self.records[index] = load_record(job.folder.path)
            self._on_event(RunFinished(*job.key, self.records[index], trained=False))
            return Claim.DONE
        for text in job.warnings:
            if text not in self._noted:
                self._noted.add(text)
                self._on_event(Note(*job.key, text))
        cfg, epochs = job.cfg, job.cfg.training.epochs
        self._on_event(RunStarted(*job.key, cfg.method_name, job.total_steps, epochs, index, len(self.jobs)))
        return Claim.READY

    def _start(self, engine: Engine, index: int, stack: contextlib.ExitStack, others: int) -> ActiveRun:
        run = ActiveRun(index, self.jobs[index], self._device, stack, self._measurement)
        try:
            engine.start(run)
            self._checkpoints.restore(engine, run)
        except UserError:
            raise
        except Exception as error:
            self._fail(engine, [run], error, others)
        for epoch in run.epochs:  # for whoever listens now, who did not hear of them
            self._report_epoch(run, epoch)
        return run

    def _step(self, engine: Engine, runs: Sequence[ActiveRun], signals: StopSignals) -> None:
        """One optimizer step of every run, and their progress where it is time to report it."""
        slow = self._step_seconds > _SLOW_STEP_SECONDS
        if slow:
            self._before_step = self._checkpoints.states(engine, runs)
        started = time.monotonic()
        try:
            with signals.held(not slow):
                engine.step(runs)
        except Exception as error:
            self._fail(engine, runs, error)
            return
        finally:
            self._step_seconds = time.monotonic() - started
        self._before_step = None
        for run in runs:
            try:
                run.report_progress(self._on_event, now=run.at_epoch_end)
            except RuntimeError as error:
                run.failure = error

    def _evaluate(
        self, engine: Engine, ended: Sequence[ActiveRun], runs: Sequence[ActiveRun], signals: StopSignals
    ) -> None:
        """Close the epoch of those of the runs that ended one, all on the same evaluation examples."""
        try:
            with signals.held(False):  # it changes nothing, and can be done again
                logits = engine.evaluate(ended)
        except Exception as error:
            self._fail(engine, ended, error, others=len(runs) - len(ended))
            return
        for run, own in zip(ended, logits, strict=True):
            try:
                run.close_epoch(own)
            except Exception as error:
                self._fail(engine, [run], error)
                continue
            self._report_epoch(run, run.epochs[-1])

    def _report_epoch(self, run: ActiveRun, epoch: Epoch) -> None:
        try:
            self._on_event(Evaluated(*run.job.key, epoch.epoch, epoch.metrics))
        except StopRun:
            run.stopped = True

    def _finish(self, engine: Engine, run: ActiveRun) -> None:
        """Take the run out of the engine and write its record; a run that was stopped has none."""
        fisher: Mapping[str, float] | None = None
        try:
            fisher = engine.finish(run)
        except (RuntimeError, MemoryError) as error:  # a lost GPU cannot be waited for
            run.failure = run.failure or error
        if run.stopped:
            remove_checkpoints(run.job)
        else:
            self.records[run.index] = write_record(run, fisher, self._on_event)
        run.resources.close()
