"""Words in messages: suggestions for misspelt names, lists of faults, and texts cut to one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_SIMILAR_ENOUGH = 0.55  # difflib's ratio, 0 to 1; `epoch` and `epochs` have 0.91, `shares` and `share` too


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of `words`, compared without regard to case; None if none of them is similar."""
    by_lower = {w.lower(): w for w in words}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=_SIMILAR_ENOUGH)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the most similar of `words`, or an empty text."""
    close = nearest(word, words)
    return f" (did you mean {close!r}?)" if close is not None else ""


def listing(faults: Sequence[str]) -> str:
    """One fault as it is; several as a count and one indented line each."""
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n" + "\n".join(f"  {f}" for f in faults)


def one_line(value: object, width: int = 160) -> str:
    """`value` as one line of printable text, at most `width` characters, safe in a message or a YAML comment."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * width]).split())
    return text if len(text) <= width else text[: width - 1] + "…"
