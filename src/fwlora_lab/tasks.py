"""From a dataset's name, folder or file to examples, batches and an official score.

The path of the data: `load_task` reads and splits, `tokenize` turns texts into one flat table,
`epoch_batches` and `collate` cut batches from it, `score` says how good the predictions are.
Texts are stripped at both ends: GLUE's own files disagree with each other about a trailing blank
(SST-2's dev.tsv has one in every row, train.tsv in none), and a byte-level tokenizer would see it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import numpy as np
import torch

from fwlora_lab import offline
from fwlora_lab.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fwlora_lab.runconfig import DatasetConfig

Text = str | tuple[str, str]

GLUE_REPOSITORY = "nyu-mll/glue"
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
OFFLINE_TRAIN, OFFLINE_DEV = 1200, 400
_CHUNK = 2000  # examples that are tokenized at once


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

    `selection` is for tuning, `dev` only for reporting. `fingerprint` is the sha256 of every text
    and label, in order, with the split it belongs to; `source` says to a human where they are from.
    """

    spec: TaskSpec
    train: Examples
    selection: Examples
    dev: Examples
    fingerprint: str
    source: str


# --- GLUE's tasks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Glue:
    """One GLUE task: its spec, its columns on the hub, and its file layout in GLUE's download."""

    spec: TaskSpec
    hub_text: tuple[str, ...]
    folder: str
    text: tuple[str, ...]
    label: str
    values: tuple[str, ...] = ("0", "1")  # how the files write the labels, in the spec's order
    header: tuple[str, ...] | None = None  # names for the columns of a file without a header
    ragged: bool = False  # QQP's files hold questions torn by a line break: such rows are skipped


def _glue(
    name: str,
    labels: Sequence[str],
    metrics: Sequence[str],
    folder: str,
    hub_text: Sequence[str],
    *,
    text: Sequence[str] = (),
    label: str = "label",
    **layout: Any,
) -> _Glue:
    spec = TaskSpec(
        name=name,
        kind="classification" if labels else "regression",
        labels=tuple(labels),
        text_fields=1 if len(hub_text) == 1 else 2,
        metrics=tuple(metrics),
        primary=metrics[0],
    )
    return _Glue(spec, tuple(hub_text), folder, tuple(text or hub_text), label, **layout)


_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")

GLUE: dict[str, _Glue] = {
    task.spec.name: task
    for task in (
        _glue("sst2", ("negative", "positive"), ("accuracy",), "SST-2", ("sentence",)),
        _glue(
            "cola",
            ("unacceptable", "acceptable"),
            ("matthews_correlation",),
            "CoLA",
            ("sentence",),
            header=("source", "label", "mark", "sentence"),
        ),
        _glue(
            "mrpc",
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
            "MRPC",
            _PAIR,
            text=("#1 String", "#2 String"),
            label="Quality",
        ),
        _glue(
            "qqp",
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            "QQP",
            ("question1", "question2"),
            label="is_duplicate",
            ragged=True,
        ),
        _glue("stsb", (), ("pearson", "spearmanr"), "STS-B", _PAIR, label="score", values=()),
        _glue(
            "mnli",
            _NLI,
            ("accuracy",),
            "MNLI",
            ("premise", "hypothesis"),
            text=_PAIR,
            label="gold_label",
            values=_NLI,
        ),
        _glue("qnli", _ENTAILMENT, ("accuracy",), "QNLI", ("question", "sentence"), values=_ENTAILMENT),
        _glue("rte", _ENTAILMENT, ("accuracy",), "RTE", _PAIR, values=_ENTAILMENT),
        _glue("wnli", ("not_entailment", "entailment"), ("accuracy",), "WNLI", _PAIR),
    )
}

_OFFLINE = TaskSpec(
    name="offline",
    kind="classification",
    labels=("broken", "acceptable"),
    text_fields=1,
    metrics=("matthews_correlation", "accuracy"),
    primary="matthews_correlation",
)


