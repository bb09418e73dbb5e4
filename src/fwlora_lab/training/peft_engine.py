"""TODO"""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor

from fwlora_lab.data.tokens import epoch_batches
from fwlora_lab.errors import UserError
from fwlora_lab.models.methods import LoraMethod, build_method
from fwlora_lab.records.record import Record
from fwlora_lab.seeds import derive
from fwlora_lab.training.device import autocast_for, forget_peak_memory
from fwlora_lab.training.events import SECONDS_BETWEEN_EVENTS, Evaluated, EventCallback, StepDone
from fwlora_lab.training.finish import finish_run
from fwlora_lab.training.jobs import Job, examples_per_step
from fwlora_lab.training.run_state import Clock, RunState, close_epoch

EVALUATION_BATCH = 128


def train_alone(job: Job, device: torch.device, listen: EventCallback) -> Record | None:
    started = datetime.now(UTC)
    forget_peak_memory(device)
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
    return finish_run(job, state, device, started, failure, listen)


def _start(job: Job, device: torch.device) -> RunState:
    arm = build_method(job.cfg, job.backbone, job.spec, job.seed, job.total_steps, device)
    torch.manual_seed(derive(job.seed, "dropout"))
    return RunState(job.seed, arm, Clock(device), Clock(device))


def _run(job: Job, state: RunState, device: torch.device, listen: EventCallback) -> None:
    while state.epoch < job.cfg.training.epochs:
        _train_epoch(job, state, device, listen)
        state.evaluating.enter("evaluation")
        close_epoch(job, state, predict(job, state.arm, device))
        state.evaluating.enter(None)
        listen(Evaluated(*job.key, state.epoch, state.epochs[-1].metrics))


def _train_epoch(job: Job, state: RunState, device: torch.device, listen: EventCallback) -> None:
    """The rest of the epoch that `state` stands in, one optimiser step at a time."""
    training, arm = job.cfg.training, state.arm
    lengths = job.train.lengths()
    groups = epoch_batches(len(job.train), examples_per_step(job.cfg), derive(job.seed, "order"), state.epoch)
    arm.model.train()
    told = time.monotonic()
    for group in groups[state.position :]:
        phase = arm.phase()
        state.training.enter(phase)
        loss = torch.zeros((), device=device)
        for micro in job.micro_batches(group):
            batch = _to(job.batch(job.train, micro), device)
            with autocast_for(job.cfg, device):
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
        if time.monotonic() - told >= SECONDS_BETWEEN_EVENTS:
            mean = state.read_losses()
            rate = state.examples / state.training.total()
            listen(StepDone(*job.key, state.step, job.total_steps, mean, phase, rate))
            told = time.monotonic()
    if state.unread:
        mean = state.read_losses()
        rate = state.examples / state.training.total()
        listen(StepDone(*job.key, state.step, job.total_steps, mean, arm.phase(), rate))
    state.training.enter(None)


@torch.inference_mode()
def predict(job: Job, arm: LoraMethod, device: torch.device) -> np.ndarray:
    """Logits [n, classes] float32 of the evaluation split, in its order."""
    arm.model.eval()
    # Long ones first: what does not fit into memory fails at once.
    order = job.evaluation.lengths().argsort(descending=True, stable=True)
    parts = []
    for index in order.split(EVALUATION_BATCH):
        batch = _to(job.batch(job.evaluation, index), device)
        del batch["labels"]
        with autocast_for(job.cfg, device):
            parts.append(arm.model(**batch).logits.float())
    logits = torch.cat(parts).cpu()
    return torch.empty_like(logits).index_copy_(0, order, logits).numpy()


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
