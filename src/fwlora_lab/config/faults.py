"""What can be wrong with a config: one `Issue` for each fault, and the error that carries them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

IssueKind = Literal["unknown_key", "missing", "type", "choice", "value"]


@dataclass(frozen=True)
class Issue:
    """One fault of a config.

    Args:
        key: dotted path of the key; "" for the whole file.
        text: what is wrong and what to do about it.
        kind: what callers decide by, where they treat faults differently.
        related: other keys that take part in the fault, of a combination that does not go together.
    """

    key: str
    text: str
    kind: IssueKind = "value"
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


class InvalidRun(ValueError):
    """A run config with faults; `issues` lists them all. pydantic asks that a validator's error is a ValueError."""

    def __init__(self, issues: Sequence[Issue]) -> None:
        super().__init__("; ".join(map(str, issues)))
        self.issues = list(issues)
