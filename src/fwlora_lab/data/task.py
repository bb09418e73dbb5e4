"""TODO"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fwlora_lab.catalog.tasks import TaskSpec

Text = str | tuple[str, str]


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
