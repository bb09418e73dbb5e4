"""How wide the output is, and how tables and names are made to fit it."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

ROOM_FOR_BARS = 100  # columns; on a narrower terminal, progress is shown in numbers only
_UNLIMITED = 10_000  # rich needs a number; for files and pipes, where nothing wraps


def output_width() -> int:
    """The terminal's width in characters; practically unlimited if the output is not a terminal."""
    console = Console()
    return console.width if console.is_terminal else _UNLIMITED


def as_text(renderable: RenderableType, width: int) -> str:
    """What rich would print on a screen of this width, as plain text without blanks at the ends of lines."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def shorten(name: str, width: int) -> str:
    """`name` in at most `width` characters; its middle is left out, because names often differ at their ends."""
    if len(name) <= width:
        return name
    kept = max(width - 1, 2)
    return f"{name[: (kept + 1) // 2]}…{name[len(name) - kept // 2 :]}"
