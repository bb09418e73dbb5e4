"""TODO"""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from optuna.trial import Trial, TrialState

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.data.load import load_task
from fwlora_lab.errors import UserError
from fwlora_lab.search.spec import Search
from fwlora_lab.search.trials import GRACE_SECONDS, SharedStudy, params_of
from fwlora_lab.search.watch import SECONDS_BETWEEN_LOOKS, SearchWatch
from fwlora_lab.training.events import Evaluated, Event, Note, RunFailed, RunFinished, RunRefused, StepDone, StopRun
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_on_demand


@dataclass
class RunningTrial:
    """A trial in training here: what its seeds have reached."""

    trial: Trial
    epochs: int
    reports: dict[int, dict[int, float]] = field(default_factory=dict)  # epoch -> seed -> metric
    scores: dict[int, float] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)  # seed -> part of the run that is done


class TrialWorker:
    """Draws trials, trains them, tells the study what became of them."""

    def __init__(self, search: Search, shared: SharedStudy, metric: str, watch: SearchWatch, stop: Interrupts) -> None:
        self.search, self.shared, self.metric, self.watch, self.stop = search, shared, metric, watch, stop
        self.running: dict[str, RunningTrial] = {}
        self.queue: list[RunSpec] = []
        self.space = search.space()
        self.look_again = 0.0

    def work(self) -> None:
        """Train trials until the study is over or somebody stops it; what is unfinished then is handed back."""
        try:
            with self.shared.heartbeat():
                room = [RunSpec(cfg, self.search.seeds[0]) for cfg in self.search.largest()]
                train_on_demand(self.draw, self.hear, room, self.search.n_jobs * len(self.search.seeds))
        except BaseException:
            with self.stop.held():
                for running in self.running.values():
                    with contextlib.suppress(UserError):  # the storage may be the trouble: its heartbeat ends too
                        self.shared.hand_back(running.trial)
            raise

    def draw(self) -> RunSpec | None:
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
                self.look_again = time.monotonic() + SECONDS_BETWEEN_LOOKS
                return None
            if not any(t.state == TrialState.RUNNING for t in self.shared.trials()):
                return None
            # They may finish, or their worker may turn out to be dead.
            self.watch.look(waiting=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return self.queue.pop(0)

    def _plan(self, trial: Trial) -> None:
        try:
            cfg = self.search.trial_config(trial.number, params_of(trial))
        except UserError as error:
            self._over(self.shared.fail(trial, str(error)), trial)
            return
        self.running[cfg.run_id] = RunningTrial(trial, cfg.training.epochs)
        self.queue += [RunSpec(cfg, seed) for seed in self.search.seeds]

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

    def _evaluated(self, running: RunningTrial, event: Evaluated) -> None:
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


class Interrupts:
    """Ctrl-C: the first asks the worker to finish its trials, the second stops it at once, or once `held` is over."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.asked = False
        self._again, self._holders = False, 0
        self._say = say

    def __enter__(self) -> Interrupts:
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


def run_worker(config: str) -> None:
    """One of several workers, in a process of its own; what it does is shown by the one that watches the study."""
    search = Search.of(RunConfig.model_validate_json(config))
    data = load_task(search.base.dataset)
    shared = search.shared_study()
    shared.bind(search.identity(data.fingerprint))
    watch = SearchWatch(shared, search, None, silent=True)
    with Interrupts(watch.note) as stop:
        TrialWorker(search, shared, data.spec.primary, watch, stop).work()
