"""TODO"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fwlora_lab.search.results import best_of
from fwlora_lab.search.spec import Search
from fwlora_lab.search.trials import SharedStudy, cause_of, is_counted, params_of

SECONDS_BETWEEN_LOOKS = 1.0


class SearchWatch:
    """Shows how the whole study stands, whoever trains its trials: a bar on a terminal, lines anywhere else."""

    def __init__(self, shared: SharedStudy, search: Search, progress: Progress | None, silent: bool = False) -> None:
        self._shared, self._search, self._progress, self._silent = shared, search, progress, silent
        self._n_trials = search.optuna.n_trials
        self._seen = {t.number for t in shared.trials() if t.state.is_finished()}
        self._began, self._new, self._said = time.monotonic(), 0, set[str]()
        self._next = 0.0
        if progress is not None:
            self._bar = progress.add_task(search.given.run_id, total=self._n_trials, state="")

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._print(f"  note: {text}")

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False)
        elif not self._silent:
            print(line, flush=True)

    def look(self, part: float = 0.0, at_once: bool = False, waiting: bool = False) -> None:
        """Read the study, at most about once a second, and tell what is new; `part` of a trial is done beside."""
        if self._silent or (not at_once and time.monotonic() < self._next):
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_LOOKS
        trials = self._shared.trials()
        done = [t for t in trials if t.state.is_finished() and is_counted(t)]
        best = best_of(trials, self._search.optuna.direction)
        state = " ".join(
            f"{sum(t.state == s for t in of)} {s.name.lower()}"
            for s, of in ((TrialState.RUNNING, trials), (TrialState.PRUNED, done), (TrialState.FAIL, done))
        ).replace("fail", "failed")
        if best is not None:
            state += f", best {best.value:.4f} (trial {best.number})"
        if waiting:
            state += ", waiting for the other workers"
        new = [t for t in done if t.number not in self._seen]
        for trial in new:
            self._seen.add(trial.number)
            self._new += 1
            line = f"[{len(self._seen & {t.number for t in done})}/{self._n_trials}] {_told(trial)}"
            self._print(line if self._progress is not None else f"{line} | {state}{self._time_left(len(done))}")
        if self._progress is not None:
            state = f"{len(done)}/{self._n_trials} done {state}"  # the bar also has the parts of those that run
            self._progress.update(self._bar, completed=min(len(done) + part, self._n_trials), state=state)

    def _time_left(self, done: int) -> str:
        left = (self._n_trials - done) * (time.monotonic() - self._began) / max(1, self._new)
        if left <= 0:
            return ""
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"


def _told(trial: FrozenTrial) -> str:
    values = " ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in params_of(trial).items())
    cause = cause_of(trial)
    if cause is not None:
        return f"trial {trial.number}: FAILED: {cause.splitlines()[0]}  {values}"
    score = "no score" if trial.value is None else f"{trial.value:.4f}"
    return f"trial {trial.number}: {score}{' pruned' if trial.state == TrialState.PRUNED else ''}  {values}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def make_display() -> Iterator[Progress | None]:
    console = Console(highlight=False)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress
