"""A cohort of runs -> their records. One run is a cohort of one.

Runs of a cohort share the data, its tokens and the backbone's description where they can. What can
be refused is refused before the first of them loads a weight or writes a file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from torch import Tensor

from fwlora_lab.data.tokens import TokenTable, epoch_batches
from fwlora_lab.errors import UserError
from fwlora_lab.lanes.engine import Lanes
from fwlora_lab.lanes.packing import Packed, Shape, pack, pack_shaped, shape_of
from fwlora_lab.lanes.settings import supports
from fwlora_lab.models.classifier import build_classifier
from fwlora_lab.models.methods import SPECTRAL, build_method, initial_ranks
from fwlora_lab.records.folder import load_record
from fwlora_lab.records.record import Record
from fwlora_lab.seeds import derive
from fwlora_lab.training.device import free_memory, in_bf16, pick_device
from fwlora_lab.training.events import (
    SECONDS_BETWEEN_EVENTS,
    Evaluated,
    EventCallback,
    Note,
    RunFinished,
    RunRefused,
    RunStarted,
    StepDone,
    StopRun,
    ignore_event,
)
from fwlora_lab.training.finish import finish_run
from fwlora_lab.training.jobs import Job, ResourceCache, RunSpec, examples_per_step, is_complete, refuse_collisions
from fwlora_lab.training.lane_settings import lane_settings
from fwlora_lab.training.peft_engine import EVALUATION_BATCH, train_alone
from fwlora_lab.training.run_state import Clock, Diverged, RunState, close_epoch

_LANES = {"cpu": 4, "cuda": 16}  # runs at once, where memory allows: a CPU gains nothing from more
_MEMORY = 0.5  # the share of the free memory that lanes may take: other processes look at the same
_SHAPED = {"cpu": False, "cuda": True}  # a GPU replays one graph, so every batch has one shape


def train_runs(
    runs: Sequence[RunSpec],
    listen: EventCallback = ignore_event,
    again: bool = False,
    resources: ResourceCache | None = None,
) -> list[Record]:
    """Train the runs that are not there yet and return the records of all, in order.

    A run that fails becomes a failed record, and the others go on; the next call tries it again. A
    run that another process is training is waited for at the end. `again` trains every run anew.

    Raises:
        UserError: before anything is trained where a config, the data or the model cannot be used,
            or a record with another config or data is in the way; later where the weights cannot
            be read or results cannot be written.
        KeyboardInterrupt: the run in progress leaves nothing.
    """
    device = pick_device()
    prepared = resources or ResourceCache(device)
    jobs = [prepared.job(run) for run in runs]
    refuse_collisions(jobs, again)
    cohort = Scheduler(jobs, device, listen, again)
    waiting = list(range(len(jobs)))
    for patient in (False, True):
        busy: list[int] = []
        groups: dict[object, list[int]] = {}
        for index in waiting:
            groups.setdefault(_lane_group(jobs[index]) or index, []).append(index)
        for key, group in groups.items():
            if isinstance(key, int):
                busy += cohort.one_by_one(group, patient)
            else:
                busy += cohort.in_lanes(iter(group), [jobs[i] for i in group], patient)
        waiting = busy
    return [cohort.records[index] for index in range(len(jobs)) if index in cohort.records]


def train_on_demand(
    draw: Callable[[], RunSpec | None],
    listen: EventCallback,
    room: Sequence[RunSpec] = (),
    at_once: int | None = None,
    resources: ResourceCache | None = None,
) -> None:
    """Train runs that are decided one at a time: `draw` is asked for the next whenever there is a place to train it.

    It may return None for now and is asked again while others train; None with nothing in training ends the call.
    Runs are trained anew whether or not they are there. `room` are runs as large as any that will be drawn: the
    lanes are made wide enough for them. At most `at_once` runs train at a time (None: as many as there are lanes).

    Raises:
        UserError: no run of `room` can be trained as it is configured, the weights cannot be read or the results
            cannot be written.
        KeyboardInterrupt: the runs in progress leave nothing.
    """
    device = pick_device()
    prepared = resources or ResourceCache(device)
    largest: list[Job] = []
    refusal: UserError | None = None
    for run in room:
        try:
            largest.append(prepared.job(run))
        except UserError as error:
            refusal = error
    if refusal is not None and not largest:
        raise refusal
    jobs: list[Job] = []
    cohort = Scheduler(jobs, device, listen, again=True)
    put_off: list[int] = []  # drawn, but of another kind than the lanes in use

    def take() -> int | None:
        while not put_off and (run := draw()) is not None:
            try:
                jobs.append(prepared.job(run))
            except UserError as error:
                listen(RunRefused(run.cfg.run_id, run.seed, str(error)))
            else:
                return len(jobs) - 1
        return None

    def take_like(first: int, room: Sequence[Job]) -> Iterator[int | None]:
        """The first and all that fit into lanes with this room; what does not waits for lanes of its own."""
        targets, highest = _room_for(room)
        yield first
        while True:
            index = take()
            if index is not None:
                names, rank = _room_for([jobs[index]])
                if _lane_group(jobs[index]) != _lane_group(room[0]) or rank > highest or not set(names) <= set(targets):
                    put_off.append(index)
                    index = None
            yield index

    while (index := put_off.pop() if put_off else take()) is not None:
        group = _lane_group(jobs[index])
        if group is None:
            cohort.one_by_one([index], patient=True)
        else:
            roomy = [jobs[index], *(job for job in largest if _lane_group(job) == group)]
            cohort.in_lanes(take_like(index, roomy), roomy, patient=True, width=at_once or _LANES[device.type])


def lanes_at_once() -> int:
    """How many runs that can share a backbone train at once on this machine, where its memory allows."""
    return _LANES[pick_device().type]


@dataclass
class Scheduler:
    """The jobs of one call and what became of them."""

    jobs: Sequence[Job]
    device: torch.device
    listen: EventCallback
    again: bool
    records: dict[int, Record] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def one_by_one(self, group: Sequence[int], patient: bool) -> list[int]:
        """Train each job with a model of its own; returns those that another process is training."""
        busy = []
        for index in group:
            with contextlib.ExitStack() as stack:
                if not self._takes(index, stack, patient):
                    busy.append(index)
                elif index not in self.records:
                    self._file(index, train_alone(self.jobs[index], self.device, self.listen))
        return busy

    def in_lanes(
        self, queue: Iterator[int | None], room: Sequence[Job], patient: bool, width: int | None = None
    ) -> list[int]:
        """Train the queue's jobs on one backbone, as many at once as there are lanes; a free lane takes the next.

        The queue yields None where it has nothing for now. The lanes have room for every job of `room`, which the
        queue's must be like; there are at most `width` of them (None: one for each job of `room`).
        """
        busy: list[int] = []
        engine: Lanes | None = None
        seats: list[ActiveRun] = []
        table = room[0].train.to(self.device)
        evaluation = room[0].evaluation
        width = min(_LANES[self.device.type], width or len(room))
        with contextlib.ExitStack() as everything:
            while True:
                while len(seats) < width and (index := next(queue, None)) is not None:
                    stack = everything.enter_context(contextlib.ExitStack())
                    if not self._takes(index, stack, patient):
                        busy.append(index)
                    elif index not in self.records:
                        engine = engine or _lanes_for(room, width, self.device)
                        seats.append(ActiveRun.taken(index, self.jobs[index], engine, self.device, stack))
                        if len(seats) == 1:
                            width = _lanes_that_fit(width, engine, seats[0], table)
                        continue
                    stack.close()
                if not seats:
                    return busy
                assert engine is not None
                self._tick(engine, seats, table)
                for seat in list(seats):
                    if seat.failure is not None or seat.state.position == len(seat.batches):
                        continue
                    seat.tell(self.listen)
                ended = [s for s in seats if s.failure is None and s.state.position == len(s.batches)]
                if ended:
                    self._evaluate(engine, seats, ended, evaluation)
                for seat in list(seats):
                    if seat.failure is not None or seat.state.epoch == seat.job.cfg.training.epochs:
                        self._file(seat.index, seat.leave(engine, seats, self.device, self.listen))

    def _file(self, index: int, record: Record | None) -> None:
        if record is not None:
            self.records[index] = record

    def _takes(self, index: int, stack: contextlib.ExitStack, patient: bool) -> bool:
        """Lock the job's folder. False where another process has it; a run that is there is filed at once."""
        job = self.jobs[index]
        if not stack.enter_context(job.folder.lock(wait=patient)):
            text = "another process is training this run: it is waited for at the end"
            self.listen(Note(*job.key, text))
            return False
        if not self.again and is_complete(job):
            self.records[index] = load_record(job.folder.path)
            self.listen(RunFinished(*job.key, self.records[index], trained=False))
            return True
        for text in job.warnings:
            if text not in self.said:
                self.said.add(text)
                self.listen(Note(*job.key, text))
        cfg, steps = job.cfg, job.total_steps
        epochs = cfg.training.epochs
        self.listen(RunStarted(*job.key, cfg.method_name, steps, epochs, index, len(self.jobs)))
        return True

    def _tick(self, engine: Lanes, seats: Sequence[ActiveRun], table: TokenTable) -> None:
        """One optimiser step of every seated run; its seconds are shared out evenly."""
        started = time.perf_counter()
        batches = [seat.batches[seat.state.position] for seat in seats]
        rates = [seat.state.arm.learning_rate(seat.state.step) for seat in seats]
        phases = [engine.phase(lane) for lane in range(len(seats))]
        regression = seats[0].job.spec.kind == "regression"
        try:
            losses = engine.step(_pack(table, batches, seats), rates, regression)
        except Exception as error:
            for seat in seats:
                seat.failure = error
            return
        share = (time.perf_counter() - started) / len(seats)
        for seat, phase, batch, loss in zip(seats, phases, batches, losses.unbind(), strict=True):
            state = seat.state
            state.step += 1
            state.position += 1
            state.examples += len(batch)
            state.tokens += int(seat.lengths[batch].sum())
            state.unread.append(loss)
            state.training.add(phase, share)

    def _evaluate(
        self, engine: Lanes, seats: Sequence[ActiveRun], ended: Sequence[ActiveRun], table: TokenTable
    ) -> None:
        """Close the epoch of the runs that ended one in this tick, all on the same evaluation examples."""
        started = time.perf_counter()
        lanes = [seats.index(seat) for seat in ended]
        order = table.lengths().argsort(descending=True, stable=True)
        try:
            parts = [
                engine.predict(pack(table, [index] * len(lanes)), lanes).float().cpu()
                for index in order.split(EVALUATION_BATCH)
            ]
        except Exception as error:
            for seat in ended:
                seat.failure = error
            return
        logits = torch.cat(parts, 1)
        logits = torch.empty_like(logits).index_copy_(1, order, logits)
        share = (time.perf_counter() - started) / len(lanes)
        for seat, own in zip(ended, logits.unbind(), strict=True):
            state = seat.state
            state.evaluating.add("evaluation", share)
            try:
                seat.tell(self.listen, at_once=True)
                close_epoch(seat.job, state, own.contiguous().numpy())
            except (Diverged, UserError) as error:
                seat.failure = error
                continue
            try:
                self.listen(Evaluated(*seat.job.key, state.epoch, state.epochs[-1].metrics))
            except StopRun as stop:
                seat.failure = stop
            else:
                seat.shuffle()


@dataclass
class ActiveRun:
    """A run in a lane: its number in the cohort, its state, and the batches of its present epoch."""

    index: int
    job: Job
    state: RunState
    started: datetime
    stack: contextlib.ExitStack
    lengths: Tensor
    batches: list[Tensor] = field(default_factory=list)
    failure: Exception | None = None
    told: float = field(default_factory=time.monotonic)
    shape: Shape = Shape(0, 0, 0)

    @classmethod
    def taken(cls, index: int, job: Job, engine: Lanes, device: torch.device, stack: contextlib.ExitStack) -> ActiveRun:
        started = datetime.now(UTC)
        arm = build_method(job.cfg, job.backbone, job.spec, job.seed, job.total_steps)
        # What the run starts from is what it would start from alone; the lane trains it.
        engine.admit(lane_settings(job.cfg, arm, job.seed, job.total_steps), arm.adapters(), arm.head())
        state = RunState(job.seed, arm, Clock(device), Clock(device))
        seat = cls(index, job, state, started, stack, job.train.lengths())
        seat.shuffle()
        if _SHAPED[device.type]:
            epochs = range(job.cfg.training.epochs)
            seat.shape = shape_of(job.train, [batch for epoch in epochs for batch in seat.order(epoch)])
        return seat

    def order(self, epoch: int) -> list[Tensor]:
        job = self.job
        return epoch_batches(len(job.train), examples_per_step(job.cfg), derive(job.seed, "order"), epoch)

    def shuffle(self) -> None:
        self.batches = self.order(self.state.epoch)

    def tell(self, listen: EventCallback, at_once: bool = False) -> None:
        """Read the losses about twice a second; one that is not finite is the run's failure."""
        if not at_once and time.monotonic() - self.told < SECONDS_BETWEEN_EVENTS:
            return
        self.told = time.monotonic()
        state = self.state
        if not state.unread:
            return
        try:
            mean = state.read_losses()
        except Diverged as error:
            if at_once:
                raise
            self.failure = error
            return
        rate = state.examples / max(state.training.total(), 1e-9)
        phase = list(state.training.seconds)[-1]
        listen(StepDone(*self.job.key, state.step, self.job.total_steps, mean, phase, rate))

    def leave(
        self, engine: Lanes, seats: list[ActiveRun], device: torch.device, listen: EventCallback
    ) -> Record | None:
        """Give the lane back and write the record."""
        lane = seats.index(self)
        del seats[lane]
        if self.failure is None:
            arm = self.state.arm
            for name, factors in engine.adapters(lane).items():
                for own, trained in zip(arm.adapters()[name], factors, strict=True):
                    own.copy_(trained)
            for name, value in engine.head_of(lane).items():
                arm.head()[name].copy_(value)
            arm.take_fisher(engine.fisher_of(lane), self.state.step)
        engine.release(lane)
        record = finish_run(self.job, self.state, device, self.started, self.failure, listen)
        self.stack.close()
        return record


