"""What training looks like: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fwlora_lab.records.record import Record
from fwlora_lab.training.events import Evaluated, Event, Note, RunFailed, RunFinished, RunStarted, StepDone


@contextmanager
def show(runs: int) -> Iterator[Callable[[Event], None]]:
    """A listener for `train_cohort` that shows loss, metric, phase and time left of `runs` runs."""
    console = Console(highlight=False)
    if not console.is_terminal:
        yield _Lines().hear
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Live(progress, runs).hear


class _Lines:
    """One line at a run's start, evaluations and end: for logs, pipes and batch systems."""

    def __init__(self, say: Callable[[str], object] | None = None) -> None:
        self.say = say or (lambda line: print(line, flush=True))
        self._last: dict[tuple[str, int], StepDone] = {}

    def hear(self, event: Event) -> None:
        name = f"{event.run_id} seed {event.seed}"
        match event:
            case RunStarted():
                self.say(
                    f"[{event.index + 1}/{event.of}] {name}: {event.method}, {event.total_steps} steps in "
                    f"{event.epochs} epochs"
                )
            case StepDone():
                self._last[event.run_id, event.seed] = event
            case Evaluated():
                last = self._last.get((event.run_id, event.seed))
                loss = f", training loss {last.loss:.4f}, {last.examples_per_second:.0f} examples/s" if last else ""
                self.say(f"  {name}: epoch {event.epoch}: {_metrics(event.metrics)}{loss}")
            case RunFinished(trained=False):
                self.say(f"  {name}: is there already ({_metrics(event.record.metrics)})")
            case RunFinished():
                assert event.record.times is not None
                self.say(f"  {name}: done after {event.record.times.train_seconds:.0f} s of training")
            case RunFailed():
                assert event.record.error is not None
                self.say(f"  {name}: FAILED: {event.record.error.message}")
            case Note():
                self.say(f"  note: {event.text}")


class _Live:
    """A bar over all runs and one for each run in training. Notes and results scroll by above them."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self._progress = progress
        self._lines = _Lines(progress.console.print)
        self._all = progress.add_task("runs", total=runs, state="", visible=runs > 1)
        self._bars: dict[tuple[str, int], TaskID] = {}
        self._metric: dict[tuple[str, int], str] = {}

    def hear(self, event: Event) -> None:
        key = (event.run_id, event.seed)
        match event:
            case RunStarted():
                name = f"{event.run_id} seed {event.seed}"
                self._bars[key] = self._progress.add_task(name, total=event.total_steps, state="")
            case StepDone():
                state = f"{event.phase}  loss {event.loss:.3f}{self._metric.get(key, '')}"
                self._progress.update(self._bars[key], completed=event.step, state=state)
            case Evaluated():
                self._metric[key] = f"  {_metrics(event.metrics)}"
                self._lines.hear(event)
            case RunFinished() | RunFailed():
                self._progress.advance(self._all)
                if key in self._bars:
                    self._progress.remove_task(self._bars.pop(key))
                self._lines.hear(event)
            case _:
                self._lines.hear(event)


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def summary(records: Sequence[Record]) -> str:
    """A table with a line per run id: mean and standard deviation over its seeds."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.run_id].append(record)
    rows = [("run", "seeds", "metric", "mean", "sd", "train s", "% of backbone")]
    for run_id, group in groups.items():
        done = [r for r in group if r.status == "complete"]
        if not done:
            rows.append((run_id, f"0 of {len(group)}", "failed", "", "", "", ""))
            continue
        metric = done[0].primary_metric
        values = [r.metrics[metric] for r in done]
        seconds = [r.times.train_seconds for r in done if r.times is not None]
        seeds = str(len(done)) if len(done) == len(group) else f"{len(done)} of {len(group)}"
        rows.append(
            (
                run_id,
                seeds,
                metric,
                f"{statistics.mean(values):.4f}",
                f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-",
                f"{statistics.mean(seconds):.1f}",
                f"{done[0].parameters.percent:.3f}" if done[0].parameters else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
