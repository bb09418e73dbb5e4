"""TODO"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fwlora_lab.data.metrics import score
from fwlora_lab.models.methods import LoraMethod
from fwlora_lab.records.record import Epoch
from fwlora_lab.training.jobs import Job

DIVERGENCE_HINT = "Lower training.learning_rate or the adapter's scale model.lora.alpha / rank."


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
    arm: LoraMethod
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
                raise Diverged(f"the training loss is {loss} at step {step}: training diverged. {DIVERGENCE_HINT}")
        self.epoch_loss += sum(losses)
        return sum(losses) / len(losses)


def close_epoch(job: Job, state: RunState, logits: np.ndarray) -> None:
    """Score the evaluation after an epoch, note it down, and point at the next one."""
    labels = job.evaluation.labels
    if not np.isfinite(logits).all():
        raise Diverged(
            f"the model's outputs are not finite after step {state.step}: training diverged. {DIVERGENCE_HINT}"
        )
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
