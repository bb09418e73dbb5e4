"""What version 0.1 left on disk is read by every part that reads records: records, study, report, compare.

pytest tests/fwlora_lab/records/test_former_format.py
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from fwlora_lab.analysis.claims import read_claims
from fwlora_lab.analysis.results import read_study
from fwlora_lab.cli.main import main
from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.config.load import load_run
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import find_records, load_record, status_of
from fwlora_lab.records.former_format import from_version_0_1
from fwlora_lab.records.study_plan import load_plan
from fwlora_lab.report.page import write_report

OLD = Path(__file__).parents[2] / "fixtures" / "v0.1"
STUDY = OLD / "old-study"
RECORDS = sorted(STUDY.glob("*/seed-*/record.json"))
FORMER_KEYS = {"lambda_fw", "fisher_alpha", "every", "start", "clip", "coupling", "norm", "selection_fraction"}
# The only column of the tables that has another name now.
RENAMED_COLUMNS = {"fisher_seconds": "warmup_seconds"}

pytestmark = pytest.mark.filterwarnings("ignore::fwlora_lab.config.former_names.FormerName")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the study's results folder."""
    return shutil.copytree(STUDY, tmp_path / "old-study")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_every_record_is_read() -> None:
    found, broken = find_records(STUDY)
    assert (len(found), broken) == (14, []) and len(RECORDS) == 14
    assert Counter(record.method for record in found) == {"lora": 5, "adalora": 4, "fw_lora": 5}
    for record in found:
        assert record.status == "complete" and record.steps == record.total_steps == 16
        assert len(record.epochs) == 2 and record.times is not None and record.matrices
        assert record.times.train_seconds == pytest.approx(record.times.warmup_seconds + record.times.steady_seconds)
        assert not FORMER_KEYS & (record.config["fw_lora"].keys() | record.config["dataset"].keys())


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: f"{f.parts[-3]}-{f.parts[-2]}")
def test_a_record_holds_the_numbers_of_its_file(file: Path) -> None:
    raw, record = json.loads(file.read_text()), load_record(file)
    assert (record.method, record.run_id, record.seed) == (raw["arm"], raw["run_id"], raw["seed"])
    assert [epoch.model_dump() for epoch in record.epochs] == raw["epochs"]
    assert [row.model_dump() for row in record.matrices] == raw["matrices"]
    assert record.times is not None and record.parameters is not None
    assert record.times.warmup_seconds == raw["times"]["fisher_seconds"]
    assert sorted(record.times.phases.values()) == sorted(raw["times"]["phases"].values())
    assert record.parameters.model_dump() == raw["parameters"]
    assert (record.config_fingerprint, record.warnings) == (raw["config_fingerprint"], raw["warnings"])


def test_the_engine_is_derived_from_the_config_and_the_warning() -> None:
    engines = {record.run_id: record.engine for record in find_records(STUDY).records}
    peft = {"offline-0.2-lora_peft", "offline-0.2-adalora_peft", "offline-0.2-fw_lora_peft", "demo-fallback"}
    assert {run_id for run_id, engine in engines.items() if engine == "peft"} == peft
    assert set(engines.values()) == {"lanes", "peft"} and len(engines) == 8
    fallback = load_record(STUDY / "demo-fallback" / "seed-0")
    assert fallback.config["training"]["engine"] == "lanes", "lanes were asked for"


def test_phases_and_splits_have_their_present_names() -> None:
    phases = {record.run_id: set(record.times.phases) for record in find_records(STUDY).records if record.times}
    assert phases["offline-0.2-fw_lora"] == {"warmup", "penalty"}
    assert phases["offline-0.2-lora"] == {"training"}
    assert load_record(STUDY / "demo-selection" / "seed-0").evaluated_on == "validation"


def test_renamed_settings_have_their_values() -> None:
    record = load_record(STUDY / "offline-0.2-fw_lora_peft" / "seed-0")
    settings = record.config["fw_lora"]
    assert (settings["penalty_strength"], settings["max_weight_ratio"], settings["penalty_mode"]) == (1e-3, 4.0, "loss")
    assert (settings["weighting"], settings["averaging"]) == ("importance", "normalized")


@pytest.mark.parametrize("content", ['{"arm": 3}', '{"arm": "lora", "config": 1, "times": [], "warnings": 2}'])
def test_a_malformed_old_record_is_named_as_broken(tmp_path: Path, content: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match="not a record of this version"):
        load_record(tmp_path)


def test_an_old_record_has_the_present_keys_and_no_others() -> None:
    present = from_version_0_1(json.loads(RECORDS[0].read_text()))
    # Version 0.1 knew none of these, and an empty value says so.
    since = {"measurement": None, "attempts": [], "files": None, "sha256": None}
    record = load_record(RECORDS[0]).model_dump(mode="json")
    assert present.keys() == record.keys() - since.keys()
    assert {key: record[key] for key in since} == since


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: f"{f.parts[-3]}-{f.parts[-2]}")
def test_an_old_run_config_is_the_same_run_today(file: Path) -> None:
    """The run is found as complete: a later version would not train it again."""
    cfg, record = load_run(str(file.with_name("config.yaml"))), load_record(file)
    assert fingerprint(cfg) == record.config_fingerprint
    here = cfg.model_copy(update={"results_dir": str(STUDY)})
    assert status_of(here, record.seed, record.data_fingerprint) == "complete"


def test_the_study_and_its_claims_are_read() -> None:
    plan = load_plan(STUDY)
    assert plan is not None and len(plan.cells) == 6 and plan.seeds == [0, 1]
    assert len(read_claims(plan.claims, "study.json: claims")) == 2
    study = read_study(STUDY)
    assert study.is_planned and study.count("complete") == len(study.runs) == 12
    assert study.notes == ("Not part of this study, and left out: demo-fallback (seed 0), demo-selection (seed 0).",)


def test_the_report_has_the_numbers_of_the_old_one(folder: Path) -> None:
    stored = {name: rows_of(STUDY / "comparison" / f"{name}.csv") for name in ("seeds", "comparisons", "verdicts")}
    write_report(folder)
    for name, rows in stored.items():
        present = rows_of(folder / "comparison" / f"{name}.csv")
        assert len(present) == len(rows) > 0
        for old, new in zip(rows, present, strict=True):
            renamed = {RENAMED_COLUMNS.get(key, key): value for key, value in old.items()}
            assert renamed.keys() <= new.keys() <= renamed.keys() | {"measurements", "doubts"}, name
            if renamed.get("metric") == "train_seconds" and name != "seeds":
                continue  # since version 0.2 seconds count by measurements, of which these records have too few
            for key, value in renamed.items():
                assert new[key] == value or float(new[key]) == pytest.approx(float(value), rel=1e-9), (name, key)


def test_compare_finds_nothing_missing_and_trains_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a run would be trained")

    monkeypatch.setattr("fwlora_lab.training.scheduler.train_runs", refuse)
    monkeypatch.setattr("fwlora_lab.study.run.train_runs", refuse)
    before = {file: file.read_bytes() for file in folder.glob("*/seed-*/record.json")}
    assert main(["compare", f"study={OLD / 'old-study.yaml'}", f"results_dir={folder}"]) == 0, capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.glob("*/seed-*/record.json")} == before
    study = read_study(folder)
    assert study.count("complete") == len(study.runs) == 12
