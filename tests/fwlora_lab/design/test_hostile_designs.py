"""Broken and hostile designs: one readable message each that names the key; nothing evaluated, nothing written.

pytest tests/fwlora_lab/design/test_hostile_designs.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fwlora_lab.design.generate import generate
from fwlora_lab.errors import UserError

GOOD: dict[str, Any] = {
    "hypothesis": {"method": "m"},
    "proposed_method": {"name": "FW-LoRA", "settings": {"epochs": 2}, "n_trials": 3},
    "comparative_methods": ["LoRA"],
    "models": [{"name": "roberta-base", "parameters": 5}],
    "datasets": [{"name": "SST-2", "settings": {"max_length": 64}}],
    "metrics": ["Accuracy"],
    "hyperparameters_to_search": {"learning_rate": "1e-4-1e-3"},
    "budgets": [0.2],
    "settings": {"lora_rank": 4},
    "runs": [{"run_id": "r", "method": "proposed", "model": "roberta-base", "dataset": "SST-2"}],
}
PLACES = [
    "proposed_method.name", "proposed_method.n_trials", "proposed_method.settings.epochs", "models.0.name",
    "models.0.parameters", "datasets.0.name", "datasets.0.settings.max_length", "metrics.0", "budgets.0",
    "hyperparameters_to_search.learning_rate", "settings.lora_rank", "runs.0.run_id", "runs.0.method", "runs.0.model",
    "runs.0.dataset", "comparative_methods.0",
]  # fmt: skip
EVIL: list[Any] = [
    {"_target_": "os.system", "x": "id"}, {}, [[]], [{"a": 1}], "${oc.env:HOME}", "???", "a\x00b", "\ud800", "a\nb: c",
    "../../etc/passwd", "__import__('os').system('id')", -1, 0, 1e308, 10**400, "x" * 300_000, "\u202egnp", "",
    [None] * 5000, "a" * 201,
]  # fmt: skip


def changed(place: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    if not place.startswith("runs"):
        del data["runs"]  # a changed name would otherwise be missed there first
    *blocks, last = place.split(".")
    at: Any = data
    for part in blocks:
        at = at[int(part)] if isinstance(at, list) else at[part]
    at[int(last) if isinstance(at, list) else last] = value
    return data


def refused(path: Path) -> str:
    """The message; the folder beside the source stays empty."""
    out = path.parent / "out"
    with pytest.raises(UserError) as caught:
        generate(str(path), str(out), False, False)
    assert not out.exists()
    message = str(caught.value)
    assert len(message) < 5000 and "\x00" not in message
    return message


def test_the_good_design_is_good(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(GOOD))
    assert generate(str(path), str(tmp_path / "out"), False, False) == 0


@pytest.mark.parametrize("evil", range(len(EVIL)))
@pytest.mark.parametrize("place", PLACES)
def test_evil_values_everywhere(tmp_path, place, evil):
    value = EVIL[evil]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(changed(place, value)))
    out = tmp_path / "out"
    try:
        generate(str(path), str(out), False, False)
    except UserError as error:
        message = str(error)
        assert not out.exists() and len(message) < 5000
        assert place.split(".")[0] in message or "_target_" in message or place.split(".")[-1] in message, message
    else:  # what passes is harmless: a name, or a number in its range
        assert {p.parent for p in out.rglob("*")} == {out}
        assert value in (0, 1e308, 10**400) or isinstance(value, str) or value == -1, (place, value)
        assert "${" not in str(value)


TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "blank": (" \n\t\n", "is empty"),
    "not UTF-8": (b"\xff\xfe\xfa", "not UTF-8"),
    "a list": ("- a\n", "must hold keys"),
    "a number": ("3", "must hold keys"),
    "JSON list": ("[]", "must hold keys"),
    "JSON cut short": ('{"models": [', "is not JSON"),
    "JSON NaN": ('{"budgets": [NaN]}', "NaN"),
    "JSON Infinity": ('{"budgets": [-Infinity]}', "Infinity"),
    "JSON overflow": ('{"budgets": [1e999]}', "budgets"),
    "JSON duplicate": ('{"models": ["a"], "models": ["b"]}', "duplicate key 'models'"),
    "JSON digits": ('{"n_trials": ' + "9" * 5000 + "}", "number"),
    "JSON nesting": ("[" * 4_000_000, "nested too deeply"),
    "JSON nesting closed": ("[" * 500 + "]" * 500, "nested too deeply"),
    "10 MB of nesting": ("[" * 10_000_000, "at most 5,000,000"),
    "10 MB of YAML": ("a: " + "[" * 10_000_000, "at most 5,000,000"),
    "2 MB of YAML": ("a: " + "[" * 2_000_000, "at most 1,000,000"),
    "YAML nesting": ("a: " + "[" * 20_000, "nested too deeply"),
    "YAML duplicate": ("models: [a]\nmodels: [b]\n", ":2: models: duplicate key"),
    "YAML python": ("models: !!python/object/apply:os.system ['id']\n", ":1: models: the tag"),
    "YAML environment": ("models: ['${oc.env:HOME}']\n", "oc.env"),
    "YAML target": ("models:\n  _target_: os.system\n", ":2: models._target_"),
    "YAML NaN": ("budgets: [.nan]\n", "budgets"),
    "YAML bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join(['*' + o] * 9)}]\n" for o, n in zip("abcdefg", "bcdefgh", strict=True)),
        "aliases are expanded",
    ),
    "long key": (json.dumps({"k" * 100_000: 1}), "characters long"),
    "unknown key": ('{"models_to_use": ["a"]}', "models_to_use: unknown key (did you mean 'models'?)"),
    "history of nothing": ('{"experimental_design": {}}', "proposed_method"),
    "prompt of nothing": ("## Experimental Design\n", "proposed_method"),
    "prompt cut short": ("## Experimental Design\nmodels_to_use=['a", "cannot be read"),
    "prompt nesting": ("## Experimental Design\na=" + "[" * 100_000, "nested too deeply"),
    "prompt calls": ("## Experimental Design\na=" + "f(" * 100_000, "nested too deeply"),
    "prompt code": ("## Experimental Design\nmodels_to_use=__import__('os').system('id')", "cannot be read"),
    "prompt name": ("## Experimental Design\nmodels_to_use=exit", "'exit' is not a value"),
    "prompt duplicate": ("## Experimental Design\na=1 a=2", "duplicate name 'a'"),
    "prompt digits": ("## Experimental Design\na=" + "9" * 5000, "too many digits"),
    "prompt escape": ("## Experimental Design\na='\\x'", "cannot be read"),
    "prompt output": ("## Experimental Design\na=1\nOutput:\n{]", "Output:4:2: is not JSON"),
    "prompt output yaml": (
        '## Experimental Design\na=1\nOutput:\n{"run_configs": [{"run_id": "a", "run_config_yaml": "a: !!py/x 1"}]}',
        "run_configs[0].run_config_yaml:1: a: the tag",
    ),
    "prompt run": ("## Experimental Design\na=1\n## Experiment Runs\nrm -rf", ":4: Experiment Runs"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_files(tmp_path, name):
    content, words = TEXTS[name]
    path = tmp_path / "d.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(path)


def test_sources_that_are_no_files(tmp_path):
    for source in (str(tmp_path / "no"), "a\x00b", "x" * 5000):
        with pytest.raises(UserError):
            generate(source, None, False, False)
    with pytest.raises(UserError, match="is a folder"):
        generate(str(tmp_path), None, False, False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from([*PLACES, *GOOD]), value=JSON)
def test_any_value_is_taken_or_refused(tmp_path, place, value):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(changed(place, value)))
    try:
        assert generate(str(path), None, True, False) in (0, 1)  # 1 where an unknown method's runs are left out
    except UserError as error:
        assert str(error)
