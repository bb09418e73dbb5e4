"""Training in lanes: several runs at once on one frozen encoder, only true tokens computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.packing import Packed, Shape, pack, pack_shaped, shape_of
from fwlora_lab.models.classifier import build_classifier
from fwlora_lab.models.methods import new_state, parts_of
from fwlora_lab.seeds import derive
from fwlora_lab.training.active_run import ActiveRun
from fwlora_lab.training.device import free_memory, in_bf16, pick_device
from fwlora_lab.training.jobs import Job
from fwlora_lab.training.lane_settings import lane_settings
from fwlora_lab.training.peft_engine import EVALUATION_BATCH
from fwlora_lab.training.resources import ResourceCache

_LANES = {"cpu": 4, "cuda": 16}  # runs at once, where memory allows: a CPU gains nothing from more
_MEMORY = 0.5  # share of the free memory that lanes may take: other processes may count on the rest
_SHAPED = {"cpu": False, "cuda": True}  # a GPU replays one captured graph, so every batch has one shape


def max_lanes(device: torch.device | None = None) -> int:
    """How many runs that can share an encoder train at once on this device, where its memory allows."""
    return _LANES[(device or pick_device()).type]


def lane_group(job: Job) -> object | None:
    """What runs must have in common to share lanes; None for a run that trains in PEFT's layers."""
    if job.engine != "lanes":
        return None
    targets = tuple(job.cfg.model.lora.target_modules)
    backbone = (job.backbone.path_or_id, job.backbone.commit, job.cfg.training.mixed_precision)
    return (parts_of(job.cfg.method_name).spectral, backbone, targets, id(job.train), id(job.evaluation))


def fits(job: Job, capacity: Sequence[Job]) -> bool:
    """Whether lanes made for the jobs of `capacity` have room for this one's matrices and ranks."""
    targets, highest = _extent(capacity)
    names, rank = _extent([job])
    return lane_group(job) == lane_group(capacity[0]) and rank <= highest and set(names) <= set(targets)


