"""TODO"""

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

from fwlora_lab.records.record import Record
from fwlora_lab.training.events import Event, Note, RunFailed, RunFinished, RunStarted, StepDone


class StudyTable:
    """A table of a study's cells × seeds with running means on a terminal, a line a run anywhere else.

    `cells`: names by run id; `to_train`: runs that will be trained. `hear` may be called from any thread.
    """

    _SEEDS_SHOWN = 8

    def __init__(self, cells: Mapping[str, str], seeds: Sequence[int], to_train: int) -> None:
        self._cells, self._seeds, self._to_train = cells, list(seeds), to_train
        self._scores: dict[str, dict[int, float]] = {run_id: {} for run_id in cells}
        self._failed: dict[str, set[int]] = {run_id: set() for run_id in cells}
        self._share: dict[tuple[str, int], float] = {}  # of a run in training, the part that is done
        self._metric = ""
        self._over = 0
        self._began = time.monotonic()
        self._notes: dict[str, None] = {}
        self._lock = threading.Lock()
        self._console = Console(highlight=False)

    def there(self, record: Record) -> None:
        """A run that was finished before."""
        self._metric = record.primary_metric
        self._scores[record.run_id][record.seed] = record.metrics[record.primary_metric]

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the table while the block runs, and once more as it stands at the end."""
        self._began = time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._render, console=self._console, refresh_per_second=2):
            yield

    def hear(self, event: Event) -> None:
        """A listener for `train_cohort`."""
        key = (event.run_id, event.seed)
        with self._lock:
            match event:
                case RunStarted():
                    self._share[key] = 0.0
                case StepDone():
                    self._share[key] = event.step / event.total
                case RunFinished():
                    self._share.pop(key, None)
                    self.there(event.record)
                    self._over += event.trained
                    if event.trained:
                        self._say(f"{event.record.metrics[self._metric]:.4f}", event)
                case RunFailed():
                    self._share.pop(key, None)
                    self._failed[event.run_id].add(event.seed)
                    self._over += 1
                    assert event.record.error is not None
                    self._say(f"FAILED: {event.record.error.message}", event)
                case Note() if event.text not in self._notes:
                    self._notes[event.text] = None
                    if not self._console.is_terminal:
                        print(f"  note: {event.text}", flush=True)

    def _say(self, what: str, event: Event) -> None:
        if self._console.is_terminal:  # the table shows it
            return
        values = list(self._scores[event.run_id].values())
        mean = f" (mean of {len(values)}: {statistics.mean(values):.4f})" if values else ""
        where = f"{self._cells[event.run_id]} seed {event.seed}"
        print(f"[{self._over}/{self._to_train}] {where}: {what}{mean}{self._time_left()}", flush=True)

    def _time_left(self) -> str:
        done = self._over + sum(self._share.values())
        if done < 0.05 or self._over == self._to_train:
            return ""
        left = (self._to_train - done) * (time.monotonic() - self._began) / done
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"

    def _render(self) -> Group:
        with self._lock:
            state = f"{self._over} of {self._to_train} runs trained{self._time_left()}"
            return Group(self._table(), *(Text(f"note: {note}") for note in self._notes), Text(state))

    def _table(self) -> Table:
        shown = self._seeds[: self._SEEDS_SHOWN]
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.add_column(self._metric or "runs")
        for seed in shown:
            table.add_column(f"seed {seed}", justify="right")
        if len(shown) < len(self._seeds):
            table.add_column(f"{len(self._seeds) - len(shown)} more", justify="right")
        table.add_column("mean ± sd", justify="right")
        for run_id, name in self._cells.items():
            scores, failed = self._scores[run_id], self._failed[run_id]
            cells = [self._cell(run_id, seed) for seed in shown]
            if len(shown) < len(self._seeds):
                rest = self._seeds[self._SEEDS_SHOWN :]
                cells.append(f"{sum(s in scores for s in rest)}/{len(rest)}" + (" failed" if failed & {*rest} else ""))
            values = list(scores.values())
            mean = f"{statistics.mean(values):.4f}" if values else ""
            if len(values) > 1:
                mean += f" ± {statistics.stdev(values):.4f}"
            table.add_row(name, *cells, mean)
        return table

    def _cell(self, run_id: str, seed: int) -> str:
        if seed in self._scores[run_id]:
            return f"{self._scores[run_id][seed]:.4f}"
        if seed in self._failed[run_id]:
            return "[red]failed[/]"
        share = self._share.get((run_id, seed))
        return "[dim]·[/]" if share is None else f"[dim]{share:.0%}[/]"