# --- loading ------------------------------------------------------------------------------------


def load_task(cfg: DatasetConfig) -> TaskData:
    """Read a dataset, carve the selection split from train, and subsample train.

    Both are drawn from `cfg.seed` alone: first `selection_fraction` of train (per class, for
    classification), then `train_examples` of what is left, in the file's order. The first n
    examples drawn are among the first m > n. dev is never touched.

    Raises UserError naming the file, the line and the column, and the cure.
    """
    if cfg.name == "glue":
        spec, train, dev, source = _load_glue(cfg)
    elif cfg.name == "offline":
        spec, train, dev, source = _load_offline(cfg)
    else:
        spec, train, dev, source = _load_files(cfg)
    train, selection = _carve(spec, train, cfg)
    train = _subsample(train, cfg)
    if spec.kind == "classification" and len(set(train.labels.tolist())) < 2:
        name = spec.labels[int(train.labels[0])]
        raise UserError(
            f"{source}: all {len(train)} training examples have the label {name!r}, so there is "
            "nothing to learn; use data with two classes or more, or leave more of it for training "
            "(dataset.train_examples, dataset.selection_fraction)"
        )
    digest = _fingerprint(spec, {"train": train, "selection": selection, "dev": dev})
    return TaskData(spec, train, selection, dev, digest, source)


def _carve(spec: TaskSpec, train: Examples, cfg: DatasetConfig) -> tuple[Examples, Examples]:
    """(rest of train, selection), both in the file's order."""
    n = len(train)
    wanted = round(cfg.selection_fraction * n)
    if cfg.selection_fraction == 0:
        return train, train.take(np.arange(0))
    if not 0 < wanted < n:
        raise UserError(
            f"dataset.selection_fraction: {cfg.selection_fraction} of {n} training examples leaves "
            f"{wanted} for selection and {n - wanted} for training; choose one that leaves both, "
            "or 0 for no selection split"
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
            "(after the selection split); ask for fewer, or null for all of them"
        )
    order = np.random.Generator(np.random.PCG64([cfg.seed, 1])).permutation(len(train))
    return train.take(np.sort(order[: cfg.train_examples]))


def _fingerprint(spec: TaskSpec, splits: dict[str, Examples]) -> str:
    digest = hashlib.sha256(json.dumps([spec.name, spec.kind, spec.labels]).encode())
    for name, part in splits.items():
        digest.update(json.dumps([name, part.texts, part.labels.tolist()]).encode())
    return digest.hexdigest()


def _load_offline(cfg: DatasetConfig) -> tuple[TaskSpec, Examples, Examples, str]:
    if (cfg.split, cfg.eval_split) != ("train", "validation"):
        raise UserError(
            "dataset.split, dataset.eval_split: the offline task has 'train' and 'validation' in "
            f"these roles, not {cfg.split!r} and {cfg.eval_split!r}"
        )
    rows = offline.sentences(cfg.seed, OFFLINE_TRAIN + OFFLINE_DEV)
    both = Examples(tuple(text for text, _ in rows), np.array([label for _, label in rows], dtype=np.int64))
    train, dev = np.split(np.arange(len(both)), [OFFLINE_TRAIN])
    source = f"offline grammar (synthetic sentences), seed {cfg.seed}"
    return _OFFLINE, both.take(train), both.take(dev), source


# --- GLUE: a folder or the hub ------------------------------------------------------------------


