"""One Optuna study that any number of workers share: who trains which trial, and how each trial ended.

A worker claims a trial under a lock that all workers of the study share (see `storage.study_lock`). The holder of the
lock sees how many trials exist, so the workers together never train more than n_trials. A worker sends a heartbeat
every few seconds. If a worker's heartbeats stop, the next claim takes its trials and tries them again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from fwlora_lab.errors import UserError
from fwlora_lab.search import storage
from fwlora_lab.search.storage import check_database, open_storage, quiet, redacted, storage_errors, study_lock
from fwlora_lab.search.trials import CAUSE, EARLIER, REQUEUED, SCORES, Direction, earlier_attempts, is_counted

_IDENTITY = "fwlora"  # the attribute of a stored study: studies on disk hold this name


class Heartbeat:
    """Tells the storage every few seconds that the trials claimed by this process are still being trained."""

    def __init__(self, database: RDBStorage) -> None:
        self._database = database
        self._trial_ids: set[int] = set()
        self._stopped = threading.Event()

    def add(self, trial_id: int) -> None:
        """Send the first heartbeat of a trial at once: the trial of a worker that dies without one is never retried."""
        self._database.record_heartbeat(trial_id)
        self._trial_ids.add(trial_id)

    def remove(self, trial_id: int) -> None:
        self._trial_ids.discard(trial_id)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Send heartbeats from a thread while the block runs."""
        thread = threading.Thread(target=self._send, name="heartbeat", daemon=True)
        self._stopped.clear()
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join(timeout=storage.HEARTBEAT_SECONDS)

    def _send(self) -> None:
        while not self._stopped.wait(storage.HEARTBEAT_SECONDS):
            for trial_id in tuple(self._trial_ids):
                # The database may be unreachable for a moment: the next heartbeat may reach it.
                with contextlib.suppress(SQLAlchemyError, StorageInternalError, KeyError):
                    self._database.record_heartbeat(trial_id)


