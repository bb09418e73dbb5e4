"""Where each value of a resolved run config comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwlora_lab.config.keys import KEYS, get_key
from fwlora_lab.config.load import load_run, origins_of
from fwlora_lab.errors import UserError


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> str:
    write(tmp_path / "base" / "small.yaml", "training:\n  epochs: 9\n  batch_size: 7\n")
    write(tmp_path / "parts" / "inner.yaml", "# @package model.lora\nrank: 4\n")
    return write(
        tmp_path / "run" / "mine.yaml",
        "defaults:\n"
        "  - /base/minilm\n"
        "  - /base/cola\n"
        "  - /base/small\n"
        "  - /parts/inner\n"
        "  - _self_\n"
        "run_id: mine\n"
        "method: lora\n"
        "training:\n"
        "  batch_size: 16\n"
        "  seed: ${dataset.seed}\n",
    )


def test_every_value_has_its_file_and_line_or_override_or_is_a_default(run: str, tmp_path: Path) -> None:
    overrides = [
        "dataset.root=/data",
        "+model.lora.dropout=0.1",
        "training.weight_decay=0.5",
        "training.weight_decay=0",
    ]
    origin = {row.key: (row.value, row.origin) for row in origins_of(run, overrides)}
    assert origin["run_id"] == ("mine", f"{run}:7")
    assert origin["training.batch_size"] == (16, f"{run}:10"), "the run's own key wins over those that it names"
    assert origin["training.epochs"] == (9, f"{tmp_path / 'base' / 'small.yaml'}:2"), "a later file wins"
    assert origin["model.lora.rank"] == (4, f"{tmp_path / 'parts' / 'inner.yaml'}:2"), "placed by its @package"
    assert origin["training.seed"] == (0, f"{run}:11"), "the line where the reference is written"
    assert origin["dataset.subset"] == ("cola", "packaged base/cola.yaml:5")
    assert origin["optuna.search_space.learning_rate.low"] == (2e-4, "packaged base/minilm.yaml:21")
    assert origin["dataset.root"] == ("/data", "override `dataset.root=/data`")
    assert origin["model.lora.dropout"] == (0.1, "override `+model.lora.dropout=0.1`")
    assert origin["training.weight_decay"] == (0.0, "override `training.weight_decay=0`"), "the last override wins"
    assert origin["training.lr_scheduler"] == ("linear", "default")


def test_the_rows_are_the_whole_resolved_config(run: str) -> None:
    cfg, rows = load_run(run), origins_of(run)
    assert [row.key for row in rows if not row.key.startswith("optuna.search_space.")] == [
        key for key, is_block in KEYS.items() if not is_block and key != "optuna.search_space"
    ]
    data = cfg.model_dump()
    assert all(row.value == get_key(data, row.key) for row in rows)
    assert len({row.key for row in rows}) == len(rows)


def test_an_override_of_a_block_is_the_origin_of_all_in_it(run: str) -> None:
    text = "~optuna"
    assert {row.key: row.origin for row in origins_of(run, [text])}["optuna"] == "override `~optuna`"
    space = "+optuna.search_space.lora_alpha={type: uniform, low: 1.0, high: 9.0}"
    rows = {row.key: (row.value, row.origin) for row in origins_of(run, [space])}
    assert rows["optuna.search_space.lora_alpha.high"] == (9.0, f"override `{space}`")
    assert rows["optuna.search_space.learning_rate.type"][1] == "packaged base/minilm.yaml:20"


def test_a_run_with_faults_has_no_origins(run: str) -> None:
    with pytest.raises(UserError, match="training.epochs: must be a whole number"):
        origins_of(run, ["training.epochs=x"])


@pytest.mark.filterwarnings("ignore:.*the former name is still read")
def test_a_former_name_is_the_origin_of_its_present_one(tmp_path: Path) -> None:
    run = write(
        tmp_path / "old.yaml",
        "run_id: old\nmethod: fw_lora\nmodel: {name: m, pretrained_id: minilm, lora: {rank: 4}}\n"
        "dataset: {name: offline}\nfw_lora:\n  every: 2\n",
    )
    rows = {row.key: (row.value, row.origin) for row in origins_of(run, ["fw_lora.lambda_fw=0.5"])}
    assert rows["fw_lora.fisher_interval"] == (2, f"{run}:6")
    assert rows["fw_lora.penalty_strength"] == (0.5, "override `fw_lora.penalty_strength=0.5`")
