"""The command `fwlora generate`: YAML texts that every loader reads alike, files, and the request itself.

pytest tests/fwlora_lab/design/test_generate.py
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import yaml
from designs import COMPARATIVE, DESIGN, PROPOSED, design
from omegaconf import OmegaConf
from ruamel.yaml import YAML

from fwlora_lab.config.keys import get_key
from fwlora_lab.config.load import validate_file
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.tree import available_runs, find_run
from fwlora_lab.design.generate import generate, generate_configs
from fwlora_lab.design.read import read_request
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import ExperimentDesign
from fwlora_lab.errors import UserError


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


def test_comments_cannot_break_out_of_their_line():
    evil = "lr 1e-3\nmethod: lora\x85x: 1\u2028y: 2\r# @package _global_\x00"
    request = DesignRequest("a\nb: c.yaml", ExperimentDesign.model_validate({**DESIGN, "hypothesis": evil}))
    text = next(iter(generate_configs(request).configs.values()))
    assert yaml.safe_load(text)["method"] == "proposed_fw_lora"
    assert text.splitlines()[0].startswith("# Generated from a b: c.yaml")


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