class LaneTrainer:
    """Runs of one lane group. The lanes are wide enough for every job of `jobs`; there are at most `width` of them."""

    def __init__(self, jobs: Sequence[Job], width: int, resources: ResourceCache) -> None:
        self._jobs, self._resources = jobs, resources
        self.device = resources.device
        self.capacity = min(max_lanes(self.device), width)
        self._lanes: LaneEngine | None = None  # made when the first run comes: all of them may be trained already
        self._runs: list[ActiveRun] = []
        self._shapes: dict[int, Shape] = {}
        self._table = jobs[0].train.to(self.device)

    def start(self, run: ActiveRun) -> None:
        job = run.job
        if self._lanes is None:
            self._lanes = make_lanes(self._jobs, self.capacity, self.device)
        model = self._resources.skeleton(job).with_head(derive(job.seed, "head"))
        run.state = new_state(job.cfg, job.backbone, model, job.plan, job.total_steps)
        settings = lane_settings(job.cfg, job.plan, job.total_steps)
        if _SHAPED[self.device.type]:
            epochs = range(job.cfg.training.epochs)
            batches = [batch for epoch in epochs for batch in job.epoch_batches(epoch)]
            self._shapes[run.index] = shape_of(job.train, batches)
        # Nothing may fail between these two: a lane without a run would never be released.
        self._lanes.admit(settings, run.state.adapters(), run.state.head())
        self._runs.append(run)
        if len(self._runs) == 1:
            self.capacity = self._lanes_that_fit(run)

    def step(self, runs: Sequence[ActiveRun]) -> None:
        """One optimizer step of every run; its seconds are shared out evenly."""
        lanes, started = self._engine, time.perf_counter()
        assert list(runs) == self._runs
        batches = [run.batch for run in runs]
        rates = [run.learning_rate(run.step) for run in runs]
        phases = [lanes.phase(lane) for lane in range(len(runs))]
        regression = runs[0].job.spec.kind == "regression"
        losses = lanes.step(self._pack(batches, runs), rates, regression)
        share = (time.perf_counter() - started) / len(runs)
        for run, phase, loss in zip(runs, phases, losses.unbind(), strict=True):
            run.count_step(loss, phase)
            run.training.add(phase, share)

    def evaluate(self, runs: Sequence[ActiveRun]) -> list[np.ndarray]:
        started = time.perf_counter()
        table = runs[0].job.evaluation
        lanes = [self._runs.index(run) for run in runs]
        order = table.lengths().argsort(descending=True, stable=True)
        parts = [
            self._engine.predict(pack(table, [index] * len(lanes)), lanes).float().cpu()
            for index in order.split(EVALUATION_BATCH)
        ]
        logits = torch.cat(parts, 1)
        logits = torch.empty_like(logits).index_copy_(1, order, logits)
        share = (time.perf_counter() - started) / len(lanes)
        for run in runs:
            run.evaluating.add("evaluation", share)
        return [own.contiguous().numpy() for own in logits.unbind()]

    def finish(self, run: ActiveRun) -> Mapping[str, float] | None:
        if run not in self._runs:
            return None  # it failed before it had a lane
        lane, fisher = self._runs.index(run), None
        if run.failure is None and not run.stopped:
            assert run.state is not None
            run.state.load(self._engine.adapters(lane), self._engine.head_of(lane))
            if run.job.cfg.method_name == "fw_lora":
                fisher = self._engine.fisher_of(lane)
        self._engine.release(lane)
        self._runs.remove(run)
        self._shapes.pop(run.index, None)
        return fisher

    def shrink(self, capacity: int) -> None:
        assert not self._runs
        self.capacity = capacity
        self._lanes = None  # its memory is free until the next run comes, and nothing of the broken step is left

    def memory(self, run: ActiveRun) -> float | None:
        return self._engine.memory(self._pack([_largest_batch(run)], [run]))

    def state_dict(self, run: ActiveRun) -> dict[str, Any]:
        return {"run": run.state_dict(), "lane": self._engine.lane_state(self._runs.index(run))}

    def load_state_dict(self, run: ActiveRun, state: dict[str, Any]) -> None:
        run.load_state_dict(state["run"])
        self._engine.restore_lane(self._runs.index(run), state["lane"])

    @property
    def _engine(self) -> LaneEngine:
        assert self._lanes is not None
        return self._lanes

    def _pack(self, batches: Sequence[Tensor], runs: Sequence[ActiveRun]) -> Packed:
        if not _SHAPED[self.device.type]:
            return pack(self._table, batches)
        shapes = [self._shapes[run.index] for run in runs]
        return pack_shaped(self._table, batches, Shape(*map(max, zip(*shapes, strict=True))))

    def _lanes_that_fit(self, run: ActiveRun) -> int:
        """How many lanes the free memory holds, judged by the first run's batch with the most tokens."""
        fit = _MEMORY * free_memory(self.device) / self._engine.memory(self._pack([_largest_batch(run)], [run]))
        return max(1, int(min(self.capacity, fit)))


def _largest_batch(run: ActiveRun) -> Tensor:
    """The examples of the run's batch with the most tokens in this epoch."""
    return max(run.batches, key=lambda batch: int(run.lengths[batch].sum()))


def make_lanes(jobs: Sequence[Job], width: int, device: torch.device) -> LaneEngine:
    """Empty lanes on a loaded encoder, with room for every job's matrices and ranks."""
    targets, highest = _extent(jobs)
    model = build_classifier(jobs[0].backbone, jobs[0].spec, 0).to(device)  # type: ignore[arg-type]
    if in_bf16(jobs[0].cfg, device):
        model.bfloat16()  # what is trained stays in fp32
    return LaneEngine(model, targets, width, highest, svd_parametrized=parts_of(jobs[0].cfg.method_name).spectral)


def _extent(jobs: Sequence[Job]) -> tuple[list[str], int]:
    """Every matrix that one of the jobs adapts, and the highest rank."""
    ranks = [job.plan.initial_ranks() for job in jobs]
    return list(dict.fromkeys(name for of in ranks for name in of)), max(rank for of in ranks for rank in of.values())
