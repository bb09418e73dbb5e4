"""A run while it trains: its books, kept in one way for both engines."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fwlora_lab.data.metrics import score
from fwlora_lab.models.adapter_state import AdapterState
from fwlora_lab.models.methods import learning_rates
from fwlora_lab.records.record import Attempt, Epoch
from fwlora_lab.training.events import SECONDS_BETWEEN_EVENTS, EventCallback, StepDone
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

    def state_dict(self) -> dict[str, float]:
        """Seconds by phase up to now, the running phase included."""
        phase = self._phase
        self.enter(None)
        self.enter(phase)
        return dict(self.seconds)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(eq=False)  # a run is itself, whatever its numbers
class ActiveRun:
    """A run in training. `epoch` and `position` point at the next step's batch.

    index: the run's number in the call; measurement: names the call, whose runs' seconds belong together; state: its
    adapters and head, there once an engine has started it; failure: why it ended early, if it did; stopped: the caller
    ended it.
    """

    _COUNTED: ClassVar = ("epoch", "position", "step", "epoch_loss", "examples", "tokens", "phase")

    index: int
    job: Job
    device: torch.device
    resources: contextlib.ExitStack
    measurement: str | None = None
    state: AdapterState | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    epoch: int = 0
    position: int = 0
    step: int = 0
    epoch_loss: float = 0.0
    examples: int = 0
    tokens: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    logits: np.ndarray | None = None
    phase: str = "training"
    failure: Exception | None = None
    stopped: bool = False

    def __post_init__(self) -> None:
        self.training, self.evaluating = Clock(self.device), Clock(self.device)
        self.learning_rate: Callable[[int], float] = learning_rates(self.job.cfg, self.job.total_steps)
        self.lengths = self.job.train.lengths()
        self._earlier: list[Attempt] = []
        self._since = self.started
        self._unread: list[Tensor] = []
        self._reported = time.monotonic()
        self.batches = self.job.epoch_batches(0)

    @property
    def batch(self) -> Tensor:
        """The examples of the next step."""
        return self.batches[self.position]

    @property
    def is_over(self) -> bool:
        return self.failure is not None or self.stopped or self.epoch == self.job.cfg.training.epochs

    @property
    def at_epoch_end(self) -> bool:
        return not self.is_over and self.position == len(self.batches)

    def count_step(self, loss: Tensor, phase: str) -> None:
        """Note down the step that was just done on `batch`; `loss` may still be on its way from the device."""
        batch = self.batch
        self.step += 1
        self.position += 1
        self.examples += len(batch)
        self.tokens += int(self.lengths[batch].sum())
        self.phase = phase
        self._unread.append(loss)

    def report_progress(self, on_event: EventCallback, now: bool = False) -> None:
        """Read the losses and report them, about twice a second or `now`.

        Raises:
            Diverged: a loss is not finite.
        """
        if not self._unread or (not now and time.monotonic() - self._reported < SECONDS_BETWEEN_EVENTS):
            return
        self._reported = time.monotonic()
        mean = self._read_losses()
        rate = self.examples / max(self.training.total(), 1e-9)
        on_event(StepDone(*self.job.key, self.step, self.job.total_steps, mean, self.phase, rate))

    def close_epoch(self, logits: np.ndarray) -> None:
        """Score the evaluation after an epoch, note it down, and point at the next epoch's first batch.

        Raises:
            Diverged: an output is not finite.
        """
        labels = self.job.evaluation.labels
        if not np.isfinite(logits).all():
            raise Diverged(
                f"the model's outputs are not finite after step {self.step}: training diverged. {DIVERGENCE_HINT}"
            )
        # Worked out from the logits: the model's own loss would carry AdaLoRA's regularizer.
        outputs = torch.from_numpy(logits)
        if self.job.spec.kind == "regression":
            loss = functional.mse_loss(outputs[:, 0], labels.float())
        else:
            loss = functional.cross_entropy(outputs, labels)
        self.logits = logits
        self.epochs.append(
            Epoch(
                epoch=self.epoch + 1,
                step=self.step,
                learning_rate=self.learning_rate(self.step),
                train_loss=self.epoch_loss / self.position,
                metrics=score(self.job.spec, logits, labels.numpy()),
                loss=float(loss) if math.isfinite(loss) else None,
            )
        )
        self.epoch, self.position, self.epoch_loss = self.epoch + 1, 0, 0.0
        self.batches = self.job.epoch_batches(self.epoch)

    def attempts(self) -> list[Attempt]:
        """The times that the run was begun or continued, this one last."""
        earlier = self._earlier
        current = Attempt(
            started=self._since,
            first_step=sum(attempt.steps for attempt in earlier),
            steps=self.step - sum(attempt.steps for attempt in earlier),
            train_seconds=sum(self.training.state_dict().values()) - sum(a.train_seconds for a in earlier),
            eval_seconds=sum(self.evaluating.state_dict().values()) - sum(a.eval_seconds for a in earlier),
        )
        return [*earlier, current]

    def state_dict(self) -> dict[str, Any]:
        """The books as numbers, texts and tensors, for a checkpoint. Waits for the device."""
        if self._unread:
            self._read_losses()
        return {
            **{name: getattr(self, name) for name in self._COUNTED},
            "epochs": [epoch.model_dump() for epoch in self.epochs],
            "logits": None if self.logits is None else torch.from_numpy(self.logits.copy()),
            "training_seconds": self.training.state_dict(),
            "evaluating_seconds": self.evaluating.state_dict(),
            "attempts": [attempt.model_dump(mode="json") for attempt in self.attempts()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, as another attempt."""
        for name in self._COUNTED:
            setattr(self, name, state[name])
        self.logits = None if state["logits"] is None else state["logits"].numpy().copy()
        self._earlier = [Attempt.model_validate(attempt) for attempt in state["attempts"]]
        self.started = self._earlier[0].started
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.training.seconds = dict(state["training_seconds"])
        self.evaluating.seconds = dict(state["evaluating_seconds"])
        self.batches = self.job.epoch_batches(self.epoch)

    def _read_losses(self) -> float:
        """Wait for the device, add the losses not read yet to the epoch's, and return their mean."""
        losses = torch.stack(self._unread).tolist()
        self._unread.clear()
        for step, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise Diverged(f"the training loss is {loss} at step {step}: training diverged. {DIVERGENCE_HINT}")
        for loss in losses:  # one by one, so that the sum does not depend on how often it is read
            self.epoch_loss += loss
        return sum(losses) / len(losses)
