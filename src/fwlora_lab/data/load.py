"""From a dataset's name, folder or file to examples, batches and an official score.

The path of the data: `load_task` reads and splits, `tokenize` turns texts into one flat table,
`epoch_batches` and `collate` cut batches from it, `score` says how good the predictions are.
Texts are stripped at both ends: GLUE's own files disagree with each other about a trailing blank
(SST-2's dev.tsv has one in every row, train.tsv in none), and a byte-level tokenizer would see it.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from fwlora_lab.catalog.tasks import TaskSpec, source_of
from fwlora_lab.config.checks import check_dataset
from fwlora_lab.data.task import Examples, TaskData
from fwlora_lab.errors import UserError

if TYPE_CHECKING:
    from fwlora_lab.config.schema import DatasetConfig


def load_task(cfg: DatasetConfig) -> TaskData:
    """Read a dataset, carve the validation split from train, and subsample train.

    Both are drawn from `cfg.seed` alone: first `validation_fraction` of train (per class, for
    classification), then `train_examples` of what is left, in the file's order. The first n
    examples drawn are among the first m > n. dev is never touched.

    Raises UserError naming the file, the line and the column, and the cure.
    """
    check_dataset(cfg)
    data_source = source_of(cfg.name)
    assert data_source is not None  # the schema refuses other names
    return _split(*data_source.resolve_loader()(cfg), cfg)


def whole_dataset(cfg: DatasetConfig) -> DatasetConfig:
    """The config of the same examples with none of them carved out or left out.

    Configs that differ only in how they split or tokenize the same examples have the same whole.
    """
    unset = ("validation_fraction", "train_examples", "max_length", "padding", "truncation")
    return cfg.model_copy(update={key: type(cfg).model_fields[key].default for key in unset})


def split_task(whole: TaskData, cfg: DatasetConfig) -> TaskData:
    """What `load_task(cfg)` returns, from the data of `load_task(whole_dataset(cfg))` instead of from the files."""
    return _split(whole.spec, whole.train, whole.dev, whole.source, cfg)


def _split(spec: TaskSpec, train: Examples, dev: Examples, source: str, cfg: DatasetConfig) -> TaskData:
    train, validation = _carve(spec, train, cfg)
    train = _subsample(train, cfg)
    if spec.kind == "classification" and len(set(train.labels.tolist())) < 2:
        name = spec.labels[int(train.labels[0])]
        raise UserError(
            f"{source}: all {len(train)} training examples have the label {name!r}, so there is "
            "nothing to learn; use data with two classes or more, or leave more of it for training "
            "(dataset.train_examples, dataset.validation_fraction)"
        )
    digest = _fingerprint(spec, {"train": train, "selection": validation, "dev": dev})
    return TaskData(spec, train, validation, dev, digest, source)


def _carve(spec: TaskSpec, train: Examples, cfg: DatasetConfig) -> tuple[Examples, Examples]:
    """(rest of train, validation), both in the file's order."""
    n = len(train)
    wanted = round(cfg.validation_fraction * n)
    if cfg.validation_fraction == 0:
        return train, train.take(np.arange(0))
    if not 0 < wanted < n:
        raise UserError(
            f"dataset.validation_fraction: {cfg.validation_fraction} of {n} training examples leaves "
            f"{wanted} for validation and {n - wanted} for training; choose one that leaves both, "
            "or 0 for no validation split"
        )
    order = np.random.Generator(np.random.PCG64([cfg.seed, 0])).permutation(n)
    if spec.kind == "regression":
        chosen = order[:wanted]
    else:
        # Largest remainders: every class keeps its share and the shares add up to `wanted`.
        labels = train.labels[order]
        exact = np.bincount(labels, minlength=len(spec.labels)) * (wanted / n)
        share = np.floor(exact).astype(np.int64)
        rest = np.argsort(share - exact, kind="stable")[: wanted - int(share.sum())]
        share[rest] += 1
        chosen = np.concatenate([order[labels == c][:k] for c, k in enumerate(share)])
    mask = np.zeros(n, dtype=bool)
    mask[chosen] = True
    return train.take(np.flatnonzero(~mask)), train.take(np.flatnonzero(mask))


def _subsample(train: Examples, cfg: DatasetConfig) -> Examples:
    if cfg.train_examples is None:
        return train
    if not 0 < cfg.train_examples <= len(train):
        raise UserError(
            f"dataset.train_examples: {cfg.train_examples} asked for, but train holds {len(train)} "
            "(after the validation split); ask for fewer, or null for all of them"
        )
    order = np.random.Generator(np.random.PCG64([cfg.seed, 1])).permutation(len(train))
    return train.take(np.sort(order[: cfg.train_examples]))


def _fingerprint(spec: TaskSpec, splits: dict[str, Examples]) -> str:
    digest = hashlib.sha256(json.dumps([spec.name, spec.kind, spec.labels]).encode())
    for name, part in splits.items():
        digest.update(json.dumps([name, part.texts, part.labels.tolist()]).encode())
    return digest.hexdigest()
