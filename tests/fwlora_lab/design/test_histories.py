"""Research histories in the public format: each becomes the right configs, or is refused for the right reason.

pytest tests/fwlora_lab/design/test_histories.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fwlora_lab.catalog.tasks import TASKS
from fwlora_lab.cli.main import main
from fwlora_lab.config.checks import check_warmup
from fwlora_lab.config.load import load_run

SHA = "8ccc9b6f36199bec6961081d44eb72fb3f7353f3"
DEBERTA = {"id": "microsoft/deberta-v3-base", "author": "microsoft", "sha": SHA, "private": False, "siblings": []}


def history(
    proposed: Any, compared: Any = "LoRA", model: str = "roberta-base", data: str = "CoLA", **more: Any
) -> dict:
    """A history with one proposed and one comparative method, in either generation's form of a method."""
    design = {
        "experiment_summary": "We compare adapters at equal size.",
        "evaluation_metrics": [{"name": "Matthews Correlation", "description": "correlation of the labels"}],
        "proposed_method": proposed,
        "comparative_methods": [compared],
        "models_to_use": [model],
        "datasets_to_use": [data],
        "hyperparameters_to_search": {},
        **more,
    }
    return {"research_topic": "adapters", "experimental_design": design, "experiment_runs": []}


def config_of(name: str, description: str, **training: Any) -> dict[str, Any]:
    """A method as the second generation writes it."""
    return {"method_name": name, "description": description, "training_config": training}


def run(tmp_path: Path, data: dict, *flags: str) -> tuple[int, dict[str, dict]]:
    """The command's exit code, and the configs it wrote by run id."""
    source, out = tmp_path / "history.json", tmp_path / "out"
    source.write_text(json.dumps(data), encoding="utf-8")
    code = main(["generate", str(source), "-o", str(out), *flags])
    found = sorted(out.iterdir()) if out.exists() else []
    return code, {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in found}


