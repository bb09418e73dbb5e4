"""One Optuna study that any number of workers share: who trains which trial, and what becomes of it.

A trial is claimed under a lock that all workers of a study share: a file beside an SQLite study, an advisory lock of a
PostgreSQL server; both are given back when their holder dies. Whoever holds it sees how many trials there are, so
that n_trials is never overshot. A worker says every few seconds that it is alive; the trials of one that stops saying
so are tried again, by whoever claims next.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import filelock
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from fwlora_lab.config.former_names import present_key
from fwlora_lab.errors import UserError

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # silence after which a worker counts as dead
_RETRIES = 2  # of a trial whose worker died: the third time it may well be the trial's fault
Direction = Literal["maximize", "minimize"]
SCORES = "scores"  # one for each seed
_CAUSE = "cause"
_HANDED_BACK = "handed_back"
_IDENTITY = "fwlora"


def storage_url(text: str) -> URL:
    """The storage's URL with the driver that comes with this package; UserError for what cannot be shared safely."""
    cure = "use sqlite:///FILE, or postgresql://USER@HOST/DATABASE to share a study over machines"
    try:
        url = sqlalchemy.make_url(text)
    except ArgumentError:
        raise UserError(f"optuna.storage={text}: is no database URL: {cure}") from None
    kind = url.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise UserError(f"optuna.storage={redacted(url)}: {kind} is not supported: {cure}")
    if url.database in (None, "", ":memory:"):
        raise UserError(f"optuna.storage={text}: a study in memory is gone with its worker: {cure}")
    return url


def redacted(url: URL) -> str:
    """The URL as it may be printed: without its password."""
    return url.render_as_string(hide_password=True)


