"""Loads the built-in offline task, which needs no network and no files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fwlora_lab.catalog.tasks import OFFLINE, TaskSpec
from fwlora_lab.data.offline import sentences
from fwlora_lab.data.task import Examples

if TYPE_CHECKING:
    from fwlora_lab.config.schema import DatasetConfig

OFFLINE_TRAIN, OFFLINE_DEV = 1200, 400


def load_offline(cfg: DatasetConfig) -> tuple[TaskSpec, Examples, Examples, str]:
    rows = sentences.sentences(cfg.seed, OFFLINE_TRAIN + OFFLINE_DEV)
    both = Examples(tuple(text for text, _ in rows), np.array([label for _, label in rows], dtype=np.int64))
    train, dev = np.split(np.arange(len(both)), [OFFLINE_TRAIN])
    source = f"offline grammar (synthetic sentences), seed {cfg.seed}"
    return OFFLINE.spec, both.take(train), both.take(dev), source
