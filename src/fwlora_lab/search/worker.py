"""A worker of a search: it claims trials, trains them, and reports their scores to the shared study."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass, field

from optuna.trial import Trial, TrialState

from fwlora_lab.display.search_progress import SECONDS_BETWEEN_UPDATES, SearchProgress
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import RunFolder
from fwlora_lab.search.interrupts import Interrupts
from fwlora_lab.search.samplers import distributions
from fwlora_lab.search.session import SearchSession, open_session
from fwlora_lab.search.spec import SearchSpec, trial_run_id
from fwlora_lab.search.storage import GRACE_SECONDS
from fwlora_lab.search.trials import params_of
from fwlora_lab.training.checkpoints import adopt_checkpoints
from fwlora_lab.training.events import Evaluated, Event, Note, RunFailed, RunFinished, RunRefused, StepDone, StopRun
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_on_demand


@dataclass
class RunningTrial:
    """A trial that this worker trains: the results of its seeds so far."""

    trial: Trial
    epochs: int
    reports: dict[int, dict[int, float]] = field(default_factory=dict)  # epoch -> seed -> metric
    scores: dict[int, float] = field(default_factory=dict)  # seed -> metric after the last epoch
    fractions_done: dict[int, float] = field(default_factory=dict)  # seed -> part of the run's steps


class TrialWorker:
    """Claims trials of a session's study and trains them, several at once, until none is left."""

    def __init__(self, session: SearchSession, progress: SearchProgress, interrupts: Interrupts) -> None:
        self.spec, self.study, self.metric = session.spec, session.study, session.metric
        self.resources = session.resources
        self.progress, self.interrupts = progress, interrupts
        self.running: dict[str, RunningTrial] = {}
        self.queue: list[RunSpec] = []  # runs of claimed trials that are not in training yet
        self.space = distributions(session.spec)
        self.next_claim = 0.0

    def work(self) -> None:
        """Train trials until all are finished or the user stops; unfinished ones are requeued then.

        A requeued trial goes on from the checkpoints of its earlier attempt, where they are on this machine.
        """
        try:
            with self.study.heartbeat.running():
                largest = [RunSpec(cfg, self.spec.seeds[0]) for cfg in self.spec.largest_configs()]
                max_concurrent = self.spec.max_concurrent * len(self.spec.seeds)
                train_on_demand(self.next_run, self.on_event, largest, max_concurrent, resources=self.resources)
        except BaseException:
            with self.interrupts.deferred():
                for running in self.running.values():
                    # If the storage itself fails, the missing heartbeats make another worker retry the trial.
                    with contextlib.suppress(UserError):
                        self.study.requeue(running.trial)
            raise

    def next_run(self) -> RunSpec | None:
        """The next run to train here; waits while the only unfinished trials are those of other workers."""
        while not self.queue:
            if self.interrupts.stop_requested or len(self.running) >= self.spec.max_concurrent:
                return None
            if self.running and time.monotonic() < self.next_claim:
                return None
            with self.interrupts.deferred():
                trial = self.study.claim(self.spec.optuna.n_trials, self.space)
                if trial is not None:
                    self._enqueue(trial)
            if trial is not None:
                continue
            if self.running:
                self.next_claim = time.monotonic() + SECONDS_BETWEEN_UPDATES
                return None
            if not any(t.state == TrialState.RUNNING for t in self.study.trials()):
                return None
            # The trials of other workers may finish, or their worker may be dead and its trials free again.
            self.progress.update(waiting=True)
            time.sleep(SECONDS_BETWEEN_UPDATES)
        return self.queue.pop(0)

    def _enqueue(self, trial: Trial) -> None:
        try:
            cfg = self.spec.trial_config(trial.number, params_of(trial))
        except UserError as error:
            self._show_end(trial, self.study.fail(trial, str(error)))
            return
        earlier = [trial_run_id(number) for number in self.study.earlier_attempts(trial)]
        for seed in self.spec.seeds:
            adopt_checkpoints(
                RunFolder(cfg.results_dir, cfg.run_id, seed),
                [RunFolder(cfg.results_dir, run_id, seed) for run_id in earlier],
            )
        self.running[cfg.run_id] = RunningTrial(trial, cfg.training.epochs)
        self.queue += [RunSpec(cfg, seed) for seed in self.spec.seeds]

    def on_event(self, event: Event) -> None:
        """The callback for `train_on_demand`."""
        if isinstance(event, Note):
            self.progress.note(event.text)
            return
        running = self.running.get(event.run_id)
        if running is None:  # the trial has ended, but this seed of it is still in training
            if isinstance(event, Evaluated):
                raise StopRun
            return
        match event:
            case StepDone():
                running.fractions_done[event.seed] = event.step / event.total
                self.progress.update(self._fraction_done())
            case Evaluated():
                self._report_epoch(running, event)
            case RunFinished():
                running.scores[event.seed] = event.record.metrics[self.metric]
                if len(running.scores) == len(self.spec.seeds):
                    scores = [running.scores[seed] for seed in self.spec.seeds]
                    self._end(event, self.study.finish(running.trial, statistics.fmean(scores), scores))
            case RunFailed():
                assert event.record.error is not None
                self._end(event, self.study.fail(running.trial, event.record.error.message))
            case RunRefused():
                self._end(event, self.study.fail(running.trial, event.reason))

    def _report_epoch(self, running: RunningTrial, event: Evaluated) -> None:
        """Report the mean over the seeds once all of them have finished this epoch."""
        values = running.reports.setdefault(event.epoch, {})
        values[event.seed] = event.metrics[self.metric]
        if len(values) < len(self.spec.seeds):
            return
        if not self.study.report(running.trial, statistics.fmean(values.values()), event.epoch):
            self._end(event, ours=False)
            raise StopRun
        if event.epoch < running.epochs and self.study.should_prune(running.trial):
            self._end(event, self.study.prune(running.trial))
            raise StopRun

    def _end(self, event: Event, ours: bool) -> None:
        running = self.running.pop(event.run_id)
        self.queue = [run for run in self.queue if run.cfg.run_id != event.run_id]
        self._show_end(running.trial, ours)

    def _show_end(self, trial: Trial, ours: bool) -> None:
        if not ours:
            self.progress.note(
                f"trial {trial.number}: its worker sent no heartbeat for {GRACE_SECONDS} s, so another worker tries "
                "the trial again"
            )
        self.progress.update(self._fraction_done(), force=True)

    def _fraction_done(self) -> float:
        """The parts done of the trials in training here, in whole trials."""
        return sum(sum(r.fractions_done.values()) for r in self.running.values()) / len(self.spec.seeds)


def run_worker(spec: SearchSpec) -> None:
    """One of several workers, in a process of its own; the process that started it shows the progress."""
    session = open_session(spec)
    progress = SearchProgress(spec.cfg.run_id, spec.optuna.n_trials, session.status, quiet=True)
    with Interrupts(progress.note) as interrupts:
        TrialWorker(session, progress, interrupts).work()