def cause_of(trial: FrozenTrial) -> str | None:
    """Why a trial failed; None for one that did not, or that was only interrupted and is tried again."""
    if trial.state != TrialState.FAIL or _HANDED_BACK in trial.user_attrs:
        return None
    if _CAUSE in trial.user_attrs:
        return trial.user_attrs[_CAUSE]
    if len(trial.system_attrs.get("retry_history", [])) >= _RETRIES:  # RetryHeartbeatStaleTrialCallback's
        return f"its worker died {_RETRIES + 1} times in this trial"
    return None


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the n_trials: an interrupted one is not, the one that tries it again is."""
    return trial.state != TrialState.FAIL or cause_of(trial) is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Heartbeats are marked experimental, and said not to work with `ask`, which leaves them to the caller: us.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
        yield


def params_of(trial: FrozenTrial | Trial) -> dict[str, Any]:
    """A trial's values by the run config's present keys, whatever the storage calls them."""
    return {present_key(name): value for name, value in trial.params.items()}


class SharedStudy:
    """The study `name` in the storage at `url`, made where it is not there yet.

    `sampler` makes a trial's sampler from its number, so that a trial's draw does not depend on who trains it.

    Raises:
        UserError: the storage cannot be reached or written.
    """

    def __init__(
        self, url: URL, name: str, direction: Direction, sampler: Callable[[int], BaseSampler], pruner: BasePruner
    ) -> None:
        self.url = url
        self._sampler = sampler
        self._beating: set[int] = set()
        self._stopped = threading.Event()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": 60}
        with self._storage_errors(), _quiet(), self._lock():
            self._storage = RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs=options,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES),
            )
            self.study = optuna.create_study(
                storage=self._storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
            )

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """What the database complains about becomes a UserError."""
        try:
            yield
        except ModuleNotFoundError as error:
            raise UserError(
                f"optuna.storage={redacted(self.url)} needs the package {error.name}: pip install 'fwlora[postgres]'"
            ) from error
        except (SQLAlchemyError, StorageInternalError, OSError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
            raise UserError(
                f"optuna.storage={redacted(self.url)}: the study cannot be read or written: {reason}. What is finished "
                "is kept; the same command goes on."
            ) from error

    def bind(self, identity: Mapping[str, Mapping[str, Any]]) -> None:
        """Note down what the study is a study of; a UserError where it is one of something else already.

        `identity` holds JSON values by name, in groups that the message names.
        """
        with self._storage_errors(), self._lock():
            stored = self.study.user_attrs.get(_IDENTITY)
            if stored is None and not self.study.get_trials(deepcopy=False):
                self.study.set_user_attr(_IDENTITY, identity)
                return
        if stored is None:
            raise UserError(
                f"{redacted(self.url)}: the study {self.study.study_name!r} was not made by fwlora search. "
                "Set another run_id or optuna.storage."
            )
        faults = []
        for group in identity:
            there, asked = stored.get(group, {}), identity[group]
            for key in sorted(there.keys() | asked.keys()):
                if there.get(key) != asked.get(key):
                    told = f"{there.get(key)!r} there, {asked.get(key)!r} asked for"
                    faults.append(f"{group} {key}: {told}" if group != "data" else f"the {key} are others")
        if faults:
            raise UserError(
                f"{redacted(self.url)} holds a study of another kind called {self.study.study_name!r}: "
                f"{'; '.join(faults)}. Set another run_id, results_dir or optuna.storage, or delete that study."
            )

    def claim(self, n_trials: int, space: Mapping[str, BaseDistribution]) -> Trial | None:
        """The next trial, its parameters drawn, or None where all n_trials are claimed."""
        with self._storage_errors(), _quiet(), self._lock():
            fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            waiting = [t for t in trials if t.state == TrialState.WAITING]
            there = sum(map(is_counted, trials))
            if there > n_trials or (there == n_trials and not waiting):
                return None
            if not waiting:
                self.study.enqueue_trial({})
                waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            # The first heartbeat comes before the trial runs: without one a worker that dies here is never missed.
            self._storage.record_heartbeat(waiting[0]._trial_id)
            self._beating.add(waiting[0]._trial_id)
            self.study.sampler = self._sampler(waiting[0].number)
            trial = self.study.ask(dict(space))
            assert trial.number == waiting[0].number
            return trial

    def report(self, trial: Trial, value: float, step: int) -> bool:
        """Note a running trial's score down; False where the trial was taken for dead and is somebody else's now."""
        with self._storage_errors():
            try:
                trial.report(value, step)
            except UpdateFinishedTrialError:
                self._beating.discard(trial._trial_id)
                return False
        return True

    def should_prune(self, trial: Trial) -> bool:
        with self._storage_errors():
            return trial.should_prune()

    def trials(self) -> list[FrozenTrial]:
        """All trials as the storage has them."""
        with self._storage_errors():
            return self.study.get_trials(deepcopy=False)

    def finish(self, trial: Trial, value: float, scores: Sequence[float]) -> bool:
        """File a score and the seeds' scores that it is the mean of; False where the trial is no longer ours."""
        with self._storage_errors(), contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr(SCORES, list(scores))
        return self._end(trial, TrialState.COMPLETE, value)

    def prune(self, trial: Trial) -> bool:
        return self._end(trial, TrialState.PRUNED)

    def fail(self, trial: Trial, cause: str) -> bool:
        with self._storage_errors(), contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr(_CAUSE, cause)  # first: a failed trial without a cause is one to try again
        return self._end(trial, TrialState.FAIL)

    def _end(self, trial: Trial, state: TrialState, value: float | None = None) -> bool:
        self._beating.discard(trial._trial_id)
        with self._storage_errors():
            try:
                self.study.tell(trial, value, state)
            except UpdateFinishedTrialError:
                return False
            except ValueError as error:
                if "Cannot tell" not in str(error):
                    raise
                return False
        return True

    def hand_back(self, trial: Trial) -> None:
        """Give up a trial that was interrupted, to be tried again with the same parameters."""
        with self._storage_errors(), self._lock(), contextlib.suppress(UpdateFinishedTrialError):
            frozen = next(t for t in self.study.get_trials(deepcopy=False) if t.number == trial.number)
            if frozen.state != TrialState.RUNNING:
                return
            trial.set_user_attr(_HANDED_BACK, True)
            if self._end(trial, TrialState.FAIL):
                self.study.add_trial(
                    optuna.create_trial(
                        state=TrialState.WAITING,
                        params=frozen.params,
                        distributions=frozen.distributions,
                        system_attrs=frozen.system_attrs,
                    )
                )

    @contextlib.contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Say from a thread of its own that the trials claimed here are being trained."""
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._stopped.clear()
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join(timeout=HEARTBEAT_SECONDS)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            for trial_id in tuple(self._beating):
                # A database that is away for a moment: the next beat may reach it.
                with contextlib.suppress(SQLAlchemyError, StorageInternalError, KeyError):
                    self._storage.record_heartbeat(trial_id)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the study against the claims of all other workers."""
        if self.url.get_backend_name() == "sqlite":
            path = Path(str(self.url.database)).resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{path}.lock"):
                yield
            return
        key = int.from_bytes(hashlib.sha256(f"fwlora/{self.url.database}".encode()).digest()[:8], "big", signed=True)
        engine = sqlalchemy.create_engine(self.url, poolclass=sqlalchemy.NullPool)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield
