"""Turns errors of transformers into messages for users, and keeps its loading quiet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

from fwlora_lab.errors import UserError

WHAT_CAN_BE_MEANT = (
    "Use minilm or mpnet (no network), roberta-base, a folder written with a slash (./my-model), or a hub "
    "id together with model.revision=<commit>."
)


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:300]}"


@contextlib.contextmanager
def as_user_error(problem: str, cure: str) -> Iterator[None]:
    """Raise every error of the block as a UserError: `problem`, the error's first line, `cure`.

    For code that reads somebody's model files: malformed ones raise almost any type inside transformers.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({first_line(error)}). {cure}") from error


CHECK_CONFIG = "Check config.json, or save the model again with save_pretrained."
FETCH_AGAIN = "Copy or download the folder again, or save the model again with save_pretrained."


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress the report of missing head weights, which is expected, and the progress bar of each tensor."""
    log = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    bars = transformers_logging.is_progress_bar_enabled()
    log.addFilter(wanted)
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.removeFilter(wanted)
        if bars:
            transformers_logging.enable_progress_bar()
