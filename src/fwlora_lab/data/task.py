"""TODO"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Text = str | tuple[str, str]


@dataclass(frozen=True)
class TaskSpec:
    """What is to be learnt, and by which metrics it is judged; the primary one comes first."""

    name: str
    kind: Literal["classification", "regression"]
    labels: tuple[str, ...]
    text_fields: Literal[1, 2]
    metrics: tuple[str, ...]
    primary: str


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts (or pairs of texts) and labels: int64 class indices, or float32 targets."""

    texts: tuple[Text, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: np.ndarray) -> Examples:
        return Examples(tuple(self.texts[i] for i in index), self.labels[index])


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task with its three disjoint splits.

    `validation` is for tuning, `dev` only for reporting. `fingerprint` is the sha256 of every text
    and label, in order, with the split it belongs to; `source` says to a human where they are from.
    """

    spec: TaskSpec
    train: Examples
    validation: Examples
    dev: Examples
    fingerprint: str
    source: str
