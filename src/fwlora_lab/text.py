"""Words in messages: suggestions for misspelt names, lists of faults, texts cut to one line or freed of secrets."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence

HIDDEN = "***"  # in place of a secret
# user:PASSWORD@ of a URL, also of one with too few slashes; greedy, because a password may contain an @ itself.
_IN_URL = re.compile(r"(\w:/{1,3}[^\s/:@]*:)(\S+)(?=@)")
_IN_QUERY = re.compile(r"(?i)((?:password|passwd|pwd|passphrase|secret|token|api_?key)=)([^&\s'\"]+)")
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{8,}")
_SECRET_VARIABLE = re.compile(r"(?i)token|password|passwd|secret|api_?key")
_SHORTEST_SECRET = 6  # a shorter value of such a variable may stand in any text by chance

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


def without_secrets(text: str) -> str:
    """The text with `***` for passwords in URLs and parameters, for tokens, and for secrets of the environment."""
    text = _IN_URL.sub(rf"\g<1>{HIDDEN}", text)
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = _TOKEN.sub(rf"\g<1>{HIDDEN}", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return text


def one_line(value: object, width: int = 160) -> str:
    """`value` as one line of printable text, at most `width` characters, safe in a message or a YAML comment."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * width]).split())
    return text if len(text) <= width else text[: width - 1] + "…"
