"""The runs of a design: listed, or one for every method, model, data set and budget.

pytest tests/fwlora_lab/design/test_design_plan.py
"""

from __future__ import annotations

import itertools
import sys
import time

import pytest
import yaml
from designs import configs, design

from fwlora_lab.config.load import validate_file
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.design.generate import generate_configs
from fwlora_lab.errors import UserError


def test_every_method_model_data_set_and_budget_fast(tmp_path):
    request = design(
        models=["roberta-base", "bert-base-uncased", "minilm"],
        datasets=["SST-2", "CoLA", "MRPC", "RTE"],
        budgets=[0.1, 0.2, 0.5],
        hyperparameters_to_search={"learning_rate": "1e-4-3e-4", "lambda_fw": "5e-5-5e-4", "batch_size": "16,32"},
    )
    start = time.process_time()
    made = generate_configs(request).configs
    assert time.process_time() - start < (2 if sys.gettrace() is None else 20)  # coverage is slow
    assert len(made) == len({*made.values()}) == 108
    assert "comparative-2-minilm-RTE-0.5pct" in made
    for run_id, text in made.items():
        cfg = RunConfig.model_validate(yaml.safe_load(text))
        assert cfg.run_id == run_id and cfg.model.lora.rank is None
    assert generate_configs(request).configs == made
    run_id, text = next(iter(made.items()))
    path = tmp_path / f"{run_id}.yaml"
    path.write_text(text)
    assert validate_file(str(path)) == []


def test_given_runs_keep_their_ids_letter_for_letter():
    runs = [
        {
            "run_id": "My.Run=1--x",
            "method": "comparative-2",
            "model": "roberta-base",
            "dataset": "SST-2",
            "budget": 0.5,
        },
        {"method": "proposed", "model": "RoBERTa base", "dataset": "sst 2", "settings": {"seed": 7}},
    ]
    first, second = configs(runs=runs)
    assert (first["run_id"], first["method"]) == ("My.Run=1--x", "baseline_lora")
    assert first["model"]["parameter_budget_percent"] == 0.5 and first["model"]["lora"]["rank"] is None
    assert (second["run_id"], second["training"]["seed"]) == ("proposed-roberta-base-SST-2", 7)


def test_a_run_may_leave_out_what_the_design_has_once():
    (only,) = configs(runs=[{"method": "proposed"}])
    assert only["run_id"] == "proposed-roberta-base-SST-2"
    with pytest.raises(UserError, match=r"runs\[0\].model: is missing, and the design has 2"):
        configs(runs=[{"method": "proposed"}], models=["a", "b"])


def test_csv_data_and_models_of_ones_own():
    files = {"name": "csv", "train_file": "a.csv", "eval_file": "b.csv", "text_column": ["s", "t"], "label_column": "y"}
    (cfg, *_) = configs(
        models=[{"name": "mine", "pretrained_id": "./folder", "parameters": 10}],
        datasets=[{"name": "reviews: 2024", "settings": files}],
    )
    assert cfg["model"]["pretrained_id"] == "./folder" and cfg["run_id"] == "proposed-mine-reviews-2024"
    assert cfg["dataset"]["text_column"] == ["s", "t"] and "eval_split" not in cfg["dataset"]


def test_two_runs_of_one_name_are_refused():
    for models in (["a b", "a-b"], ["A", "a"], ["日本", "中国"]):
        with pytest.raises(UserError, match="two runs are called"):
            generate_configs(design(models=models))
    many = [f"m{n}" for n in itertools.islice(itertools.count(), 100)]
    with pytest.raises(UserError, match="more than 1,000 runs"):
        generate_configs(design(models=many, datasets=["CoLA", "RTE", "MRPC", "QQP"]))
