"""The tasks: what is learnt, how it is scored, where the data come from, and how designs name them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fwlora_lab.catalog.extensions import load_extensions


@dataclass(frozen=True)
class TaskSpec:
    """What is to be learnt, and by which metrics it is judged.

    Args:
        name: a short name, which results show.
        kind: classification, or regression of one number.
        labels: names of the classes in the order of their indices; empty for regression.
        text_fields: 1 for single texts, 2 for pairs.
        metrics: names in data/metrics.py.
        primary: the metric that comparisons and searches use; one of `metrics`.
    """

    name: str
    kind: Literal["classification", "regression"]
    labels: tuple[str, ...]
    text_fields: Literal[1, 2]
    metrics: tuple[str, ...]
    primary: str


# Reads the data of a run: it is given the run config's `dataset` block (config.schema.DatasetConfig) and returns the
# task, the training examples, the evaluation examples (both data.task.Examples), and a sentence on where they are from.
Loader = Callable[[Any], tuple[TaskSpec, Any, Any, str]]


@dataclass(frozen=True)
class DataSource:
    """Where data come from: a value of dataset.name in a run config.

    Args:
        name: the value.
        loader: a function, or its place, "package.module:function", so that the catalog imports no data code.
        keys: those keys of the `dataset` block that not every source reads.
    """

    name: str
    loader: Loader | str
    keys: tuple[str, ...] = ("split", "eval_split")

    def resolve_loader(self) -> Loader:
        """The loader itself; its module is imported where only its place is known."""
        if not isinstance(self.loader, str):
            return self.loader
        module, _, function = self.loader.partition(":")
        return getattr(importlib.import_module(module), function)


@dataclass(frozen=True)
class TaskInfo:
    """A task that run configs and designs know by its name.

    Args:
        source: where its data come from. A source of several tasks reads dataset.subset, which names the task.
        train_examples: number of training examples, where it is known before the data are read.
        eval_splits: values of dataset.eval_split whose labels are public; the first is the default.
        prose_pattern: regular expression of the task's name in a design's text.
    """

    spec: TaskSpec
    source: DataSource
    train_examples: int | None = None
    eval_splits: tuple[str, ...] = ("validation",)
    prose_pattern: str | None = None

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class GlueTask(TaskInfo):
    """A task of GLUE, with its columns on the hub and the layout of its files in GLUE's own download.

    Args:
        hub_text: columns of the texts on the hub.
        folder: the task's folder in the download.
        text: columns of the texts in the files; `label` is the column of the label.
        values: how the files write the labels, in the order of `spec.labels`.
        header: names for the columns of a file without a header.
        ragged: QQP's files hold questions cut by a line break; such rows are skipped.
    """

    train_examples: int = 0
    prose_pattern: str = ""
    hub_text: tuple[str, ...] = ()
    folder: str = ""
    text: tuple[str, ...] = ()
    label: str = "label"
    values: tuple[str, ...] = ("0", "1")
    header: tuple[str, ...] | None = None
    ragged: bool = False


GLUE_REPOSITORY = "nyu-mll/glue"  # on the Hugging Face hub
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"

FILE_METRICS = ("accuracy", "matthews_correlation")  # of CSV and JSONL files; the first is the primary one
_FILE_SOURCES = ("csv", "jsonl")
_FILES = "fwlora_lab.data.csv_jsonl:load_files"
_FILE_KEYS = ("train_file", "eval_file", "text_column", "label_column")
_GLUE = DataSource("glue", "fwlora_lab.data.glue:load_glue", ("subset", "root", "revision", "split", "eval_split"))
_OFFLINE = DataSource("offline", "fwlora_lab.data.offline.task:load_offline")

SOURCES: dict[str, DataSource] = {
    "glue": _GLUE,
    "offline": _OFFLINE,
    "csv": DataSource("csv", _FILES, _FILE_KEYS),
    "jsonl": DataSource("jsonl", _FILES, _FILE_KEYS),
}
TASKS: dict[str, TaskInfo] = {}


def register_task(task: TaskInfo) -> TaskInfo:
    """Make a task, and its source if that is new, known to run configs and designs.

    A module that calls this for a task of its own is named in the environment variable FWLORA_EXTENSIONS.

    Raises:
        ValueError: the name is taken or is not made of letters, digits, "-" and "_".
    """
    name, source = task.name, task.source
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"task {name!r}: a name is made of letters, digits, '-' and '_'")
    if name in TASKS:
        raise ValueError(f"task {name!r} is already registered: choose another name")
    if SOURCES.get(source.name, source) != source:
        raise ValueError(f"task {name!r}: its source {source.name!r} is already registered with another loader")
    if "subset" not in source.keys and source.name != name:
        raise ValueError(f"task {name!r}: a source of one task has the task's name, not {source.name!r}")
    SOURCES[source.name] = source
    TASKS[name] = task
    return task


def source_of(name: str) -> DataSource | None:
    """The source that dataset.name means, extensions included; None for a name that is not known."""
    load_extensions()
    return SOURCES.get(name)


def tasks_of(source: DataSource) -> dict[str, TaskInfo]:
    """The tasks of a source, by name."""
    return {name: task for name, task in TASKS.items() if task.source == source}


def metrics_of(source: str, subset: str | None) -> tuple[str, ...]:
    """The metrics of the task that dataset.name and dataset.subset mean; () if only reading its data tells."""
    load_extensions()
    if source in _FILE_SOURCES:
        return FILE_METRICS
    task = TASKS.get(subset or source)
    return () if task is None else task.spec.metrics


def _glue(
    name: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    train_examples: int,
    prose_pattern: str,
    folder: str,
    hub_text: tuple[str, ...],
    *,
    text: tuple[str, ...] = (),
    label: str = "label",
    values: tuple[str, ...] = ("0", "1"),
    header: tuple[str, ...] | None = None,
    ragged: bool = False,
    eval_splits: tuple[str, ...] = ("validation",),
) -> GlueTask:
    spec = TaskSpec(
        name=name,
        kind="classification" if labels else "regression",
        labels=labels,
        text_fields=1 if len(hub_text) == 1 else 2,
        metrics=metrics,
        primary=metrics[0],
    )
    return GlueTask(
        spec, _GLUE, train_examples, eval_splits, prose_pattern,
        hub_text, folder, text or hub_text, label, values, header, ragged,
    )  # fmt: skip


_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_F1 = ("f1", "accuracy")
_ACCURACY = ("accuracy",)
GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        _glue("sst2", ("negative", "positive"), _ACCURACY, 67_349, r"\bSST-?2\b", "SST-2", ("sentence",)),
        _glue(
            "cola", ("unacceptable", "acceptable"), ("matthews_correlation",), 8_551, r"\bCoLA\b", "CoLA",
            ("sentence",), header=("source", "label", "mark", "sentence"),
        ),
        _glue(
            "mrpc", ("not_equivalent", "equivalent"), _F1, 3_668, r"\bMRPC\b", "MRPC", _PAIR,
            text=("#1 String", "#2 String"), label="Quality",
        ),
        _glue(
            "qqp", ("not_duplicate", "duplicate"), _F1, 363_846, r"\bQQP\b", "QQP", ("question1", "question2"),
            label="is_duplicate", ragged=True,
        ),
        _glue(
            "stsb", (), ("pearson", "spearmanr"), 5_749, r"\bSTS-?B\b", "STS-B", _PAIR, label="score", values=(),
        ),
        _glue(
            "mnli", _NLI, _ACCURACY, 392_702, r"\bMNLI\b", "MNLI", ("premise", "hypothesis"),
            text=_PAIR, label="gold_label", values=_NLI,
            eval_splits=("validation", "validation_matched", "validation_mismatched"),
        ),
        _glue(
            "qnli", _ENTAILMENT, _ACCURACY, 104_743, r"\bQNLI\b", "QNLI", ("question", "sentence"), values=_ENTAILMENT,
        ),
        _glue("rte", _ENTAILMENT, _ACCURACY, 2_490, r"\bRTE\b", "RTE", _PAIR, values=_ENTAILMENT),
        _glue("wnli", ("not_entailment", "entailment"), _ACCURACY, 635, r"\bWNLI\b", "WNLI", _PAIR),
    )
}  # fmt: skip
for _task in GLUE.values():
    register_task(_task)
OFFLINE = register_task(
    TaskInfo(
        TaskSpec(
            name="offline",
            kind="classification",
            labels=("broken", "acceptable"),
            text_fields=1,
            metrics=("matthews_correlation", "accuracy"),
            primary="matthews_correlation",
        ),
        _OFFLINE,
    )
)