LIKE_LORA = "Extends LoRA: a generalised prompt module beside LoRA's pair. Unlike AdaLoRA, it keeps one rank. {}"
# What is proposed, and the nearest known methods that the message names.
UNKNOWN: dict[str, tuple[Any, str]] = {
    "a name like LoRA's": (config_of("GLoRA", LIKE_LORA), "lora"),
    "a name with AdaLoRA in its description": (config_of("IncreLoRA", "Grows ranks where AdaLoRA prunes."), "adalora"),
    "a name with FW-LoRA in its description": (config_of("LoRA-FA", "Freezes A; FW-LoRA and LoRA do not."), "lora"),
    "another sort of adapter": (config_of("IA3", "Rescales activations. Cheaper than LoRA."), "known: lora"),
    "a known name in brackets": (config_of("LoRA (DoRA)", "Splits magnitude from direction."), "lora"),
    "a known name with a sign": (config_of("LoRA+", "LoRA with two learning rates."), "lora"),
    "a known name with a restriction": (config_of("FW-LoRA without warm-up", "FW-LoRA, K = 0."), "fw_lora"),
    "a text on another method": ("Houlsby adapters after each block. LoRA is the baseline.", "known: lora"),
    "a text that begins with LoRA": ("LoRA is a popular method, but uniform. We propose BLoRA.\n" + "x" * 400, "lora"),
    "a text that begins with FW-LoRA": ("FW-LoRA is a penalty by F. We propose SparseLoRA, without F.", "lora"),
    "a text that names a method later": ("A weighting of LoRA by Fisher information, FW-LoRA.", "known: lora"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_proposed_method_is_named_and_its_runs_are_left_out(tmp_path, capsys, case):
    proposed, nearest = UNKNOWN[case]
    name = proposed["method_name"] if isinstance(proposed, dict) else proposed[:20]
    code, made = run(tmp_path, history(proposed))
    told = capsys.readouterr().err
    assert code == 1 and list(made) == ["comparative-1-roberta-base-CoLA"]
    assert made["comparative-1-roberta-base-CoLA"]["method"] == "baseline_lora"
    assert "unknown method" in told and name in told and "proposed_method" in told and nearest in told
    assert "left out" in told


def test_the_check_of_an_unknown_method_writes_nothing(tmp_path, capsys):
    code, made = run(tmp_path, history("GLoRA"), "--check")
    assert code == 1 and made == {} and "'GLoRA' is not a method that is known here" in capsys.readouterr().err


def test_a_history_of_unknown_methods_only_is_refused(tmp_path, capsys):
    code, made = run(tmp_path, history("GLoRA", "DoRA"))
    told = capsys.readouterr().err
    assert code == 2 and made == {} and "'GLoRA'" in told and "'DoRA'" in told


def test_listed_runs_of_an_unknown_method_are_left_out(tmp_path):
    data = history("GLoRA", "LoRA+")
    data["experimental_design"]["comparative_methods"].append("LoRA")
    names = {"a": "proposed", "b": "GLoRA", "c": "comparative-1", "d": "LoRA+", "e": "LoRA", "f": "comparative-2"}
    data["experiment_runs"] = [
        {"run_id": i, "method_name": m, "model_name": "roberta-base", "dataset_name": "CoLA"} for i, m in names.items()
    ]
    code, made = run(tmp_path, data)
    assert code == 1 and {i: cfg["method"] for i, cfg in made.items()} == {"e": "baseline_lora", "f": "baseline_lora"}


KNOWN: dict[str, tuple[Any, str]] = {
    "the request's way": ("Fisher-Weighted LoRA (FW-LoRA) is a replacement for LoRA.\nAdaLoRA moves ranks.", "fw_lora"),
    "a description of other methods": (config_of("FW-LoRA", "Not GLoRA, not AdaLoRA."), "fw_lora"),
    "words around the name": (config_of("Proposed FW-LoRA", ""), "fw_lora"),
    "another spelling": (config_of("Fisher Weighted LoRA", ""), "fw_lora"),
    "an extension of ours": (config_of("SVD-LoRA", "LoRA in AdaLoRA's form."), "svd_lora"),
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_known_proposed_method(tmp_path, capsys, case):
    proposed, method = KNOWN[case]
    code, made = run(tmp_path, history(proposed, config_of("LoRA baseline (rank 8)", "plain")))
    assert code == 0, capsys.readouterr().err
    assert made["proposed-roberta-base-CoLA"]["method"].endswith(method)
    assert made["comparative-1-roberta-base-CoLA"]["method"] == "baseline_lora"


@pytest.mark.parametrize("written", ["DeBERTa-v3-base", "deberta_v3_base (184M)", "microsoft/deberta-v3-base"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_models_resource_gives_its_id_and_commit(tmp_path, written, inside):
    resources = {"hugging_face": {"models": [{"id": "a/deberta-v3-small"}, DEBERTA], "datasets": []}}
    data = history("FW-LoRA", model=written)
    (data["experimental_design"] if inside else data)["external_resources"] = resources
    code, made = run(tmp_path, data)
    assert code == 0 and len(made) == 2
    for cfg in made.values():
        assert cfg["model"]["pretrained_id"] == "microsoft/deberta-v3-base" and cfg["model"]["revision"] == SHA


def test_a_resource_of_another_model_is_not_used(tmp_path):
    two = [{**DEBERTA, "id": "x/twin"}, {**DEBERTA, "id": "y/twin"}, DEBERTA]
    for model in ("twin", "deberta-v3", "other/deberta-v3-base"):  # ambiguous, a part of the name, another owner
        _, made = run(tmp_path, history("FW-LoRA", model=model, external_resources={"hugging_face": {"models": two}}))
        run_id = f"proposed-{model.replace('/', '-')}-CoLA"
        assert made[run_id]["model"]["pretrained_id"] == model and "revision" not in made[run_id]["model"]


def test_a_catalogued_model_keeps_the_historys_own_commit(tmp_path):
    for sha, written in ((SHA, SHA), ("e2da8e2f811d1448a5b465c236feacd80ffbac7b", None)):  # the second is pinned here
        folder = tmp_path / sha[:4]
        folder.mkdir()
        models = [{"id": "FacebookAI/roberta-base", "sha": sha}]
        _, made = run(folder, history("FW-LoRA", external_resources={"hugging_face": {"models": models}}))
        model = made["proposed-roberta-base-CoLA"]["model"]
        assert (model["pretrained_id"], model.get("revision")) == ("roberta-base", written)


@pytest.mark.parametrize(
    ("training", "space", "k"),
    [
        ({}, {}, 0.25),  # 804 steps of CoLA: 500 would leave 304
        ({"epochs": 10}, {}, 500),  # 2,680 steps
        ({"epochs": 1, "batch_size": 64}, {}, 0.25),  # 134 steps
        ({}, {"batch_size": "16,64", "learning_rate": "1e-3-1e-2"}, 0.25),
        ({"warmup_steps": 100}, {}, 0.25),  # AIRAS' name for the learning rate's warm-up
        ({}, {"warmup_steps": "20-80"}, 50),
    ],
)
def test_our_own_defaults_fit_the_run_that_the_history_states(tmp_path, capsys, training, space, k):
    data = history(config_of("FW-LoRA", "", **training), hyperparameters_to_search=space)
    code, made = run(tmp_path, data, *([] if "warmup_steps" in training else ["--check"]))
    assert code == 0, capsys.readouterr().err
    code, made = run(tmp_path, data)
    cfg = load_run(str(tmp_path / "out" / "proposed-roberta-base-CoLA.yaml"))
    assert cfg.fw_lora.warmup_steps == k and type(cfg.fw_lora.warmup_steps) is type(k)
    examples = TASKS["cola"].train_examples
    assert examples is not None
    steps = cfg.training.epochs * -(-examples // cfg.training.batch_size)
    check_warmup(cfg, steps)
    if "learning_rate" in space:
        assert 1e-3 <= cfg.training.learning_rate <= 1e-2


def test_a_k_that_the_history_states_stays(tmp_path, capsys):
    data = history("FW-LoRA", data="RTE")
    data["research_hypothesis"] = {"method": "F is measured for K ≈ 500 steps."}
    code, made = run(tmp_path, data)
    assert code == 0 and made["proposed-roberta-base-RTE"]["fw_lora"]["warmup_steps"] == 500
    assert "K = 500 leaves no step of the 234 of rte" in capsys.readouterr().err


def test_another_fault_does_not_hide_that_the_method_is_unknown(tmp_path, capsys):
    code, made = run(tmp_path, history("GLoRA", evaluation_metrics=["Accu\nracy"]))
    told = capsys.readouterr().err
    assert code == 2 and made == {} and "evaluation_metrics[0]" in told and "'GLoRA' is not a method" in told
