"""TODO"""

from __future__ import annotations

from typing import NamedTuple


class Issue(NamedTuple):
    """One fault: where (key path, "" for the whole file) and what, ending in the cure."""

    key: str
    text: str


class Faults(ValueError):
    """Several faults found by one validator."""

    def __init__(self, issues: list[Issue]) -> None:
        super().__init__("; ".join(f"{i.key}: {i.text}" for i in issues))
        self.issues = issues
