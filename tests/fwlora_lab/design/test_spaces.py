"""Ranges as people write them become search dimensions of the right type.

pytest tests/fwlora_lab/design/test_spaces.py
"""

from __future__ import annotations

import pytest

from fwlora_lab.config.keys import LEAVES
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.design.spaces import parse_space
from fwlora_lab.errors import UserError


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


def test_the_keys_that_count_are_those_of_whole_numbers_in_the_schema():
    schema = RunConfig.model_json_schema()

    def is_whole(key: str) -> bool:
        block = schema
        for part in key.split("."):
            block = block["properties"][part]
            block = schema["$defs"][block["$ref"].rsplit("/", 1)[-1]] if "$ref" in block else block
        types = {choice.get("type") for choice in block.get("anyOf", [block])}
        return "integer" in types and "number" not in types

    searched = [k for k in LEAVES if k.split(".")[0] in ("model", "dataset", "training", "fw_lora", "adalora")]
    counts = [k for k in searched if (parse_space(k, "3e2-8e2").dimension or {}).get("type") == "int"]
    assert sorted(counts) == sorted([*filter(is_whole, searched), "fw_lora.warmup_steps"])
