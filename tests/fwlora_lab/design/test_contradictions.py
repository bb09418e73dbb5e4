"""Each contradiction of a design is found, and named with its two places.

pytest tests/fwlora_lab/design/test_contradictions.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from designs import design, kinds

from fwlora_lab.catalog.tasks import TASKS, DataSource, TaskInfo, TaskSpec
from fwlora_lab.design.generate import generate_configs


def test_a_sound_design_has_no_contradiction():
    space = {"learning_rate": "1e-4-3e-4", "lambda_fw": "1e-5-1e-3"}
    hypothesis = "We fine-tune on SST-2 for 3 epochs. Budgets: 0.1 % and 0.5 %."
    assert kinds(hyperparameters_to_search=space, hypothesis=hypothesis, models=["roberta-base (125M)"]) == []


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"budgets": [0.2], "settings": {"lora_rank": 8}}, "rank against budget", "rank 8 is 0.946 %"),
        ({"budgets": [0.2], "hyperparameters_to_search": {"lora_rank": "4,8"}}, "rank against budget", "4 is 0.473 %"),
        ({"models": ["roberta-base (110M)"]}, "model size", "124,645,632"),
        ({"models": [{"name": "roberta-base", "parameters": 10**8}]}, "model size", "not 100 M"),
        ({"datasets": ["CoLA"], "settings": {"warmup_steps": 500}}, "K against steps", "leaves 304 steps of the 804"),
        ({"datasets": ["CoLA"], "settings": {"batch_size": 64}, "summary": "K=500"}, "K against steps", "of the 402"),
        ({"datasets": ["RTE"], "hyperparameters_to_search": {"warmup_steps": "10-200"}}, "K against steps", "of rte"),
        ({"hypothesis": {"experimental_setup": "SST-2 and CoLA"}}, "left out", "data set cola"),
        ({"summary": "Budgets 0.1 %, 0.2 %", "budgets": [0.2]}, "left out", "budget 0.1 %"),
        ({"summary": "Baselines: plain LoRA.", "comparative_methods": []}, "left out", "plain LoRA"),
        ({"metrics": ["Matthews Correlation"]}, "left out", "Matthews"),
        ({"hyperparameters_to_search": {"gamma": "2-1"}}, "range", "backwards"),
        ({"hyperparameters_to_search": {"lambda_fw": "0-1"}}, "range", "log scale"),
        ({"summary": "lr 2e-4", "hyperparameters_to_search": {"learning_rate": "1e-3-2e-3"}}, "range", "outside"),
        ({"settings": {"target_modules": ["query", "q_proj"]}}, "target modules", "'q_proj'"),
        ({"settings": {"target_modules": ["output"]}}, "target modules", "literally"),
        ({"summary": "3 epochs", "settings": {"epochs": 5}}, "two values", "3 and 5"),
        ({"summary": "3 epochs", "hypothesis": "5 epochs"}, "two values", "5 and 3"),
        (
            {"settings": {"dataset.validation_fraction": 0.0}, "hyperparameters_to_search": {"lambda_fw": "1e-4-1e-3"}},
            "one split",
            "validation",
        ),
        (
            {
                "comparative_methods": [{"name": "LoRA", "n_trials": 3}],
                "hyperparameters_to_search": {"learning_rate": "1e-4-1e-3"},
            },
            "unequal tuning",
            "3 for lora",
        ),
        (
            {"comparative_methods": [{"name": "LoRA", "hyperparameters_to_search": {"learning_rate": "1e-5-1e-3"}}]},
            "unequal tuning",
            "differently",
        ),
        (
            {"runs": [{"run_id": "comparative-1-x", "method": "LoRA", "model": "roberta-base", "dataset": "SST-2"}]},
            "method",
            "the run is comparative-2",
        ),
    ],
)  # fmt: skip
def test_each_contradiction_is_named_with_both_places(changes, kind, words):
    found = [c for c in generate_configs(design(**changes)).contradictions if c.kind == kind]
    assert any(words in c.text for c in found), generate_configs(design(**changes)).contradictions
    for c in found:
        assert len(c.places) == 2 and all(map(str, c.places)) and c.places[0] != c.places[1]


def test_a_registered_task_that_only_the_prose_names_is_left_out(monkeypatch):
    spec = TaskSpec("toy", "classification", ("no", "yes"), 1, ("accuracy",), "accuracy")
    toy = TaskInfo(spec, DataSource("toy", "nowhere:load"), train_examples=640, prose_pattern=r"\bToy\b")
    monkeypatch.setitem(TASKS, "toy", toy)
    found = [(c.kind, c.text) for c in generate_configs(design(hypothesis="SST-2 and Toy, K = 500")).contradictions]
    assert ("left out", "data set toy is demanded by the prose, no run has it") in found
    k_of_toy = "K = 500 leaves no step of the 60 of toy (640 examples, batch 32, 3 epochs)"
    assert ("K against steps", k_of_toy) in found


@pytest.mark.parametrize("name", ["lambda_fw", "penalty_strength", "fw_lora.penalty_strength", "weight_decay"])
def test_methods_are_tuned_alike_in_what_they_share(name):
    dimension = {"type": "loguniform", "low": 1e-5, "high": 1e-3}
    examples = {"a": {"optuna": {"search_space": {name: dimension}}}, "b": {"optuna": {"n_trials": None}}}
    found = generate_configs(replace(design(), examples=examples)).contradictions
    unequal = [c.text for c in found if c.kind == "unequal tuning"]
    assert unequal == (["weight_decay is searched in one run only"] if name == "weight_decay" else [])
