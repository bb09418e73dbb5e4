"""What the scheduler asks of a training engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fwlora_lab.training.active_run import ActiveRun


class Engine(Protocol):
    """Trains the runs that it was given, step by step.

    A run comes in with `start` and leaves with `finish`; between them `step` trains all runs that are in. An engine
    moves the runs' parameters and clocks and calls `ActiveRun.count_step`; it writes no file and sends no event.
    """

    @property
    def capacity(self) -> int:
        """How many runs may be in at once."""
        ...

    def start(self, run: ActiveRun) -> None:
        """Take a run in, at its initial values, and set `run.state`."""
        ...

    def step(self, runs: Sequence[ActiveRun]) -> None:
        """One optimizer step of every run that is in."""
        ...

    def evaluate(self, runs: Sequence[ActiveRun]) -> list[np.ndarray]:
        """Logits [n, classes] float32 of the evaluation split, in its order, for some of the runs."""
        ...

    def finish(self, run: ActiveRun) -> Mapping[str, float] | None:
        """Take a run out, its trained values in `run.state`; F by matrix, None for a method that observes none."""
        ...

    def shrink(self, capacity: int) -> None:
        """Take in at most so many runs from now on, after a step did not fit into the memory; no run is in."""
        ...

    def memory(self, run: ActiveRun) -> float | None:
        """Bytes that one step takes of a run that is in, besides the encoder; None if that is not known."""
        ...

    def state_dict(self, run: ActiveRun) -> dict[str, Any]:
        """All that the run is now: books, adapters, head, optimizer, randomness and the method's own state."""
        ...

    def load_state_dict(self, run: ActiveRun, state: dict[str, Any]) -> None:
        """Let a run that was just started go on where `state_dict` was taken: it continues bit by bit the same."""
        ...
