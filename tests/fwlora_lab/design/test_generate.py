"""From a design to run configs: ranges, values and where they come from, contradictions, files.

pytest tests/fwlora_lab/design/test_generate.py
"""

from __future__ import annotations

import io
import itertools
import json
import random
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from ruamel.yaml import YAML

from fwlora_lab.catalog.encoders import ENCODERS
from fwlora_lab.config.keys import get_key
from fwlora_lab.config.load import validate_file
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.tree import available_runs, find_run
from fwlora_lab.config.yaml_writer import yaml_scalar
from fwlora_lab.design.generate import generate, generate_configs
from fwlora_lab.design.names import method_in, slug, subset_of
from fwlora_lab.design.read import read_request
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import ExperimentDesign
from fwlora_lab.design.spaces import parse_space
from fwlora_lab.errors import UserError

PROPOSED = "proposed-roberta-base-110M--SST-2-GLUE"
COMPARATIVE = "comparative-1-roberta-base-110M--SST-2-GLUE"
DESIGN = {
    "proposed_method": "FW-LoRA",
    "comparative_methods": ["AdaLoRA", "LoRA"],
    "models": ["roberta-base"],
    "datasets": ["SST-2"],
}


def design(**changes) -> DesignRequest:
    return DesignRequest("d.yaml", ExperimentDesign.model_validate({**DESIGN, **changes}))


def configs(**changes) -> list[dict]:
    return [yaml.safe_load(text) for text in generate_configs(design(**changes)).configs.values()]


def kinds(**changes) -> list[str]:
    return [c.kind for c in generate_configs(design(**changes)).contradictions]


# --- ranges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("learning_rate", "1e-4-3e-4", {"type": "loguniform", "low": 1e-4, "high": 3e-4}),
        ("learning_rate", "5e-5 to 5e-4", {"type": "loguniform", "low": 5e-5, "high": 5e-4}),
        ("learning_rate", "1e−4–3e−4", {"type": "loguniform", "low": 1e-4, "high": 3e-4}),
        ("learning_rate", "between 1e-4 and 3e-4", {"type": "loguniform", "low": 1e-4, "high": 3e-4}),
        ("learning_rate", "[1e-5, 1e-3]", {"type": "loguniform", "low": 1e-5, "high": 1e-3}),
        ("learning_rate", "1e-5, 1e-3", {"type": "categorical", "choices": [1e-5, 1e-3]}),
        ("learning_rate", [1e-5, 1e-3], {"type": "loguniform", "low": 1e-5, "high": 1e-3}),
        ("lambda_fw", "5e-5—5e-4", {"type": "loguniform", "low": 5e-5, "high": 5e-4}),
        ("lambda_fw", "0-1e-3", {"type": "uniform", "low": 0, "high": 1e-3}),
        ("clip", "0.8-1.5", {"type": "uniform", "low": 0.8, "high": 1.5}),
        ("gamma", "-1--0.5", {"type": "uniform", "low": -1, "high": -0.5}),
        ("gamma", "-1-1", {"type": "uniform", "low": -1, "high": 1}),
        ("gamma", "1.5-0.5", {"type": "uniform", "low": 0.5, "high": 1.5}),
        ("weight_decay", "0–0.05", {"type": "uniform", "low": 0, "high": 0.05}),
        ("lora_dropout", "0..0.2", {"type": "uniform", "low": 0, "high": 0.2}),
        ("lora_rank", "4,8,16", {"type": "categorical", "choices": [4, 8, 16]}),
        ("lora_rank", "{4; 8}", {"type": "categorical", "choices": [4, 8]}),
        ("lora_rank", "[4, 8]", {"type": "categorical", "choices": [4, 8]}),
        ("lora_rank", "4-16", {"type": "int", "low": 4, "high": 16, "step": 1}),
        ("batch_size", "16, 32 or 64", {"type": "categorical", "choices": [16, 32, 64]}),
        ("batch_size", "16-64", {"type": "categorical", "choices": [16, 32, 64]}),
        ("batch_size", "10-60", {"type": "int", "low": 10, "high": 60, "step": 1}),
        ("warmup_steps", "300,500,800", {"type": "int", "low": 300, "high": 800, "step": 100}),
        ("warmup_steps", "300-800", {"type": "int", "low": 300, "high": 800, "step": 100}),
        ("warmup_steps", "3e2-8e2", {"type": "int", "low": 300, "high": 800, "step": 100}),
        ("warmup_steps", "300-800 step 50", {"type": "int", "low": 300, "high": 800, "step": 50}),
        ("warmup_steps", "0.1-0.5", {"type": "uniform", "low": 0.1, "high": 0.5}),
        ("estimator", "exact, sketch", {"type": "categorical", "choices": ["exact", "sketch"]}),
        ("normalize_weights", "true,false", {"type": "categorical", "choices": [True, False]}),
    ],
)
def test_ranges(name, text, expected):
    dimension = parse_space(name, text).dimension
    assert dimension == expected
    assert dimension is not None and list(map(type, dimension.values())) == list(map(type, expected.values()))