def _load_glue(cfg: DatasetConfig) -> tuple[TaskSpec, Examples, Examples, str]:
    task = GLUE.get(cfg.subset or "")
    if task is None:
        raise UserError(
            f"dataset.subset: GLUE has no task {cfg.subset!r}{_hint(cfg.subset or '', GLUE)}; it has {', '.join(GLUE)}"
        )
    splits = (
        _glue_split(task, "split", cfg.split),
        _glue_split(task, "eval_split", cfg.eval_split),
    )
    if cfg.root is None:
        train, dev = _from_hub(task, splits, cfg.revision)
        source = f"{GLUE_REPOSITORY} {task.spec.name} at {cfg.revision or GLUE_REVISION} (hub)"
        return task.spec, train, dev, source
    folder = _glue_folder(task, cfg.root)
    train, dev = (_read_tsv(task, folder / f"{s.replace('validation', 'dev')}.tsv") for s in splits)
    return task.spec, train, dev, f"GLUE {task.spec.name} from folder {folder}"


def _glue_split(task: _Glue, key: str, name: str) -> str:
    """The hub's name of a labelled split; MNLI's plain `validation` is the matched one."""
    mnli = task.spec.name == "mnli"
    known = [
        "train",
        *(["validation_matched", "validation_mismatched"] if mnli else ["validation"]),
    ]
    if mnli and name == "validation":
        return "validation_matched"
    if name not in known:
        why = "has no public labels" if name.startswith("test") else "does not exist"
        raise UserError(
            f"dataset.{key}: {task.spec.name}'s split {name!r} {why}{_hint(name, known)}; "
            f"choose one of {', '.join(known)}"
        )
    return name


def _glue_folder(task: _Glue, root: str) -> Path:
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"dataset.root: {root} is not a folder; give the one that holds {task.folder}/")
    folder = base / task.folder
    if not folder.is_dir():
        inside = sorted(p.name for p in base.iterdir())
        if "train.tsv" in inside:
            cure = f"give the folder above it, and call this one {task.folder}"
        else:
            cure = f"it holds {', '.join(inside[:8]) or 'nothing'}{_hint(task.folder, inside)}"
        raise UserError(f"dataset.root: {root} has no folder {task.folder}/; {cure}")
    return folder


def _read_tsv(task: _Glue, path: Path) -> Examples:
    """GLUE's tab-separated files quote nothing, so a row is a line cut at its tabs."""
    lines = _read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    first = 1
    if task.header is None:
        first, header = 2, tuple(lines.pop(0).rstrip("\r").split("\t")) if lines else ()
    else:
        header = task.header
    if not lines:
        _refuse_file(path, "there is no example in it")
    columns = [_column(path, header, name) for name in (*task.text, task.label)]
    numbers = {value: i for i, value in enumerate(task.values)}
    texts: list[Text] = []
    labels: list[float] = []
    for number, line in enumerate(lines, first):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            if task.ragged:
                continue
            _refuse(
                path,
                number,
                None,
                f"{len(cells)} tab-separated columns instead of {len(header)} "
                f"({', '.join(header)}); restore the file from GLUE's download",
            )
        *fields, label = (cells[c].strip() for c in columns)
        for name, field in zip(task.text, fields, strict=True):
            if not field and not task.ragged:
                _refuse(path, number, name, "the text is empty; fill it or drop the line")
        texts.append(fields[0] if len(fields) == 1 else (fields[0], fields[1]))
        if task.spec.kind == "regression":
            labels.append(_target(path, number, task.label, label))
        elif label in numbers:
            labels.append(numbers[label])
        else:
            allowed = ", ".join(task.values)
            _refuse(path, number, task.label, f"the label is {label!r}; it must be one of {allowed}")
    if not texts:
        _refuse_file(path, f"no row has the {len(header)} columns that its header names")
    return Examples(tuple(texts), _label_array(task.spec, labels))


