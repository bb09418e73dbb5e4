"""Loads GLUE's tasks, from the Hugging Face hub or from the folder layout of GLUE's own download."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fwlora_lab.catalog.tasks import GLUE, GLUE_REPOSITORY, GLUE_REVISION, GlueTask, TaskSpec
from fwlora_lab.data.task import Examples, Text
from fwlora_lab.data.text_files import column_of, read_text, refuse, refuse_file
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean

if TYPE_CHECKING:
    from fwlora_lab.config.schema import DatasetConfig


def load_glue(cfg: DatasetConfig) -> tuple[TaskSpec, Examples, Examples, str]:
    """Read a GLUE task from `cfg.root`, the folder of GLUE's download, or from the hub if that is not set.

    Raises:
        UserError: the folder or a file is not as GLUE's download has it, or the hub cannot be reached.
    """
    task = GLUE[cfg.subset or ""]
    splits = (cfg.split, _hub_split(task, cfg.eval_split))
    if cfg.root is None:
        train, dev = _from_hub(task, splits, cfg.revision)
        source = f"{GLUE_REPOSITORY} {task.spec.name} at {cfg.revision or GLUE_REVISION} (hub)"
        return task.spec, train, dev, source
    folder = _glue_folder(task, cfg.root)
    train, dev = (_read_tsv(task, folder / f"{s.replace('validation', 'dev')}.tsv") for s in splits)
    return task.spec, train, dev, f"GLUE {task.spec.name} from folder {folder}"


def _hub_split(task: GlueTask, name: str) -> str:
    """The hub's name of a labelled split; MNLI's plain `validation` is the matched one."""
    return "validation_matched" if task.name == "mnli" and name == "validation" else name


def _glue_folder(task: GlueTask, root: str) -> Path:
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"dataset.root: {root} is not a folder; give the one that holds {task.folder}/")
    folder = base / task.folder
    if not folder.is_dir():
        inside = sorted(p.name for p in base.iterdir())
        if "train.tsv" in inside:
            cure = f"give the folder above it, and call this one {task.folder}"
        else:
            cure = f"it holds {', '.join(inside[:8]) or 'nothing'}{did_you_mean(task.folder, inside)}"
        raise UserError(f"dataset.root: {root} has no folder {task.folder}/; {cure}")
    return folder


def _read_tsv(task: GlueTask, path: Path) -> Examples:
    """Read one of GLUE's tab-separated files. They have no quoting, so a row is a line split at its tabs."""
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    first = 1
    if task.header is None:
        first, header = 2, tuple(lines.pop(0).rstrip("\r").split("\t")) if lines else ()
    else:
        header = task.header
    if not lines:
        refuse_file(path, "there is no example in it")
    columns = [column_of(path, header, name) for name in (*task.text, task.label)]
    numbers = {value: i for i, value in enumerate(task.values)}
    texts: list[Text] = []
    labels: list[float] = []
    for number, line in enumerate(lines, first):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            if task.ragged:
                continue
            refuse(
                path,
                number,
                None,
                f"{len(cells)} tab-separated columns instead of {len(header)} "
                f"({', '.join(header)}); restore the file from GLUE's download",
            )
        *fields, label = (cells[c].strip() for c in columns)
        for name, field in zip(task.text, fields, strict=True):
            if not field and not task.ragged:
                refuse(path, number, name, "the text is empty; fill it or drop the line")
        texts.append(fields[0] if len(fields) == 1 else (fields[0], fields[1]))
        if task.spec.kind == "regression":
            labels.append(_target(path, number, task.label, label))
        elif label in numbers:
            labels.append(numbers[label])
        else:
            allowed = ", ".join(task.values)
            refuse(path, number, task.label, f"the label is {label!r}; it must be one of {allowed}")
    if not texts:
        refuse_file(path, f"no row has the {len(header)} columns that its header names")
    return Examples(tuple(texts), _label_array(task.spec, labels))


def _target(path: Path, number: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 5:
        refuse(path, number, column, f"the score is {cell!r}; it must be a number from 0 to 5")
    return value


def _label_array(spec: TaskSpec, labels: Sequence[float]) -> np.ndarray:
    return np.array(labels, dtype=np.float32 if spec.kind == "regression" else np.int64)


def _from_hub(task: GlueTask, splits: tuple[str, str], revision: str | None) -> tuple[Examples, Examples]:
    commit = revision or GLUE_REVISION
    try:
        # Imported here because it is slow to import and nothing else needs it.
        from datasets import load_dataset

        parts = load_dataset(GLUE_REPOSITORY, task.spec.name, revision=commit, split=list(splits))
        tables: list[Any] = [part[:] for part in parts]
        train, dev = (_hub_examples(task, table) for table in tables)
    # The libraries raise dozens of unrelated types for "no network", "no such commit", "offline mode" and "broken
    # download", and what the user can do is the same for all of them.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(
            f"{GLUE_REPOSITORY} ({task.spec.name}, commit {commit}) could not be loaded from the "
            f"Hugging Face hub: {type(error).__name__}: {reason}\n"
            "Check the network and dataset.revision; or download GLUE and set dataset.root=<folder "
            f"that holds {task.folder}/>; or use the built-in task with dataset.name=offline."
        ) from error
    return train, dev


def _hub_examples(task: GlueTask, table: dict[str, list]) -> Examples:
    labels = table["label"]
    if task.spec.kind == "classification" and not set(labels) <= set(range(len(task.spec.labels))):
        raise ValueError(f"labels {sorted(set(labels))} are not indices of {task.spec.labels}")
    fields = [[text.strip() for text in table[column]] for column in task.hub_text]
    texts = fields[0] if len(fields) == 1 else zip(*fields, strict=True)
    return Examples(tuple(texts), _label_array(task.spec, labels))
