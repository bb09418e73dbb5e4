"""Seeds: those that a command names, and one for each use of randomness in a run."""

from __future__ import annotations

import hashlib
import re

from fwlora_lab.errors import UserError

MAX_SEEDS = 1_000


def parse_seeds(text: str) -> list[int]:
    """The seeds in `0..2` (0, 1 and 2), `1,5,7` or `0..9,42`.

    Raises:
        UserError: anything else, a seed given twice, or more than MAX_SEEDS.
    """
    cure = "write seeds=0..4, seeds=1,5,7 or seeds=0..9,42"
    seeds: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})\s*(?:\.\.\s*([0-9]{1,10})\s*)?", part, re.ASCII)
        if match is None:
            raise UserError(f"seeds={text}: {part.strip()!r} is neither a seed nor a range: {cure}")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise UserError(f"seeds={text}: {part.strip()} runs backwards: write {last}..{first}")
        if last >= 2**32:
            raise UserError(f"seeds={text}: seeds are below 2**32")
        if len(seeds) + last - first + 1 > MAX_SEEDS:
            raise UserError(f"seeds={text}: more than {MAX_SEEDS:,} seeds: {cure}")
        seeds += range(first, last + 1)
    twice = sorted({s for s in seeds if seeds.count(s) > 1})
    if twice:
        raise UserError(f"seeds={text}: seed {twice[0]} is given twice: name each seed once")
    return seeds


def derive(seed: int, purpose: str) -> int:
    """A seed below 2**56 for one use of randomness in a run, so that one use never changes the draws of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")
