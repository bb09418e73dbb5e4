"""Malformed run configs: each ends in one readable message that names the line or the key.

pytest tests/fwlora_lab/config/test_malformed_configs.py
"""

# One case a line, however long its message is.
# ruff: noqa: E501

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fwlora_lab.config.load import expand_runs, load_run, validate_file
from fwlora_lab.errors import UserError

GOOD = """\
run_id: mine
method: fw_lora
model:
  name: m
  pretrained_id: minilm
  lora:
    rank: 4
dataset:
  name: glue
  subset: cola
training:
  epochs: 1
"""
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def swap(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def csv(text: str) -> str:
    return swap("  name: glue\n  subset: cola\n", f"  name: csv\n  {text}\n")


def search(text: str) -> str:
    return GOOD + f"optuna:\n  search_space:\n    {text}\n"


LR = "learning_rate: {type: loguniform, low: 1e-4, high: 1e-3}"
FILES = "train_file: a.csv, eval_file: b.csv, text_column: t, label_column: l".replace(", ", "\n  ")

# name -> (the file's bytes or text, what the message must say)
CASES: dict[str, tuple[str | bytes, str]] = {
    # the file as such
    "empty": ("", "is empty"),
    "only comments": ("# nothing\n\n", "is empty"),
    "null": ("null", "single value"),
    "list at the top": ("- run_id: x\n", ":1: must hold keys"),
    "text at the top": ("run_id", "not a single value"),
    "not UTF-8": (b"run_id: caf\xe9\n", "byte 11 is not UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "not UTF-8"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "NUL bytes": (b"run_id: a\x00b\n", "is not YAML"),
    "too large": ("# " + "x" * 1_000_001, "at most 1,000,000"),
    "two documents": (GOOD + "---\n" + GOOD, "one file holds one run"),
    "a page of HTML": ("<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n", "x.yaml:"),
    "JSON cut short": ('{"run_id": "x", "method": ', ":1:"),
    # YAML
    "tab": ("run_id: x\nmodel:\n\tname: y\n", ":3:1: is not YAML"),
    "bad indentation": (swap("  epochs: 1", "  epochs: 1\n   batch_size: 3"), ":13:"),
    "colon in a bare text": (swap("name: m", "name: a: b"), ":4:"),
    "unclosed bracket": (GOOD + "  seed: [1\n", "is not YAML"),
    "unclosed quote": (GOOD + "  seed: '1\n", "is not YAML"),
    "unknown alias": (GOOD + "  seed: *nobody\n", ":13:9: is not YAML"),
    "duplicate key": (GOOD + "  epochs: 2\n", ":13: training.epochs: duplicate key (first on line 12); keep one"),
    "duplicate block": (GOOD + "model:\n  name: z\n", ":13: model: duplicate key"),
    "a billion laughs": (LAUGHS, "values once its aliases are expanded"),
    "alias to itself": ("run_id: &a [*a]\n", "alias refers to itself"),
    "deep nesting": ("a: " + "[" * 50_000, "nested too deeply"),
    "many values": ("a: [" + "1," * 20_000 + "]", "more than 10,000 values"),
    "python tag": (swap("name: m", "name: !!python/object/apply:os.system ['id']"), ":4: model.name: the tag"),
    "python name": (swap("name: m", "name: !!python/name:os.system"), "the tag"),
    "path tag": (swap("name: m", "name: !!python/object/apply:pathlib.Path [x]"), "the tag"),
    "own tag": (swap("name: m", "name: !env HOME"), ":4: model.name: the tag !env"),
    "binary tag": (swap("name: m", "name: !!binary aGk="), "the tag !!binary"),
    "merge key": (swap("  epochs: 1", "  <<: {epochs: 1}"), ":12: training: `<<` cannot be a key"),
    "number as key": (GOOD + "  1: 2\n", ":13: training: `1` cannot be a key"),
    "bool as key": (GOOD + "  on: 2\n", ":13: training: `on` cannot be a key"),
    "list as key": (GOOD + "  ? [a]\n  : 2\n", ":13: training: a list or mapping cannot be a key"),
    "octal": (swap("epochs: 1", "epochs: 017"), ":12: training.epochs: `017`"),
    "hexadecimal": (swap("epochs: 1", "epochs: 0x1F"), ":12: training.epochs: `0x1F`"),
    "sexagesimal": (swap("epochs: 1", "epochs: 1:30"), ":12: training.epochs: `1:30`"),
    "underscores": (swap("epochs: 1", "epochs: 1_000"), ":12: training.epochs: `1_000`"),
    "sexagesimal float": (swap("epochs: 1", "epochs: 1:30.5"), ":12: training.epochs: `1:30.5`"),
    # code and interpolation
    "_target_": (swap("  name: m", "  _target_: os.system"), ":4: model._target_: is refused"),
    "nested _target_": (GOOD + "optuna:\n  sampler:\n    _target_: a.B\n", ":15: optuna.sampler._target_"),
    "environment": (swap("name: m", "name: ${oc.env:HOME}"), ":4: model.name: '${oc.env:HOME}'"),
    "nested interpolation": (swap("name: m", "name: ${a.${b}}"), ":4: model.name"),
    "resolver": (swap("name: m", "name: ${oc.decode:'1'}"), ":4: model.name"),
    "half an interpolation": (swap("name: m", "name: 'x${'"), ":4: model.name"),
    "reference to nothing": (swap("name: m", "name: ${nothing.here}"), "nothing.here"),
    "circle of references": (swap("name: m", "name: ${model.pretrained_id}").replace("minilm", "${model.name}"), "model."),
    "interpolation as key": (GOOD + "  ${x}: 2\n", ":13: training.${x}"),
    "hydra block": (GOOD + "hydra:\n  run: {dir: /tmp/x}\n", ":13: hydra:"),
    "hydra in defaults": ("defaults: [override hydra/launcher: x, _self_]\n" + GOOD, ":1: defaults:"),
    "defaults without _self_": ("defaults: [/base/minilm]\n" + GOOD, ":1: defaults: must end in `- _self_`"),
    "defaults of nothing": ("defaults: [/base/nothing, _self_]\n" + GOOD, "base/nothing"),
    "defaults is a text": ("defaults: x\n" + GOOD, ":1: defaults: must be a list"),
    "defaults holds a number": ("defaults: [1, _self_]\n" + GOOD, ":1: defaults: 1 is not a config's name"),
    "defaults of itself": ("defaults: [x, _self_]\n" + GOOD, "x.yaml"),
    # keys
    "unknown key at the top": (GOOD + "modell: 3\n", ":13: modell: unknown key (did you mean 'model'?)"),
    "unknown key in a block": (swap("epochs", "epoch"), ":12: training.epoch: unknown key (did you mean 'training.epochs'?)"),
    "key in the wrong block": (swap("rank: 4", "rank: 4\n    batch_size: 8"), "did you mean 'training.batch_size'"),
    "camel case": (GOOD + "  batchSize: 8\n", ":13: training.batchSize"),
    "no run_id": (swap("run_id: mine\n", ""), "run_id: is missing"),
    "no method": (swap("method: fw_lora\n", ""), "method: is missing"),
    "no model": (re.sub(r"model:\n(  .*\n)+", "", GOOD), "model.pretrained_id: is missing"),
    "empty block": (re.sub(r"dataset:\n(  .*\n)+", "dataset:\n", GOOD), ":8: dataset: must be a block"),
    "block as text": (re.sub(r"training:\n(  .*\n)+", "training: fast\n", GOOD), ":11: training: must be a block of keys, not the text 'fast'"),
    "block as list": (re.sub(r"training:\n(  .*\n)+", "training: [1]\n", GOOD), ":11: training: must be a block of keys, not a list"),
    # single values
    "run_id with a slash": (swap("run_id: mine", "run_id: a/../b"), ":1: run_id: 'a/../b' cannot name a folder"),
    "run_id hidden": (swap("run_id: mine", "run_id: .x"), ":1: run_id:"),
    "run_id too long": (swap("run_id: mine", "run_id: " + "x" * 201), ":1: run_id:"),
    "run_id with a space": (swap("run_id: mine", "run_id: a b"), ":1: run_id:"),
    "run_id with a newline": (swap("run_id: mine", 'run_id: "a\\n"'), ":1: run_id:"),
    "run_id a number": (swap("run_id: mine", "run_id: 12"), ":1: run_id: must be a text, not 12: put it in quotes"),
    "unknown method": (swap("fw_lora", "fwlora"), ":2: method: 'fwlora' is not a method (did you mean 'fw_lora'?)"),
    "text for a number": (swap("epochs: 1", "epochs: '3'"), ":12: training.epochs: must be a whole number, not the text '3': remove the quotes"),
    "words for a number": (swap("epochs: 1", "epochs: three"), ":12: training.epochs: must be a whole number"),
    "fraction of an epoch": (swap("epochs: 1", "epochs: 1.5"), ":12: training.epochs: must be a whole number, not 1.5"),
    "bool for a number": (swap("epochs: 1", "epochs: true"), ":12: training.epochs: must be a whole number, not true"),
    "null for a number": (swap("epochs: 1", "epochs:"), ":12: training.epochs: must be a whole number, not null"),
    "no epochs": (swap("epochs: 1", "epochs: 0"), ":12: training.epochs: must be greater than or equal to 1, not 0"),
    "huge epochs": (swap("epochs: 1", "epochs: " + "9" * 400), ":12: training.epochs"),
    "more digits than Python reads": (swap("epochs: 1", "epochs: " + "9" * 5000), "x.yaml"),
    "nan": (GOOD + "  learning_rate: .nan\n", ":13: training.learning_rate: must be a finite number"),
    "inf": (GOOD + "  learning_rate: .inf\n", ":13: training.learning_rate: must be a finite number"),
    "a float too large": (GOOD + "  learning_rate: 1e999\n", ":13: training.learning_rate"),
    "no learning rate": (GOOD + "  learning_rate: 0\n", ":13: training.learning_rate: must be greater than 0"),
    "negative decay": (GOOD + "  weight_decay: -1\n", ":13: training.weight_decay"),
    "warm-up of the whole run": (GOOD + "  warmup_ratio: 1.0\n", ":13: training.warmup_ratio: must be less than 1"),
    "negative seed": (GOOD + "  seed: -1\n", ":13: training.seed"),
    "huge seed": (GOOD + "  seed: 4294967296\n", ":13: training.seed"),
    "yes as a text": (GOOD + "  optimizer: yes\n", ":13: training.optimizer: true is not allowed"),
    "unknown optimizer": (GOOD + "  optimizer: adam\n", ":13: training.optimizer: the text 'adam' is not allowed (did you mean 'adamw'?)"),
    "unknown precision": (GOOD + "  mixed_precision: fp16\n", ":13: training.mixed_precision: the text 'fp16' is not allowed"),
    "a commit read as a number": (swap("name: m", "name: m\n  revision: 695e0514"), ":5: model.revision: must be a text, not inf: put it in quotes"),
    "rank zero": (swap("rank: 4", "rank: 0"), ":7: model.lora.rank: must be greater than or equal to 1"),
    "alpha zero": (swap("rank: 4", "rank: 4\n    alpha: 0"), ":8: model.lora.alpha: must be greater than 0"),
    "dropout one": (swap("rank: 4", "rank: 4\n    dropout: 1"), ":8: model.lora.dropout"),
    "no targets": (swap("rank: 4", "rank: 4\n    target_modules: []"), ":8: model.lora.target_modules"),
    "targets as text": (swap("rank: 4", "rank: 4\n    target_modules: query"), ":8: model.lora.target_modules: must be a list"),
    "a target twice": (swap("rank: 4", "rank: 4\n    target_modules: [query, query]"), "'query' more than once"),
    "a target that is a number": (swap("rank: 4", "rank: 4\n    target_modules: [query, 3]"), "model.lora.target_modules.1: must be a text, not 3"),
    "empty name": (swap("name: m", "name: ''"), ":4: model.name"),
    "text columns as a number": (csv(FILES.replace("text_column: t", "text_column: 5")), "dataset.text_column: must be a text or a list"),
    # combinations
    "adapters off": (swap("rank: 4", "rank: 4\n    enabled: false"), ":8: model.lora.enabled: every method here"),
    "neither rank nor budget": (swap("    rank: 4", "    alpha: 4"), "model.lora.rank: neither it nor"),
    "budget above all": (swap("name: m", "name: m\n  parameter_budget_percent: 101"), ":5: model.parameter_budget_percent"),
    "glue without subset": (swap("  subset: cola\n", ""), "dataset.subset: glue needs it"),
    "unknown subset": (swap("cola", "CoLa2"), ":10: dataset.subset: 'CoLa2' is not a task of glue (did you mean 'cola'?)"),
    "unknown dataset": (swap("glue", "gleu"), ":9: dataset.name: the text 'gleu' is not allowed (did you mean 'glue'?)"),
    "scored on train": (swap("cola", "cola\n  eval_split: train"), ":11: dataset.eval_split: 'train' is also dataset.split"),
    "scored on test": (swap("cola", "cola\n  eval_split: test"), ":11: dataset.eval_split: 'test' has no public labels"),
    "length too short": (swap("cola", "cola\n  max_length: 3"), ":11: dataset.max_length"),
    "truncation as text": (swap("cola", "cola\n  truncation: 'true'"), ":11: dataset.truncation: must be true or false"),
    "csv without files": (csv("seed: 1"), "dataset.train_file: dataset.name csv needs it"),
    "csv scored on train": (csv(FILES.replace("b.csv", "a.csv")), "dataset.eval_file: is the train_file"),
    "label is text": (csv(FILES.replace("label_column: l", "label_column: t")), "dataset.label_column: 't' is a text column"),
    "three text columns": (csv(FILES.replace("text_column: t", "text_column: [a, b, c]")), "dataset.text_column: name one column"),
    "selection of nothing": (GOOD + "  evaluate_on: selection\n", ":13: training.evaluate_on: validation needs"),
    "selection of all": (swap("cola", "cola\n  validation_fraction: 1.0"), ":11: dataset.validation_fraction"),
    "K zero": (GOOD + "fw_lora: {warmup_steps: 0}\n", "fw_lora.warmup_steps: 0 is too short"),
    "K one point five": (GOOD + "fw_lora: {warmup_steps: 1.5}\n", "fw_lora.warmup_steps: 1.5 is not a fraction"),
    "K as text": (GOOD + "fw_lora: {warmup_steps: '500'}\n", "fw_lora.warmup_steps: must be a whole number or a number, not the text '500': remove"),
    "EMA one": (GOOD + "fw_lora: {fisher_ema_decay: 1.0}\n", "fw_lora.fisher_ema_decay: must be less than 1"),
    "start after K": (GOOD + "fw_lora: {warmup_steps: 5, start: 5}\n", "fw_lora.fisher_start: 5 leaves no step"),
    "unknown weighting": (GOOD + "fw_lora: {weighting: importence}\n", "fw_lora.weighting: the text 'importence' is not allowed (did you mean 'importance'?)"),
    "no pruning phase": (GOOD + "adalora: {tinit_ratio: 0.5, tfinal_ratio: 0.5}\n", "adalora: tinit_ratio 0.5 + tfinal_ratio 0.5"),
    "AdaLoRA that cannot shrink": (GOOD + "adalora: {init_rank_factor: 1.0}\n", "adalora.init_rank_factor: must be greater than 1"),
    # search
    "search without a space": (GOOD + "optuna: {n_trials: 3}\n", "optuna: needs exactly one of search_space"),
    "both dialects": (search(LR) + "  search_spaces: [{param_name: seed, distribution_type: int, low: 1, high: 2}]\n", "optuna: needs exactly one"),
    "search of nothing known": (search(LR.replace("learning_rate", "learnig_rate")), ":15: optuna.search_space.learnig_rate: 'learnig_rate' is not a key that can be searched (did you mean 'learning_rate'?)"),
    "search of two keys": (search("seed: {type: int, low: 1, high: 2}"), "could mean dataset.seed or training.seed"),
    "low above high": (search(LR.replace("1e-4", "1e-2")), "optuna.search_space.learning_rate: low 0.01 is not below high 0.001"),
    "log of zero": (search(LR.replace("1e-4", "0")), "loguniform needs low above 0"),
    "unknown distribution": (search(LR.replace("loguniform", "loguniforn")), "(did you mean 'loguniform'?)"),
    "no choices": (search("batch_size: {type: categorical}"), "optuna.search_space.batch_size: a categorical dimension needs choices"),
    "a choice the key refuses": (search("batch_size: {type: categorical, choices: [16, 0]}"), "optuna.search_space.batch_size: 0 is refused by training.batch_size"),
    "a float for an int": (search("batch_size: {type: uniform, low: 1.5, high: 3.0}"), "1.5 is refused by training.batch_size"),
    "one key twice": (search("rank: {type: int, low: 1, high: 2}\n    lora_rank: {type: int, low: 1, high: 2}"), "as rank does"),
    "no trials": (search(LR) + "  n_trials: 0\n", ":16: optuna.n_trials"),
}  # fmt: skip

PIECES = ["\n", "  ", ": ", "- ", "&a ", "*a", "!!", "${", "}", "'", '"', "#", "\t", "{", "[", "]", "? ", "<<: ",
          "| ", "> ", "null", "1e999", "defaults: [x]\n", "---", "%YAML 9.9\n", "???", "\ufeff", "\x85", "=", "\\$"]  # fmt: skip


def snapshot(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("name", CASES)
def test_malformed_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, says = CASES[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        validate_file("x.yaml")
    message = str(caught.value)
    assert says in message, message
    assert "x.yaml" in message and "Traceback" not in message and "given_run" not in message
    assert len(message) < 1200, "a message is read by people"
    assert snapshot(tmp_path) == ["x.yaml"]


def test_the_good_one_is_good(tmp_path):
    (tmp_path / "x.yaml").write_text(GOOD)
    assert validate_file(str(tmp_path / "x.yaml")) == []
    (tmp_path / "x.yaml").write_text(search(LR) + "  n_trials: 2\n")
    assert validate_file(str(tmp_path / "x.yaml")) == []
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert validate_file(str(tmp_path / "x.yaml")) == []


def test_all_faults_are_listed_at_once(tmp_path):
    text = swap("method: fw_lora", "method: magic").replace("epochs: 1", "epochs: 0\n  sed: 1")
    text = text.replace("cola", "kola") + "fw_lora: {warmup_steps: 0}\n"
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        validate_file(str(tmp_path / "x.yaml"))
    message = str(caught.value)
    for key in (
        "method",
        "training.epochs",
        "training.sed",
        "dataset.subset",
        "fw_lora.warmup_steps",
    ):
        assert re.search(rf"x\.yaml:\d+: {key}: ", message), key
    assert message.startswith("5 faults:")


def test_all_faults_of_the_text_are_listed_at_once(tmp_path):
    text = GOOD + "  seed: 017\n  seed: 1\n  optimizer: ${oc.env:X}\n  _target_: y\n"
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="4 faults") as caught:
        validate_file(str(tmp_path / "x.yaml"))
    assert [int(n) for n in re.findall(r"x\.yaml:(\d+):", str(caught.value))] == [13, 14, 15, 16]


def test_a_faulty_override_is_named_and_not_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text(GOOD)
    with pytest.raises(UserError) as caught:
        load_run(str(tmp_path / "x.yaml"), ["training.epochs=0"])
    assert str(caught.value).startswith("override `training.epochs=0`: training.epochs: must be")


def test_a_broken_file_that_a_run_builds_on_is_named(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/mine.yaml").write_text("training: {epochs: 017}\n")
    (tmp_path / "x.yaml").write_text("defaults: [/base/mine, _self_]\n" + GOOD)
    with pytest.raises(UserError, match=r"mine\.yaml:1: training\.epochs: `017`"):
        load_run(str(tmp_path / "x.yaml"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_is_typed_ends_in_a_config_or_a_message(data, tmp_path_factory):
    text = search(LR)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        until = min(len(text), at + data.draw(st.integers(0, 6)))
        piece = data.draw(st.sampled_from(PIECES) | st.text(max_size=3))
        text = text[:at] + piece + text[until:]
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        validate_file(str(path))
    except UserError as error:
        assert "x.yaml" in str(error)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("missing.yaml", "there is no such file (did you mean 'missin.yaml'?)"),
        ("no/such/folder/x.yaml", "there is no such file"),
        ("folder", "there is no run 'folder'"),
        ("./folder", "is a folder"),
        ("folder.yaml", "is a folder"),
        ("loop.yaml", "loop.yaml"),
        ("missin.yaml/x.yaml", "there is no such file"),
        ("minilm-cola-fwlora", "did you mean 'minilm-cola-fw_lora'"),
        ("~nobody-here/x.yaml", "x.yaml"),
    ],
)
def test_runs_that_cannot_be_found(run, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "missin.yaml").write_text(GOOD)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.yaml").mkdir()
    os.symlink("loop.yaml", tmp_path / "loop.yaml")
    for read in (load_run, expand_runs):
        with pytest.raises(UserError) as caught:
            read(run)
        assert says in str(caught.value)


def test_a_config_dir_that_is_not_there():
    with pytest.raises(UserError, match="no such folder"):
        load_run("demo-lora", config_dir="/no/such/folder")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "x.yaml").write_text(GOOD)
    (tmp_path / "x.yaml").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load_run(str(tmp_path / "x.yaml"))
