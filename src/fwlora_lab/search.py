"""Optuna around `train`: from a run config's search space to its best hyper-parameters.

A trial is scored on the selection split, a part of the training data that it does not train on: dev stays unseen. Its
score is the task's primary metric after the last epoch (not the best of the epochs), the mean over its seeds. Trials
that agree in what lanes must share train side by side on one backbone; the sampler is told of those that run.

results_dir/<run_id>/search/
    study.db          the study, where optuna.storage names no other place
    best.yaml         the best trial as a run config: all training data, scored on dev
    trials.csv        a row for each trial
    importances.csv   the share of the scores' variation that goes with each parameter (PED-ANOVA)
    *.svg             the history, a slice through each parameter, the importances
    trials/           the records of the trials' runs, as `train` writes them
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import os
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fwlora_lab.errors import UserError
from fwlora_lab.launch import launch
from fwlora_lab.methods import derive
from fwlora_lab.runconfig import (
    LEAVES,
    Dimension,
    OptunaConfig,
    RunConfig,
    dimensions_of,
    get_key,
    in_fingerprint,
    to_yaml,
    warnings_of,
    with_values,
)
from fwlora_lab.tasks import load_task
from fwlora_lab.train import (
    Evaluated,
    Event,
    Note,
    Planned,
    RunFailed,
    RunFinished,
    RunRefused,
    StepDone,
    StopRun,
    train_drawn,
)
from fwlora_lab.trials import GRACE_SECONDS, SCORES, SharedStudy, cause_of, counts, shown, storage_url

_SELECTION_FRACTION = 0.1  # where the config sets no part of the training data aside
_SECONDS_BETWEEN_LOOKS = 1.0
_SHARE_OF_TRIALS = 4  # a quarter of the trials at once: the sampler is to learn from some before it draws the last
_STARTUP_TRIALS = 10  # drawn at random before TPE's model, but not more than a third of all
# These decide what is learnt and what is scored: trials that differ in them have scores that do not compare.
_NOT_SEARCHED = (
    "training.seed",
    "training.evaluate_on",
    "training.save_adapter",
    "model.lora.enabled",
    *(
        f"dataset.{key}"
        for key in (
            "name subset root revision split eval_split train_file eval_file text_column label_column "
            "train_examples selection_fraction seed"
        ).split()
    ),
)
_RANK_KEYS = ("model.lora.rank", "model.parameter_budget_percent", "adalora.init_rank_factor")


# --- what is searched ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A run config as a search: `given` as it was written, `base` as its trials start from."""

    given: RunConfig
    base: RunConfig
    optuna: OptunaConfig
    dimensions: dict[str, Dimension]

    @classmethod
    def of(cls, cfg: RunConfig) -> Search:
        """Raises UserError where the config has no search space, or one that scores trials on different data."""
        if cfg.optuna is None:
            raise UserError(
                f"{cfg.run_id} has no search space: add a block `optuna` with n_trials and search_space, for example\n"
                "  '+optuna={n_trials: 12, search_space: {learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}}}'"
            )
        dimensions = dimensions_of(cfg.optuna)
        for key in dimensions:
            if key in _NOT_SEARCHED:
                raise UserError(f"optuna: {key} cannot be searched: trials would be scored on something else each")
        fraction = cfg.dataset.selection_fraction or _SELECTION_FRACTION
        changes = {
            "dataset.selection_fraction": fraction,
            "training.evaluate_on": "selection",
            "training.save_adapter": False,
            "optuna": None,  # the storage's password stays out of the records
            "results_dir": str(Path(cfg.results_dir) / cfg.run_id / "search" / "trials"),
        }
        return cls(cfg, with_values(cfg, changes), cfg.optuna, dimensions)

    @property
    def folder(self) -> Path:
        return Path(self.given.results_dir) / self.given.run_id / "search"

    @property
    def storage(self) -> str:
        return self.optuna.storage or f"sqlite:///{(self.folder / 'study.db').resolve()}"

    @property
    def seeds(self) -> list[int]:
        """The training seeds, the same for every trial."""
        first = self.given.training.seed
        return [(first + i) % 2**32 for i in range(self.optuna.seeds_per_trial)]

    @property
    def n_jobs(self) -> int:
        """Trials at once in one worker, as far as there are lanes."""
        return self.optuna.n_jobs or max(1, self.optuna.n_trials // _SHARE_OF_TRIALS)

    @property
    def notes(self) -> list[str]:
        """What a person should know before it begins."""
        cfg, notes = self.given, warnings_of(self.given)
        if not cfg.dataset.selection_fraction:
            notes.append(
                f"dataset.selection_fraction is 0: {_SELECTION_FRACTION:g} of the training data is set aside to score "
                "the trials on; best.yaml trains on all of it"
            )
        if self.optuna.pruner != "none" and self.epochs < 2:
            notes.append(f"optuna.pruner={self.optuna.pruner} has nothing to prune: there is one epoch")
        return notes

    @property
    def epochs(self) -> int:
        """The most epochs that a trial trains."""
        return self._highest("training.epochs") or self.given.training.epochs

    def space(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by the run config's keys."""
        return {key: _distribution(dimension) for key, dimension in self.dimensions.items()}

    def trial_config(self, number: int, values: dict[str, Any]) -> RunConfig:
        """The run config of a trial; UserError where its values do not go together."""
        return with_values(self.base, values | {"run_id": _trial_id(number)})

    def largest(self) -> list[RunConfig]:
        """Configs with the highest rank that the space allows, for the lanes to have room for all."""
        most = {key: high for key in _RANK_KEYS if (high := self._highest(key)) is not None}
        first = {key: d.low if d.choices is None else d.choices[0] for key, d in self.dimensions.items()}
        found = []
        for values in (most, first | most):
            with contextlib.suppress(UserError):
                found.append(with_values(self.base, values))
        return found

    def _highest(self, key: str) -> Any:
        dimension = self.dimensions.get(key)
        if dimension is None:
            return None
        return max((v for v in dimension.choices or [dimension.high] if v is not None), default=None)

    def identity(self, data_fingerprint: str) -> dict[str, dict[str, Any]]:
        """What a study is a study of, by name: two with the same are one, and their trials compare."""
        cfg = self.base.model_dump(mode="json") | {"method": self.base.arm}
        keys = [key for key in LEAVES if in_fingerprint(key) and key not in self.dimensions]
        return {
            "config": {key: get_key(cfg, key) for key in keys},
            "space": {key: d.model_dump(mode="json", exclude_none=True) for key, d in self.dimensions.items()},
            "optuna": {"direction": self.optuna.direction, "seeds": self.seeds},
            "data": {"texts, labels or splits": data_fingerprint},
        }

    def shared_study(self) -> SharedStudy:
        return SharedStudy(
            storage_url(self.storage), self.given.run_id, self.optuna.direction, self._sampler, self._pruner()
        )

    def _sampler(self, number: int) -> BaseSampler:
        seed = derive(self.given.training.seed, f"trial {number}") % 2**32
        if self.optuna.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        startup = max(1, min(_STARTUP_TRIALS, self.optuna.n_trials // 3))
        # constant_liar: running trials count as bad ones, so that two at once do not try the same.
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)

    def _pruner(self) -> BasePruner:
        if self.optuna.pruner == "median":
            return optuna.pruners.MedianPruner()
        if self.optuna.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.epochs, reduction_factor=3)
        return optuna.pruners.NopPruner()


def _trial_id(number: int) -> str:
    return f"trial-{number:04d}"


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.type == "categorical":
        return CategoricalDistribution(dimension.choices or [])
    low, high, step = dimension.low, dimension.high, dimension.step
    assert low is not None and high is not None
    if dimension.type == "int":
        return IntDistribution(int(low), int(high), step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.type == "loguniform", step=step)


# --- a worker -----------------------------------------------------------------------------------


@dataclass
class _Running:
    """A trial in training here: what its seeds have reached."""

    trial: Trial
    epochs: int
    reports: dict[int, dict[int, float]] = field(default_factory=dict)  # epoch -> seed -> metric
    scores: dict[int, float] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)  # seed -> part of the run that is done


class _Worker:
    """Draws trials, trains them, tells the study what became of them."""

    def __init__(self, search: Search, shared: SharedStudy, metric: str, watch: _Watch, stop: _Interrupts) -> None:
        self.search, self.shared, self.metric, self.watch, self.stop = search, shared, metric, watch, stop
        self.running: dict[str, _Running] = {}
        self.queue: list[Planned] = []
        self.space = search.space()
        self.look_again = 0.0

    def work(self) -> None:
        """Train trials until the study is over or somebody stops it; what is unfinished then is handed back."""
        try:
            with self.shared.heartbeat():
                room = [Planned(cfg, self.search.seeds[0]) for cfg in self.search.largest()]
                train_drawn(self.draw, self.hear, room, self.search.n_jobs * len(self.search.seeds))
        except BaseException:
            with self.stop.held():
                for running in self.running.values():
                    with contextlib.suppress(UserError):  # the storage may be the trouble: its heartbeat ends too
                        self.shared.hand_back(running.trial)
            raise

    def draw(self) -> Planned | None:
        """The next run to train here; waits while the only trials left are those of other workers."""
        while not self.queue:
            if self.stop.asked or len(self.running) >= self.search.n_jobs:
                return None
            if self.running and time.monotonic() < self.look_again:
                return None
            with self.stop.held():
                trial = self.shared.claim(self.search.optuna.n_trials, self.space)
                if trial is not None:
                    self._plan(trial)
            if trial is not None:
                continue
            if self.running:
                self.look_again = time.monotonic() + _SECONDS_BETWEEN_LOOKS
                return None
            if not any(t.state == TrialState.RUNNING for t in self.shared.trials()):
                return None
            # They may finish, or their worker may turn out to be dead.
            self.watch.look(waiting=True)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return self.queue.pop(0)

    def _plan(self, trial: Trial) -> None:
        try:
            cfg = self.search.trial_config(trial.number, trial.params)
        except UserError as error:
            self._over(self.shared.fail(trial, str(error)), trial)
            return
        self.running[cfg.run_id] = _Running(trial, cfg.training.epochs)
        self.queue += [Planned(cfg, seed) for seed in self.search.seeds]

    def hear(self, event: Event) -> None:
        """A listener for `train_drawn`."""
        if isinstance(event, Note):
            self.watch.note(event.text)
            return
        running = self.running.get(event.run_id)
        if running is None:  # another seed of a trial that is over
            if isinstance(event, Evaluated):
                raise StopRun
            return
        match event:
            case StepDone():
                running.share[event.seed] = event.step / event.total
                self.watch.look(self._part())
            case Evaluated():
                self._evaluated(running, event)
            case RunFinished():
                running.scores[event.seed] = event.record.metrics[self.metric]
                if len(running.scores) == len(self.search.seeds):
                    scores = [running.scores[seed] for seed in self.search.seeds]
                    self._end(event, self.shared.finish(running.trial, statistics.fmean(scores), scores))
            case RunFailed():
                assert event.record.error is not None
                self._end(event, self.shared.fail(running.trial, event.record.error.message))
            case RunRefused():
                self._end(event, self.shared.fail(running.trial, event.reason))

    def _evaluated(self, running: _Running, event: Evaluated) -> None:
        """Report the mean over the seeds, as soon as all of them have come to this epoch."""
        values = running.reports.setdefault(event.epoch, {})
        values[event.seed] = event.metrics[self.metric]
        if len(values) < len(self.search.seeds):
            return
        if not self.shared.report(running.trial, statistics.fmean(values.values()), event.epoch):
            self._end(event, ours=False)
            raise StopRun
        if event.epoch < running.epochs and self.shared.should_prune(running.trial):
            self._end(event, self.shared.prune(running.trial))
            raise StopRun

    def _end(self, event: Event, ours: bool) -> None:
        running = self.running.pop(event.run_id)
        self.queue = [run for run in self.queue if run.cfg.run_id != event.run_id]
        self._over(ours, running.trial)

    def _over(self, ours: bool, trial: Trial) -> None:
        if not ours:
            self.watch.note(
                f"trial {trial.number}: its worker was silent for {GRACE_SECONDS} s, so that another one tries it again"
            )
        self.watch.look(self._part(), at_once=True)

    def _part(self) -> float:
        """The trials in training here, in whole trials."""
        return sum(sum(r.share.values()) for r in self.running.values()) / len(self.search.seeds)


class _Interrupts:
    """Ctrl-C: the first asks the worker to finish its trials, the second stops it at once, or once `held` is over."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.asked = False
        self._again, self._holders = False, 0
        self._say = say

    def __enter__(self) -> _Interrupts:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, *_: object) -> None:
        if self.asked:
            self._again = True
            if not self._holders:
                raise KeyboardInterrupt
            return
        self.asked = True
        self._say("Ctrl-C: the running trials are finished first; once more stops at once")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around what must not be cut in two: a trial that is taken in the storage and known to nobody here."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._again and not self._holders:
                raise KeyboardInterrupt


# --- what it looks like -------------------------------------------------------------------------


class _Watch:
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
        self._next = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        trials = self._shared.trials()
        done = [t for t in trials if t.state.is_finished() and counts(t)]
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
    values = " ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in trial.params.items())
    cause = cause_of(trial)
    if cause is not None:
        return f"trial {trial.number}: FAILED: {cause.splitlines()[0]}  {values}"
    score = "no score" if trial.value is None else f"{trial.value:.4f}"
    return f"trial {trial.number}: {score}{' pruned' if trial.state == TrialState.PRUNED else ''}  {values}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _display() -> Iterator[Progress | None]:
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


# --- the command --------------------------------------------------------------------------------


def run_search(cfg: RunConfig, workers: int = 1, launcher: Sequence[str] = ()) -> int:
    """Search until the study has its n_trials and write what was found; returns the exit code.

    With several `workers` a Hydra launcher starts them (`launcher`: the words for it) and this process watches.

    Raises:
        UserError: the config has no search space, data, model or storage cannot be used, or the stored study is
            one of another space, config or data.
        KeyboardInterrupt: somebody stopped it before it was through; what is finished is kept.
    """
    search = Search.of(cfg)
    data = load_task(search.base.dataset)
    shared = search.shared_study()
    shared.bind(search.identity(data.fingerprint))
    with _display() as progress:
        watch = _Watch(shared, search, progress)
        for text in search.notes:
            watch.note(text)
        with _Interrupts(watch.note) as stop:
            if workers > 1 or launcher:
                _watch_workers(search, workers, launcher, watch, stop)
            else:
                _Worker(search, shared, data.spec.primary, watch, stop).work()
            watch.look(at_once=True)
    trials = shared.trials()
    write_results(search, shared, data.spec.primary)
    _conclude(search, shared, data.spec.primary, trials)
    left = search.optuna.n_trials - sum(t.state.is_finished() and counts(t) for t in trials)
    if left > 0 and stop.asked:
        raise KeyboardInterrupt
    return 0 if best_of(trials, search.optuna.direction) is not None else 1


def _watch_workers(search: Search, workers: int, launcher: Sequence[str], watch: _Watch, stop: _Interrupts) -> None:
    """Have the launcher start the workers and show the study while they work."""
    over = threading.Event()

    def show() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(UserError):  # a database that is away for a moment
                watch.look()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        work = functools.partial(_work, search.given.model_dump_json())
        launch(work, workers, launcher, search.folder / "workers")
    except UserError:
        raise
    except Exception as error:  # each launcher has words of its own for a worker that was killed
        if stop.asked:  # as by Ctrl-C before it began
            raise KeyboardInterrupt from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"a worker ended before its time: {reason}. What is finished is kept; the same command goes on."
        ) from error
    finally:
        over.set()
        thread.join()


def _work(config: str) -> None:
    """One of several workers, in a process of its own; what it does is shown by the one that watches the study."""
    search = Search.of(RunConfig.model_validate_json(config))
    data = load_task(search.base.dataset)
    shared = search.shared_study()
    shared.bind(search.identity(data.fingerprint))
    watch = _Watch(shared, search, None, silent=True)
    with _Interrupts(watch.note) as stop:
        _Worker(search, shared, data.spec.primary, watch, stop).work()


def best_of(trials: Sequence[FrozenTrial], direction: str) -> FrozenTrial | None:
    """The complete trial with the best score, the earliest of equals; None where none is complete."""
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    sign = 1 if direction == "maximize" else -1
    return max(done, key=lambda t: (sign * t.values[0], -t.number), default=None)


def best_config(search: Search, trial: FrozenTrial) -> RunConfig:
    """The run config that a trial recommends: all training data again, scored on dev."""
    back = {
        "run_id": f"{search.given.run_id}-best",
        "dataset.selection_fraction": 0.0,
        "training.evaluate_on": "dev",
        "optuna": None,
    }
    return with_values(search.given, trial.params | back)


def _conclude(search: Search, shared: SharedStudy, metric: str, trials: Sequence[FrozenTrial]) -> None:
    done = [t for t in trials if t.state.is_finished() and counts(t)]
    failed = [t for t in done if t.state == TrialState.FAIL]
    pruned = sum(t.state == TrialState.PRUNED for t in done)
    print(f"{len(done)} of {search.optuna.n_trials} trials: {len(done) - pruned - len(failed)} complete, ", end="")
    print(f"{pruned} pruned, {len(failed)} failed")
    best = best_of(trials, search.optuna.direction)
    if best is not None:
        print(f"best: trial {best.number}, {metric} {best.value:.4f} on the selection split, after the last epoch")
        for key, value in best.params.items():
            print(f"  {key} = {value}")
        fresh = max(search.seeds) + 1
        print(f"train it: fwlora train run={search.folder / 'best.yaml'} seeds={fresh}..{fresh + 2}")
    print(f"results: {search.folder}")
    print(f"see the study: optuna-dashboard {shown(shared.url)}")
    for trial in failed[:3] if best is None else ():
        print(f"fwlora: trial {trial.number} failed: {cause_of(trial)}", file=sys.stderr)


# --- what is left behind ------------------------------------------------------------------------


def write_results(search: Search, shared: SharedStudy, metric: str) -> None:
    """Write best.yaml, the tables and the plots of a study as it stands."""
    trials = shared.trials()
    best = best_of(trials, search.optuna.direction)
    _write(search.folder / "trials.csv", _table(search, trials, metric))
    if best is None:
        return
    _write(search.folder / "best.yaml", _header(search, best, trials, metric) + to_yaml(best_config(search, best)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A slice through a parameter that had one value.
        warnings.filterwarnings("ignore", message="Attempting to set identical low and high")
        importances = _importances(shared.study)
        if importances:
            rows = [["parameter", "importance"], *([key, f"{value:.6g}"] for key, value in importances.items())]
            _write(search.folder / "importances.csv", _csv(rows))
        _plot(search, shared.study, metric, with_importances=bool(importances))


def _header(search: Search, best: FrozenTrial, trials: Sequence[FrozenTrial], metric: str) -> str:
    fraction, direction = search.base.dataset.selection_fraction, search.optuna.direction
    done = sum(t.state.is_finished() and counts(t) for t in trials)
    lines = [
        f"The best of {done} trials of the search around {search.given.run_id}, found {datetime.now(UTC):%Y-%m-%d}:",
        f"trial {best.number}, {metric} {best.value:.6g} ({direction}), the mean over seeds "
        f"{', '.join(map(str, search.seeds))} after the last epoch,",
        f"on a selection split of {fraction:g} of the training data. Dev was not looked at. This config trains on all",
        "training data and is scored on dev: report it with seeds that the search did not use.",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _table(search: Search, trials: Sequence[FrozenTrial], metric: str) -> str:
    keys = list(search.dimensions)
    rows: list[list[Any]] = [
        ["trial", "state", metric, *(f"seed {s}" for s in search.seeds), *keys, "epochs", "seconds", "cause"]
    ]
    for t in trials:
        scores = t.user_attrs.get(SCORES, [None] * len(search.seeds))
        seconds = None if t.duration is None else round(t.duration.total_seconds(), 1)
        state = t.state.name.lower() if counts(t) else "interrupted"
        values = [t.params.get(key) for key in keys]
        rows.append([t.number, state, t.value, *scores, *values, len(t.intermediate_values), seconds, cause_of(t)])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _importances(study: optuna.Study) -> dict[str, float]:
    """Empty where there are too few trials to tell."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Parameter importances will be equal")
        try:
            return optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError, UserWarning):
            return {}


def _plot(search: Search, study: optuna.Study, metric: str, with_importances: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as drawings

    plots = {"history": drawings.plot_optimization_history, "slices": drawings.plot_slice}
    if with_importances:
        plots["importances"] = drawings.plot_param_importances
    with plt.rc_context({"svg.hashsalt": "fwlora"}):
        for name, draw in plots.items():
            axes = draw(study) if name == "importances" else draw(study, target_name=metric)
            figure = axes.figure if hasattr(axes, "figure") else axes.flat[0].figure
            file = io.StringIO()
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            _write(search.folder / f"{name}.svg", file.getvalue())


def _write(path: Path, text: str) -> None:
    """Write a file in one piece; UserError where that cannot be done."""
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written: {error.strerror}. Free some space, or set results_dir=DIR."
        ) from error
