"""Data: loading, splitting, tokenizing, batching and scoring.

pytest tests/fwlora_lab/data/test_tasks.py
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import HubServer, serve_dataset
from transformers import BertTokenizerFast  # type: ignore[attr-defined]

from fwlora_lab.catalog.tasks import GLUE, GLUE_REPOSITORY, GLUE_REVISION
from fwlora_lab.config.schema import DatasetConfig
from fwlora_lab.data import task, tokens
from fwlora_lab.data.glue import load_glue
from fwlora_lab.data.load import load_task
from fwlora_lab.data.metrics import score
from fwlora_lab.data.offline import sentences, words
from fwlora_lab.data.task import Examples
from fwlora_lab.data.tokens import collate, epoch_batches, tokenize
from fwlora_lab.errors import UserError

REAL_GLUE = Path(os.environ.get("FWLORA_GLUE", Path(__file__).resolve().parents[4] / "shared" / "glue"))
needs_glue = pytest.mark.skipif(
    not (REAL_GLUE / "CoLA" / "train.tsv").is_file(),
    reason="GLUE's files are not here: set FWLORA_GLUE to the folder that holds CoLA/ and SST-2/",
)


def dataset(**keys: Any) -> DatasetConfig:
    return DatasetConfig(**{"name": "offline", **keys})


# --- GLUE's file layouts ------------------------------------------------------------------------

# task -> (train's file, dev's file, rows of train as they must come out)
FILES: dict[str, tuple[str, str, list[tuple[Any, float]]]] = {
    "sst2": (
        'sentence\tlabel\na "dull day\t0\nbright skies \t1\n',
        "sentence\tlabel\nwarm rain \t1\n",
        [('a "dull day', 0), ("bright skies", 1)],
    ),
    "cola": (
        "ab12\t1\t\tBirds sing.\nab12\t0\t*\tBird sing.\n",
        "ab12\t1\t\tFish swim.\n",
        [("Birds sing.", 1), ("Bird sing.", 0)],
    ),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tIt rains.\tRain falls.\n"
        "0\t7\t9\tIt rains.\tSnow falls.\n",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tIt is wet.\tIt is damp.\n",
        [(("It rains.", "Rain falls."), 1), (("It rains.", "Snow falls."), 0)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWho?\tWhich man?\t1\n"
        "4\t5\t6\ttorn\n7\t8\t9\tWho?\tWhere?\t0\n",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tFor what?\t1\n",
        [(("Who?", "Which man?"), 1), (("Who?", "Where?"), 0)],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t1\t2\ta\tb\tA cat.\tOne cat.\t4.750\n1\tg\tf\t1\t2\ta\tb\tA cat.\tA car.\t0.0\n",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t1\t2\ta\tb\tA dog.\tOne dog.\t5\n",
        [(("A cat.", "One cat."), 4.75), (("A cat.", "A car."), 0.0)],
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tHe ran.\tHe moved.\tentailment\t"
        "entailment\n1\tHe ran.\tHe slept.\tneutral\tcontradiction\n2\tHe ran.\tFar.\tneutral\t"
        "neutral\n",
        "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n0\tIt is.\tIt was.\tneutral\tneutral\tneutral\n",
        [(("He ran.", "He moved."), 0), (("He ran.", "He slept."), 2), (("He ran.", "Far."), 1)],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tentailment\n1\tWho?\tSo.\tnot_entailment\n",
        "index\tquestion\tsentence\tlabel\n0\tWhen?\tSoon.\tentailment\n",
        [(("Who?", "He did."), 0), (("Who?", "So."), 1)],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\r\n0\tIt rains.\tIt is wet.\tentailment\r\n"
        "1\tIt rains.\tIt is dry.\tnot_entailment\r\n",
        "index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo.\tentailment\n",
        [(("It rains.", "It is wet."), 0), (("It rains.", "It is dry."), 1)],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tHe saw it.\tHe saw rain.\t1\n1\tHe saw it.\tHe saw.\t0",
        "index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo.\t1\n",
        [(("He saw it.", "He saw rain."), 1), (("He saw it.", "He saw."), 0)],
    ),
}
METRICS = {
    "sst2": ("accuracy",),
    "cola": ("matthews_correlation",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


def write_glue(root: Path, task: str, train: str | bytes | None = None) -> DatasetConfig:
    folder = root / GLUE[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    text = FILES[task][0] if train is None else train
    (folder / "train.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    dev = "dev_matched.tsv" if task == "mnli" else "dev.tsv"
    (folder / dev).write_text(FILES[task][1], newline="")
    return dataset(name="glue", subset=task, root=str(root))


@pytest.mark.parametrize("task", FILES)
def test_glue_folder(tmp_path: Path, task: str) -> None:
    data = load_task(write_glue(tmp_path, task))
    rows = FILES[task][2]
    assert data.train.texts == tuple(text for text, _ in rows)
    assert data.train.labels.tolist() == [label for _, label in rows]
    assert data.train.labels.dtype == (np.float32 if task == "stsb" else np.int64)
    assert (len(data.dev), len(data.validation)) == (1, 0)
    assert data.spec.name == task
    assert data.spec.metrics == METRICS[task] and data.spec.primary == METRICS[task][0]
    assert data.spec.kind == ("regression" if task == "stsb" else "classification")
    assert data.spec.text_fields == (2 if isinstance(rows[0][0], tuple) else 1)
    assert str(tmp_path) in data.source


def test_both_ends_of_a_text_are_stripped(tmp_path: Path) -> None:
    data = load_task(write_glue(tmp_path, "sst2"))
    assert data.dev.texts == ("warm rain",)


def test_mnli_has_two_dev_sets(tmp_path: Path) -> None:
    cfg = write_glue(tmp_path, "mnli")
    other = FILES["mnli"][1].replace("It is.", "We are.")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").write_text(other)
    matched = load_task(cfg.model_copy(update={"eval_split": "validation_matched"}))
    mismatched = load_task(cfg.model_copy(update={"eval_split": "validation_mismatched"}))
    assert matched.dev.texts == load_task(cfg).dev.texts == (("It is.", "It was."),)
    assert mismatched.dev.texts == (("We are.", "It was."),)


def test_split_names_choose_the_files(tmp_path: Path) -> None:
    text = "sentence\tlabel\nwarm rain\t1\ncold rain\t0\n"
    cfg = write_glue(tmp_path, "sst2")
    (tmp_path / "SST-2" / "dev.tsv").write_text(text)
    turned = cfg.model_copy(update={"split": "validation", "eval_split": "train"})
    _, train, dev, _ = load_glue(turned)
    assert train.texts == ("warm rain", "cold rain")
    assert dev.texts == ('a "dull day', "bright skies")
    with pytest.raises(UserError, match="dataset.split: 'validation': glue is trained on its split train"):
        load_task(turned)


@needs_glue
@pytest.mark.parametrize(
    ("task", "train", "dev", "positive"),
    [("sst2", 67349, 872, 37569 + 444), ("cola", 8551, 1043, 6023 + 721)],
)
def test_the_real_glue(task: str, train: int, dev: int, positive: int) -> None:
    data = load_task(dataset(name="glue", subset=task, root=str(REAL_GLUE)))
    assert (len(data.train), len(data.dev)) == (train, dev)
    assert int(data.train.labels.sum() + data.dev.labels.sum()) == positive
    part = load_task(
        dataset(
            name="glue",
            subset=task,
            root=str(REAL_GLUE),
            validation_fraction=0.1,
            train_examples=800,
        )
    )
    assert (len(part.train), len(part.validation)) == (800, round(0.1 * train))
    assert part.dev.texts == data.dev.texts
    assert part.validation.labels.mean() == pytest.approx(data.train.labels.mean(), abs=1e-3)


# --- the hub ------------------------------------------------------------------------------------

HUB_ROWS = {
    "train": {
        "sentence": [" Birds sing. ", "Bird sing.", "Fish swim."],
        "label": [1, 0, 1],
        "idx": [0, 1, 2],
    },
    "validation": {"sentence": ["Cats purr."], "label": [1], "idx": [0]},
}
LOAD = """
from fwlora_lab.errors import UserError
from fwlora_lab.config.schema import DatasetConfig
from fwlora_lab.data.load import load_task
data = load_task(DatasetConfig(name="glue", subset="cola"))
print(data.train.texts, data.train.labels, data.dev.texts, data.source)
try:
    load_task(DatasetConfig(name="glue", subset="cola", revision="0" * 40))
