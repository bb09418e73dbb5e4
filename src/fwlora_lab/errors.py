"""Errors caused by user input; shown as one message, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a data file, a folder or a command line.

    The message says what is wrong, where (file and key), and what to do about it. The command line prints it and exits
    with code 2. It is no ValueError: code that translates a library's ValueError must not catch it by accident.
    """