def _target(path: Path, number: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 5:
        _refuse(path, number, column, f"the score is {cell!r}; it must be a number from 0 to 5")
    return value


def _label_array(spec: TaskSpec, labels: Sequence[float]) -> np.ndarray:
    return np.array(labels, dtype=np.float32 if spec.kind == "regression" else np.int64)


def _from_hub(task: _Glue, splits: tuple[str, str], revision: str | None) -> tuple[Examples, Examples]:
    commit = revision or GLUE_REVISION
    try:
        # Imported here: it is slow to import and only this path needs it.
        from datasets import load_dataset

        parts = load_dataset(GLUE_REPOSITORY, task.spec.name, revision=commit, split=list(splits))
        tables: list[Any] = [part[:] for part in parts]
        train, dev = (_hub_examples(task, table) for table in tables)
    # The libraries below raise dozens of unrelated types for "no network", "no such commit",
    # "offline mode" and "broken download"; to the user all of them have the same cures.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(
            f"{GLUE_REPOSITORY} ({task.spec.name}, commit {commit}) could not be loaded from the "
            f"Hugging Face hub: {type(error).__name__}: {reason}\n"
            "Check the network and dataset.revision; or download GLUE and set dataset.root=<folder "
            f"that holds {task.folder}/>; or use the built-in task with dataset.name=offline."
        ) from error
    return train, dev


def _hub_examples(task: _Glue, table: dict[str, list]) -> Examples:
    labels = table["label"]
    if task.spec.kind == "classification" and not set(labels) <= set(range(len(task.spec.labels))):
        raise ValueError(f"labels {sorted(set(labels))} are not indices of {task.spec.labels}")
    fields = [[text.strip() for text in table[column]] for column in task.hub_text]
    texts = fields[0] if len(fields) == 1 else zip(*fields, strict=True)
    return Examples(tuple(texts), _label_array(task.spec, labels))


# --- CSV and JSONL ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    number: int  # the line on which it ends, counted from 1
    texts: tuple[str, ...]
    label: str | int


def _load_files(cfg: DatasetConfig) -> tuple[TaskSpec, Examples, Examples, str]:
    for key in ("train_file", "eval_file", "text_column", "label_column"):
        if not getattr(cfg, key):
            raise UserError(f"dataset.{key}: a {cfg.name} dataset needs it, and it is not set")
    text = (cfg.text_column,) if isinstance(cfg.text_column, str) else tuple(cfg.text_column or ())
    label = str(cfg.label_column)
    if len(text) > 2 or len({*text, label}) != len(text) + 1:
        raise UserError(
            "dataset.text_column, dataset.label_column: give one or two text columns and another "
            f"one for the label, not {', '.join(text)} and {label}"
        )
    paths = [Path(str(name)).expanduser() for name in (cfg.train_file, cfg.eval_file)]
    read = _read_csv if cfg.name == "csv" else _read_jsonl
    rows = [read(path, text, label) for path in paths]
    if paths[0].samefile(paths[1]):
        raise UserError(
            f"dataset.train_file, dataset.eval_file: both are {paths[0]}, so the model would be "
            "judged on what it was trained on; split the file in two"
        )
    classes = _classes(paths[0], rows[0], label)
    spec = TaskSpec(
        name=paths[0].stem,
        kind="classification",
        labels=tuple(str(c) for c in classes),
        text_fields=1 if len(text) == 1 else 2,
        metrics=("accuracy", "matthews_correlation"),
        primary="accuracy",
    )
    numbers = {value: i for i, value in enumerate(classes)}
    train, dev = (_examples(path, part, label, numbers) for path, part in zip(paths, rows, strict=True))
    return spec, train, dev, f"{cfg.name} files {paths[0]} and {paths[1]}"


