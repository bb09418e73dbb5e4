"""The database that holds a search's study: its URL, its errors, and a lock that all workers of the study share."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from fwlora_lab.errors import UserError
from fwlora_lab.search.trials import MAX_RETRIES

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # without a heartbeat for this long, a worker counts as dead
_SQLITE_TIMEOUT_SECONDS = 60  # how long to wait while another process writes


def storage_url(text: str) -> URL:
    """The storage's URL with the driver that comes with this package; UserError for what workers cannot share."""
    cure = "use sqlite:///FILE, or postgresql://USER@HOST/DATABASE to share a study over machines"
    try:
        url = sqlalchemy.make_url(text)
    except ArgumentError:
        raise UserError(f"optuna.storage={text}: not a database URL: {cure}") from None
    kind = url.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise UserError(f"optuna.storage={redacted(url)}: {kind} is not supported: {cure}")
    if url.database in (None, "", ":memory:"):
        raise UserError(f"optuna.storage={text}: a study in memory is lost when its worker ends: {cure}")
    return url


def redacted(url: URL) -> str:
    """The URL as it may be printed: without its password."""
    return url.render_as_string(hide_password=True)


def open_storage(url: URL) -> RDBStorage:
    """Connect to the database; its tables are made if they are missing."""
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": _SQLITE_TIMEOUT_SECONDS}
    return RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=options,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
    )


@contextlib.contextmanager
def storage_errors(url: URL) -> Iterator[None]:
    """Turn errors of the database into a UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"optuna.storage={redacted(url)} needs the package {error.name}: pip install 'fwlora[postgres]'"
        ) from error
    except (SQLAlchemyError, StorageInternalError, OSError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise UserError(
            f"optuna.storage={redacted(url)}: the study cannot be read or written: {reason}. Finished trials are "
            "kept; run the same command again to continue."
        ) from error


@contextlib.contextmanager
def study_lock(url: URL) -> Iterator[None]:
    """Hold the study against the claims of all other workers; the lock is released if its holder dies."""
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            yield
        return
    key = int.from_bytes(hashlib.sha256(f"fwlora/{url.database}".encode()).digest()[:8], "big", signed=True)
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide two of Optuna's warnings about heartbeats that do not apply here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        # Optuna warns that `ask` sends no heartbeats. `Heartbeat` sends them.
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
        yield
