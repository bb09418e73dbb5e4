"""A cohort of runs -> their records. One run is a cohort of one.

Runs of a cohort share the data, its tokens and the backbone's description where they can. What can
be refused is refused before the first of them loads a weight or writes a file.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fwlora_lab.backbones import Backbone, build_classifier, cpu_has_bf16, load_backbone
from fwlora_lab.errors import UserError
from fwlora_lab.lanes import Lanes, supports
from fwlora_lab.methods import SPECTRAL, Arm, build_arm, derive, initial_ranks, lane_settings, plan_adapters
from fwlora_lab.packing import Packed, Shape, pack, pack_shaped, shape_of
from fwlora_lab.records import (
    BackboneInfo,
    Epoch,
    Failure,
    Machine,
    Record,
    RunDir,
    Times,
    cpu_name,
    differences,
    git_commit,
    load_record,
    status_of,
    versions,
)
from fwlora_lab.runconfig import RunConfig, check_warmup, fingerprint, warnings_of
from fwlora_lab.tasks import (
    TaskData,
    TaskSpec,
    TokenTable,
    collate,
    epoch_batches,
    length_groups,
    load_task,
    score,
    tokenize,
)

_EVALUATION_BATCH = 128
_LANES = {"cpu": 4, "cuda": 16}  # runs at once, where memory allows: a CPU gains nothing from more
_MEMORY = 0.5  # the share of the free memory that lanes may take: other processes look at the same
_SHAPED = {"cpu": False, "cuda": True}  # a GPU replays one graph, so every batch has one shape
_SECONDS_BETWEEN_EVENTS = 0.5
_CALM_DOWN = "Lower training.learning_rate or the adapter's scale model.lora.alpha / rank."


# --- what a caller hears ------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something that happened to one run; `seed` and `run_id` say to which."""

    run_id: str
    seed: int


@dataclass(frozen=True)
class RunStarted(Event):
    """A run begins: run `index` (from 0) of `of` in its cohort."""

    arm: str
    total_steps: int
    epochs: int
    index: int
    of: int


@dataclass(frozen=True)
class StepDone(Event):
    """About twice a second: `loss` is the mean over the steps since the last such event."""

    step: int
    total: int
    loss: float
    phase: str
    examples_per_second: float


@dataclass(frozen=True)
class Evaluated(Event):
    """The evaluation after an epoch."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunFinished(Event):
    """The run's record is written; `trained` is false where it was there already."""

    record: Record
    trained: bool


@dataclass(frozen=True)
class RunFailed(Event):
    """The run failed, and its record says why."""

    record: Record


@dataclass(frozen=True)
class RunRefused(Event):
    """A run that was drawn cannot be trained as it is configured; there is no record of it."""

    reason: str


@dataclass(frozen=True)
class Note(Event):
    """Something that a reader should know once."""

    text: str


Listener = Callable[[Event], object]


class StopRun(Exception):
    """Raised by a listener that hears `Evaluated`: the run ends there and leaves nothing, the others go on."""


def _silence(event: Event) -> None:
    pass


# --- a cohort -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A run to train: `seed` takes the place of `training.seed`."""

    cfg: RunConfig
    seed: int


def train_cohort(runs: Sequence[Planned], listen: Listener = _silence, again: bool = False) -> list[Record]:
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
    prepared = _Prepared(device)
    jobs = [prepared.job(run) for run in runs]
    _refuse_collisions(jobs, again)
    cohort = _Cohort(jobs, device, listen, again)
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


def train_drawn(
    draw: Callable[[], Planned | None], listen: Listener, room: Sequence[Planned] = (), at_once: int | None = None
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
    prepared = _Prepared(device)
    largest: list[_Job] = []
    refusal: UserError | None = None
    for run in room:
        try:
            largest.append(prepared.job(run))
        except UserError as error:
            refusal = error
    if refusal is not None and not largest:
        raise refusal
    jobs: list[_Job] = []
    cohort = _Cohort(jobs, device, listen, again=True)
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

    def take_like(first: int, room: Sequence[_Job]) -> Iterator[int | None]:
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


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class _Job:
    """A run with all that it needs and does not change."""

    cfg: RunConfig
    seed: int
    data: TaskData
    backbone: Backbone
    train: TokenTable
    evaluation: TokenTable
    total_steps: int
    folder: RunDir
    warnings: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.cfg.run_id, self.seed

    @property
    def spec(self) -> TaskSpec:
        return self.data.spec

    def micro_batches(self, group: Tensor) -> list[Tensor]:
        """One step's examples in the parts that go through the model one after another."""
        parts = list(group.split(self.cfg.training.batch_size))
        if self.cfg.dataset.padding == "grouped":
            lengths = self.train.lengths()
            parts = [part[g] for part in parts for g in length_groups(lengths[part])]
        return parts

    def batch(self, table: TokenTable, index: Tensor) -> dict[str, Tensor]:
        data, pad = self.cfg.dataset, self.backbone.tokenizer.pad_token_id
        return collate(table, index, cast(int, pad or 0), data.padding, data.max_length)


@dataclass
class _Prepared:
    """Data, tokens and backbones, each loaded once."""

    device: torch.device
    tasks: dict[str, TaskData] = field(default_factory=dict)
    backbones: dict[str, Backbone] = field(default_factory=dict)
    tables: dict[tuple[str, str, str], TokenTable] = field(default_factory=dict)

    def job(self, run: Planned) -> _Job:
        """The run with all that it needs; refuses what cannot be trained."""
        tasks, backbones, tables = self.tasks, self.backbones, self.tables
        training = run.cfg.training.model_copy(update={"seed": run.seed})
        cfg = run.cfg.model_copy(update={"training": training})
        data_key = cfg.dataset.model_dump_json()
        if data_key not in tasks:
            tasks[data_key] = load_task(cfg.dataset)
        backbone_key = f"{cfg.model.pretrained_id}@{cfg.model.revision}"
        if backbone_key not in backbones:
            backbones[backbone_key] = load_backbone(cfg.model)
        data, backbone = tasks[data_key], backbones[backbone_key]
        if cfg.dataset.max_length > backbone.max_tokens:
            raise UserError(
                f"dataset.max_length={cfg.dataset.max_length} is more than the "
                f"{backbone.max_tokens} tokens that {backbone.name} can read. "
                f"Set dataset.max_length={backbone.max_tokens} or less."
            )
        for split in ("train", cfg.training.evaluate_on):
            examples = getattr(data, split)
            if not len(examples):
                raise UserError(
                    f"training.evaluate_on={split} needs a {split} split, and it is empty. "
                    "Set dataset.selection_fraction above 0, or training.evaluate_on=dev."
                    if split == "selection"
                    else f"the {split} split of {data.source} is empty."
                )
            if (data_key, backbone_key, split) not in tables:
                tables[data_key, backbone_key, split] = tokenize(
                    examples, backbone.tokenizer, cfg.dataset.max_length, cfg.dataset.truncation
                )
        total_steps = cfg.training.epochs * steps_per_epoch(cfg, len(data.train))
        check_warmup(cfg, total_steps, len(data.train))
        notes = [*warnings_of(cfg), *plan_adapters(cfg, backbone, total_steps).warnings]
        if cfg.training.mixed_precision == "bf16" and not in_bf16(cfg, self.device):
            notes.append("training.mixed_precision=bf16: this CPU has no instructions for it; the run trains in fp32.")
        if cfg.training.engine == "lanes" and supports(backbone.config):
            if cfg.dataset.padding == "max_length":
                notes.append(
                    "dataset.padding=max_length changes nothing here: lanes compute true tokens only. "
                    "Set training.engine=peft to pad."
                )
        elif cfg.training.engine == "lanes":
            notes.append(
                f"training.engine=lanes does not know {backbone.config.model_type}: the run trains with PEFT's layers "
                "and padded batches, one model a run."
            )
        return _Job(
            cfg=cfg,
            seed=run.seed,
            data=data,
            backbone=backbone,
            train=tables[data_key, backbone_key, "train"],
            evaluation=tables[data_key, backbone_key, cfg.training.evaluate_on],
            total_steps=total_steps,
            folder=RunDir(cfg.results_dir, cfg.run_id, run.seed),
            warnings=tuple(notes),
        )


def steps_per_epoch(cfg: RunConfig, examples: int) -> int:
    """Optimiser steps in an epoch; the last one may see fewer examples."""
    return math.ceil(examples / _examples_per_step(cfg))


def _examples_per_step(cfg: RunConfig) -> int:
    return cfg.training.batch_size * cfg.training.gradient_accumulation_steps


def _refuse_collisions(jobs: Sequence[_Job], again: bool) -> None:
    seen: dict[Path, _Job] = {}
    for job in jobs:
        path = job.folder.path.resolve()
        if path in seen:
            raise UserError(
                f"run_id={job.cfg.run_id!r} with seed {job.seed} is asked for twice. "
                "Give each variant a run_id of its own, for example run_id=NAME."
            )
        seen[path] = job
        if not again:
            _is_complete(job)


def _is_complete(job: _Job) -> bool:
    status = status_of(job.cfg, job.seed, job.data.fingerprint)
    if status == "different":
        reasons = differences(job.cfg, load_record(job.folder.path), job.data.fingerprint)
        raise UserError(
            f"{job.folder.path} holds a finished run of another kind: {'; '.join(reasons)}. "
            "Set another run_id or results_dir, or train it anew with again=true."
        )
    return status == "complete"


@dataclass
class _Cohort:
    """The jobs of one call and what became of them."""

    jobs: Sequence[_Job]
    device: torch.device
    listen: Listener
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
                    self._file(index, _train_one(self.jobs[index], self.device, self.listen))
        return busy

    def in_lanes(
        self, queue: Iterator[int | None], room: Sequence[_Job], patient: bool, width: int | None = None
    ) -> list[int]:
        """Train the queue's jobs on one backbone, as many at once as there are lanes; a free lane takes the next.

        The queue yields None where it has nothing for now. The lanes have room for every job of `room`, which the
        queue's must be like; there are at most `width` of them (None: one for each job of `room`).
        """
        busy: list[int] = []
        engine: Lanes | None = None
        seats: list[_Seat] = []
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
                        seats.append(_Seat.taken(index, self.jobs[index], engine, self.device, stack))
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
        if not self.again and _is_complete(job):
            self.records[index] = load_record(job.folder.path)
            self.listen(RunFinished(*job.key, self.records[index], trained=False))
            return True
        for text in job.warnings:
            if text not in self.said:
                self.said.add(text)
                self.listen(Note(*job.key, text))
        cfg, steps = job.cfg, job.total_steps
        epochs = cfg.training.epochs
        self.listen(RunStarted(*job.key, cfg.arm, steps, epochs, index, len(self.jobs)))
        return True

    def _tick(self, engine: Lanes, seats: Sequence[_Seat], table: TokenTable) -> None:
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

    def _evaluate(self, engine: Lanes, seats: Sequence[_Seat], ended: Sequence[_Seat], table: TokenTable) -> None:
        """Close the epoch of the runs that ended one in this tick, all on the same evaluation examples."""
        started = time.perf_counter()
        lanes = [seats.index(seat) for seat in ended]
        order = table.lengths().argsort(descending=True, stable=True)
        try:
            parts = [
                engine.predict(pack(table, [index] * len(lanes)), lanes).float().cpu()
                for index in order.split(_EVALUATION_BATCH)
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
                _close_epoch(seat.job, state, own.contiguous().numpy())
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
class _Seat:
    """A run in a lane: its number in the cohort, its state, and the batches of its present epoch."""

    index: int
    job: _Job
    state: RunState
    started: datetime
    stack: contextlib.ExitStack
    lengths: Tensor
    batches: list[Tensor] = field(default_factory=list)
    failure: Exception | None = None
    told: float = field(default_factory=time.monotonic)
    shape: Shape = Shape(0, 0, 0)

    @classmethod
    def taken(cls, index: int, job: _Job, engine: Lanes, device: torch.device, stack: contextlib.ExitStack) -> _Seat:
        started = datetime.now(UTC)
        arm = build_arm(job.cfg, job.backbone, job.spec, job.seed, job.total_steps)
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
        return epoch_batches(len(job.train), _examples_per_step(job.cfg), derive(job.seed, "order"), epoch)

    def shuffle(self) -> None:
        self.batches = self.order(self.state.epoch)

    def tell(self, listen: Listener, at_once: bool = False) -> None:
        """Read the losses about twice a second; one that is not finite is the run's failure."""
        if not at_once and time.monotonic() - self.told < _SECONDS_BETWEEN_EVENTS:
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

    def leave(self, engine: Lanes, seats: list[_Seat], device: torch.device, listen: Listener) -> Record | None:
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
        record = _finish(self.job, self.state, device, self.started, self.failure, listen)
        self.stack.close()
        return record


def _lane_group(job: _Job) -> object | None:
    """What runs must have in common to share lanes; None for a run that cannot have one."""
    if job.cfg.training.engine != "lanes" or not supports(job.backbone.config):
        return None
    targets = tuple(job.cfg.model.lora.target_modules)
    spectral = job.cfg.arm in SPECTRAL
    backbone = (job.backbone.path_or_id, job.backbone.commit, job.cfg.training.mixed_precision)
    return (spectral, backbone, targets, id(job.train), id(job.evaluation))


def _room_for(jobs: Sequence[_Job]) -> tuple[list[str], int]:
    """Every matrix that one of the jobs adapts, and the highest rank."""
    ranks = [initial_ranks(job.cfg, job.backbone, job.total_steps) for job in jobs]
    return list(dict.fromkeys(name for of in ranks for name in of)), max(rank for of in ranks for rank in of.values())


def _lanes_for(jobs: Sequence[_Job], width: int, device: torch.device) -> Lanes:
    """An engine with room for every job's matrices and ranks."""
    targets, highest = _room_for(jobs)
    model = build_classifier(jobs[0].backbone, jobs[0].spec, 0).to(device)  # type: ignore[arg-type]
    if in_bf16(jobs[0].cfg, device):
        model.bfloat16()  # what is trained stays in fp32
    return Lanes(model, targets, width, highest, spectral=jobs[0].cfg.arm in SPECTRAL)


def _pack(table: TokenTable, batches: Sequence[Tensor], seats: Sequence[_Seat]) -> Packed:
    if not _SHAPED[table.tokens.device.type]:
        return pack(table, batches)
    return pack_shaped(table, batches, Shape(*map(max, zip(*(seat.shape for seat in seats), strict=True))))


def _lanes_that_fit(width: int, engine: Lanes, seat: _Seat, table: TokenTable) -> int:
    """How many of `width` lanes the free memory holds, judged by the first run's batch with the most tokens."""
    largest = max(seat.batches, key=lambda batch: int(seat.lengths[batch].sum()))
    fit = _MEMORY * _free_memory(engine.device) / engine.memory(_pack(table, [largest], [seat]))
    return max(1, int(min(width, fit)))


def _free_memory(device: torch.device) -> float:
    """Bytes; without limit where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


# --- one run ------------------------------------------------------------------------------------


class Diverged(RuntimeError):
    """The training loss or the model's outputs stopped being finite."""


class Clock:
    """Seconds by phase; the device is waited for where one phase ends and another begins."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._phase: str | None = None
        self._since = 0.0

    def enter(self, phase: str | None) -> None:
        """Count from now on for `phase`; None counts for nothing."""
        if phase == self._phase:
            return
        now = self._now()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def total(self) -> float:
        """Seconds up to now over all phases, without waiting for the device."""
        running = 0.0 if self._phase is None else time.perf_counter() - self._since
        return sum(self.seconds.values()) + running

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass
class RunState:
    """Everything that the loop changes. `epoch` and `position` point at the next step's batch."""

    seed: int
    arm: Arm
    training: Clock
    evaluating: Clock
    epoch: int = 0
    position: int = 0
    step: int = 0
    epoch_loss: float = 0.0
    unread: list[Tensor] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    logits: np.ndarray | None = None

    def read_losses(self) -> float:
        """Wait for the device, add the losses not read yet to the epoch's, and return their mean.

        Raises:
            Diverged: one of them is not finite.
        """
        losses = torch.stack(self.unread).tolist()
        self.unread.clear()
        for step, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise Diverged(f"the training loss is {loss} at step {step}: training diverged. {_CALM_DOWN}")
        self.epoch_loss += sum(losses)
        return sum(losses) / len(losses)


def _train_one(job: _Job, device: torch.device, listen: Listener) -> Record | None:
    started = datetime.now(UTC)
    _forget_peak_memory(device)
    state: RunState | None = None
    failure: Exception | None = None
    try:
        state = _start(job, device)
        _run(job, state, device, listen)
    except UserError:
        raise
    except Exception as error:
        failure = error
        if state is not None:
            with contextlib.suppress(RuntimeError):  # a lost GPU cannot be waited for
                state.training.enter(None)
    return _finish(job, state, device, started, failure, listen)


def _finish(
    job: _Job,
    state: RunState | None,
    device: torch.device,
    started: datetime,
    failure: Exception | None,
    listen: Listener,
) -> Record | None:
    """Write the record of a run that is over, well or not, and say so; a run that was stopped has none."""
    if isinstance(failure, StopRun):
        return None
    if failure is None:
        assert state is not None
        try:
            record = _record(job, state, device, started)
        except Exception as error:
            failure = error
    if failure is not None:
        told = Failure(
            type=type(failure).__name__,
            message=str(failure),
            traceback="".join(traceback.format_exception(failure)),
        )
        record = _record(job, state, device, started, told)
        job.folder.write(record, job.cfg)
        listen(RunFailed(*job.key, record))
        return record
    assert state is not None
    job.folder.write(
        record,
        job.cfg,
        logits=state.logits,
        labels=job.evaluation.labels.numpy(),
        save_adapter=state.arm.export if job.cfg.training.save_adapter else None,
    )
    listen(RunFinished(*job.key, record, trained=True))
    return record


def _start(job: _Job, device: torch.device) -> RunState:
    arm = build_arm(job.cfg, job.backbone, job.spec, job.seed, job.total_steps, device)
    torch.manual_seed(derive(job.seed, "dropout"))
    return RunState(job.seed, arm, Clock(device), Clock(device))


def _run(job: _Job, state: RunState, device: torch.device, listen: Listener) -> None:
    while state.epoch < job.cfg.training.epochs:
        _train_epoch(job, state, device, listen)
        state.evaluating.enter("evaluation")
        _close_epoch(job, state, predict(job, state.arm, device))
        state.evaluating.enter(None)
        listen(Evaluated(*job.key, state.epoch, state.epochs[-1].metrics))


def _train_epoch(job: _Job, state: RunState, device: torch.device, listen: Listener) -> None:
    """The rest of the epoch that `state` stands in, one optimiser step at a time."""
    training, arm = job.cfg.training, state.arm
    lengths = job.train.lengths()
    groups = epoch_batches(len(job.train), _examples_per_step(job.cfg), derive(job.seed, "order"), state.epoch)
    arm.model.train()
    told = time.monotonic()
    for group in groups[state.position :]:
        phase = arm.phase()
        state.training.enter(phase)
        loss = torch.zeros((), device=device)
        for micro in job.micro_batches(group):
            batch = _to(job.batch(job.train, micro), device)
            with _precision(job.cfg, device):
                # The mean over the step's examples, also where the last micro-batch is a short one.
                part = arm.model(**batch).loss * (len(micro) / len(group))
            part.backward()
            loss += part.detach()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(arm.trainable, training.max_grad_norm)
        arm.optimizer.step()
        arm.scheduler.step()
        arm.optimizer.zero_grad()
        state.step += 1
        state.position += 1
        state.examples += len(group)
        state.tokens += int(lengths[group].sum())
        state.unread.append(loss)
        if time.monotonic() - told >= _SECONDS_BETWEEN_EVENTS:
            mean = state.read_losses()
            rate = state.examples / state.training.total()
            listen(StepDone(*job.key, state.step, job.total_steps, mean, phase, rate))
            told = time.monotonic()
    if state.unread:
        mean = state.read_losses()
        rate = state.examples / state.training.total()
        listen(StepDone(*job.key, state.step, job.total_steps, mean, arm.phase(), rate))
    state.training.enter(None)


def _close_epoch(job: _Job, state: RunState, logits: np.ndarray) -> None:
    """Score the evaluation after an epoch, note it down, and point at the next one."""
    labels = job.evaluation.labels
    if not np.isfinite(logits).all():
        raise Diverged(f"the model's outputs are not finite after step {state.step}: training diverged. {_CALM_DOWN}")
    # Worked out from the logits: the model's own loss would carry AdaLoRA's regulariser.
    outputs = torch.from_numpy(logits)
    if job.spec.kind == "regression":
        loss = functional.mse_loss(outputs[:, 0], labels.float())
    else:
        loss = functional.cross_entropy(outputs, labels)
    state.logits = logits
    state.epochs.append(
        Epoch(
            epoch=state.epoch + 1,
            step=state.step,
            learning_rate=state.arm.learning_rate(state.step),
            train_loss=state.epoch_loss / state.position,
            metrics=score(job.spec, logits, labels.numpy()),
            loss=float(loss) if math.isfinite(loss) else None,
        )
    )
    state.epoch, state.position, state.epoch_loss = state.epoch + 1, 0, 0.0


@torch.inference_mode()
def predict(job: _Job, arm: Arm, device: torch.device) -> np.ndarray:
    """Logits [n, classes] float32 of the evaluation split, in its order."""
    arm.model.eval()
    # Long ones first: what does not fit into memory fails at once.
    order = job.evaluation.lengths().argsort(descending=True, stable=True)
    parts = []
    for index in order.split(_EVALUATION_BATCH):
        batch = _to(job.batch(job.evaluation, index), device)
        del batch["labels"]
        with _precision(job.cfg, device):
            parts.append(arm.model(**batch).logits.float())
    logits = torch.cat(parts).cpu()
    return torch.empty_like(logits).index_copy_(0, order, logits).numpy()


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def in_bf16(cfg: RunConfig, device: torch.device) -> bool:
    """Whether the encoder computes in bf16: asked for, and the device has instructions for it."""
    return cfg.training.mixed_precision == "bf16" and (device.type == "cuda" or cpu_has_bf16())


def _precision(cfg: RunConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if in_bf16(cfg, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _record(
    job: _Job,
    state: RunState | None,
    device: torch.device,
    started: datetime,
    failure: Failure | None = None,
) -> Record:
    """The record of a run as it stands: complete, or failed where it was when `failure` struck."""
    cuda = device.type == "cuda"
    record = Record(
        run_id=job.cfg.run_id,
        seed=job.seed,
        arm=job.cfg.arm,
        status="failed" if failure else "complete",
        error=failure,
        started=started,
        finished=datetime.now(UTC),
        command=shlex.join(sys.argv),
        versions=versions(),
        git_commit=git_commit(),
        machine=Machine(
            cpu=cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(device) if cuda else "cpu",
            precision="bf16" if in_bf16(job.cfg, device) else "fp32",
        ),
        config=job.cfg.model_dump(mode="json"),
        config_fingerprint=fingerprint(job.cfg),
        data_fingerprint=job.data.fingerprint,
        data_source=job.data.source,
        evaluated_on=job.cfg.training.evaluate_on,
        primary_metric=job.spec.primary,
        backbone=BackboneInfo(
            name=job.backbone.name,
            source=job.backbone.source,
            commit=job.backbone.commit,
            parameters=job.backbone.parameters,
        ),
        total_steps=job.total_steps,
        warnings=list(job.warnings),
    )
    if state is None:
        return record
    phases = state.training.seconds
    seconds = sum(phases.values())
    fisher = phases.get("fisher", 0.0)
    record.epochs = state.epochs
    record.steps = state.step
    record.times = Times(
        train_seconds=seconds,
        fisher_seconds=fisher,
        steady_seconds=seconds - fisher,
        eval_seconds=sum(state.evaluating.seconds.values()),
        phases=dict(phases),
    )
    record.peak_memory_bytes = _peak_memory(device)
    if seconds > 0:
        record.examples_per_second = state.examples / seconds
        record.tokens_per_second = state.tokens / seconds
    if failure is None:
        record.parameters = state.arm.parameters()
        record.matrices = state.arm.report()
    return record


def _forget_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux counts the resident peak anew from here; elsewhere it is that of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