def test_single_values_are_not_searched():
    for given, value in (("8", 8), ("8,8", 8), (8, 8), ("8-8", 8), ([8], 8)):
        space = parse_space("lora_rank", given)
        assert (space.dimension, space.value) == (None, value)
    assert parse_space("learning_rate", "1e-4").value == 1e-4


def test_faults_of_ranges_are_said():
    assert "backwards" in parse_space("learning_rate", "3e-4-1e-4").faults[0]
    assert "log scale" in parse_space("lambda_fw", "0-1e-3").faults[0]
    for text in ("", "a b", "1e-4-", "-", ",", "1e999-2", "1-2-3", "9" * 30 + "-1", "x" * 200):
        with pytest.raises(UserError):
            parse_space("learning_rate", text)


# --- names -------------------------------------------------------------------------------------


def test_names_of_methods_data_and_runs():
    for text, method in {
        "FW-LoRA": "fw_lora",
        "Fisher-Weighted LoRA (FW-LoRA)": "fw_lora",
        "proposed_fw_lora": "fw_lora",
        "Fisher-Weighted LoRA (FW-LoRA) is a replacement for ordinary LoRA, unlike AdaLoRA: " + "x" * 50: "fw_lora",
        "AdaLoRA": "adalora",
        "SVD-LoRA": "svd_lora",
        "plain LoRA": "lora",
        "Vanilla LoRA (uniform rank)": "lora",
        "QLoRA": None,
        "LoRA+": None,
        "FW-LoRA without warm-up": None,
    }.items():
        assert method_in(text) == method, text
    for text, subset in {"SST-2 (GLUE)": "sst2", "GLUE (CoLA)": "cola", "glue/mrpc": "mrpc", "imdb": None}.items():
        assert subset_of(text) == subset
    assert slug(["proposed", "roberta-base (110M)", "SST-2 (GLUE)"]) == PROPOSED


def test_sizes_of_the_known_encoders():
    words = {"roberta": (50265, 514, 1), "uncased": (30522, 512, 2), "cased": (28996, 512, 2)}
    for name, e in ENCODERS.items():
        vocabulary, positions, types = words[next((w for w in words if w in name), "uncased")]
        d, f = e.width, e.feed_forward
        embeddings = (vocabulary + positions + types) * d + 2 * d
        layer = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
        assert e.parameters == embeddings + e.layers * layer + d * d + d, name
    roberta = ENCODERS["roberta-base"]
    assert roberta.parameters_per_rank(["query", "key", "value", "intermediate", "output"]) == 147_456
    assert roberta.parameters_per_rank(["all-linear"]) == 165_888
    assert roberta.parameters_per_rank(["query", "q_proj"]) is None
    assert roberta.parameters_per_rank(["output.dense"]) == 12 * (1536 + 3840)


# --- configs -----------------------------------------------------------------------------------


def test_every_method_model_data_set_and_budget_fast(tmp_path):
    request = design(
        models=["roberta-base", "bert-base-uncased", "minilm"],
        datasets=["SST-2", "CoLA", "MRPC", "RTE"],
        budgets=[0.1, 0.2, 0.5],
        hyperparameters_to_search={"learning_rate": "1e-4-3e-4", "lambda_fw": "5e-5-5e-4", "batch_size": "16,32"},
    )
    start = time.process_time()
    made = generate_configs(request).configs
    assert time.process_time() - start < 2
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


def test_csv_data_and_models_of_ones_own():
    files = {"name": "csv", "train_file": "a.csv", "eval_file": "b.csv", "text_column": ["s", "t"], "label_column": "y"}
    (cfg, *_) = configs(
        models=[{"name": "mine", "pretrained_id": "./folder", "parameters": 10}],
        datasets=[{"name": "reviews: 2024", "settings": files}],
    )
    assert cfg["model"]["pretrained_id"] == "./folder" and cfg["run_id"] == "proposed-mine-reviews-2024"
    assert cfg["dataset"]["text_column"] == ["s", "t"] and "eval_split" not in cfg["dataset"]


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


