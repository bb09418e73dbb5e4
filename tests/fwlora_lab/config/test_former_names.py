"""Former names of keys and values are read as what they are called now, with one warning each.

pytest tests/fwlora_lab/config/test_former_names.py
"""

from __future__ import annotations

import pytest

from fwlora import config as core
from fwlora_lab.config import former_names
from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.config.keys import KEYS, search_key
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError

OLD = """\
run_id: old
method: proposed_fw_lora
model: {name: tiny, pretrained_id: minilm, lora: {rank: 2, alpha: 4}}
dataset: {name: offline, selection_fraction: 0.1}
training: {evaluate_on: selection}
fw_lora:
  lambda_fw: 3.0e-4
  warmup_steps: 0.3
  fisher_alpha: 0.9
  every: 2
  start: 1
  clip: 5.0
  coupling: decoupled
  norm: factors
  averaging: share
  weighting: share
"""
NEW = {
    "fw_lora.penalty_strength": 3e-4,
    "fw_lora.fisher_ema_decay": 0.9,
    "fw_lora.fisher_interval": 2,
    "fw_lora.fisher_start": 1,
    "fw_lora.max_weight_ratio": 5.0,
    "fw_lora.penalty_mode": "decoupled",
    "fw_lora.penalty_norm": "factors",
    "fw_lora.averaging": "normalized",
    "fw_lora.weighting": "importance",
    "dataset.validation_fraction": 0.1,
    "training.evaluate_on": "validation",
}


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(former_names, "_warned", set())


def value(cfg: RunConfig, key: str) -> object:
    block, leaf = key.split(".")
    return getattr(getattr(cfg, block), leaf)


def test_a_file_with_former_names(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    with pytest.warns(FutureWarning) as caught:
        cfg = load_run(str(path))
    assert {key: value(cfg, key) for key in NEW} == NEW
    assert len(caught) == len(NEW), "one warning for each former name"
    # The hash that version 0.1 gave this config: its records count as the same run.
    assert fingerprint(cfg) == "e950dd4f11963e73a7f07da957ac7b4ab79310399cfba8b0a96cf62ef5dc33b7"


def test_overrides_with_former_names():
    overrides = ["fw_lora.lambda_fw=0.5", "fw_lora.weighting=share", "dataset.selection_fraction=0.2"]
    with pytest.warns(FutureWarning, match="fw_lora.lambda_fw is now called fw_lora.penalty_strength"):
        cfg = load_run("demo-fw_lora", overrides)
    assert (cfg.fw_lora.penalty_strength, cfg.fw_lora.weighting, cfg.dataset.validation_fraction) == (
        0.5,
        "importance",
        0.2,
    )


@pytest.mark.parametrize("name", ["lambda_fw", "fw_lora.lambda_fw", "penalty_strength"])
def test_a_search_space_with_a_former_name(name):
    assert search_key(name) == "fw_lora.penalty_strength"


def test_a_former_name_beside_its_present_one_is_a_fault(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(OLD.replace("  every: 2\n", "  every: 2\n  fisher_interval: 3\n"))
    with (
        pytest.raises(UserError, match="both.yaml:10: fw_lora.every: .*former name of fw_lora.fisher_interval"),
        pytest.warns(FutureWarning),
    ):
        load_run(str(path))


def test_the_core_and_the_lab_read_a_former_name_alike():
    own = {key: new for key, new in former_names.FORMER_KEYS.items() if key.startswith("fw_lora.")}
    assert len(own) == 7
    for key, new in own.items():
        assert f"fw_lora.{core.FORMER_NAMES[key.removeprefix('fw_lora.')]}" == new


def test_names_there_and_back():
    tree = {"fw_lora": {"norm": "update", "weighting": "share"}, "training": {"evaluate_on": "dev"}}
    present = former_names.with_present_names(tree)
    assert present["fw_lora"] == {"penalty_norm": "update", "weighting": "importance"}
    assert former_names.with_stored_names(present) == tree and tree["fw_lora"]["norm"] == "update"
    assert set(former_names.FORMER_KEYS.values()) <= set(KEYS) and not set(former_names.FORMER_KEYS) & set(KEYS)
