"""Errors caused by user input; shown as one message, without a traceback."""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake in a config, a data file, a folder or a command line.

    The message says what is wrong, where (file and key), and what to do about it. The command line prints it and exits
    with code 2. It is no ValueError: code that translates a library's ValueError must not catch it by accident.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the machine or of a GPU, for what was asked."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter: torch's, of a GPU
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # On a CPU torch has no class for it, and safetensors none for a file that cannot be mapped.
    text = str(error).lower()
    return isinstance(error, Exception) and any(words in text for words in _TOO_LITTLE)


_TOO_LITTLE = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "(os error 12)",
    "bad_alloc",
    "failed to map segment",  # of a library that is loaded when it is first needed
    "can't start new thread",
)