def test_loaders_read_the_same_values():
    """PyYAML, ruamel and OmegaConf on 1,000 configs with values that loaders are known to disagree on."""
    rng = random.Random(0)
    ruamel = YAML(typ="safe", pure=False)
    words = [
        "no",
        "on",
        "0o17",
        "017",
        "1e5",
        "695e0514",
        "null",
        "~",
        "1:30",
        "ünï # x",
        "a: b",
        "- c",
        "true",
        "=",
        "x'\"",
    ]
    texts: list[str] = []
    for _ in range(25):
        models = [f"{rng.choice(words)} {n}" for n in range(5)]
        data = {
            "models": [{"name": m, "pretrained_id": rng.choice(words)} for m in models],
            "datasets": ["SST-2", "CoLA"],
            "comparative_methods": ["LoRA"],
            "budgets": [round(rng.uniform(0.01, 2), 6), 10 ** rng.uniform(-6, -3)],
            "settings": {
                "learning_rate": 10 ** rng.uniform(-12, 0),
                "weight_decay": rng.choice([0.0, 1e-7, 0.1, 1]),
                "mixed_precision": rng.choice(["no", "bf16"]),
                "target_modules": ["no", rng.choice(words) + "x"],
            },
            "hyperparameters_to_search": {"lambda_fw": {"type": "uniform", "low": 1e-9, "high": rng.random()}},
        }
        made = generate_configs(design(**data)).configs.values()
        for text in made:
            plain = yaml.load(text, Loader=yaml.CSafeLoader)
            assert RunConfig.model_validate(plain).training.learning_rate == data["settings"]["learning_rate"]
        texts += made
    assert len(texts) == 1000
    # Every value stands in one line, so the slow loaders read each distinct line once, and some configs as a whole.
    values = {line.split(": ", 1)[1] for text in texts for line in text.splitlines()[1:] if ": " in line}
    distinct = "\n".join(f"v{n}: {value}" for n, value in enumerate(sorted(values))) + "\n"
    for text in (distinct, *texts[::50]):
        plain = yaml.safe_load(text)
        assert plain == ruamel.load(io.StringIO(text)) == OmegaConf.to_container(OmegaConf.create(text))


def test_values_that_are_equal_in_python_keep_their_yaml():
    assert [yaml_scalar(v) for v in (1, 1.0, True, [1, 2], [1.0, True])] == [
        "1",
        "1.0",
        "true",
        "[1, 2]",
        "[1.0, true]",
    ]


def test_comments_cannot_break_out_of_their_line():
    evil = "lr 1e-3\nmethod: lora\x85x: 1\u2028y: 2\r# @package _global_\x00"
    request = DesignRequest("a\nb: c.yaml", ExperimentDesign.model_validate({**DESIGN, "hypothesis": evil}))
    text = next(iter(generate_configs(request).configs.values()))
    assert yaml.safe_load(text)["method"] == "proposed_fw_lora"
    assert text.splitlines()[0].startswith("# Generated from a b: c.yaml")


# --- contradictions ----------------------------------------------------------------------------


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
        ({"datasets": ["CoLA"]}, "K against steps", "leaves 304 steps of the 804"),
        ({"datasets": ["CoLA"], "settings": {"batch_size": 64}}, "K against steps", "no step of the 402"),
        ({"datasets": ["RTE"], "hyperparameters_to_search": {"warmup_steps": "10-90"}}, "K against steps", "of rte"),
        ({"hypothesis": {"experimental_setup": "SST-2 and CoLA"}}, "left out", "data set cola"),
        ({"summary": "Budgets 0.1 %, 0.2 %", "budgets": [0.2]}, "left out", "budget 0.1 %"),
        ({"summary": "Baselines: plain LoRA.", "comparative_methods": []}, "left out", "plain LoRA"),
        ({"metrics": ["Matthews Correlation"]}, "left out", "Matthews"),
        ({"hyperparameters_to_search": {"gamma": "2-1"}}, "range", "backwards"),
        ({"hyperparameters_to_search": {"lambda_fw": "0-1"}}, "range", "log scale"),
        ({"hyperparameters_to_search": {"learning_rate": "1e-3-2e-3"}}, "range", "outside"),
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


# --- the request itself ------------------------------------------------------------------------