except UserError as error:
    print("UserError:", error)
"""


def test_glue_from_a_hub_at_the_pinned_commit(tmp_path: Path) -> None:
    with HubServer() as hub:
        serve_dataset(hub, GLUE_REPOSITORY, GLUE_REVISION, {"cola": HUB_ROWS})
        done = subprocess.run(
            [sys.executable, "-c", LOAD],
            env={**os.environ, **hub.environment(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    right, _, wrong = done.stdout.partition("UserError:")
    assert "('Birds sing.', 'Bird sing.', 'Fish swim.') [1 0 1] ('Cats purr.',)" in right
    assert GLUE_REVISION in right
    assert "dataset.root=" in wrong and "0" * 40 in wrong


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no network"), FileNotFoundError(""), ValueError("offline\nmode"), OSError()],
)
def test_every_failure_of_the_hub_names_the_cures(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    fake_datasets(monkeypatch, load)
    with pytest.raises(UserError) as caught:
        load_task(dataset(name="glue", subset="sst2"))
    message = str(caught.value)
    for part in ("nyu-mll/glue", "dataset.root=", "SST-2", "dataset.name=offline"):
        assert part in message
    assert type(error).__name__ in message


def test_the_hub_is_asked_for_commit_subset_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    table = {"premise": ["A"] * 3, "hypothesis": ["B"] * 3, "label": [0, 2, 1]}

    def load(*args: Any, **keys: Any) -> Any:
        asked.append((args, keys))
        return [[table], [table]]

    class Part(list):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(0)

    fake_datasets(monkeypatch, lambda *a, **k: [Part(part) for part in load(*a, **k)])
    data = load_task(dataset(name="glue", subset="mnli"))
    load_task(dataset(name="glue", subset="mnli", revision="abc"))
    assert asked[0] == (
        ("nyu-mll/glue", "mnli"),
        {"revision": GLUE_REVISION, "split": ["train", "validation_matched"]},
    )
    assert asked[1][1]["revision"] == "abc"
    assert data.train.texts == (("A", "B"),) * 3 and data.train.labels.tolist() == [0, 2, 1]
    table["label"] = [0, -1, 1]
    with pytest.raises(UserError, match="not indices"):
        load_task(dataset(name="glue", subset="mnli"))


# --- CSV and JSONL ------------------------------------------------------------------------------


def write_csv(root: Path, train: str | bytes, dev: str = "text,label\nz,a\n") -> DatasetConfig:
    return write_files(root, "csv", train, dev)


def write_jsonl(root: Path, train: str | bytes, dev: str = "") -> DatasetConfig:
    return write_files(root, "jsonl", train, dev or '{"text": "z", "label": "a"}')


def write_files(root: Path, kind: str, train: str | bytes, dev: str) -> DatasetConfig:
    files = root / f"train.{kind}", root / f"dev.{kind}"
    files[0].write_bytes(train if isinstance(train, bytes) else train.encode())
    files[1].write_text(dev)
    return dataset(
        name=kind,
        train_file=str(files[0]),
        eval_file=str(files[1]),
        text_column="text",
        label_column="label",
    )


def test_csv_quotes_commas_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufeffid,text,label\r\n1,"one, ""two""\nthree",yes\r\n\r\n2, four ,no\r\n'
    data = load_task(write_csv(tmp_path, text, "text,label\nfive,yes\n"))
    assert data.train.texts == ('one, "two"\nthree', "four")
    assert data.spec.labels == ("no", "yes") and data.train.labels.tolist() == [1, 0]
    assert data.dev.labels.tolist() == [1]
    assert data.spec.metrics == ("accuracy", "matthews_correlation")


def test_whole_numbers_sort_as_numbers(tmp_path: Path) -> None:
    data = load_task(write_csv(tmp_path, "text,label\na,10\nb,9\nc,-1\n", "text,label\nd,9\n"))
    assert data.spec.labels == ("-1", "9", "10") and data.train.labels.tolist() == [2, 1, 0]
    data = load_task(write_csv(tmp_path, "text,label\na,10\nb,9\nc,01\n", "text,label\nd,9\n"))
    assert data.spec.labels == ("01", "10", "9")


def test_jsonl_pairs_and_whole_number_labels(tmp_path: Path) -> None:
    rows = [{"a": f"left {i}", "b": f" right {i}", "label": 2 - i, "more": None} for i in range(3)]
    cfg = write_jsonl(tmp_path, "\n\n".join(map(json.dumps, rows)), json.dumps(rows[0]) + "\n")
    data = load_task(cfg.model_copy(update={"text_column": ["b", "a"]}))
    assert data.train.texts[0] == ("right 0", "left 0") and data.spec.text_fields == 2
    assert data.spec.labels == ("0", "1", "2") and data.train.labels.tolist() == [2, 1, 0]


# --- malformed files ----------------------------------------------------------------------------

SST2 = "sentence\tlabel\n"
STSB = FILES["stsb"][0].split("\n")[0] + "\n"
COLA_LINE = "ab12\t1\t\tBirds sing.\n"
MANY = "".join(f"text {i},label {i}\n" for i in range(40))

MALFORMED_GLUE: dict[str, tuple[str, str | bytes, str]] = {
    "empty file": ("sst2", "", r"train.tsv: it is empty"),
    "only blanks": ("sst2", " \n\n", r"train.tsv: it is empty"),
    "header only": ("sst2", SST2, r"train.tsv: there is no example"),
    "not UTF-8": ("sst2", SST2.encode() + b"caf\xe9\t1\n", r"line 2: the byte 0xe9.*save the file as"),
    "UTF-16": ("sst2", (SST2 + "a\t1\n").encode("utf-16"), r"line 1: the byte 0xff"),
    "null byte": ("sst2", SST2 + "a\t1\nb\0\t0\n", r"line 3: it holds a null byte"),
    "misspelt column": (
        "sst2",
        "sentense\tlabel\na\t1\n",
        r"line 1, column 'sentence'.*'sentense'",
    ),
    "a CSV": ("sst2", "sentence,label\na,1\n", r"line 1, column 'sentence'"),
    "column twice": ("sst2", "sentence\tlabel\tlabel\na\t1\t1\n", r"'label': two columns"),
    "row too short": ("sst2", SST2 + "a\t1\nb\n", r"line 3: 1 tab-separated columns instead of 2"),
    "row too long": ("sst2", SST2 + "a\tb\t1\n", r"line 2: 3 tab-separated columns instead of 2"),
    "blank line": ("sst2", SST2 + "a\t1\n\nb\t0\n", r"line 3: 1 tab-separated"),
    "unknown label": ("sst2", SST2 + "a\t1\nb\t2\n", r"line 3, column 'label'.*'2'.*one of 0, 1"),
    "missing label": ("sst2", SST2 + "a\t\n", r"line 2, column 'label'.*''"),
    "label of a test set": ("sst2", SST2 + "a\t-1\n", r"line 2, column 'label'.*'-1'"),
    "no text": ("sst2", SST2 + "a\t1\n \t0\n", r"line 3, column 'sentence': the text is empty"),
    "one class": ("sst2", SST2 + "a\t1\nb\t1\n", r"all 2 training examples.*'positive'"),
    "cola with a header": (
        "cola",
        SST2 + COLA_LINE,
        r"line 1: 2 tab-separated columns instead of 4",
    ),
    "cola, short": ("cola", COLA_LINE + "ab12\t0\t*\n", r"line 2: 3 tab-separated columns"),
    "no score": (
        "stsb",
        STSB + "0\tg\tf\t1\t2\ta\tb\tx\ty\tbad\n",
        r"line 2, column 'score'.*'bad'",
    ),
    "NaN": ("stsb", STSB + "0\tg\tf\t1\t2\ta\tb\tx\ty\tnan\n", r"line 2, column 'score'.*0 to 5"),
    "score 6": ("stsb", STSB + "0\tg\tf\t1\t2\ta\tb\tx\ty\t6\n", r"line 2, column 'score'.*0 to 5"),
    "all torn": ("qqp", FILES["qqp"][0].split("\n")[0] + "\n1\t2\n", r"no row has the 6 columns"),
}


@pytest.mark.parametrize("case", MALFORMED_GLUE)
def test_malformed_glue_file(tmp_path: Path, case: str) -> None:
    task, text, message = MALFORMED_GLUE[case]
    with pytest.raises(UserError, match=message) as caught:
        load_task(write_glue(tmp_path, task, text))
    assert str(tmp_path) in str(caught.value)


MALFORMED_CSV: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"train.csv: it is empty"),
    "header only": ("text,label\n", r"train.csv: there is no example"),
    "not UTF-8": (b"text,label\na,1\n\xff,2\n", r"line 3: the byte 0xff"),
    "missing column": ("txt,label\na,1\n", r"line 1, column 'text'.*did you mean 'txt'"),
    "wrong case": ("Text,label\na,1\n", r"line 1, column 'text'.*did you mean 'Text'"),
    "semicolons": ("text;label\na;1\n", r"separated by ';', save it with commas"),
    "column twice": ("text,label,text\na,1,b\n", r"line 1, column 'text': two columns"),
    "ragged": ("text,label\na,1\nb, c,2\n", r"line 3: 3 cells instead of 2"),
    "ragged after a break": ('text,label\n"a\nb",1\nc\n', r"line 4: 1 cells instead of 2"),
    "open quote": ('text,label\na,1\n"b,2\n', r"line 3: this is not valid CSV.*quotation mark"),
    "stray quote": ('text,label\n"a"b,1\n', r"line 2: this is not valid CSV"),
    "NA": ("text,label\na,1\nb,NA\n", r"line 3, column 'label': the label is missing \(it reads 'NA'\).*another"),
    "null": ("text,label\na,1\nb,null\n", r"line 3, column 'label': the label is missing \(it reads 'null'\)"),
    "two cases": ("text,label\na,Good\nb,bad\nc,good\n", r"line 4.*'good' and the label 'Good' of line 2 differ only"),
    "no label": ("text,label\na,1\nb,\n", r"line 3, column 'label': the label is missing"),
    "NaN": ("text,label\na,1\nb,nan\n", r"line 3, column 'label': the label is missing"),
    "no text": ("text,label\na,1\n ,2\n", r"line 3, column 'text': the text is empty"),
    "one class": ("text,label\na,1\nb,1\n", r"all 2 labels in column 'label' are '1'"),
    "no classes": ("text,label\n" + MANY, r"40 different labels in 40 rows"),
    "label only in dev": ("text,label\nx,aa\ny,b\n", r"dev.csv, line 2, column 'label'.*mean 'aa'"),
}
JSON_ROW = '{"text": "a", "label": 1}\n'
MALFORMED_JSONL: dict[str, tuple[str | bytes, str]] = {
    "no JSON": (JSON_ROW + "{text: a}\n", r"line 2: this is not valid JSON"),
    "cut off": (JSON_ROW + '{"text": "b", "la', r"line 2: this is not valid JSON"),
    "one array": (f"[{JSON_ROW.strip()}]", r"line 1: this is of type list; write an object"),
    "a number": (JSON_ROW + "7\n", r"line 2: this is of type int; write an object"),
    "NaN": (JSON_ROW + '{"text": "b", "label": NaN}', r"line 2: this is not valid JSON \(NaN"),
    "key twice": ('{"text": "a", "text": "b", "label": 1}', r"the key 'text' occurs twice"),
    "missing key": (JSON_ROW + '{"txt": "b", "label": 2}', r"line 2, column 'text'.*'txt'"),
    "no label": (JSON_ROW + '{"text": "b"}', r"line 2, column 'label': the key is missing"),
    "text is null": (JSON_ROW + '{"text": null, "label": 2}', r"line 2, column 'text'.*None"),
    "label is null": (JSON_ROW + '{"text": "b", "label": null}', r"line 2, column 'label'.*None"),
    "label is a float": (JSON_ROW + '{"text": "b", "label": 1.5}', r"column 'label'.*1.5.*whole"),
    "label is a bool": (JSON_ROW + '{"text": "b", "label": true}', r"column 'label': some labels are strings"),
    "mixed labels": (JSON_ROW + '{"text": "b", "label": "x"}', r"some labels are strings"),
    "half a surrogate": (JSON_ROW + '{"text": "\\ud800", "label": 2}', r"half a surrogate"),
    "too deep": ("[" * 100_000, r"line 1: this is not valid JSON"),
    "one class": (JSON_ROW * 3, r"all 3 labels in column 'label' are 1"),
}


@pytest.mark.parametrize(
    ("train", "dev", "classes", "numbers"),
    [
        (["1", "0", "1.0"], ["0.0", "1"], ("0", "1"), [1, 0, 1]),
        (["1.0", "0.0", "1.0"], ["0.0"], ("0.0", "1.0"), [1, 0, 1]),  # one spelling stays as it is
        (["-1", "10", "9"], ["9.0"], ("-1", "9", "10"), [0, 2, 1]),
        (["True", "false", "TRUE"], ["true"], ("TRUE", "false"), [0, 1, 0]),
        (["--1", "-1", "a"], ["a"], ("--1", "-1", "a"), [0, 1, 2]),
        (["01", "1", "2"], ["1"], ("01", "1", "2"), [0, 1, 2]),
        (["nano", "none", "no"], ["no"], ("nano", "no", "none"), [0, 2, 1]),
    ],
)
def test_labels_are_read_as_people_mean_them(tmp_path: Path, train, dev, classes, numbers) -> None:
    def table(labels: list[str]) -> str:
        return "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels))

    cfg = write_csv(tmp_path, table(train))
    Path(str(cfg.eval_file)).write_text(table(dev))
    data = load_task(cfg)
    assert data.spec.labels == classes and data.train.labels.tolist() == numbers


def test_a_json_label_may_be_a_truth_value_or_a_whole_float(tmp_path: Path) -> None:
    rows = '{"text": "a", "label": true}\n{"text": "b", "label": false}\n'
    cfg = write_jsonl(tmp_path, rows)
    Path(str(cfg.eval_file)).write_text(rows)
    assert load_task(cfg).spec.labels == ("false", "true")
    rows = '{"text": "a", "label": 1}\n{"text": "b", "label": 2.0}\n{"text": "c", "label": 1.0}\n'
    Path(str(cfg.train_file)).write_text(rows)
    Path(str(cfg.eval_file)).write_text(rows)
    assert load_task(cfg).train.labels.tolist() == [0, 1, 0]


def test_a_text_may_be_as_long_as_it_is(tmp_path: Path) -> None:
    long = "x" * 200_000
    cfg = write_csv(tmp_path, f'text,label\n"{long}",1\nb,0\n')
    Path(str(cfg.eval_file)).write_text("text,label\nb,0\n")
    assert load_task(cfg).train.texts[0] == long


@pytest.mark.parametrize("case", MALFORMED_CSV)
def test_malformed_csv(tmp_path: Path, case: str) -> None:
    text, message = MALFORMED_CSV[case]
    with pytest.raises(UserError, match=message) as caught:
        load_task(write_csv(tmp_path, text))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("case", MALFORMED_JSONL)
def test_malformed_jsonl(tmp_path: Path, case: str) -> None:
    text, message = MALFORMED_JSONL[case]
    with pytest.raises(UserError, match=message) as caught:
        load_task(write_jsonl(tmp_path, text))
    assert str(tmp_path) in str(caught.value)


def test_places_where_no_data_is(tmp_path: Path) -> None:
    cfg = write_glue(tmp_path, "sst2")

    def refused(message: str, **keys: Any) -> None:
        with pytest.raises(UserError, match=message):
            load_task(cfg.model_copy(update=keys))

    refused(r"dataset.subset: 'sst-2' is not a task of glue \(did you mean 'sst2'\?\)", subset="sst-2")
    refused(r"dataset.root: .*nowhere is not a folder", root=str(tmp_path / "nowhere"))
    refused(r"has no folder SST-2/; give the folder above", root=str(tmp_path / "SST-2"))
    refused(r"has no folder CoLA/; it holds SST-2", subset="cola")
    refused(r"dataset.eval_split: 'test' has no public labels or does not exist: use validation", eval_split="test")
    refused(r"dataset.split: 'trian': glue is trained on its split train", split="trian")
    (tmp_path / "SST-2").rename(tmp_path / "sst-2")
    refused(r"has no folder SST-2/; it holds sst-2 \(did you mean 'sst-2'\?\)")
    (tmp_path / "sst-2").rename(tmp_path / "SST-2")
    (tmp_path / "SST-2" / "dev.tsv").rename(tmp_path / "SST-2" / "dev.tsv.txt")
    refused(r"dev.tsv: No such file.*did you mean 'dev.tsv.txt'")
    (tmp_path / "SST-2" / "dev.tsv").mkdir()
    refused(r"dev.tsv: Is a directory")


def test_incomplete_or_contradictory_file_settings(tmp_path: Path) -> None:
    cfg = write_csv(tmp_path, "text,label\na,1\nb,2\n", "text,label\nc,1\n")
    load_task(cfg)

    def refused(message: str, **keys: Any) -> None:
        with pytest.raises(UserError, match=message):
            load_task(cfg.model_copy(update=keys))

    refused("dataset.eval_file: dataset.name csv needs it", eval_file=None)
    refused("dataset.text_column: dataset.name csv needs it", text_column=None)
    refused("dataset.text_column: name one column, or a list of two", text_column=["a", "b", "c"])
    refused("dataset.label_column: 'label' is a text column", text_column="label")
    refused("dataset.eval_file: is the train_file", eval_file=cfg.train_file)
    (tmp_path / "link.csv").symlink_to(tmp_path / "train.csv")
    refused("both are .*train.csv", eval_file=str(tmp_path / "link.csv"))
    refused(r"trian.csv: No such file.*'train.csv'", train_file=str(tmp_path / "trian.csv"))
    refused("dataset.text_column: name one column, or a list of two", text_column=["text", "text"])


# --- carving, subsampling, fingerprints ---------------------------------------------------------


def numbered(root: Path, n: int = 100, dev: str = "text,label\nz,a\n") -> DatasetConfig:
    # 70 % a, 30 % b, in blocks: an unstratified or unshuffled draw shows.
    rows = [f"text {i},{'a' if i < 0.7 * n else 'b'}" for i in range(n)]
    return write_csv(root, "text,label\n" + "\n".join(rows), dev)


def test_selection_is_carved_from_train_per_class(tmp_path: Path) -> None:
    cfg = numbered(tmp_path)
    whole = load_task(cfg)
    part = load_task(cfg.model_copy(update={"validation_fraction": 0.2}))
    assert len(whole.validation) == 0 and len(whole.train) == 100
    assert np.bincount(part.validation.labels).tolist() == [14, 6]
    assert np.bincount(part.train.labels).tolist() == [56, 24]
    assert set(part.train.texts) | set(part.validation.texts) == set(whole.train.texts)
    assert not set(part.train.texts) & set(part.validation.texts)
    assert part.dev.texts == whole.dev.texts
    for split in (part.train, part.validation):  # the file's order, and each text its own label
        numbers = [int(str(text).split()[1]) for text in split.texts]
        assert numbers == sorted(numbers)
        assert split.labels.tolist() == [int(number >= 70) for number in numbers]
    assert part.validation.texts != tuple(f"text {i}" for i in range(20))


def test_shares_of_selection_add_up(tmp_path: Path) -> None:
    rows = ["text,label", *(f"t{i},{'abc'[i % 3]}" for i in range(10))]
    cfg = write_csv(tmp_path, "\n".join(rows))
    for fraction, count in ((0.1, 1), (0.3, 3), (0.5, 5), (0.7, 7)):
        part = load_task(cfg.model_copy(update={"validation_fraction": fraction}))
        assert (len(part.validation), len(part.train)) == (count, 10 - count)


def test_the_dataset_seed_alone_decides_the_splits(tmp_path: Path) -> None:
    cfg = numbered(tmp_path)

    def drawn(**keys: Any) -> task.TaskData:
        return load_task(cfg.model_copy(update={"validation_fraction": 0.2, **keys}))

    assert drawn().fingerprint == drawn().fingerprint
    assert drawn().validation.texts != drawn(seed=1).validation.texts
    # Subsampling comes after the carving, and smaller samples lie within larger ones.
    small, large = drawn(train_examples=20), drawn(train_examples=50)
    assert small.validation.texts == large.validation.texts == drawn().validation.texts
    assert (len(small.train), len(large.train)) == (20, 50)
    assert set(small.train.texts) < set(large.train.texts) < set(drawn().train.texts)
    assert drawn(train_examples=80).train.texts == drawn().train.texts


def test_impossible_sizes(tmp_path: Path) -> None:
    cfg = numbered(tmp_path)
    with pytest.raises(UserError, match="train_examples: 101 asked for, but train holds 100"):
        load_task(cfg.model_copy(update={"train_examples": 101}))
    with pytest.raises(UserError, match="validation_fraction: 0.001 of 100 .*leaves 0"):
        load_task(cfg.model_copy(update={"validation_fraction": 0.001}))
    with pytest.raises(UserError, match="validation_fraction: 0.999 .* 0 for training"):
        load_task(cfg.model_copy(update={"validation_fraction": 0.999}))
    with pytest.raises(UserError, match="nothing to learn.*dataset.train_examples"):
        load_task(cfg.model_copy(update={"train_examples": 1}))


def test_regression_is_carved_without_classes(tmp_path: Path) -> None:
    row = "0\tg\tf\t1\t2\ta\tb\tx{i}\ty\t{score}\n"
    text = STSB + "".join(row.format(i=i, score=i / 4) for i in range(20))
    cfg = write_glue(tmp_path, "stsb", text)
    part = load_task(cfg.model_copy(update={"validation_fraction": 0.25}))
    assert (len(part.validation), len(part.train)) == (5, 15)
    for split in (part.train, part.validation):
        assert split.labels.tolist() == [int(left[1:]) / 4 for left, _ in split.texts]


def test_the_fingerprint_sees_text_label_order_and_membership(tmp_path: Path) -> None:
    base = "text,label\none,a\ntwo,b\nthree,a\n"
    dev = "text,label\nfour,a\n"
    prints = [
        load_task(write_csv(tmp_path, train, evaluation)).fingerprint
        for train, evaluation in (
            (base, dev),
            (base, dev),
            (base.replace("one", "One"), dev),
            (base.replace("one,a", "one,b"), dev),
            ("text,label\ntwo,b\none,a\nthree,a\n", dev),
            (base + "four,a\n", "text,label\nthree,a\n"),
            ("text,label\none,a\ntwo,b\n", "text,label\nthree,a\nfour,a\n"),
            (base.replace(",b", ",c"), dev),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == len(prints) - 1
    assert len(prints[0]) == 64


# --- the offline task ---------------------------------------------------------------------------


def test_the_offline_task() -> None:
    data = load_task(dataset())
    assert data.spec.labels == ("broken", "acceptable") and data.spec.name == "offline"
    assert data.spec.metrics == ("matthews_correlation", "accuracy")
    assert (len(data.train), len(data.validation), len(data.dev)) == (1200, 0, 400)
    assert len({*data.train.texts, *data.dev.texts}) == 1600
    for part in (data.train, data.dev):
        assert part.labels.mean() == 0.5
    assert "synthetic" in data.source
    with pytest.raises(UserError, match="dataset.eval_split: 'test' has no public labels"):
        load_task(dataset(eval_split="test"))


def test_offline_sentences_are_the_same_bytes_everywhere() -> None:
    rows = sentences.sentences(0, 1600)
    digest = hashlib.sha256("\n".join(f"{label} {text}" for text, label in rows).encode())
    # Changing the grammar changes this, and makes earlier results incomparable: do it knowingly.
    assert digest.hexdigest() == "e9abbcbf7e2a14f9fe497fdd56934ed5ecc9d003ba6dbc9052d64777f92fd14b"
    assert sentences.sentences(0, 50) == rows[:50]
    assert not {text for text, _ in sentences.sentences(1, 200)} & {text for text, _ in rows[:200]}


def test_every_template_breaks_its_sentence_in_several_ways() -> None:
    rng = words.Rng(3)
    for template in sentences.TEMPLATES:
        kinds: set[str] = set()
        for _ in range(100):
            sentence = template(rng)
            forms = {**sentence.broken, **sentence.broken_phrases}
            kinds |= set(sentence.broken)
            for kind, broken in forms.items():
                assert broken != sentence.words, (template, kind)
                for text in (broken, sentence.words):
                    assert "{" not in text and "  " not in text and text == text.strip()
        assert len(kinds) >= 4, template


def test_articles_and_agreement_of_acceptable_sentences() -> None:
    for text, label in sentences.sentences(5, 3000):
        assert text[0].isupper() and text[-1] in ".?"
        if not label:
            continue
        words = text[:-1].lower().split()
        for one, two in zip(words, words[1:], strict=False):
            assert one != two, text
            if one in ("a", "an"):
                assert (one == "an") == (two[0] in "aeiou"), text
            if one in ("they", "we"):
                assert two not in ("is", "was", "has", "does"), text
            if one in ("these", "those", "several", "many", "two", "three", "four"):
                assert two not in ("is", "was", "has", "does"), text


# --- tokens and batches -------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
PAD, UNK, CLS, SEP = range(4)
A = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab=str(path))


SINGLES = Examples(("a b c", "", "d", "e f g h a b"), np.array([1, 0, 1, 0]))
PAIRS = Examples((("a b", "c"), ("d", "e f")), np.array([0.5, 4.0], dtype=np.float32))


def test_tokenize_single_texts(tokenizer: Any) -> None:
    table = tokenize(SINGLES, tokenizer, 16, True)
    assert len(table) == 4 and table.lengths().tolist() == [5, 2, 3, 8]
    assert table.offsets.tolist() == [0, 5, 7, 10, 18]
    assert table.tokens[:7].tolist() == [CLS, A, A + 1, A + 2, SEP, CLS, SEP]
    assert table.tokens.dtype == torch.int32 and table.offsets.dtype == torch.int64
    assert table.types is not None and table.types.dtype == torch.int8 and not table.types.any()
    assert table.labels.dtype == torch.int64 and table.labels.tolist() == [1, 0, 1, 0]


def test_tokenize_pairs(tokenizer: Any) -> None:
    table = tokenize(PAIRS, tokenizer, 16, True)
    assert table.tokens.tolist()[:6] == [CLS, A, A + 1, SEP, A + 2, SEP]
    assert table.types is not None
    assert table.types.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert table.labels.dtype == torch.float32 and table.labels.tolist() == [0.5, 4.0]


def test_tokenize_truncates_or_refuses(tokenizer: Any, monkeypatch: Any) -> None:
    table = tokenize(SINGLES, tokenizer, 4, True)
    assert table.lengths().tolist() == [4, 2, 3, 4]
    assert table.tokens[-4:].tolist() == [CLS, A + 4, A + 5, SEP]
    assert tokenize(SINGLES, tokenizer, 8, False).lengths().tolist() == [5, 2, 3, 8]
    with pytest.raises(UserError, match="example 3 .*has 8 tokens, more than 7.*truncation"):
        tokenize(SINGLES, tokenizer, 7, False)
    # Off means off, also where the tokenizer itself knows a shorter limit.
    monkeypatch.setattr(tokenizer, "model_max_length", 5)
    assert tokenize(SINGLES, tokenizer, 8, False).lengths().tolist() == [5, 2, 3, 8]
    with pytest.raises(UserError, match="max_length: 4 leaves no space.*3 special tokens"):
        tokenize(PAIRS, tokenizer, 4, True)


def test_tokenize_nothing_and_across_chunks(tokenizer: Any, monkeypatch: Any) -> None:
    empty = tokenize(SINGLES.take(np.arange(0)), tokenizer, 8, True)
    assert len(empty) == 0 and empty.offsets.tolist() == [0]
    whole = tokenize(SINGLES, tokenizer, 8, True)
    monkeypatch.setattr(tokens, "_CHUNK", 3)
    parts = tokenize(SINGLES, tokenizer, 8, True)
    assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.offsets, parts.offsets)


def test_no_types_where_the_model_has_none(tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids", "attention_mask"])
    table = tokenize(SINGLES, tokenizer, 8, True)
    assert table.types is None
    assert "token_type_ids" not in collate(table, torch.tensor([0]), PAD, "longest", 8)


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_collate_equals_the_tokenizers_own_padding(tokenizer: Any, padding: Any) -> None:
    index = torch.tensor([2, 0, 1])
    for examples in (SINGLES, PAIRS):
        rows = index[index < len(examples)]
        table = tokenize(examples, tokenizer, 12, True)
        batch = collate(table, rows, PAD, padding, 12)
        texts = [examples.texts[i] for i in rows]
        expected = tokenizer(texts, padding=padding, max_length=12, return_tensors="pt")
        assert set(batch) == {*expected, "labels"}
        for name, tensor in expected.items():
            assert batch[name].dtype == torch.int64
            assert torch.equal(batch[name], tensor), name
        assert batch["labels"].tolist() == [examples.labels[i] for i in rows]


def test_the_padding_id_is_used(tokenizer: Any) -> None:
    table = tokenize(SINGLES, tokenizer, 8, True)
    batch = collate(table, torch.tensor([1, 3]), 9, "longest", 8)
    assert batch["input_ids"][0].tolist() == [CLS, SEP] + [9] * 6
    assert batch["attention_mask"].sum(1).tolist() == [2, 8]


def test_epoch_batches() -> None:
    batches = epoch_batches(103, 20, seed=3, epoch=1)
    assert [len(batch) for batch in batches] == [20] * 5 + [3]
    assert sorted(torch.cat(batches).tolist()) == list(range(103))
    assert batches[0].dtype == torch.int64
    same = epoch_batches(103, 20, seed=3, epoch=1)
    assert all(torch.equal(a, b) for a, b in zip(batches, same, strict=True))
    # Neither the batch size nor earlier draws change the order, seed and epoch are not one number.
    orders = {tuple(torch.cat(epoch_batches(103, 20, s, e)).tolist()) for s, e in ((3, 1), (1, 3), (3, 2))}
    assert len(orders) == 3
    assert torch.equal(torch.cat(batches), torch.cat(epoch_batches(103, 7, 3, 1)))
    assert epoch_batches(0, 4, 0, 0) == []
    assert torch.cat(epoch_batches(8, 8, seed=3, epoch=1)).tolist() == [2, 1, 4, 0, 5, 7, 6, 3]


def test_length_groups_cost_as_little_as_the_best_cut() -> None:
    lengths = torch.tensor([3, 40, 4, 11, 38, 3, 12])

    def cost(groups: list[torch.Tensor]) -> int:
        return sum(len(group) * int(lengths[group].max()) + 10 for group in groups)

    groups = tokens.length_groups(lengths, overhead=10)
    assert sorted(torch.cat(groups).tolist()) == list(range(7))
    order, best = lengths.argsort(descending=True), math.inf
    for cuts in range(2**6):
        ends = [i + 1 for i in range(6) if cuts >> i & 1]
        best = min(best, cost(list(order.tensor_split(ends))))
    assert cost(groups) == best < cost([order])


# --- scores -------------------------------------------------------------------------------------


def logits_of(predictions: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[predictions] * 3.0 - 1.0


# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
PREDICTED = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_scores_worked_out_by_hand() -> None:
    logits = logits_of(PREDICTED)
    matthews = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert score(GLUE["cola"].spec, logits, LABELS) == {"matthews_correlation": pytest.approx(matthews)}
    assert score(GLUE["sst2"].spec, logits, LABELS) == {"accuracy": pytest.approx(0.7)}
    both = score(GLUE["mrpc"].spec, logits, LABELS)
    assert list(both) == ["f1", "accuracy"]
    assert both == {"f1": pytest.approx(2 * 3 / (2 * 3 + 1 + 2)), "accuracy": pytest.approx(0.7)}


def test_f1_is_that_of_label_one() -> None:
    turned = score(GLUE["qqp"].spec, logits_of([1 - p for p in PREDICTED]), 1 - LABELS)
    assert turned["f1"] == pytest.approx(2 * 4 / (2 * 4 + 2 + 1))


def test_three_classes() -> None:
    labels, predicted = np.array([0, 1, 2, 2]), [0, 2, 2, 1]
    assert score(GLUE["mnli"].spec, logits_of(predicted, 3), labels) == {"accuracy": 0.5}


def test_regression_scores() -> None:
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 40).astype(np.float32)
    logits = (labels + rng.normal(0, 1, 40))[:, None]
    found = score(GLUE["stsb"].spec, logits, labels)

    def ranks(values: np.ndarray) -> np.ndarray:
        return values.argsort().argsort()

    assert found["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], labels)[0, 1], abs=1e-6)
    spearman = np.corrcoef(ranks(logits[:, 0]), ranks(labels))[0, 1]
    assert found["spearmanr"] == pytest.approx(spearman)
    assert found["spearmanr"] != pytest.approx(found["pearson"], abs=1e-4)
    assert score(GLUE["stsb"].spec, -logits, labels)["pearson"] == pytest.approx(-found["pearson"])


@pytest.mark.filterwarnings("error")
def test_a_constant_prediction_scores_zero() -> None:
    constant = logits_of([1] * 10)
    assert score(GLUE["cola"].spec, constant, LABELS) == {"matthews_correlation": 0.0}
    assert score(GLUE["mrpc"].spec, logits_of([0] * 10), LABELS)["f1"] == 0.0
    zeros = {"pearson": 0.0, "spearmanr": 0.0}
    targets = np.linspace(0, 5, 10, dtype=np.float32)
    assert score(GLUE["stsb"].spec, np.full((10, 1), 2.5), targets) == zeros
    assert score(GLUE["stsb"].spec, targets[:, None], np.full(10, 2.0)) == zeros


def test_scores_that_would_be_no_numbers() -> None:
    logits = logits_of(PREDICTED)
    logits[3, 0] = np.nan
    with pytest.raises(UserError, match="not finite for 1 of 10 examples.*learning_rate"):
        score(GLUE["cola"].spec, logits, LABELS)
    with pytest.raises(ValueError, match="logits"):
        score(GLUE["cola"].spec, logits_of(PREDICTED)[:-1], LABELS)
    with pytest.raises(ValueError, match="logits"):
        score(GLUE["mnli"].spec, logits_of(PREDICTED), LABELS)
