"""Design files, prompt texts and research histories become designs.

pytest tests/fwlora_lab/design/test_read_request.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fwlora_lab.design.read import read_request
from fwlora_lab.design.request import DesignRequest, Place
from fwlora_lab.design.schema import ExperimentDesign, design_schema
from fwlora_lab.errors import UserError

DESIGN = """\
hypothesis: Shrinking helps.
proposed_method: FW-LoRA
comparative_methods: [LoRA, {name: AdaLoRA, n_trials: 7}]
models: [roberta-base]
datasets: [SST-2 (GLUE)]
hyperparameters_to_search:
  learning_rate: 1e-4-3e-4
"""
PROMPT = """\
You write configs.

## Hypothesis
method='It\\'s FW-LoRA' experimental_setup="Parameter budgets: 0.1 %, 0.2 %. 3 epochs,\\nbatch 32"

## Experimental Design
experiment_summary='All of it' evaluation_metrics=['Accuracy'] proposed_method='FW-LoRA' \
comparative_methods=['AdaLoRA'] models_to_use=['roberta-base (110M)'] datasets_to_use=['SST-2 (GLUE)'] \
hyperparameters_to_search={'learning_rate': '1e-4-3e-4'} external_resources=ExternalResources(\
hugging_face=HuggingFace(models=[HuggingFaceResource(id='a/b', sha='0123456789012345678901234567890123456789', \
created_at=datetime.datetime(2022, 3, 2, tzinfo=TzInfo(UTC)), private=False, size=None)], datasets=[])) \
experiment_code=None

## Experiment Runs

- Run ID: proposed-x
  Method: proposed
  Model: roberta-base (110M)
  Dataset: SST-2 (GLUE)

# Experimental Environment
One GPU
Output:
{"run_configs": [
  {"run_id": "proposed-x",
   "run_config_yaml": "run_id: proposed-x\\nmethod: lora  # plain\\n"}]}
