"""TODO"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the most similar of `words`, or nothing."""
    by_lower = {w.lower(): w for w in words}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.55)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def listing(faults: Sequence[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n" + "\n".join(f"  {f}" for f in faults)


def one_line(value: object, width: int = 160) -> str:
    """A text that can stand in one line of a message or of a YAML comment, whatever it holds."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * width]).split())
    return text if len(text) <= width else text[: width - 1] + "…"
