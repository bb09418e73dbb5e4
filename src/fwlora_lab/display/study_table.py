"""The progress of a study: a table of its cells and seeds with running means, or a line for each run."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fwlora_lab.display.width import shorten
from fwlora_lab.records.record import Record
from fwlora_lab.training.events import Event, Note, RunFailed, RunFinished, RunStarted, StepDone

_MAX_SEEDS = 8  # with a column of their own, if the terminal is wide enough
_GAP = 2  # blanks between columns
_SCORE_WIDTH = 7  # -0.1234
_MIN_NAME_WIDTH = 8
_MEAN_HEADING = "mean ± sd"


class StudyTable:
    """A table of a study's cells x seeds with running means on a terminal, a line for each run anywhere else.

    Args:
        cells: the cells' names by run id.
        seeds: the study's seeds.
        to_train: how many runs will be trained.
    """

    def __init__(self, cells: Mapping[str, str], seeds: Sequence[int], to_train: int) -> None:
        self._cells, self._seeds, self._to_train = cells, list(seeds), to_train
        self._scores: dict[str, dict[int, float]] = {run_id: {} for run_id in cells}
        self._failed: dict[str, set[int]] = {run_id: set() for run_id in cells}
        self._fraction_done: dict[tuple[str, int], float] = {}  # of the runs in training
        self._metrics: dict[str, None] = {}  # the tasks' primary metrics, each once
        self._trained = 0
        self._started = time.monotonic()
        self._notes: dict[str, None] = {}
        self._lock = threading.Lock()
        self._console = Console(highlight=False)

    def add_finished(self, record: Record) -> None:
        """Show the score of a finished run."""
        self._metrics[record.primary_metric] = None
        self._scores[record.run_id][record.seed] = record.metrics[record.primary_metric]

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the table while the block runs; its last state stays on the screen."""
        self._started = time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        with Live(
            get_renderable=lambda: self._render(self._console.width), console=self._console, refresh_per_second=2
        ):
            yield

    def on_event(self, event: Event) -> None:
        """The callback for `train_runs`; it may be called from any thread."""
        key = (event.run_id, event.seed)
        with self._lock:
            match event:
                case RunStarted():
                    self._fraction_done[key] = 0.0
                case StepDone():
                    self._fraction_done[key] = event.step / event.total
                case RunFinished():
                    self._fraction_done.pop(key, None)
                    self.add_finished(event.record)
                    self._trained += event.trained
                    if event.trained:
                        self._print_run(f"{event.record.metrics[event.record.primary_metric]:.4f}", event)
                case RunFailed():
                    self._fraction_done.pop(key, None)
                    self._failed[event.run_id].add(event.seed)
                    self._trained += 1
                    assert event.record.error is not None
                    self._print_run(f"FAILED: {event.record.error.message}", event)
                case Note() if event.text not in self._notes:
                    self._notes[event.text] = None
                    if not self._console.is_terminal:
                        print(f"  note: {event.text}", flush=True)

    def _print_run(self, result: str, event: Event) -> None:
        if self._console.is_terminal:  # the table shows it
            return
        values = list(self._scores[event.run_id].values())
        mean = f" (mean of {len(values)}: {statistics.mean(values):.4f})" if values else ""
        name = f"{self._cells[event.run_id]} seed {event.seed}"
        print(f"[{self._trained}/{self._to_train}] {name}: {result}{mean}{self._time_left()}", flush=True)

    def _time_left(self) -> str:
        done = self._trained + sum(self._fraction_done.values())
        if done < 0.05 or self._trained == self._to_train:
            return ""
        left = (self._to_train - done) * (time.monotonic() - self._started) / done
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"

    def _render(self, width: int) -> Group:
        with self._lock:
            state = f"{self._trained} of {self._to_train} runs trained{self._time_left()}"
            return Group(self._table(width), *(Text(f"note: {note}") for note in self._notes), Text(state))

    def _table(self, width: int) -> Table:
        means = [self._mean(run_id) for run_id in self._cells]
        shown, name_width = self._fit(width, max(map(len, [_MEAN_HEADING, *means])))
        seeds, rest = self._seeds[:shown], self._seeds[shown:]
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        table.add_column(shorten(self._heading(), name_width), no_wrap=True)
        for seed in seeds:
            table.add_column(_seed_heading(seed), justify="right", no_wrap=True)
        if rest:
            table.add_column(_rest_heading(rest), justify="right", no_wrap=True)
        table.add_column(_MEAN_HEADING, justify="right", no_wrap=True)
        for (run_id, name), mean in zip(self._cells.items(), means, strict=True):
            cells = [self._cell(run_id, seed) for seed in seeds]
            if rest:
                cells.append(self._count(run_id, rest))
            table.add_row(shorten(name, name_width), *cells, mean)
        return table

    def _fit(self, width: int, mean_width: int) -> tuple[int, int]:
        """How many seeds get a column of their own (one more column counts the others), and the width of the names."""
        names = max(map(len, [self._heading(), *self._cells.values()]))
        columns = [max(len(_seed_heading(seed)), _SCORE_WIDTH) + _GAP for seed in self._seeds[:_MAX_SEEDS]]
        rest = max(map(len, [_rest_heading(self._seeds), *(self._count(r, self._seeds) for r in self._cells)])) + _GAP
        available = width - mean_width - _GAP
        wanted = min(names, max(width // 3, _MIN_NAME_WIDTH))  # long names are cut to a third of the table
        if len(columns) == len(self._seeds) and sum(columns) + wanted <= available:
            rest = 0
        while columns and sum(columns) + rest + wanted > available:
            columns.pop()
        return len(columns), max(_MIN_NAME_WIDTH, min(names, available - sum(columns) - rest))

    def _heading(self) -> str:
        if not self._metrics:
            return "runs"
        return next(iter(self._metrics)) if len(self._metrics) == 1 else "primary metric"

    def _mean(self, run_id: str) -> str:
        values = list(self._scores[run_id].values())
        mean = f"{statistics.mean(values):.4f}" if values else ""
        return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean

    def _count(self, run_id: str, seeds: Sequence[int]) -> str:
        failed = " failed" if self._failed[run_id] & {*seeds} else ""
        return f"{sum(seed in self._scores[run_id] for seed in seeds)}/{len(seeds)}{failed}"

    def _cell(self, run_id: str, seed: int) -> str:
        if seed in self._scores[run_id]:
            return f"{self._scores[run_id][seed]:.4f}"
        if seed in self._failed[run_id]:
            return "[red]failed[/]"
        fraction = self._fraction_done.get((run_id, seed))
        return "[dim]·[/]" if fraction is None else f"[dim]{fraction:.0%}[/]"


def _seed_heading(seed: int) -> str:
    return f"seed {seed}"


def _rest_heading(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} more"
