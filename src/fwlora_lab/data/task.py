"""A task's data: texts with labels, in three splits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fwlora_lab.catalog.tasks import TaskSpec

Text = str | tuple[str, str]


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts (or pairs of texts) and their labels: int64 class indices, or float32 numbers for regression."""

    texts: tuple[Text, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: np.ndarray) -> Examples:
        """The examples at the positions in `index`."""
        return Examples(tuple(self.texts[i] for i in index), self.labels[index])


def repetitions(train: Examples, evaluation: Examples) -> tuple[int, int]:
    """How many training examples repeat an earlier one's text, and how many evaluation examples a training text."""
    texts = set(train.texts)
    return len(train) - len(texts), sum(text in texts for text in evaluation.texts)


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task with its three disjoint splits.

    Attributes:
        validation: a part of the training data that is held out for tuning.
        dev: the data's own evaluation split, for reported scores only.
        fingerprint: sha256 of every text and label, in order, with the split that it belongs to.
        source: where the data are from, in words.
    """

    spec: TaskSpec
    train: Examples
    validation: Examples
    dev: Examples
    fingerprint: str
    source: str
