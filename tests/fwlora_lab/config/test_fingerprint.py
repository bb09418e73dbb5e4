"""Fingerprints of run configs stay what they were, so that existing records count as the same runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.config.load import load_run

RUN = """\
run_id: a-run
method: proposed_fw_lora
model: {name: roberta-base, pretrained_id: FacebookAI/roberta-base, parameter_budget_percent: 0.5}
dataset: {name: glue, subset: cola}
"""
# Overrides of the run above -> its fingerprint. All hashes are from the code that wrote the first records (commit
# eac8abe), under the names that keys and values had then. None may ever change.
FIRST = {
    "":
        "7d95c3a18021f458def75ce39f2a1e8d78aa589e7ae7088a9f25a716c89c6050",
    "method=lora":
        "80158160742d12d311ea0e2d39ebe1489a3304f400a697b9676983e7d309867c",
    "method=baseline_lora":
        "80158160742d12d311ea0e2d39ebe1489a3304f400a697b9676983e7d309867c",
    "method=adalora":
        "46fb237c9fa14d3e56a9607aa02db17c1eeeee5ea728c9e0876aa407ec2154d2",
    "method=svd_lora":
        "1d6657e1f38322f3c308d810dd865976949462d6c9b05c77206fc506c841b37a",
    "training.engine=peft":
        "5852119f321a0abac0e9b61c8f5062a418b2c3e9718512dc8cf7b94904925b0c",
    "method=lora training.engine=peft":
        "cc08d6f9b35c8f4e4fa61292f41340d065004f9371113228a1654f7f2dadb01c",
    "model.lora.rank=8":
        "60b02792715e04bd9cc83730dcd580bb1bbc5ef8e1fc8b9b6e3de5f61c389574",
    "model.lora.rank=8 model.lora.alpha=16.0":
        "60b02792715e04bd9cc83730dcd580bb1bbc5ef8e1fc8b9b6e3de5f61c389574",
    "model.lora.rank=8 model.lora.alpha=24.0":
        "aad7bc39c1a137430ca4f059ab9dd5a36dae5daa9a800368db78cc2f74314a99",
    "model.lora.alpha=16.0":
        "7d95c3a18021f458def75ce39f2a1e8d78aa589e7ae7088a9f25a716c89c6050",
    "model.lora.rank=8 model.parameter_budget_percent=null":
        "60b02792715e04bd9cc83730dcd580bb1bbc5ef8e1fc8b9b6e3de5f61c389574",
    "fw_lora.lambda_fw=0.01 fw_lora.warmup_steps=0.25 fw_lora.fisher_alpha=0.9":
        "2cba20851d1eb5d5f125b3036dd1fb33a9dcff9ea60e815e20a2604d153f8862",
    "fw_lora.averaging=share":
        "f9d365cdb9a75f9ce643ad037ed87673b522ec81491815c5c2300de10e3f689b",
    "fw_lora.weighting=power fw_lora.gamma=1.0 fw_lora.clip=8.0":
        "41769d9a2883f7aca5bffaff80b873fdb246302eca0ef108699ac126e902a49d",
    "fw_lora.weighting=uniform":
        "b3dd663888efd3dc768c7d1975eb6241252ac0b84b8c35cfc457cf302dcb1736",
    "fw_lora.weighting=rank fw_lora.normalize_weights=true":
        "f97e12a5da7a47b8d40ac43257cb8eea2043e4c9094c4e411a7bf08ecded5527",
    "fw_lora.estimator=sketch fw_lora.every=5 fw_lora.sketch_columns=8":
        "7d5d1658993c9d07f5db2021ee3f5d9c19c2e2d59d93caa960a5eeb936ee0f8e",
    "fw_lora.estimator=adapter fw_lora.every=5":
        "8761d4373dbe8e238e70327cbe12ff7fa077b0002cbabef88d198ac056ace518",
    "fw_lora.coupling=decoupled fw_lora.norm=factors fw_lora.start=10":
        "2a05aebd0bce3e1fe442a0cef2463ac1190d9ee16fd4e7f22b1228370bd6597e",
    "dataset.selection_fraction=0.1 training.evaluate_on=selection":
        "d3e62788d4ae4d03f929c813d30953b45603d5753db7761621582a4eecd26210",
    "dataset.selection_fraction=0.1":
        "e3f79b5d6928ec88ceeacc8000363465d2182fee982ccbbc89688b5a8422e311",
    "dataset.train_examples=100 dataset.seed=3":
        "d66043e688877c325d533fab7a0d9e352d9ece672bf793601c4f8c85996133db",
    "dataset.name=offline":
        "9f00142aa7f2b4dd9b48034fec3549749447bf21a22132612b4f27ab9a0025a0",
    "dataset.root=/somewhere":
        "7d95c3a18021f458def75ce39f2a1e8d78aa589e7ae7088a9f25a716c89c6050",
    "training.seed=7 training.save_adapter=false results_dir=elsewhere model.name=other":
        "7d95c3a18021f458def75ce39f2a1e8d78aa589e7ae7088a9f25a716c89c6050",
    "model.pretrained_id=minilm":
        "cf5d8f44be2b6ec4146c30cefd0d23e59b4de72cca2e62a99c0493481092206a",
    "dataset.name=csv dataset.train_file=a.csv dataset.eval_file=b.csv "
    "dataset.text_column=text dataset.label_column=label":
        "e35de7d8edea85cf7081086aad5cf50f5e1d2ffbddf1d2b06f958aee54a7c8c8",
    "adalora.delta_t=10 method=adalora training.engine=peft":
        "2d85fc78bdd30d5020f5290a8274b712f658517e7b7464c5c9a994c02a375f75",
    "method=svd_lora adalora.orth_reg_weight=0.1 adalora.delta_t=10":
        "38c31d014ac950083f179499dca2eba946220d196f1301e1d2511e548c7f3a83",
    "training.epochs=5 training.batch_size=16 training.learning_rate=0.001 "
    "training.mixed_precision=no training.max_grad_norm=null":
        "5746200d9639222de0041c1e026480447138ca76ff640a948ee297a9ccd81fcd",
}  # fmt: skip
# The same settings under their present names.
RENAMED = {
    "fw_lora.lambda_fw=0.01 fw_lora.warmup_steps=0.25 fw_lora.fisher_alpha=0.9":
        "fw_lora.penalty_strength=0.01 fw_lora.warmup_steps=0.25 fw_lora.fisher_ema_decay=0.9",
    "fw_lora.averaging=share": "fw_lora.averaging=normalized",
    "fw_lora.weighting=power fw_lora.gamma=1.0 fw_lora.clip=8.0":
        "fw_lora.weighting=power fw_lora.gamma=1.0 fw_lora.max_weight_ratio=8.0",
    "fw_lora.estimator=sketch fw_lora.every=5 fw_lora.sketch_columns=8":
        "fw_lora.estimator=sketch fw_lora.fisher_interval=5 fw_lora.sketch_columns=8",
    "fw_lora.coupling=decoupled fw_lora.norm=factors fw_lora.start=10":
        "fw_lora.penalty_mode=decoupled fw_lora.penalty_norm=factors fw_lora.fisher_start=10",
    "dataset.selection_fraction=0.1 training.evaluate_on=selection":
        "dataset.validation_fraction=0.1 training.evaluate_on=validation",
}  # fmt: skip


def of(folder: Path, overrides: str) -> str:
    file = folder / "a-run.yaml"
    file.write_text(RUN)
    return fingerprint(load_run(str(file), overrides.split()))


@pytest.mark.filterwarnings("ignore:.*the former name is still read")
@pytest.mark.parametrize("overrides", FIRST)
def test_a_config_has_the_fingerprint_of_the_first_records(tmp_path: Path, overrides: str) -> None:
    assert of(tmp_path, overrides) == FIRST[overrides]


@pytest.mark.parametrize("former", RENAMED)
def test_a_renamed_setting_keeps_its_fingerprint(tmp_path: Path, former: str) -> None:
    assert of(tmp_path, RENAMED[former]) == FIRST[former]


def test_what_changes_no_result_changes_no_fingerprint_and_all_else_does() -> None:
    same = [
        {"", "model.lora.alpha=16.0", "dataset.root=/somewhere",
         "training.seed=7 training.save_adapter=false results_dir=elsewhere model.name=other"},
        {"method=lora", "method=baseline_lora"},
        {"model.lora.rank=8", "model.lora.rank=8 model.lora.alpha=16.0",
         "model.lora.rank=8 model.parameter_budget_percent=null"},
    ]  # fmt: skip
    for overrides in same:
        assert len({FIRST[o] for o in overrides}) == 1
    assert len(set(FIRST.values())) == len(FIRST) - sum(len(overrides) - 1 for overrides in same)
