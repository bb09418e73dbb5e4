"""The database that holds a search's study: its URL, its errors, and a lock that all workers of the study share."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sqlite3
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
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.trials import MAX_RETRIES
from fwlora_lab.text import HIDDEN, without_secrets

ENVIRONMENT = "FWLORA_STORAGE"  # a URL with a password, which then stands in no file and no command

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # without a heartbeat for this long, a worker counts as dead
_SQLITE_TIMEOUT_SECONDS = 60  # how long to wait while another process writes


def storage_url(spec: SearchSpec) -> URL:
    """Where the search's study is: optuna.storage, the environment's FWLORA_STORAGE, or study.db in its folder.

    A written config has `***` for a password: FWLORA_STORAGE stands in for such a URL too.

    Raises:
        UserError: no database URL, or a database that workers cannot share.
    """
    text, given = spec.optuna.storage, os.environ.get(ENVIRONMENT)
    if text is None and given is None:
        # Not by way of a text: a path may have a `?`, which would begin a URL's parameters.
        return URL.create("sqlite", database=str((spec.folder / "study.db").resolve()))
    if text is None or (HIDDEN in text and given is not None):
        assert given is not None
        return database_url(given)
    if HIDDEN in text:
        raise UserError(
            f"optuna.storage={text}: the password was left out where this config was written. Set the environment's "
            f"{ENVIRONMENT} to the whole URL."
        )
    return database_url(text)


def database_url(text: str) -> URL:
    """The URL with the driver that comes with this package; UserError for what workers cannot share."""
    cure = "use sqlite:///FILE, or postgresql://USER@HOST/DATABASE to share a study over machines"
    try:
        url = sqlalchemy.make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise UserError(f"optuna.storage={without_secrets(text)}: not a database URL: {cure}") from None
    kind = url.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise UserError(f"optuna.storage={redacted(url)}: {kind} is not supported: {cure}")
    if url.database in (None, "", ":memory:"):
        raise UserError(f"optuna.storage={redacted(url)}: a study in memory is lost when its worker ends: {cure}")
    return url


def redacted(url: URL) -> str:
    """The URL as it may be printed: without its password."""
    return without_secrets(url.render_as_string(hide_password=True))


def check_database(url: URL) -> None:
    """Look whether an SQLite file is intact, and there if the search has left anything else.

    Raises:
        UserError: it is damaged, or missing beside results of its trials.
    """
    if url.get_backend_name() != "sqlite":
        return
    file = Path(str(url.database)).resolve()
    trials = [name for name in ("trials.csv", "best.yaml") if (file.parent / name).exists()]
    if file.exists() and file.stat().st_size and (fault := database_fault(file)) is not None:
        raise UserError(
            f"{file}: {fault}. Put a copy of the file back; to search again, delete {file.name} and what is beside it."
        )
    if file.name == "study.db" and trials and not (file.exists() and file.stat().st_size):
        raise UserError(
            f"{file}: the search's database is missing or empty, while {' and '.join(trials)} of it "
            f"{'are' if len(trials) > 1 else 'is'} there. Put the file back; to search again, delete the folder "
            f"{file.parent}."
        )


def database_fault(file: Path) -> str | None:
    """What is wrong with an SQLite file; None if nothing is."""
    try:
        with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            rows = [str(row[0]) for row in database.execute("PRAGMA integrity_check(3)")]
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except (sqlite3.Error, UnicodeDecodeError) as error:
        return f"no intact database: {error}"
    if rows != ["ok"]:
        return f"no intact database: {'; '.join(' '.join(row.split()) for row in rows)}"
    return None if {"studies", "trials"} <= tables else "no database of a search: its tables are missing"


def open_storage(url: URL) -> RDBStorage:
    """Connect to the database; its tables are made if they are missing."""
    options: dict[str, Any] = {"pool_pre_ping": True}
    text = url.render_as_string(hide_password=False)
    if url.get_backend_name() == "sqlite":
        # Optuna takes a text, in which a path with `?` or braces would be another file: the connection is made here.
        file, text = str(url.database), "sqlite://"
        options |= {
            "creator": functools.partial(
                sqlite3.connect, file, timeout=_SQLITE_TIMEOUT_SECONDS, check_same_thread=False
            ),
            "poolclass": sqlalchemy.QueuePool,
        }
    return RDBStorage(
        text,
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
        reason = without_secrets(str(getattr(cause, "orig", None) or cause).strip().splitlines()[0])
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