def _classes(path: Path, rows: list[_Row], column: str) -> list[str | int]:
    """The distinct labels of train, in numerical order if all are whole numbers, else sorted."""
    count = Counter(row.label for row in rows)
    if len({type(label) for label in count}) > 1:
        odd = min((type(row.label).__name__, row.number) for row in rows)[1]
        _refuse(path, odd, column, "some labels are strings and some are numbers; write one kind")
    if len(count) == 1:
        only = next(iter(count))
        _refuse_file(
            path,
            f"all {len(rows)} labels in column {column!r} are {only!r}, so there is nothing to "
            "learn; use data with two classes or more",
        )
    if len(count) > max(20, len(rows) // 2):
        _refuse_file(
            path,
            f"column {column!r} holds {len(count)} different labels in {len(rows)} rows, which is "
            "no classification task; check dataset.label_column",
        )
    labels = sorted(count, key=str)
    whole = all(isinstance(label, int) or _is_whole(label) for label in labels)
    return sorted(labels, key=int) if whole else labels


def _is_whole(label: str) -> bool:
    # "01" and "1" are two labels, so only the canonical spelling counts as a number.
    return label.lstrip("-").isdecimal() and label.isascii() and str(int(label)) == label


def _examples(path: Path, rows: list[_Row], column: str, numbers: dict[str | int, int]) -> Examples:
    labels = []
    for row in rows:
        if row.label not in numbers:
            known = [str(name) for name in numbers]
            _refuse(
                path,
                row.number,
                column,
                f"the label {row.label!r} does not occur in the training file"
                f"{_hint(str(row.label), known)}; its labels are {', '.join(known[:10])}",
            )
        labels.append(numbers[row.label])
    texts = tuple(r.texts[0] if len(r.texts) == 1 else (r.texts[0], r.texts[1]) for r in rows)
    return Examples(texts, np.array(labels, dtype=np.int64))


def _read_csv(path: Path, text: tuple[str, ...], label: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows = []
    header: list[str] | None = None
    columns: list[int] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                columns = [_column(path, header, name) for name in (*text, label)]
                continue
            if len(cells) != len(header):
                _refuse(
                    path,
                    reader.line_num,
                    None,
                    f"{len(cells)} cells instead of {len(header)} ({', '.join(header)}); put a "
                    'text that holds a comma into "quotes"',
                )
            *fields, value = (cells[c] for c in columns)
            value = value.strip()
            if value in ("", "nan", "NaN"):
                _refuse(path, reader.line_num, label, "the label is missing; fill it or drop the row")
            rows.append(_row(path, reader.line_num, text, fields, value))
    except csv.Error as error:
        _refuse(
            path,
            reader.line_num,
            None,
            f"this is no valid CSV ({error}); most often a quotation mark is not closed, or not "
            'doubled inside a "quoted" text',
        )
    if not rows:
        _refuse_file(path, "there is no example in it")
    return rows


def _read_jsonl(path: Path, text: tuple[str, ...], label: str) -> list[_Row]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            _refuse(path, number, None, f"this is no valid JSON ({error}); write one object a line")
        if not isinstance(record, dict):
            kind = type(record).__name__
            _refuse(path, number, None, f'a {kind} instead of an object like {{"{text[0]}": ...}}')
        missing = next((name for name in (*text, label) if name not in record), None)
        if missing is not None:
            _refuse(path, number, missing, f"the key is missing{_hint(missing, record)}; add it")
        for name in text:
            if not isinstance(record[name], str):
                _refuse(path, number, name, f"the text is {record[name]!r}; it must be a string")
        value = record[label]
        if isinstance(value, str):
            value = value.strip()
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            _refuse(
                path,
                number,
                label,
                f"the label is {value!r}; it must be a non-empty string or a whole number",
            )
        rows.append(_row(path, number, text, [record[name] for name in text], value))
    if not rows:
        _refuse_file(path, "there is no example in it")
    return rows


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {double!r} occurs twice")
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _row(path: Path, number: int, names: tuple[str, ...], fields: Sequence[str], label: str | int) -> _Row:
    texts = tuple(field.strip() for field in fields)
    for name, field in zip(names, texts, strict=True):
        if not field:
            _refuse(path, number, name, "the text is empty; fill it or drop the row")
        try:
            field.encode()
        except UnicodeEncodeError:
            _refuse(path, number, name, "the text holds half a surrogate pair (\\ud800 to \\udfff)")
    return _Row(number, texts, label)


# --- reading files and complaining about them ---------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        why = error.strerror or type(error).__name__
        raise UserError(
            f"{path}: {why}{_hint(path.name, [b for b in beside if b != path.name])}; check the "
            "path in dataset.root, dataset.train_file and dataset.eval_file"
        ) from error
    if not data.strip():
        _refuse_file(path, "it is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        _refuse(path, line, None, f"the byte 0x{data[error.start]:02x} is no UTF-8; save it as UTF-8")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        _refuse(path, line, None, "it holds a null byte, so it is no text file; save it as UTF-8")
    return text


def _column(path: Path, header: Sequence[str], name: str) -> int:
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        _refuse(path, 1, name, "two columns have this name; rename one")
    odd = [c for c in "\t;|" if len(header) == 1 and c in header[0]]
    cure = f"; it seems to be separated by {odd[0]!r}, save it with commas" if odd else ""
    names = ", ".join(header[:12])
    _refuse(path, 1, name, f"there is no such column{_hint(name, header)}; it has {names}{cure}")


def _refuse(path: Path, line: int, column: str | None, message: str) -> NoReturn:
    where = f", column {column!r}" if column is not None else ""
    raise UserError(f"{path}, line {line}{where}: {message}")


def _refuse_file(path: Path, message: str) -> NoReturn:
    raise UserError(f"{path}: {message}")


def _hint(name: str, known: Iterable[str]) -> str:
    folded = {option.lower(): option for option in known}
    close = get_close_matches(name.lower(), folded, n=1)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


# --- tokens and batches -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenTable:
    """All token ids of n examples end to end; example i is `tokens[offsets[i]:offsets[i + 1]]`.

    tokens int32 [N], types (segment ids) int8 [N] or None, offsets int64 [n + 1], labels int64 or
    float32 [n].
    """

    tokens: torch.Tensor
    types: torch.Tensor | None
    offsets: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> torch.Tensor:
        """Tokens of each example, special ones included: int64 [n]."""
        return self.offsets.diff()

    def to(self, device: torch.device) -> TokenTable:
        """The same table on `device`."""
        types = None if self.types is None else self.types.to(device)
        return TokenTable(self.tokens.to(device), types, self.offsets.to(device), self.labels.to(device))


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: bool) -> TokenTable:
    """Token ids of every example, special tokens in, at most `max_length` each.

    Raises UserError if an example is longer and `truncation` is off.
    """
    pairs = bool(examples.texts) and not isinstance(examples.texts[0], str)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= special + pairs:
        raise UserError(
            f"dataset.max_length: {max_length} leaves no room for text beside the {special} "
            f"special tokens; set it to {special + pairs + 1} or more"
        )
    with_types = "token_type_ids" in tokenizer.model_input_names
    lengths, tokens, types = [], [], []
    # In chunks, because Python lists of ids take ten times the memory of the arrays.
    for start in range(0, len(examples), _CHUNK):
        chunk = examples.texts[start : start + _CHUNK]
        fields: list[Any] = [list(f) for f in zip(*chunk, strict=True)] if pairs else [list(chunk)]
        encoded = tokenizer(
            *fields,
            truncation=truncation,
            max_length=max_length if truncation else None,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=with_types,
            verbose=False,
        )
        ids = encoded["input_ids"]
        lengths.append(np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))
        tokens.append(_flat(ids, np.int32))
        if with_types:
            types.append(_flat(encoded["token_type_ids"], np.int8))
    sizes = np.concatenate([np.zeros(1, np.int64), *lengths])  # offsets begin with 0
    if sizes.max() > max_length:
        worst = int(sizes.argmax())
        raise UserError(
            f"dataset.max_length: example {worst - 1} (counted from 0) has {sizes[worst]} tokens, "
            f"more than {max_length}, and dataset.truncation is false; raise max_length or set "
            "truncation: true"
        )
    return TokenTable(
        tokens=torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *tokens])),
        types=torch.from_numpy(np.concatenate([np.zeros(0, np.int8), *types])) if with_types else None,
        offsets=torch.from_numpy(sizes.cumsum()),
        labels=torch.from_numpy(examples.labels.copy()),
    )


