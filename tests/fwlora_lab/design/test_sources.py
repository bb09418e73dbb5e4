"""Where the value of a key comes from, and which source wins.

pytest tests/fwlora_lab/design/test_sources.py
"""

from __future__ import annotations

import yaml
from designs import DESIGN, configs, design

from fwlora_lab.design.draft import Sourced
from fwlora_lab.design.generate import generate_configs
from fwlora_lab.design.plan import plan_design
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import ExperimentDesign


def test_what_is_stated_wins_and_has_no_comment():
    request = design(
        hypothesis="5 epochs, batch 8, lr 1e-3.",
        settings={"epochs": 2, "lora_rank": 4},
        comparative_methods=[{"name": "AdaLoRA", "settings": {"batch_size": 64}}],
        hyperparameters_to_search={"weight_decay": "0.02"},
    )
    first, second = generate_configs(request).configs.values()
    lines = first.splitlines()
    assert "  epochs: 2" in lines and "    rank: 4" in lines and "  weight_decay: 0.02" in lines
    assert "  batch_size: 8  # hypothesis, in prose" in lines
    assert "  learning_rate: 0.001  # hypothesis, in prose" in lines
    assert "run_id: proposed-roberta-base-SST-2  # from the method, the model and the data set" in lines
    assert "    alpha: 8  # twice the rank, LoRA's custom" in lines
    assert "  max_length: 128  # convention of the task" in lines
    assert "  fisher_ema_decay: 0.98  # default of FW-LoRA" in lines
    assert "  batch_size: 64" in second.splitlines() and "fw_lora:" not in second
    stated = {"method:", "name:", "pretrained_id:", "subset:", "epochs:", "rank:", "weight_decay:"}
    for line in lines[1:]:
        key, value = line.split(maxsplit=1) if " " in line.strip() else (line.strip(), "")
        assert not value or "  # " in line or key in stated, line


def test_an_example_config_with_a_list_of_search_spaces():
    spaces = [{"param_name": "learning_rate", "distribution_type": "loguniform", "low": 1e-5, "high": 1e-2}]
    example = {"optuna": {"n_trials": 7, "search_spaces": spaces}}
    request = DesignRequest(
        "d", ExperimentDesign.model_validate(DESIGN), examples={"proposed-roberta-base-SST-2": example}
    )
    for text in generate_configs(request).configs.values():
        optuna = yaml.safe_load(text)["optuna"]
        assert optuna["n_trials"] == 7
        assert optuna["search_space"] == {"learning_rate": {"type": "loguniform", "low": 1e-5, "high": 1e-2}}


def test_a_search_keeps_a_part_of_train_and_fits_the_method():
    space = {"learning_rate": "1e-4-3e-4", "lambda_fw": "1e-5-1e-4", "adalora.beta1": "0.5-0.9"}
    fw, adalora, lora = configs(hyperparameters_to_search=space, n_trials=9)
    assert [list(c["optuna"]["search_space"]) for c in (fw, adalora, lora)] == [
        ["learning_rate", "penalty_strength"],
        ["learning_rate", "adalora.beta1"],
        ["learning_rate"],
    ]
    for cfg in (fw, adalora, lora):
        assert cfg["optuna"]["n_trials"] == 9 and cfg["dataset"]["validation_fraction"] == 0.1
    assert "validation_fraction" not in configs()[0]["dataset"] and "optuna" not in configs()[0]


def test_of_several_sources_the_first_that_has_a_value_wins():
    """Each source in its turn, the ones before it taken away."""
    stated = {"settings": {"epochs": 2}, "n_trials": 3}
    prose = {"hypothesis": "We train for 4 epochs."}
    example = {"training": {"epochs": 5}, "optuna": {"n_trials": 6}}
    filled = {"settings.epochs": 7, "n_trials": 8}
    searched = {"hyperparameters_to_search": {"learning_rate": "1e-4-1e-3"}}

    def first(changes: dict, examples: dict, filled: dict) -> tuple[Sourced, Sourced]:
        given = ExperimentDesign.model_validate({**DESIGN, **searched, **changes})
        request = DesignRequest("d", given, examples=examples, filled=filled, writer="m")
        draft = plan_design(request).drafts[0]
        return draft.values["training.epochs"], draft.n_trials

    examples = {"proposed-roberta-base-SST-2": example}
    of_example = "example output of the request"
    example_keys = [f"example:proposed-roberta-base-SST-2.{key}" for key in ("training.epochs", "optuna.n_trials")]
    assert first({**stated, **prose}, examples, filled) == (
        Sourced(2, source_location="settings.epochs"),
        Sourced(3, source_location="n_trials"),
    )
    assert first(prose, examples, filled) == (
        Sourced(4, "hypothesis, in prose", "hypothesis"),
        Sourced(6, of_example, example_keys[1]),
    )
    assert first({}, examples, filled)[0] == Sourced(5, of_example, example_keys[0])
    assert first({}, {}, filled) == (
        Sourced(7, source_location="settings.epochs"),
        Sourced(8, source_location="n_trials"),
    )
    assert first({}, {}, {}) == (Sourced(3, "default of run configs"), Sourced(20, "default of run configs"))


def test_what_a_language_model_searches_is_neither_stated_nor_in_an_example():
    space = {"type": "loguniform", "low": 1e-5, "high": 1e-2}
    request = DesignRequest(
        "d",
        ExperimentDesign.model_validate({**DESIGN, "settings": {"batch_size": 16}, "hypothesis": "3 epochs"}),
        examples={"x": {"optuna": {"search_space": {"learning_rate": space}}}},
        filled={
            "hyperparameters_to_search.learning_rate": "1e-4-1e-3",
            "hyperparameters_to_search.batch_size": "8,64",
            "hyperparameters_to_search.epochs": "1-5",
        },
        writer="m",
    )
    search = plan_design(request).drafts[0].search
    assert list(search) == ["training.learning_rate", "training.epochs"], "the prose alone does not fix a value"
    assert search["training.learning_rate"].space.dimension == space
    assert search["training.epochs"].source_location == "hyperparameters_to_search.epochs"


def test_the_requests_own_words_for_settings_are_understood():
    (fw, *_) = configs(
        settings={"lambda_fw": 0.01, "warmup_steps": 300, "fisher_alpha": 0.9},
        hyperparameters_to_search={"clip": "1.5-4"},
    )
    assert fw["fw_lora"] == {"penalty_strength": 0.01, "warmup_steps": 300, "fisher_ema_decay": 0.9}
    assert list(fw["optuna"]["search_space"]) == ["max_weight_ratio"]


def test_a_methods_own_ranges_win_over_the_designs_and_settings_over_both():
    own = {"learning_rate": "1e-5-1e-3", "batch_size": 8, "weight_decay": "0.03"}
    fw, lora = configs(
        comparative_methods=[{"name": "LoRA", "hyperparameters_to_search": own}],
        hyperparameters_to_search={"learning_rate": "1e-4-3e-4", "batch_size": 16, "weight_decay": 0.02, "epochs": 5},
        settings={"epochs": 2, "weight_decay": 0.01},
    )
    for cfg, low, batch_size in ((fw, 1e-4, 16), (lora, 1e-5, 8)):
        assert cfg["optuna"]["search_space"]["learning_rate"]["low"] == low
        assert cfg["training"]["batch_size"] == batch_size
        assert (cfg["training"]["epochs"], cfg["training"]["weight_decay"]) == (2, 0.01)