class SharedStudy:
    """The Optuna study `name` in the storage at `url`; it is made if it does not exist.

    Args:
        sampler: makes a trial's sampler from its place among the counted trials, so that a trial's values do not depend
            on who trains it.

    Raises:
        UserError: the storage cannot be reached or written. Every method raises it too.
    """

    def __init__(
        self, url: URL, name: str, direction: Direction, sampler: Callable[[int], BaseSampler], pruner: BasePruner
    ) -> None:
        self.url = url
        self._sampler = sampler
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._locked(), quiet():
            check_database(url)
            self._database = open_storage(url)
            self.study = optuna.create_study(
                storage=self._database, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
            )
        self.heartbeat = Heartbeat(self._database)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with storage_errors(self.url), study_lock(self.url):
            yield

    def bind(self, identity: Mapping[str, Mapping[str, Any]]) -> None:
        """Store what the study searches; UserError if the study was made for something else.

        Args:
            identity: JSON values by name, in groups that the error message names.
        """
        with self._locked():
            stored = self.study.user_attrs.get(_IDENTITY)
            if stored is None and not self.study.get_trials(deepcopy=False):
                self.study.set_user_attr(_IDENTITY, identity)
                return
        if stored is None:
            raise UserError(
                f"{redacted(self.url)}: the study {self.study.study_name!r} was not made by fwlora search. "
                "Set another run_id or optuna.storage."
            )
        differences = []
        for group in identity:
            there, asked = stored.get(group, {}), identity[group]
            for key in sorted(there.keys() | asked.keys()):
                if there.get(key) != asked.get(key):
                    values = f"{there.get(key)!r} there, {asked.get(key)!r} asked for"
                    differences.append(f"{group} {key}: {values}" if group != "data" else f"the {key} are others")
        if differences:
            raise UserError(
                f"{redacted(self.url)} holds a study of another kind called {self.study.study_name!r}: "
                f"{'; '.join(differences)}. Set another run_id, results_dir or optuna.storage, or delete that study."
            )

    def trials(self) -> list[FrozenTrial]:
        """All trials as the storage has them."""
        with storage_errors(self.url):
            return self.study.get_trials(deepcopy=False)

    def claim(self, n_trials: int, space: Mapping[str, BaseDistribution]) -> Trial | None:
        """The next trial, its parameters drawn, or None if all n_trials are claimed."""
        with self._locked(), quiet():
            fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            waiting = [t for t in trials if t.state == TrialState.WAITING]
            existing = sum(map(is_counted, trials))
            if existing > n_trials or (existing == n_trials and not waiting):
                return None
            if not waiting:
                self.study.enqueue_trial({})
                waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            self.heartbeat.add(waiting[0]._trial_id)
            # Attempts that were stopped do not count, so that a search that was stopped draws what it would have drawn.
            stopped = sum(not is_counted(t) for t in trials if t.number < waiting[0].number)
            self.study.sampler = self._sampler(waiting[0].number - stopped)
            trial = self.study.ask(dict(space))
            assert trial.number == waiting[0].number
            return trial

    def earlier_attempts(self, trial: Trial) -> list[int]:
        """The numbers of the trials that this one tries again, the latest first."""
        with storage_errors(self.url):
            return earlier_attempts(self._database.get_trial(trial._trial_id))

    def report(self, trial: Trial, value: float, step: int) -> bool:
        """Store a running trial's score; False if the trial was taken for dead and belongs to another worker now."""
        with storage_errors(self.url):
            try:
                trial.report(value, step)
            except UpdateFinishedTrialError:
                self.heartbeat.remove(trial._trial_id)
                return False
        return True

    def should_prune(self, trial: Trial) -> bool:
        with storage_errors(self.url):
            return trial.should_prune()

    def finish(self, trial: Trial, value: float, scores: Sequence[float]) -> bool:
        """Store a score and the seeds' scores that it is the mean of; False if the trial is no longer ours."""
        self._set_attribute(trial, SCORES, list(scores))
        return self._end(trial, TrialState.COMPLETE, value)

    def prune(self, trial: Trial) -> bool:
        """End a trial early; False if the trial is no longer ours."""
        return self._end(trial, TrialState.PRUNED)

    def fail(self, trial: Trial, cause: str) -> bool:
        """End a trial as failed, with its cause; False if the trial is no longer ours."""
        self._set_attribute(trial, CAUSE, cause)  # first: a failed trial without a cause would be tried again
        return self._end(trial, TrialState.FAIL)

    def _set_attribute(self, trial: Trial, name: str, value: object) -> None:
        with storage_errors(self.url), contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr(name, value)

    def _end(self, trial: Trial, state: TrialState, value: float | None = None) -> bool:
        self.heartbeat.remove(trial._trial_id)
        with storage_errors(self.url):
            try:
                self.study.tell(trial, value, state)
            except UpdateFinishedTrialError:
                return False
            except ValueError:  # for a trial that another worker ended or took over, and for an impossible value
                if self._database.get_trial(trial._trial_id).state == TrialState.RUNNING:
                    raise
                return False
        return True

    def requeue(self, trial: Trial) -> None:
        """Give up a trial that was interrupted; it is tried again with the same parameters."""
        with self._locked(), contextlib.suppress(UpdateFinishedTrialError):
            frozen = next(t for t in self.study.get_trials(deepcopy=False) if t.number == trial.number)
            if frozen.state != TrialState.RUNNING:
                return
            trial.set_user_attr(REQUEUED, True)
            if self._end(trial, TrialState.FAIL):
                self.study.add_trial(
                    optuna.create_trial(
                        state=TrialState.WAITING,
                        params=frozen.params,
                        distributions=frozen.distributions,
                        system_attrs=frozen.system_attrs,
                        user_attrs={EARLIER: [trial.number, *earlier_attempts(frozen)]},
                    )
                )
