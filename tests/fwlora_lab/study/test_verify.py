"""Results that were changed, torn, swapped or replaced are found; whole ones are not.

pytest tests/fwlora_lab/study/test_verify.py
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from pathlib import Path

import pytest
from tiny import World, make_backbone

from fwlora_lab import files
from fwlora_lab.cli.main import main
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.errors import UserError
from fwlora_lab.models import weights
from fwlora_lab.models.weights import local_weights
from fwlora_lab.records.folder import ChangedRecord, RunFolder, find_records, load_record
from fwlora_lab.records.study_plan import StudyCell, StudyPlan, write_plan
from fwlora_lab.search import results
from fwlora_lab.search.run import run_search
from fwlora_lab.study.verify import verify
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_runs

PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> World:
    """Two seeds of a run, a search of one trial, and a plan."""
    world = World(tmp_path_factory.mktemp("world"))
    cfg = world.config("lora", training__epochs=1)
    train_runs([RunSpec(cfg, 0), RunSpec(cfg, 1)])
    plan = StudyPlan(
        study="s", command="fwlora compare", tasks=["t"], budgets=[1.0], methods={"lora": "LoRA"}, reference="lora",
        seeds=[0, 1], selection={}, cells=[StudyCell(task="t", budget=1.0, method="lora", run_id="lora")],
    )  # fmt: skip
    write_plan(world.results, plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_plot", lambda *_, **__: None)
        run_search(searched(world))
    return world


def searched(world: World) -> RunConfig:
    space = {"learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-1}}
    return world.config("lora", run_id="found", training__epochs=1, optuna={"n_trials": 1, "search_space": space})


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original.results, tmp_path / "results"))


def test_what_was_written_is_whole(folder, capsys):
    found = verify(folder)
    assert (found.faults, found.runs, found.without_hashes) == ([], 3, 0)
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 3 runs, 0 faults\n"


def test_every_flipped_byte_and_every_cut_is_found(folder):
    draw = random.Random(0)
    watched = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(".lock")]
    # What is made from the others is not watched: a search's tables, and the adapter's card.
    watched = [f for f in watched if f.name == "study.db" or (f.parent.name != "search" and f.name != "README.md")]
    assert {f.name for f in watched} >= {"record.json", "study.json", "study.db", "adapter_model.safetensors"}
    tried, harmless = 0, []
    for file in watched:
        whole = file.read_bytes()
        for place in [draw.randrange(len(whole)) for _ in range(20)]:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
            tried += 1
            if not verify(folder).faults:
                harmless.append(file.name)
        for place in [draw.randrange(len(whole)) for _ in range(10)]:
            file.write_bytes(whole[:place])
            tried += 1
            if not verify(folder).faults:
                harmless.append(file.name)
        file.write_bytes(whole)
    assert tried == 30 * len(watched)
    # SQLite keeps no hash of its pages: a flipped value in a free place, or in a text, leaves an intact database.
    assert set(harmless) <= {"study.db"} and harmless.count("study.db") < 30
    assert verify(folder).faults == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "lora/seed-1").rename(d / "lora/seed-5"), "is the record of lora seed 1, in the folder of"),
        (lambda d: (d / "lora").rename(d / "best"), "is the record of lora seed 0, in the folder of best seed 0"),
        (lambda d: (d / "lora/seed-0/predictions.npz").unlink(), "missing"),
        (lambda d: (d / "lora/seed-0/record.json").unlink(), "the record is missing"),
        (lambda d: (d / "lora/seed-0/notes.txt").write_text("a"), "not written by the run"),
    ],
)
def test_what_is_misplaced_or_missing_is_named(folder, capsys, change, said):
    change(folder)
    assert main(["verify", str(folder)]) == 2
    assert said in capsys.readouterr().out


def test_two_swapped_seeds_are_named(folder):
    one, two = folder / "lora/seed-0", folder / "lora/seed-1"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    assert [fault.path.parent for fault in verify(folder).faults] == [one, two]


def test_a_changed_score_is_not_trained_over_and_not_reported(folder, original, capsys):
    file = folder / "lora/seed-0/record.json"
    values = json.loads(file.read_text())
    values["epochs"][-1]["metrics"]["accuracy"] = 1.0
    file.write_text(json.dumps(values, indent=2))
    with pytest.raises(ChangedRecord, match="changed after its run wrote it"):
        load_record(file)
    assert [broken.path for broken in find_records(folder).broken] == [file]
    cfg = original.config("lora", training__epochs=1, results_dir=str(folder))
    with pytest.raises(ChangedRecord):
        train_runs([RunSpec(cfg, 0)])
    assert main(["report", str(folder)]) == 0
    assert "changed after its run wrote it" in (folder / "report.md").read_text()
    del values["sha256"], values["files"]  # as in records from before there were hashes
    file.write_text(json.dumps(values))
    found = verify(folder)
    assert (found.faults, found.without_hashes) == ([], 1)


def test_other_weights_in_the_encoders_folder_make_another_run(original, tmp_path):
    backbone = Path(make_backbone(tmp_path / "backbone"))
    cfg = original.config(
        "lora", training__epochs=1, results_dir=str(tmp_path / "r"), model__pretrained_id=str(backbone)
    )
    (record,) = train_runs([RunSpec(cfg, 0)])
    assert record.backbone.weights == local_weights(cfg.model) is not None
    assert train_runs([RunSpec(cfg, 0)]) == [record]
    other = Path(make_backbone(tmp_path / "other", dropout=0.2))
    shutil.copy(other / "config.json", backbone / "config.json")
    with pytest.raises(UserError, match="the encoder's files"):
        train_runs([RunSpec(cfg, 0)])


def test_a_large_files_hash_is_computed_once(original, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_LARGE", 0)
    monkeypatch.setattr(weights.constants, "HF_HOME", str(tmp_path / "cache"))
    cfg = original.config().model
    first = local_weights(cfg)
    monkeypatch.setattr(weights.hashlib, "file_digest", lambda *_: pytest.fail("the hash is known"))
    assert local_weights(cfg) == first
    monkeypatch.undo()
    assert local_weights(cfg) == first


def test_a_hub_model_has_no_hash(original):
    assert local_weights(with_values(original.config(), {"model.pretrained_id": "roberta-base"}).model) is None


def read_often(file: str, going: object, seen: object) -> None:
    while going.is_set():  # type: ignore[attr-defined]
        try:
            seen.put(load_record(file).command)  # type: ignore[attr-defined]
        except UserError as error:
            seen.put(f"error: {error}")  # type: ignore[attr-defined]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_record_that_is_replaced_is_never_absent(folder, original, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    run = RunFolder(folder, "lora", 0)
    cfg = original.config("lora", training__epochs=1, results_dir=str(folder))
    record = load_record(run.path)
    going, seen = PROCESSES.Event(), PROCESSES.SimpleQueue()
    going.set()
    reader = PROCESSES.Process(target=read_often, args=(str(run.path), going, seen))
    reader.start()
    read = [seen.get()]
    for i in range(150):
        run.write(record.model_copy(update={"command": f"writing {i}"}), cfg)
        while not seen.empty():
            read.append(seen.get())
    going.clear()
    reader.join()
    while not seen.empty():
        read.append(seen.get())
    assert len(set(read)) > 10 and not [text for text in read if text.startswith("error")]
    assert sorted(p.name for p in run.path.parent.iterdir() if not p.name.endswith(".lock")) == ["seed-0", "seed-1"]
