"""Tasks and encoders are data, and somebody's own are added in one file, without a change to this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from fwlora_lab.catalog import extensions
from fwlora_lab.catalog.encoders import ENCODERS, ROLES, EncoderInfo, aliases, pinned_revisions, register_encoder
from fwlora_lab.catalog.tasks import (
    GLUE,
    SOURCES,
    TASKS,
    DataSource,
    TaskInfo,
    TaskSpec,
    register_task,
    source_of,
    tasks_of,
)
from fwlora_lab.config.checks import warnings_of
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.data.load import load_task
from fwlora_lab.data.metrics import score
from fwlora_lab.errors import UserError

TOY = '''
"""Whether a sentence is about a dog."""

import numpy as np

from fwlora_lab.catalog.tasks import DataSource, TaskInfo, TaskSpec, register_task
from fwlora_lab.data.task import Examples

SPEC = TaskSpec("dogs", "classification", ("other", "dog"), 1, ("accuracy",), "accuracy")


def load(dataset):
    draw = np.random.default_rng(dataset.seed)
    labels = draw.integers(0, 2, 60)
    texts = tuple("the dog sees a bird" if label else "the cat sees a tree" for label in labels)
    both = Examples(texts, labels.astype(np.int64))
    return SPEC, both.take(np.arange(40)), both.take(np.arange(40, 60)), "sentences about dogs"


register_task(TaskInfo(SPEC, DataSource("dogs", load), train_examples=40))
'''


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    registries: list[dict[str, Any]] = [TASKS, SOURCES, ENCODERS]  # type: ignore[list-item]
    before = [(registry, dict(registry)) for registry in registries]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)
    extensions._load.cache_clear()


def task(name: str = "toy", source: DataSource | None = None) -> TaskInfo:
    spec = TaskSpec(name, "classification", ("a", "b"), 1, ("accuracy",), "accuracy")
    return TaskInfo(spec, source or DataSource(name, lambda dataset: (spec, None, None, "nowhere")))


# --- what is in the catalog ---------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_complete(name: str) -> None:
    info = TASKS[name]
    assert info.name == name and SOURCES[info.source.name] == info.source
    assert info.spec.primary in info.spec.metrics
    assert bool(info.spec.labels) == (info.spec.kind == "classification")
    assert callable(info.source.resolve_loader())
    outputs, labels = max(1, len(info.spec.labels)), np.array([0, 1, 1, 0])
    assert list(score(info.spec, np.eye(4)[:, :outputs], labels)) == list(info.spec.metrics)


def test_the_tasks_of_a_source() -> None:
    assert list(tasks_of(SOURCES["glue"])) == list(GLUE)
    assert list(tasks_of(SOURCES["csv"])) == []
    assert source_of("glue") is SOURCES["glue"] and source_of("glu") is None


def test_a_role_means_paths_that_name_it_alone() -> None:
    """Two roles share a path only where an architecture has one matrix for both."""
    for first in ROLES:
        for second in ROLES:
            assert first == second or ROLES[first] & ROLES[second] <= {"attn.Wqkv"}


def test_pins_and_aliases_come_from_the_encoders() -> None:
    assert aliases() == {"roberta-base": "FacebookAI/roberta-base"}
    assert pinned_revisions() == {
        "FacebookAI/roberta-base": "e2da8e2f811d1448a5b465c236feacd80ffbac7b",
        "sentence-transformers/all-mpnet-base-v2": "e8c3b32edf5434bc2275fc9bab85f82640a19130",
        "microsoft/mpnet-base": "6996ce1e91bd2a9c7d7f61daec37463394f73f09",
    }


# --- a task of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (task("cola", SOURCES["glue"]), "'cola' is already registered"),
        (task("a b"), "letters, digits"),
        (task("toy", DataSource("offline", lambda dataset: None)), "another loader"),  # type: ignore[arg-type,return-value]
        (task("toy", SOURCES["offline"]), "has the task's name"),
    ],
)
def test_a_task_that_cannot_be_told_from_others_is_refused(info: TaskInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_task(info)


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of one's own in which a task is registered; its folder is on the path, nothing else is done."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "toy_task_of_mine.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setenv("FWLORA_EXTENSIONS", "toy_task_of_mine")
    monkeypatch.delitem(sys.modules, "toy_task_of_mine", raising=False)
    return str(tmp_path / "code")


def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "run_id: mine\nmethod: lora\n"
        f"model: {{name: tiny, pretrained_id: {tiny.make_backbone(tmp_path / 'backbone')}, lora: {{rank: 2}}}}\n"
        "dataset: {name: dogs, seed: 3, max_length: 16}\ntraining: {epochs: 1, batch_size: 8}\n"
    )
    return str(path)


def test_a_run_config_can_name_an_extensions_task(extension: str, tmp_path: Path) -> None:
    cfg = load_run(config(tmp_path))
    assert isinstance(cfg, RunConfig) and warnings_of(cfg) == []
    data = load_task(cfg.dataset)
    assert (data.spec.name, len(data.train), len(data.dev), data.source) == ("dogs", 40, 20, "sentences about dogs")
    run = str(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="dataset.eval_split: 'tests' has no public labels or does not exist"):
        load_run(run, ["dataset.eval_split=tests"])
    ignored = warnings_of(load_run(run, ["dataset.root=/x"]))
    assert ignored == ["dataset.root = /x is ignored: dataset.name is dogs, not glue"]


def test_an_extensions_task_is_trained_from_the_command_line(extension: str, tmp_path: Path) -> None:
    run = config(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([extension, *sys.path])}
    arguments = ["train", f"run={run}", f"results_dir={tmp_path / 'results'}"]
    command = [sys.executable, "-c", "import sys; from fwlora_lab.cli.main import main; sys.exit(main())", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(next((tmp_path / "results").rglob("record.json")).read_text())
    assert record["status"] == "complete" and record["data_source"] == "sentences about dogs"
    assert 0 <= record["epochs"][-1]["metrics"]["accuracy"] <= 1


def test_without_the_extension_its_task_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset.name: the text 'dogs' is not allowed: use one of glue, offline, csv"):
        load_run(config(tmp_path))


@pytest.mark.parametrize("code", ["import nothing_of_this_name", "raise RuntimeError('broken')", "a syntax error"])
def test_an_extension_that_cannot_be_imported_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    (tmp_path / "broken_extension.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FWLORA_EXTENSIONS", "broken_extension")
    with pytest.raises(UserError, match="FWLORA_EXTENSIONS: the module 'broken_extension' cannot be imported"):
        extensions.load_extensions()


# --- an encoder of one's own --------------------------------------------------------------------


def test_a_registered_encoder_is_pinned_and_its_matrices_are_known() -> None:
    mine = register_encoder(
        EncoderInfo("mine", "lab/mine", 1_000_000, 2, 8, 32, hub_id="lab/mine-base", revision="0123456789" * 4)
    )
    assert ENCODERS["mine"] is mine
    assert aliases()["lab/mine"] == "lab/mine-base" and pinned_revisions()["lab/mine-base"] == "0123456789" * 4
    assert mine.parameters_per_rank(["query", "output"]) == 2 * ((8 + 8) + (8 + 32))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (EncoderInfo("minilm", "lab/mine", 1, 1, 1, 1), "already registered"),
        (EncoderInfo("mine", "roberta-base", 1, 1, 1, 1), "already registered"),
        (EncoderInfo("Mine", "lab/mine", 1, 1, 1, 1), "lower case"),
        (EncoderInfo("mine", "lab/mine", 1, 1, 1, 1, revision="main"), "not a full commit hash"),
    ],
)
def test_an_encoder_that_could_not_be_found_again_is_refused(encoder: EncoderInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_encoder(encoder)
