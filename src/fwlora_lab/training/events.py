"""What happens to runs while they train, as values that a caller's `on_event` receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fwlora_lab.records.record import Record

SECONDS_BETWEEN_EVENTS = 0.5


@dataclass(frozen=True)
class Event:
    """Something that happened to one run; `seed` and `run_id` say to which."""

    run_id: str
    seed: int


@dataclass(frozen=True)
class RunStarted(Event):
    """A run begins: run `index` (from 0) of the `of` runs of one call."""

    method: str
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


EventCallback = Callable[[Event], object]


class StopRun(Exception):
    """Raised by a callback that receives `Evaluated`: that run ends and leaves nothing, the others go on."""


def ignore_event(event: Event) -> None:
    """A callback for callers who want none."""
