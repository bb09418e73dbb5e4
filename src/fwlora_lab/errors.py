"""What goes wrong because of what somebody wrote: printed as one message, never as a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a config, a data file, a folder or a command line.

    The message says what is wrong, where (file and key), and what to do about it. The command line
    prints it and exits with code 2.
    """
