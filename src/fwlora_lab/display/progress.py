"""The progress of training: live bars on a terminal, plain lines anywhere else, and a table of the results."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from fwlora_lab.display.width import ROOM_FOR_BARS, as_text, output_width, shorten
from fwlora_lab.records.record import Record
from fwlora_lab.training.events import Evaluated, Event, Note, RunFailed, RunFinished, RunStarted, StepDone


@contextmanager
def show(runs: int, console: Console | None = None) -> Iterator[Callable[[Event], None]]:
    """A callback for `train_runs` that shows loss, metric, phase and time left of `runs` runs."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield TrainingLines().on_event
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        *([BarColumn(bar_width=None)] if console.width >= ROOM_FOR_BARS else []),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        yield TrainingBars(progress, runs, name_width=console.width // 3).on_event


class TrainingLines:
    """One line at a run's start, evaluations and end: for logs, pipes and batch systems."""

    def __init__(self, print_line: Callable[[str], object] | None = None) -> None:
        self._print = print_line or (lambda line: print(line, flush=True))
        self._last_step: dict[tuple[str, int], StepDone] = {}

    def on_event(self, event: Event) -> None:
        """The callback for `train_runs`."""
        name = f"{event.run_id} seed {event.seed}"
        match event:
            case RunStarted():
                self._print(
                    f"[{event.index + 1}/{event.of}] {name}: {event.method}, {event.total_steps} steps in "
                    f"{event.epochs} epochs"
                )
            case StepDone():
                self._last_step[event.run_id, event.seed] = event
            case Evaluated():
                last = self._last_step.get((event.run_id, event.seed))
                loss = f", training loss {last.loss:.4f}, {last.examples_per_second:.0f} examples/s" if last else ""
                self._print(f"  {name}: epoch {event.epoch}: {_metrics(event.metrics)}{loss}")
            case RunFinished(trained=False):
                self._print(f"  {name}: is there already ({_metrics(event.record.metrics)})")
            case RunFinished():
                assert event.record.times is not None
                self._print(f"  {name}: done after {event.record.times.train_seconds:.0f} s of training")
            case RunFailed():
                assert event.record.error is not None
                self._print(f"  {name}: FAILED: {event.record.error.message}")
            case Note():
                self._print(f"  note: {event.text}")


class TrainingBars:
    """A bar over all runs and one for each run in training. Notes and results scroll by above them."""

    def __init__(self, progress: Progress, runs: int, name_width: int) -> None:
        self._progress = progress
        self._name_width = name_width
        self._lines = TrainingLines(progress.console.print)
        self._all = progress.add_task("runs", total=runs, state="", visible=runs > 1)
        self._bars: dict[tuple[str, int], TaskID] = {}
        self._metric: dict[tuple[str, int], str] = {}

    def on_event(self, event: Event) -> None:
        """The callback for `train_runs`."""
        key = (event.run_id, event.seed)
        match event:
            case RunStarted():
                seed = f" seed {event.seed}"
                name = shorten(event.run_id, self._name_width - len(seed)) + seed
                self._bars[key] = self._progress.add_task(name, total=event.total_steps, state="")
            case StepDone():
                state = f"{event.phase}  loss {event.loss:.3f}{self._metric.get(key, '')}"
                self._progress.update(self._bars[key], completed=event.step, state=state)
            case Evaluated():
                metric, score = next(iter(event.metrics.items()))  # the primary one
                self._metric[key] = f"  {metric.split('_')[0]} {score:.4f}"
                self._lines.on_event(event)
            case RunFinished() | RunFailed():
                self._progress.advance(self._all)
                if key in self._bars:
                    self._progress.remove_task(self._bars.pop(key))
                self._lines.on_event(event)
            case _:
                self._lines.on_event(event)


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def summary(records: Sequence[Record], width: int | None = None) -> str:
    """A table with a line per run id: mean and standard deviation over its seeds.

    Args:
        width: in characters; by default the terminal's, or unlimited if the output is not a terminal.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.run_id].append(record)
    table = Table(box=None, pad_edge=False, header_style=None)
    table.add_column("run", overflow="fold")
    table.add_column("seeds", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for heading in ("mean", "sd", "train s", "param %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run_id, group in groups.items():
        table.add_row(run_id, *_summary_cells(group))
    return as_text(table, width or output_width())


def _summary_cells(group: Sequence[Record]) -> list[str]:
    done = [record for record in group if record.status == "complete"]
    if not done:
        return [f"0 of {len(group)}", "failed"]
    metric, parameters = done[0].primary_metric, done[0].parameters
    values = [record.metrics[metric] for record in done]
    seconds = [record.times.train_seconds for record in done if record.times is not None]
    return [
        str(len(done)) if len(done) == len(group) else f"{len(done)} of {len(group)}",
        metric,
        f"{statistics.mean(values):.4f}",
        f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-",
        f"{statistics.mean(seconds):.1f}",
        f"{parameters.percent:.3f}" if parameters else "-",
    ]