def _request(tmp_path: Path) -> str:
    """The request's shape with its own example output, which is packaged as two runs."""
    outputs = [{"run_id": i, "run_config_yaml": find_run(i).read_text()} for i in (PROPOSED, COMPARATIVE)]
    text = f"""\
## Hypothesis
method='Fisher-Weighted LoRA: K≈500 steps, λ≈1e-4' experimental_setup='SST-2 ⟶ accuracy; CoLA ⟶ Matthews corr.\\n\
Parameter budgets: 0.1 %, 0.2 %, 0.5 % of full parameters.\\nBaselines: (a) Plain LoRA, (b) AdaLoRA.\\n\
Training details: 3 epochs, batch 32, lr 2e-4, AdamW, warm-up ratio 0.06.' experimental_code='fisher_alpha = 0.98'

## Experimental Design
experiment_summary='Evaluate on the dev splits.' evaluation_metrics=['Accuracy', 'Matthews Correlation'] \
proposed_method='Fisher-Weighted LoRA (FW-LoRA) is a drop-in replacement for ordinary LoRA fine-tuning.' \
comparative_methods=['AdaLoRA'] models_to_use=['roberta-base (110M)'] datasets_to_use=['SST-2 (GLUE)'] \
hyperparameters_to_search={{'learning_rate': '1e-4-3e-4', 'lambda_fw': '5e-5-5e-4', 'lora_rank': '4,8,16', \
'warmup_steps': '300,500,800', 'batch_size': '16,32,64'}}

## Experiment Runs
- Run ID: {PROPOSED}
  Method: proposed
  Model: roberta-base (110M)
  Dataset: SST-2 (GLUE)
- Run ID: {COMPARATIVE}
  Method: comparative-1
  Model: roberta-base (110M)
  Dataset: SST-2 (GLUE)
Output:
{json.dumps({"run_configs": outputs}, indent=2)}
"""
    path = tmp_path / "request.txt"
    path.write_text(text)
    return str(path)


def leaves(data: dict, prefix: str = ""):
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_the_configs_of_the_request_hold_every_key_of_its_example_output(tmp_path, capsys):
    source, out = _request(tmp_path), tmp_path / "out"
    assert {PROPOSED, COMPARATIVE} <= {*available_runs()}
    assert generate(source, str(out), False, False) == 0
    warnings = capsys.readouterr().err
    # the design says AdaLoRA, one range, and equal tuning
    design_wins = {
        PROPOSED: {},
        COMPARATIVE: {
            "method": "baseline_adalora",
            "optuna.n_trials": 30,
            "optuna.search_space.learning_rate.low": 1e-4,
        },
    }
    for run_id, differs in design_wins.items():
        path = out / f"{run_id}.yaml"
        assert validate_file(str(path)) == []
        made = yaml.safe_load(path.read_text())
        example = read_request(source).examples[run_id]
        for key, value in leaves(dict(example)):
            assert get_key(made, key) == differs.get(key, value), key
    for words in (
        "rank 8 is 0.946 %", "rank 4 is 0.473 %", "124,645,632 parameters, not 110 M", "makes it baseline_lora",
        "30 trials for", "learning_rate is searched more widely", "weight_decay is searched in one run only",
        "K = 500 leaves 223 steps of the 723 of cola", "K = 800 leaves no step of the 363 of cola", "one split",
        "blocks and no Linear layers", "data set cola", "budget 0.1 %", "budget 0.5 %", "baseline plain LoRA",
        "Matthews Correlation belongs to CoLA",
    ):  # fmt: skip
        assert words in warnings, words
    assert "two values" not in warnings and "unequal tuning: n_trials" not in warnings
    both = [*(out.iterdir())]
    assert len(both) == 2
    assert generate(source, str(out), False, False) == 0  # the same bytes again


def test_the_command_writes_prints_and_checks(tmp_path, capsys):
    source = _request(tmp_path)
    assert generate(source, str(tmp_path / "no"), False, True) == 1
    assert not (tmp_path / "no").exists() and "nothing was written" in capsys.readouterr().err
    assert generate(source, None, True, False) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [c["run_id"] for c in shown["run_configs"]] == [PROPOSED, COMPARATIVE]
    assert generate(source, None, False, False) == 0
    printed = [*yaml.safe_load_all(capsys.readouterr().out)]
    assert printed == [yaml.safe_load(c["run_config_yaml"]) for c in shown["run_configs"]]
    sound = tmp_path / "sound.json"
    sound.write_text(json.dumps(DESIGN))
    assert generate(str(sound), None, False, True) == 0
    assert capsys.readouterr() == ("", "")


def test_a_changed_file_is_not_overwritten(tmp_path):
    source = tmp_path / "d.json"
    source.write_text(json.dumps(DESIGN))
    out = tmp_path / "out"
    generate(str(source), str(out), False, False)
    files = sorted(out.iterdir())
    files[-1].write_text("mine")
    before = {f: f.read_bytes() for f in files}
    with pytest.raises(UserError, match="exists with other content"):
        generate(str(source), str(out), False, False)
    assert {f: f.read_bytes() for f in sorted(out.iterdir())} == before
    with pytest.raises(UserError, match="cannot be written"):
        generate(str(source), str(source), False, False)


def test_two_runs_of_one_name_are_refused():
    for models in (["a b", "a-b"], ["A", "a"], ["日本", "中国"]):
        with pytest.raises(UserError, match="two runs are called"):
            generate_configs(design(models=models))
    many = [f"m{n}" for n in itertools.islice(itertools.count(), 100)]
    with pytest.raises(UserError, match="more than 1,000 runs"):
        generate_configs(design(models=many, datasets=["CoLA", "RTE", "MRPC", "QQP"]))
