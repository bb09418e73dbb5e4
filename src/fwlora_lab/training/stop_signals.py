"""What Ctrl-C and SIGTERM do to training: it ends between two steps, where a checkpoint can be written.

A second Ctrl-C ends it at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM asked this process to end; uncaught, it ends with exit code 143 and no traceback."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)

    def __reduce__(self) -> tuple[type[Terminated], tuple[()]]:  # launchers send a worker's exception to the parent
        return Terminated, ()


class StopSignals:
    """Handles SIGINT and SIGTERM while the `with` block runs, which is left by KeyboardInterrupt or `Terminated`.

    The first signal raises at once, or waits for `check` in a `held` block. After it, SIGINT raises at once wherever it
    comes, and `is_hurried` says so. A repeated SIGTERM does nothing: a process may get it from its parent and from
    whoever ends the whole group.

    A handler of SIGINT that was there before is asked first, and decides with a KeyboardInterrupt whether to stop;
    where SIGINT is ignored it stays so. In a thread other than the main one, where Python handles no signals, nothing
    happens.
    """

    def __init__(self) -> None:
        self.is_hurried = False
        self._asked: BaseException | None = None
        self._held = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                former = signal.getsignal(number)
                if callable(former) or (number == signal.SIGTERM and former == signal.SIG_DFL):
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    @contextlib.contextmanager
    def held(self, on: bool = True) -> Iterator[None]:
        """Let the first signal wait for `check`, or raise at once (`on=False`) in a part of such a block."""
        before = self._held
        if not on:
            self.check()
        self._held = on
        try:
            yield
        finally:
            self._held = before

    def check(self) -> None:
        """Raise for a signal that came in a `held` block.

        Raises:
            KeyboardInterrupt: it was SIGINT.
            Terminated: it was SIGTERM.
        """
        if self._asked is not None:
            raise self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        error: BaseException = Terminated()
        if number == signal.SIGINT:
            try:
                self._former[number](number, frame)
            except KeyboardInterrupt as raised:
                error = raised
            else:
                return  # whoever handles Ctrl-C around this lets the runs go on
        if self._asked is not None:
            if number == signal.SIGTERM:
                return
            self.is_hurried = True
            raise error
        self._asked = error
        if not self._held:
            raise error


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` while the block runs, so that what is held is released and files are tidied."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Terminated

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
