"""One contradiction of a design, and how its two places are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fwlora_lab.design.draft import RunDraft
from fwlora_lab.design.plan import DesignPlan
from fwlora_lab.design.prose import ProseNumber
from fwlora_lab.design.request import Place
from fwlora_lab.text import one_line

ContradictionKind = Literal[
    "K against steps", "left out", "method", "model size", "one split", "range", "rank against budget", "search space",
    "target modules", "two values", "unequal tuning", "unknown method",
    "unsupported",
]  # fmt: skip


@dataclass(frozen=True)
class Contradiction:
    """Two statements that cannot both hold.

    Args:
        kind: what sort of statements they are.
        text: what contradicts what.
        places: the two statements, each with its file and line.
    """

    kind: ContradictionKind
    text: str
    places: tuple[Place, Place]

    def __str__(self) -> str:
        return "\n".join([f"{self.kind}: {self.text}", *(f"    {place}" for place in self.places)])


def origin(plan: DesignPlan, draft: RunDraft, key: str) -> Place:
    """Where the value of a run's key comes from."""
    value = draft.values[key]
    if not value.source_location:
        return Place(f"{plan.request.source}: run {draft.run_id}: {key} = {value.value} ({value.note})")
    return plan.request.locate(value.source_location, value.value)


def locate_number(plan: DesignPlan, number: ProseNumber) -> Place:
    """Where the prose has a number, with the words around it."""
    return plan.request.locate(number.source_location, number.quote)


def task_name(draft: RunDraft) -> str:
    """The run's task: a subset of its source, or the source itself."""
    return str(draft.get("dataset.subset") or draft.get("dataset.name"))


def in_json(dimension: Mapping[str, Any]) -> str:
    """A search dimension in one line."""
    return one_line(json.dumps(dimension, ensure_ascii=False, default=str), 120)
