"""Modules of other people that register their own tasks, encoders or methods."""

from __future__ import annotations

import functools
import importlib
import os

from fwlora_lab.errors import UserError

VARIABLE = "FWLORA_EXTENSIONS"


def load_extensions() -> None:
    """Import the modules that the environment variable FWLORA_EXTENSIONS names, separated by commas, once each.

    The variable, unlike a registration in one process, also reaches the workers of a search or a study. A config cannot
    name a module, because a config runs no code.

    Raises:
        UserError: a module cannot be imported.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        _load(name.strip())


@functools.cache
def _load(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever somebody else's module raises
        raise UserError(
            f"{VARIABLE}: the module {name!r} cannot be imported: {type(error).__name__}: {error}. "
            "Correct it, or take it out of the variable."
        ) from error