def _lane_group(job: Job) -> object | None:
    """What runs must have in common to share lanes; None for a run that cannot have one."""
    if job.cfg.training.engine != "lanes" or not supports(job.backbone.config):
        return None
    targets = tuple(job.cfg.model.lora.target_modules)
    spectral = job.cfg.method_name in SPECTRAL
    backbone = (job.backbone.path_or_id, job.backbone.commit, job.cfg.training.mixed_precision)
    return (spectral, backbone, targets, id(job.train), id(job.evaluation))


def _room_for(jobs: Sequence[Job]) -> tuple[list[str], int]:
    """Every matrix that one of the jobs adapts, and the highest rank."""
    ranks = [initial_ranks(job.cfg, job.backbone, job.total_steps) for job in jobs]
    return list(dict.fromkeys(name for of in ranks for name in of)), max(rank for of in ranks for rank in of.values())


def _lanes_for(jobs: Sequence[Job], width: int, device: torch.device) -> Lanes:
    """An engine with room for every job's matrices and ranks."""
    targets, highest = _room_for(jobs)
    model = build_classifier(jobs[0].backbone, jobs[0].spec, 0).to(device)  # type: ignore[arg-type]
    if in_bf16(jobs[0].cfg, device):
        model.bfloat16()  # what is trained stays in fp32
    return Lanes(model, targets, width, highest, spectral=jobs[0].cfg.method_name in SPECTRAL)


def _pack(table: TokenTable, batches: Sequence[Tensor], seats: Sequence[ActiveRun]) -> Packed:
    if not _SHAPED[table.tokens.device.type]:
        return pack(table, batches)
    return pack_shaped(table, batches, Shape(*map(max, zip(*(seat.shape for seat in seats), strict=True))))


def _lanes_that_fit(width: int, engine: Lanes, seat: ActiveRun, table: TokenTable) -> int:
    """How many of `width` lanes the free memory holds, judged by the first run's batch with the most tokens."""
    largest = max(seat.batches, key=lambda batch: int(seat.lengths[batch].sum()))
    fit = _MEMORY * free_memory(engine.device) / engine.memory(_pack(table, [largest], [seat]))
    return max(1, int(min(width, fit)))