"""


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_design_file_in_yaml_and_in_json_is_the_same(tmp_path):
    request: Any = read_request(write(tmp_path / "d.yaml", DESIGN))
    design: Any = request.design
    assert design.comparative_methods[0] == "LoRA"
    assert design.comparative_methods[1].n_trials == 7
    assert str(request.locate("comparative_methods.1.n_trials", 7)) == (
        f"{tmp_path / 'd.yaml'}:3: comparative_methods[1].n_trials: 7"
    )
    data = design.model_dump(exclude_unset=True)
    assert read_request(write(tmp_path / "d.json", json.dumps(data))).design == design


def test_the_schema_is_that_of_the_design():
    published = json.loads(design_schema())
    assert set(published["properties"]) == set(ExperimentDesign.model_fields)
    assert published["additionalProperties"] is False
    assert {"proposed_method", "models", "datasets"} == set(published["required"])


def test_the_prompt_text(tmp_path):
    request: Any = read_request(write(tmp_path / "r.txt", PROMPT))
    design: Any = request.design
    assert design.hypothesis.method == "It's FW-LoRA"
    assert design.hypothesis.experimental_setup.endswith("3 epochs,\nbatch 32")
    assert design.models == ["roberta-base (110M)"]
    assert design.hyperparameters_to_search == {"learning_rate": "1e-4-3e-4"}
    assert design.runs[0].run_id == "proposed-x" and design.runs[0].method == "proposed"
    assert design.environment == "One GPU"
    assert request.commits["a/b"] == request.commits["b"] == "0123456789" * 4
    assert request.examples == {"proposed-x": {"run_id": "proposed-x", "method": "lora"}}
    lines = PROMPT.splitlines()
    for key, part in {
        "models": "models_to_use",
        "hypothesis.method": "method=",
        "runs.0.dataset": "Dataset: ",
        "example:proposed-x.method": "run_config_yaml",
    }.items():
        line = int(str(request.locate(key)).split(":")[1])
        assert part in lines[line - 1], key
    assert str(request.locate("models.0", "x")).endswith("Experimental Design: models_to_use[0]: x")


OLD = {
    "experiment_summary": "s",
    "evaluation_metrics": ["Accuracy"],
    "proposed_method": "FW-LoRA",
    "comparative_methods": ["AdaLoRA"],
    "models_to_use": ["roberta-base"],
    "datasets_to_use": ["SST-2"],
    "hyperparameters_to_search": {"learning_rate": "1e-4-3e-4"},
}
RUN = {"run_id": "r", "method_name": "proposed", "model_name": "roberta-base", "dataset_name": "SST-2", "results": None}
NEW = {
    "experiment_summary": "s",
    "runner_config": {"runner_label": ["ubuntu"], "description": "8 cores"},
    "evaluation_metrics": [{"name": "Accuracy", "description": "right / all"}],
    "models_to_use": ["roberta-base"],
    "datasets_to_use": ["nyu-mll/glue/sst2"],
    "proposed_method": {
        "method_name": "FW-LoRA",
        "description": "d",
        "training_config": {"learning_rate": 1e-4, "epochs": 3, "warmup_steps": 100, "seed": None},
        "optuna_config": {
            "enabled": True,
            "n_trials": 5,
            "search_spaces": [
                {"param_name": "lambda_fw", "distribution_type": "loguniform", "low": 1e-5, "high": 1e-3, "step": None}
            ],
        },
    },
    "comparative_methods": [{"method_name": "AdaLoRA", "description": "d", "optuna_config": {"enabled": False}}],
}


@pytest.mark.parametrize(
    "history",
    [
        {"experimental_design": OLD, "experiment_runs": [RUN], "research_topic": "x"},
        {"new_method": {"method": "m", "experimental_design": {**OLD, "experiment_runs": [RUN]}}},
        {
            "research_session": {
                "hypothesis": {"open_problems": "o", "other": 1},
                "iterations": [{"method": "old"}, {"experimental_design": OLD, "experiment_runs": [RUN]}],
            }
        },
    ],
)
def test_a_research_history_of_the_first_generation(tmp_path, history):
    design: Any = read_request(write(tmp_path / "h.json", json.dumps(history))).design
    assert design.models == ["roberta-base"] and design.metrics == ["Accuracy"]
    assert [(r.run_id, r.method, r.dataset) for r in design.runs] == [("r", "proposed", "SST-2")]
    if "research_session" in history:
        assert design.hypothesis.open_problems == "o"


def test_a_research_history_of_the_second_generation(tmp_path):
    history = {"research_hypothesis": {"method": "m"}, "experimental_design": NEW, "experiment_runs": []}
    request: Any = read_request(write(tmp_path / "h.json", json.dumps(history)))
    method = request.design.proposed_method
    assert (method.name, method.n_trials) == ("FW-LoRA", 5)
    assert method.settings == {"learning_rate": 1e-4, "epochs": 3, "training.warmup_steps": 100}
    dimension = method.hyperparameters_to_search["lambda_fw"]
    assert (dimension.type, dimension.low, dimension.high) == ("loguniform", 1e-5, 1e-3)
    assert request.design.comparative_methods[0].hyperparameters_to_search == {}
    assert request.design.metrics == ["Accuracy"] and "8 cores" in request.design.environment


PROMPT_2 = """\
## Research Hypothesis
open_problems='o' method='FW-LoRA' experimental_setup='3 epochs' primary_metric='MCC' expected_result=None

## Experimental Design
experiment_summary='s' compute_environment=ComputeEnvironment(os='linux', cpu_cores=8, gpu_type=None) \
evaluation_metrics=[EvaluationMetric(name='Matthews Correlation', description="it's r")] \
models_to_use=['roberta-base'] datasets_to_use=['CoLA'] proposed_method=MethodConfig(method_name='FW-LoRA', \
description='shrinks', training_config=TrainingConfig(learning_rate=0.0002, batch_size=None, optimizer='AdamW', \
warmup_steps=100, gradient_clip=1.0, scheduler='Linear', seed=42, additional_params='fisher_alpha = 0.97'), \
optuna_config=OptunaConfig(enabled=True, n_trials=20, search_spaces=[SearchSpace(param_name='warmup_steps', \
distribution_type='int', low=50.0, high=150.0, choices=None), SearchSpace(param_name='lora_rank', \
distribution_type='categorical', low=None, high=None, choices=[4, 8])])) comparative_methods=[MethodConfig(\
method_name='LoRA', description='plain', training_config=None, optuna_config=OptunaConfig(enabled=False, n_trials=20, \
search_spaces=None))]

