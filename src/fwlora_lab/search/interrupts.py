"""What Ctrl-C does to a search: the first one finishes the running trials, the second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupts:
    """Handles SIGINT while the `with` block runs: `stop_requested` after the first, KeyboardInterrupt at the second.

    In a thread other than the main one, where Python handles no signals, it does nothing.

    Args:
        on_stop: called with a line for the user at the first signal.
    """

    def __init__(self, on_stop: Callable[[str], object]) -> None:
        self.stop_requested = False
        self._second, self._deferrals = False, 0
        self._on_stop = on_stop

    def __enter__(self) -> Interrupts:
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._former = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._former)

    def _handle(self, *_: object) -> None:
        if self.stop_requested:
            self._second = True
            if not self._deferrals:
                raise KeyboardInterrupt
            return
        self.stop_requested = True
        self._on_stop("Ctrl-C: the running trials are finished first; once more stops at once")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a second Ctrl-C wait for the end of the block.

        For steps that must not be cut in two, such as claiming a trial in the storage and noting it here.
        """
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
            if self._second and not self._deferrals:
                raise KeyboardInterrupt