def _flat(rows: list[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype)


def collate(
    table: TokenTable,
    index: torch.Tensor,
    pad_id: int,
    padding: Literal["longest", "max_length", "grouped"],
    max_length: int,
) -> dict[str, torch.Tensor]:
    """The batch of the b examples in `index` (int64 [b]), padded on the right to T tokens.

    input_ids, attention_mask and (if the table has types) token_type_ids are int64 [b, T]; labels
    [b]. T is the batch's longest example, or the `max_length` that `tokenize` was given.
    """
    start, end = table.offsets[index], table.offsets[index + 1]
    width = max_length if padding == "max_length" else int((end - start).max())
    position = start[:, None] + torch.arange(width, device=start.device)
    mask = position < end[:, None]
    position = position.clamp(max=len(table.tokens) - 1)
    batch = {
        "input_ids": torch.where(mask, table.tokens[position].long(), pad_id),
        "attention_mask": mask.long(),
        "labels": table.labels[index],
    }
    if table.types is not None:
        batch["token_type_ids"] = torch.where(mask, table.types[position].long(), 0)
    return batch


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """The shuffled batches (int64 [<= batch_size]) of an epoch; a pure function of its arguments.

    The last batch holds what is left over and may be short.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)
    return list(torch.from_numpy(order).split(batch_size)) if n else []


def length_groups(lengths: torch.Tensor, overhead: int = 32) -> list[torch.Tensor]:
    """Positions of a batch in groups of similar length, the cheapest to compute one after another.

    lengths: int64 [b], in tokens. Minimises `Σ_groups (size · longest + overhead)` exactly, by
    dynamic programming over the sorted lengths; `overhead` is what one more forward and backward
    pass costs, in tokens. The batch stays the batch: the groups' losses, weighted by their sizes,
    add up to its mean loss.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    longest = lengths[order].tolist()
    best, cut = [0] + [0] * len(longest), [0] * (len(longest) + 1)
    for end in range(1, len(longest) + 1):
        costs = [best[a] + (end - a) * longest[a] + overhead for a in range(end)]
        best[end] = min(costs)
        cut[end] = costs.index(best[end])
    groups, end = [], len(longest)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


# --- scores -------------------------------------------------------------------------------------


def score(spec: TaskSpec, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics, by name, as fractions (not percent).

    logits [n, c] (c = 1 for regression), labels [n]. F1 is that of label 1. Where a metric is
    0 / 0 because the predictions (or the labels) are all the same, it is 0.0: a constant predicts
    nothing. Raises UserError if a logit is not finite.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = np.asarray(logits)
    labels = np.asarray(labels)
    outputs = max(1, len(spec.labels))
    if logits.shape != (len(labels), outputs) or not len(labels):
        raise ValueError(f"logits {logits.shape} for {len(labels)} labels and {outputs} outputs")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise UserError(
            f"the model's outputs are not finite for {bad} of {len(labels)} examples: training has "
            "diverged; lower training.learning_rate or the adapter's scale alpha/rank"
        )
    if spec.kind == "regression":
        predicted = logits[:, 0].astype(np.float64)
        constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
        measures = {
            "pearson": lambda: 0.0 if constant else pearsonr(predicted, labels)[0],
            "spearmanr": lambda: 0.0 if constant else spearmanr(predicted, labels)[0],
        }
    else:
        predicted = logits.argmax(axis=1)
        measures = {
            "accuracy": lambda: accuracy_score(labels, predicted),
            # 0 is documented, but scikit-learn's annotation allows strings only.
            "f1": lambda: f1_score(labels, predicted, pos_label=1, zero_division=cast(Any, 0)),
            "matthews_correlation": lambda: matthews_corrcoef(labels, predicted),
        }
    return {name: float(measures[name]()) for name in spec.metrics}