# Instructions for Generating Run Configurations
- Models: ['roberta-base']
Output:
{"run_configs": [{"run_id": "x", "run_config_yaml": "run_id: x\\noptuna:\\n  search_spaces:\\n    - \
{param_name: learning_rate, distribution_type: loguniform, low: 1.0e-5, high: 1.0e-2}\\n"}]}
"""


def test_the_prompt_of_the_second_generation(tmp_path):
    request: Any = read_request(write(tmp_path / "r.txt", PROMPT_2))
    design: Any = request.design
    assert design.hypothesis.experimental_setup == "3 epochs" and "cpu_cores" in design.environment
    assert design.metrics == ["Matthews Correlation"] and design.runs == []
    proposed, (compared,) = design.proposed_method, design.comparative_methods
    assert proposed.settings == {
        "learning_rate": 2e-4, "optimizer": "adamw", "training.warmup_steps": 100, "max_grad_norm": 1.0,
        "lr_scheduler": "linear", "seed": 42,
    }  # fmt: skip
    assert proposed.description == "shrinks\nfisher_alpha = 0.97"
    spaces = {k: v.model_dump(exclude_none=True) for k, v in proposed.hyperparameters_to_search.items()}
    assert spaces == {
        "warmup_steps": {"type": "int", "low": 50, "high": 150},
        "lora_rank": {"type": "categorical", "choices": [4, 8]},
    }
    assert type(spaces["warmup_steps"]["low"]) is int
    assert (compared.name, compared.settings, compared.hyperparameters_to_search) == ("LoRA", {}, {})
    assert str(request.locate("hypothesis.method")).split(":")[1:] == ["2", " Research Hypothesis.method"]


def test_runs_as_printed_objects_and_without_what_the_design_has_once(tmp_path):
    start = PROMPT.index("\n- Run ID")
    printed = "[ExperimentRun(run_id='a', method_name='proposed', model_name=None, dataset_name='SST-2 (GLUE)', "
    printed += "run_config='training:\\n  epochs: 4\\n', results=None)]"
    text = PROMPT[:start] + printed + "\n\n# Experimental Environment\nOne GPU\n"
    request: Any = read_request(write(tmp_path / "r.txt", text))
    assert [(r.run_id, r.method, r.model, r.dataset) for r in request.design.runs] == [
        ("a", "proposed", None, "SST-2 (GLUE)")
    ]
    listed = PROMPT.replace("  Model: roberta-base (110M)", "  Model: None")
    assert read_request(write(tmp_path / "l.txt", listed)).design.runs[0].model is None


def test_the_last_cycle_of_a_history(tmp_path):
    history = {"experiment_history": {"cycles": [{"experimental_design": {}}, {"experimental_design": OLD}]}}
    assert read_request(write(tmp_path / "h.json", json.dumps(history))).design.models == ["roberta-base"]


def test_configs_that_a_history_holds_are_examples(tmp_path):
    run = {**RUN, "run_config": "training:\n  epochs: 4\n"}
    request: Any = read_request(
        write(tmp_path / "h.json", json.dumps({"experimental_design": OLD, "experiment_runs": [run]}))
    )
    assert request.examples == {"r": {"training": {"epochs": 4}}}


@pytest.mark.parametrize("text", ["```\n## Experimental Design\n```\n", "x\nOutput:\n## Experimental Design\n"])
def test_a_heading_that_is_quoted_is_not_a_section(tmp_path, text):
    with pytest.raises(UserError, match="'Experimental Design' is inside a code fence or the output"):
        read_request(write(tmp_path / "r.txt", text))


def test_a_place_knows_who_wrote_what_is_there():
    design = ExperimentDesign.model_validate({"proposed_method": "FW-LoRA", "models": ["a"], "datasets": ["CoLA"]})
    filled = DesignRequest("d.yaml", design, writer="m", filled={"models": ["a"]})
    assert filled.locate("models.0", "a") == Place("answer of m: models[0]: a", is_filled=True)
    assert filled.locate("datasets.0") == Place("d.yaml: datasets[0]", is_filled=False)
    assert not DesignRequest("answer of m: d.yaml", design, writer="m").locate("models").is_filled
