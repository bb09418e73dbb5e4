"""The progress of a hyper-parameter search: a bar on a terminal, a line for each finished trial anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fwlora_lab.display.width import ROOM_FOR_BARS

SECONDS_BETWEEN_UPDATES = 1.0
TrialPhase = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialStatus:
    """A trial as it is shown; `cause` says why a failed one failed."""

    number: int
    phase: TrialPhase
    score: float | None
    values: Mapping[str, Any]
    cause: str | None = None


@dataclass(frozen=True)
class SearchStatus:
    """The trials of a search, whichever process trains them."""

    running: int
    finished: Sequence[TrialStatus]
    best: TrialStatus | None


class SearchProgress:
    """Shows what became of a search's trials since the last update.

    Args:
        name: the search's name, shown before the bar.
        n_trials: how many trials the search has in all.
        read_status: reads the present status from the storage.
        bar: the live display of `search_display`, or None to print lines.
        quiet: show nothing and never read the status.
    """

    def __init__(
        self,
        name: str,
        n_trials: int,
        read_status: Callable[[], SearchStatus],
        bar: Progress | None = None,
        quiet: bool = False,
    ) -> None:
        self._n_trials, self._read_status, self._bar, self._quiet = n_trials, read_status, bar, quiet
        self._shown = set[int]() if quiet else {trial.number for trial in read_status().finished}
        self._started, self._newly_finished = time.monotonic(), 0
        self._notes: set[str] = set()
        self._next_update = 0.0
        if bar is not None:
            self._bar_id = bar.add_task(name, total=n_trials, state="")

    def note(self, text: str) -> None:
        """Print a note; the same text only once."""
        if text not in self._notes:
            self._notes.add(text)
            self._print(f"  note: {text}")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        elif not self._quiet:
            print(line, flush=True)

    def update(self, fraction_done: float = 0.0, force: bool = False, waiting: bool = False) -> None:
        """Read the status, about once a second at most, and show what is new.

        Args:
            fraction_done: the parts done of the trials that this process trains, in trials.
            force: read the status however short ago the last update was.
            waiting: this process has nothing to do until the trials of others end.
        """
        if self._quiet or (not force and time.monotonic() < self._next_update):
            return
        self._next_update = time.monotonic() + SECONDS_BETWEEN_UPDATES
        status = self._read_status()
        state = _state(status) + (", waiting for the other workers" if waiting else "")
        numbers = {trial.number for trial in status.finished}
        for trial in [trial for trial in status.finished if trial.number not in self._shown]:
            self._shown.add(trial.number)
            self._newly_finished += 1
            line = f"[{len(self._shown & numbers)}/{self._n_trials}] {_trial_line(trial)}"
            self._print(line if self._bar is not None else f"{line} | {state}{self._time_left(len(numbers))}")
        if self._bar is not None:
            # The bar also counts the parts of running trials, so the text says how many are finished.
            done = min(len(numbers) + fraction_done, self._n_trials)
            self._bar.update(self._bar_id, completed=done, state=f"{len(numbers)}/{self._n_trials} done {state}")

    def _time_left(self, done: int) -> str:
        left = (self._n_trials - done) * (time.monotonic() - self._started) / max(1, self._newly_finished)
        if left <= 0:
            return ""
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"


def _state(status: SearchStatus) -> str:
    pruned, failed = (sum(t.phase == phase for t in status.finished) for phase in ("pruned", "failed"))
    best = ""
    if status.best is not None and status.best.score is not None:
        best = f", best {status.best.score:.4f} (trial {status.best.number})"
    return f"{status.running} running {pruned} pruned {failed} failed{best}"


def _trial_line(trial: TrialStatus) -> str:
    values = " ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in trial.values.items())
    if trial.cause is not None:
        return f"trial {trial.number}: FAILED: {trial.cause.splitlines()[0]}  {values}"
    score = "no score" if trial.score is None else f"{trial.score:.4f}"
    return f"trial {trial.number}: {score}{' pruned' if trial.phase == 'pruned' else ''}  {values}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def search_display(console: Console | None = None) -> Iterator[Progress | None]:
    """A live display for `SearchProgress` while the block runs; None if the output is not a terminal."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield None
        return
    state = TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    name = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    wide = [name, BarColumn(bar_width=20)] if console.width >= ROOM_FOR_BARS else []
    with Progress(*wide, state, TimeRemainingColumn(compact=True), console=console) as bar:
        yield bar
