"""Run configs: composition, overrides, sweeps, seeds, writing and fingerprints.

pytest tests/fwlora_lab/config/test_run_config.py
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError
from ruamel.yaml import YAML

import fwlora
from fwlora.config import warmup_in_steps
from fwlora_lab.catalog.methods import METHODS
from fwlora_lab.catalog.tasks import GLUE
from fwlora_lab.config.checks import check_warmup, reads, warnings_of
from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.config.keys import KEYS, get_key, search_key
from fwlora_lab.config.load import expand_runs, load_run, validate_file
from fwlora_lab.config.schema import FWLoraSettings, RunConfig
from fwlora_lab.config.search_space import dimensions_of
from fwlora_lab.config.tree import CONF, available_runs
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.errors import UserError
from fwlora_lab.seeds import parse_seeds

PROPOSED = "proposed-roberta-base-110M--SST-2-GLUE"
COMPARATIVE = "comparative-1-roberta-base-110M--SST-2-GLUE"
MINIMAL = """\
run_id: mine
method: lora
model: {name: m, pretrained_id: minilm, lora: {rank: 4}}
dataset: {name: glue, subset: cola}
"""


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the packaged tree -------------------------------------------------------------------------


@pytest.mark.parametrize("run", available_runs())
def test_every_packaged_run_is_valid_and_warns_of_nothing(run):
    cfg = load_run(run)
    assert cfg.run_id == run
    assert warnings_of(cfg) == []


def test_both_runs_of_the_request_hold_its_values():
    cfg = load_run(PROPOSED)
    assert (cfg.method_name, cfg.method) == ("fw_lora", "proposed_fw_lora")
    assert cfg.model.parameter_budget_percent == 0.2
    lora = cfg.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.scale) == (8, 16, 0.1, 2.0)
    assert lora.target_modules == ["query", "key", "value", "intermediate", "output"]
    assert (cfg.dataset.name, cfg.dataset.subset, cfg.dataset.max_length) == ("glue", "sst2", 128)
    assert (cfg.dataset.padding, cfg.dataset.validation_fraction) == ("max_length", 0.0)
    t = cfg.training
    assert (t.epochs, t.batch_size, t.learning_rate, t.weight_decay) == (3, 32, 2e-4, 0.01)
    assert (t.warmup_ratio, t.mixed_precision, t.seed) == (0.06, "bf16", 42)
    fw = cfg.fw_lora
    assert (fw.penalty_strength, fw.warmup_steps, fw.fisher_ema_decay) == (1e-4, 500, 0.98)
    assert cfg.optuna and cfg.optuna.n_trials == 30
    assert list(dimensions_of(cfg.optuna)) == [
        "training.learning_rate",
        "fw_lora.penalty_strength",
        "model.lora.rank",
        "fw_lora.warmup_steps",
        "training.batch_size",
    ]
    other = load_run(COMPARATIVE)
    assert other.method_name == "lora" and other.optuna and other.optuna.n_trials == 20
    assert other.training == cfg.training and other.model == cfg.model


def test_arms_of_one_family_differ_in_their_method_only():
    for family in ("demo", "minilm-cola", "minilm-sst2"):
        dumps = [load_run(f"{family}-{m}").model_dump() for m in ("lora", "adalora", "fw_lora")]
        for dump in dumps:
            for key in ("run_id", "method", "fw_lora", "adalora"):
                dump.pop(key)
            # One number of trials and one space for all; λ comes on top for the method that has it.
            (dump["optuna"] or {}).get("search_space", {}).pop("penalty_strength", None)
        assert dumps[0] == dumps[1] == dumps[2]


def test_settings_of_the_method_have_the_defaults_of_the_method():
    """But for K: a run config without one means the request's."""
    own = {f.name: f.default for f in dataclasses.fields(fwlora.FWLoraConfig) if f.name != "seed"}
    assert own["warmup_steps"] == "auto"
    assert FWLoraSettings().model_dump() == {**own, "warmup_steps": 500}


# --- where runs come from ----------------------------------------------------------------------


def test_a_run_is_an_id_a_path_or_an_id_in_a_tree_of_ones_own(tmp_path, monkeypatch):
    nested = write(tmp_path / "tree/run/mine.yaml", MINIMAL)
    write(tmp_path / "flat/mine.yaml", MINIMAL)
    odd = write(tmp_path / "a (b), é=1/it's 100% mine.yaml", MINIMAL)
    expected = load_run(nested)
    assert load_run("mine", config_dir=str(tmp_path / "tree")) == expected
    assert load_run("mine", config_dir=str(tmp_path / "flat")) == expected
    assert load_run(odd) == expected
    assert expand_runs(odd) == [expected]
    monkeypatch.chdir(tmp_path)
    assert load_run("flat/mine.yaml") == expected
    assert load_run("mine", config_dir="flat") == expected
    assert load_run("demo-lora", config_dir="flat").run_id == "demo-lora"


def test_ones_own_tree_wins_over_the_packaged_one(tmp_path):
    write(tmp_path / "base/minilm.yaml", "training: {warmup_ratio: 0.5}")
    text = "defaults: [/base/minilm, /base/cola, _self_]\n"
    text += "run_id: demo-lora\nmethod: lora\nmodel: {name: m, pretrained_id: m, lora: {rank: 2}}\n"
    write(tmp_path / "run/demo-lora.yaml", text)
    write(tmp_path / "config.yaml", "something: else")
    cfg = load_run("demo-lora", config_dir=str(tmp_path))
    assert (cfg.training.warmup_ratio, cfg.model.lora.rank) == (0.5, 2)
    assert cfg.model.lora.alpha is None  # nothing of the packaged base/minilm
    assert cfg.dataset.subset == "cola"  # from the packaged base/cola


def test_a_file_reads_numbers_as_people_mean_them(tmp_path):
    path = write(tmp_path / "x.yaml", MINIMAL + "training: {learning_rate: 1e-4, mixed_precision: no}")
    cfg = load_run(path)
    assert cfg.training.learning_rate == 1e-4
    assert cfg.training.mixed_precision == "no"
    assert cfg.fw_lora.warmup_steps == 500 and type(cfg.fw_lora.warmup_steps) is int
    assert validate_file(path) == []


def test_aliases_and_references_are_read(tmp_path):
    text = MINIMAL + "training: {seed: &s 7}\nfw_lora: {warmup_steps: 9}\n"
    text = text.replace("cola}", "cola, seed: '${training.seed}', max_length: *s}")
    moved = "training: {seed: &s 7}\n" + text.replace("training: {seed: &s 7}\n", "")
    cfg = load_run(write(tmp_path / "x.yaml", moved))
    assert (cfg.dataset.seed, cfg.dataset.max_length) == (7, 7)
    assert load_run(str(tmp_path / "x.yaml"), ["training.seed=8"]).dataset.seed == 8


def test_loading_writes_nothing_and_leaves_hydra_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker = object()
    GlobalHydra.instance().hydra = marker  # type: ignore[assignment]
    try:
        load_run("demo-lora")
        with pytest.raises(UserError):
            load_run("demo-lora", ["training=3"])
        assert GlobalHydra.instance().hydra is marker
    finally:
        GlobalHydra.instance().clear()
    assert os.listdir(tmp_path) == [] and Path.cwd() == tmp_path


# --- overrides and sweeps ----------------------------------------------------------------------


def test_every_kind_of_override():
    cfg = load_run(
        "minilm-cola-fw_lora",
        [
            "training.learning_rate=5e-4",
            "+fw_lora.gamma=0.3",
            "~training.epochs",
            "++model.lora.alpha=null",
            "dataset.root=some/glue",
            "dataset.text_column=[a,b]",
            "training.mixed_precision=no",
        ],
    )
    assert cfg.training.learning_rate == 5e-4 and cfg.fw_lora.gamma == 0.3
    assert cfg.training.epochs == 3  # the file's value is gone, the schema's default is left
    assert cfg.model.lora.scale == 2.0 and cfg.dataset.root == "some/glue"
    assert cfg.dataset.text_column == ["a", "b"] and cfg.training.mixed_precision == "no"


def test_the_budget_decides_where_the_rank_is_null():
    cfg = load_run(PROPOSED, ["model.lora.rank=null"])
    assert cfg.model.lora.rank is None and cfg.model.lora.scale == 2.0
    assert warnings_of(cfg)[0].startswith("model.lora.alpha = 16.0 is ignored")
    assert load_run(PROPOSED, ["model.lora.alpha=12"]).model.lora.scale == 1.5


def test_several_runs_without_multirun():
    both = expand_runs(f"{PROPOSED},{COMPARATIVE}", ["training.epochs=1"])
    assert [c.run_id for c in both] == [PROPOSED, COMPARATIVE]
    assert {c.training.epochs for c in both} == {1}
    assert [c.run_id for c in expand_runs("glob(demo-*,exclude=*fw*)")] == [
        "demo-adalora",
        "demo-lora",
    ]
    assert [c.run_id for c in expand_runs("choice(demo-lora,demo-fw_lora)")] == [
        "demo-lora",
        "demo-fw_lora",
    ]


def test_sweeps_name_their_runs():
    overrides = [
        "training.learning_rate=1e-3,5e-4",
        "training.epochs=range(1,3)",
        "training.seed=5",
    ]
    runs = expand_runs("demo-lora,demo-fw_lora", overrides, multirun=True)
    assert len(runs) == 8 and len({r.run_id for r in runs}) == 8
    assert runs[0].run_id == "demo-lora--learning_rate=0.001--epochs=1"
    assert runs[3].run_id == "demo-lora--learning_rate=0.0005--epochs=2"
    assert (runs[3].training.learning_rate, runs[3].training.epochs) == (5e-4, 2)
    assert {r.training.seed for r in runs} == {5}


def test_swept_texts_and_lists_give_safe_and_distinct_names():
    overrides = [
        "model.lora.target_modules=[query],[query,key],[key]",
        "dataset.root='a/b','a_b','a b'",
    ]
    runs = expand_runs("minilm-cola-lora", overrides, multirun=True)
    assert len({r.run_id for r in runs}) == 9
    assert all(re.fullmatch(r"[A-Za-z0-9._=-]{1,200}", r.run_id) for r in runs)
    long = ",".join(f"'{'x' * 200}{i}'" for i in range(3))
    assert len({r.run_id for r in expand_runs("demo-lora", [f"results_dir={long}"], True)}) == 3


@pytest.mark.parametrize(
    ("run", "overrides", "multirun", "says"),
    [
        ("demo-lora", ["training.epochs=1,2"], False, "--multirun"),
        ("demo-lora", ["training.epochs=glob(*)"], True, "glob"),
        ("demo-lora", ["training.epochs=interval(1,2)"], True, "sweep"),
        ("demo-lora,demo-lora", [], False, "distinct run_ids"),
        ("glob(nothing*)", [], False, "matches none"),
        ("demo-lora", ["run_id=a,a"], True, "distinct run_ids"),
        ("demo-lora", ["run=demo-fw_lora"], False, "named once"),
        ("demo-lora", ["training.seed=range(0,5000)"], True, "limit"),
        ("demo-lora,demo-lorra", [], False, "did you mean 'demo-lora'"),
        ("", [], False, "empty"),
        ("x" * 5000, [], False, "cannot name a file"),
        ("a\0b", [], False, "there is no run"),
    ],
)
def test_sweeps_that_are_refused(run, overrides, multirun, says):
    with pytest.raises(UserError, match=re.escape(says)):
        expand_runs(run, overrides, multirun)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.learning_rte=1", "did you mean 'training.learning_rate'"),
        ("learning_rate=1", "did you mean 'training.learning_rate'"),
        ("+training.new=1", "unknown key 'training.new'"),
        ("training.epochs", "key=value"),
        ("training.epochs=", "training.epochs"),
        ("training.epochs='3'", "remove the quotes"),
        ("training.epochs=2.5", "must be a whole number"),
        ("training.learning_rate=nan", "finite"),
        ("training.learning_rate=1e999", "finite"),
        ("training.seed=true", "must be a whole number, not true"),
        ("training=3", "must be a block"),
        ("model.lora=[1]", "model.lora"),
        ("dataset.root=/my (data)", "quote"),
        ("dataset.revision=695e0514", "quotes"),
        ("dataset.root=${oc.env:HOME}", "only references"),
        ("dataset.root='${oc.env:HOME}'", "only references"),
        ("dataset.root=${no.such.key}", "no.such.key"),
        ("training=${training}", "training"),
        ("+model._target_=os.system", "_target_"),
        ("model={_target_:os.system}", "_target_"),
        ("hydra.run.dir=x", "results_dir"),
        ("hydra/launcher=joblib", "results_dir"),
        ("~nothing", "nothing"),
        ("~method", "method: is missing"),
    ],
)
def test_overrides_that_are_refused(override, says):
    with pytest.raises(UserError) as caught:
        load_run("demo-lora", [override])
    assert says in str(caught.value)


def test_a_run_without_a_search_space_has_no_number_of_trials(tmp_path):
    with pytest.raises(UserError, match=r"override `optuna.n_trials=3`: .*the run itself has no optuna block"):
        load_run(write(tmp_path / "mine.yaml", MINIMAL), ["optuna.n_trials=3"])


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0..2", [0, 1, 2]),
        ("1,5,7", [1, 5, 7]),
        ("0..3,42", [0, 1, 2, 3, 42]),
        ("5..5", [5]),
        (" 1 , 2 ", [1, 2]),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "-1",
        "1.5",
        "3..1",
        "1,,2",
        "1,1",
        "0..3,2",
        "0...2",
        "1..",
        "4294967296",
        "0..999999999",
        "٣",
    ],
)
def test_seeds_that_are_refused(text):
    with pytest.raises(UserError, match="seeds="):
        parse_seeds(text)


# --- rules over several keys -------------------------------------------------------------------


def test_warmup_must_end_before_the_run():
    cfg = load_run(PROPOSED, ["training.epochs=1", "dataset.subset=cola"])
    with pytest.raises(UserError) as caught:
        check_warmup(cfg, 267, 8551)
    assert str(caught.value) == (
        "fw_lora.warmup_steps = 500 is not smaller than the 267 optimiser steps of this run "
        "(8551 examples / batch 32, 1 epoch): use fw_lora.warmup_steps=66 or a fraction such as "
        "0.25"
    )
    check_warmup(cfg, 501)
    with pytest.raises(UserError):
        check_warmup(cfg, 500)
    check_warmup(load_run(COMPARATIVE), 267)  # plain LoRA has no warm-up
    fraction = load_run(PROPOSED, ["fw_lora.warmup_steps=0.25", "fw_lora.fisher_start=60"])
    check_warmup(fraction, 267)
    with pytest.raises(UserError, match="start"):
        check_warmup(fraction, 200)
    with pytest.raises(UserError, match="0.9999"):
        check_warmup(load_run(PROPOSED, ["fw_lora.warmup_steps=0.9999"]), 267)


@pytest.mark.parametrize(
    ("run", "override", "says"),
    [
        (
            "demo-lora",
            "fw_lora.penalty_strength=0.1",
            "fw_lora.penalty_strength = 0.1 is ignored: method is lora",
        ),
        ("demo-fw_lora", "fw_lora.gamma=0.1", "weighting is importance"),
        ("demo-fw_lora", "fw_lora.sketch_columns=2", "estimator is exact"),
        ("demo-fw_lora", "adalora.beta1=0.5", "method is fw_lora"),
        ("demo-lora", "dataset.root=x", "dataset.name is offline"),
        ("demo-lora", "model.revision=abc", "minilm comes with its package"),
        ("minilm-cola-lora", "dataset.text_column=x", "not csv or jsonl"),
    ],
)
def test_settings_without_effect_are_warned_of_and_leave_the_fingerprint(run, override, says):
    plain, changed = load_run(run), load_run(run, [override])
    assert warnings_of(plain) == []
    (warning,) = warnings_of(changed)
    assert says in warning
    assert fingerprint(plain) == fingerprint(changed)


def test_svd_lora_reads_adaloras_regulariser_and_nothing_of_its_schedule():
    plain = load_run("demo-adalora", ["method=svd_lora"])
    assert plain.method_name == "svd_lora" and warnings_of(plain) == []
    for key in (k for k in KEYS if k.startswith(("adalora.", "fw_lora."))):
        assert reads("svd_lora", key) == (key == "adalora.orth_reg_weight")
    other = load_run("demo-adalora", ["method=svd_lora", "adalora.tinit_ratio=0.3", "adalora.init_rank_factor=3.0"])
    assert [w.split(" is ")[0] for w in warnings_of(other)] == [
        "adalora.init_rank_factor = 3.0",
        "adalora.tinit_ratio = 0.3",
    ]
    assert fingerprint(other) == fingerprint(plain) != fingerprint(load_run("demo-adalora"))
    stronger = load_run("demo-adalora", ["method=svd_lora", "adalora.orth_reg_weight=0.1"])
    assert warnings_of(stronger) == [] and fingerprint(stronger) != fingerprint(plain)


def test_searching_what_is_ignored_is_warned_of():
    cfg = load_run(PROPOSED, ["method=lora"])
    assert any("optuna searches fw_lora.penalty_strength" in w for w in warnings_of(cfg))


def test_fingerprint_changes_with_what_changes_the_result_and_with_nothing_else():
    base = fingerprint(load_run(PROPOSED))
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    for same in (
        "run_id=x",
        "results_dir=x",
        "optuna=null",
        "training.seed=1",
        "method=fw_lora",
        "training.save_adapter=false",
        "model.lora.alpha=null",
        "model.name=x",
        "model.parameter_budget_percent=0.5",
        "optuna.n_trials=3",
        "dataset.root=/elsewhere",
    ):
        assert fingerprint(load_run(PROPOSED, [same])) == base, same
    for other in (
        "method=lora",
        "training.learning_rate=1e-4",
        "model.lora.rank=4",
        "dataset.seed=1",
        "fw_lora.warmup_steps=499",
        "model.lora.target_modules=[query]",
        "dataset.subset=cola",
        "training.evaluate_on=selection",
        "fw_lora.weighting=uniform",
    ):
        extra = ["dataset.validation_fraction=0.1"] if "selection" in other else []
        assert fingerprint(load_run(PROPOSED, [other, *extra])) != base, other


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("batch_size", "training.batch_size"),
        ("lora_rank", "model.lora.rank"),
        ("rank", "model.lora.rank"),
        ("warmup_steps", "fw_lora.warmup_steps"),
        ("training.seed", "training.seed"),
        ("lora_dropout", "model.lora.dropout"),
    ],
)
def test_names_of_a_search(name, key):
    assert search_key(name) == key and key in KEYS


def test_both_dialects_of_a_search_mean_the_same():
    by_name = load_run(PROPOSED)
    assert by_name.optuna and by_name.optuna.search_space
    data = by_name.model_dump()
    space = data["optuna"].pop("search_space")
    data["optuna"]["search_spaces"] = [
        {"param_name": n, "distribution_type": d.pop("type"), **d} for n, d in space.items()
    ]
    listed = RunConfig.model_validate(data)
    assert listed.optuna and dimensions_of(listed.optuna) == dimensions_of(by_name.optuna)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        load_run("demo-lora").method = "fw_lora"  # type: ignore[misc]


@pytest.mark.parametrize("total_steps", [2, 3, 7, 100, 501])
@pytest.mark.parametrize("warmup_steps", [1, 0.001, 0.25, 0.5, 1 / 3, 0.499])
def test_the_length_of_the_warmup_is_that_of_the_method(warmup_steps, total_steps):
    method = fwlora.FWLoraConfig(warmup_steps=warmup_steps)
    assert warmup_in_steps(warmup_steps, total_steps) == method.resolve_warmup_steps(total_steps)


# --- writing -----------------------------------------------------------------------------------

TEXT = st.one_of(
    st.sampled_from(
        [
            "no",
            "y",
            "1e-4",
            "695e0514",
            "017",
            "0x1F",
            "1:30",
            "null",
            "~",
            ".inf",
            "- a",
            "a: b",
            "a #b",
            "'",
            '"',
            "\\",
            "\\n",
            " a ",
            "%",
            "@x",
            "*x",
            "&x",
            "!x",
            "{a}",
            "é",
            "日本",
            "🙂",
            "\u2028",
            "\ufeff",
            "\u200d",
            "2024-01-01",
            "=",
            "<<",
            "$",
            "\\$",
            "1_000",
            "x" * 300,
        ]
    ),
    st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=30),
).filter(lambda s: "${" not in s and s != "???")
SMALL = st.floats(1e-300, 0.999999, allow_nan=False)
POSITIVE = st.floats(5e-324, 1.7e308, allow_nan=False, allow_infinity=False)


@st.composite
def configs(draw):
    rank = draw(st.none() | st.integers(1, 64))
    kind = draw(st.sampled_from(["glue", "offline", "csv", "jsonl"]))
    dataset = {
        "name": kind,
        "root": draw(st.none() | TEXT),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "train_examples": draw(st.none() | st.integers(2, 10**12)),
        "truncation": draw(st.booleans()),
        "validation_fraction": draw(SMALL),
    }
    if kind == "glue":
        dataset["subset"] = draw(st.sampled_from(list(GLUE)))
    if kind in ("csv", "jsonl"):
        a, b, c = draw(st.lists(TEXT, min_size=3, max_size=3, unique=True))
        dataset |= {
            "train_file": a,
            "eval_file": b,
            "label_column": c,
            "text_column": draw(st.sampled_from([a, [a], [a, b]])),
        }
    low = draw(st.floats(1e-12, 1.0))
    optuna = (
        None
        if draw(st.booleans())
        else {
            "search_space": {
                "learning_rate": {"type": "loguniform", "low": low, "high": 2.0},
                "lora_rank": {"type": "categorical", "choices": [4, 8]},
            },
            "storage": draw(st.none() | TEXT),
        }
    )
    return RunConfig.model_validate(
        {
            "run_id": draw(st.from_regex(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,40}", fullmatch=True)),
            "method": draw(st.sampled_from(sorted(METHODS))),
            "model": {
                "name": draw(TEXT),
                "pretrained_id": draw(TEXT),
                "revision": draw(st.none() | TEXT),
                "parameter_budget_percent": draw(st.floats(1e-6, 100)),
                "lora": {
                    "rank": rank,
                    "alpha": draw(st.none() | POSITIVE),
                    "target_modules": draw(st.lists(TEXT, min_size=1, max_size=4, unique=True)),
                },
            },
            "dataset": dataset,
            "training": {
                "learning_rate": draw(POSITIVE),
                "weight_decay": draw(POSITIVE),
                "mixed_precision": draw(st.sampled_from(["bf16", "no"])),
                "max_grad_norm": draw(st.none() | POSITIVE),
            },
            "fw_lora": {
                "penalty_strength": draw(st.sampled_from([0.0, 1e-4]) | POSITIVE),
                "warmup_steps": draw(SMALL | st.integers(1, 10**9)),
            },
            "optuna": optuna,
            "results_dir": draw(TEXT),
        }
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cfg=configs())
def test_yaml_is_read_alike_by_every_loader(cfg):
    text = to_yaml(cfg)
    readings = [
        yaml.safe_load(text),
        YAML(typ="safe", pure=True).load(text),
        YAML(typ="safe").load(text),
        OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=True),
    ]
    for reading in readings:
        assert reading == readings[0]
        assert RunConfig.model_validate(reading) == cfg
        assert to_yaml(RunConfig.model_validate(reading)) == text
        assert fingerprint(RunConfig.model_validate(reading)) == fingerprint(cfg)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cfg=configs())
def test_a_written_config_runs_again(cfg, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "config.yaml"
    path.write_text(to_yaml(cfg), encoding="utf-8")
    assert load_run(str(path)) == cfg


def test_small_floats_are_written_with_a_point_and_a_signed_exponent():
    text = to_yaml(load_run(PROPOSED, ["training.learning_rate=1e-5", "training.weight_decay=1e30"]))
    assert "learning_rate: 1.0e-5" in text and "weight_decay: 1.0e+30" in text
    assert "penalty_strength: 1.0e-4" in text and 'mixed_precision: "no"' in to_yaml(
        load_run(PROPOSED, ["training.mixed_precision=no"])
    )


def test_the_packaged_tree_ships_with_the_package():
    assert (CONF / "config.yaml").is_file() and len(available_runs()) == 11


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optuna.pruner=median", "median"),
        ("optuna.n_jobs=3", 3),
        ("+optuna.n_jobs=3", 3),
        ("optuna.storage=postgresql://USER@HOST/DATABASE", "postgresql://USER@HOST/DATABASE"),
        ("fw_lora.gamma=0.7", 0.7),
        ("adalora.delta_t=2", 2),
        ("model.lora.alpha=3", 3.0),
    ],
)
def test_keys_of_optional_blocks_are_overridden_without_a_plus(override, value):
    cfg = load_run("minilm-cola-lora", [override])
    assert get_key(cfg.model_dump(), override.split("=")[0].lstrip("+")) == value


def test_a_search_space_is_changed_and_extended_without_a_plus():
    added = "optuna.search_space.weight_decay={type:uniform,low:0.0,high:0.1}"
    cfg = load_run("minilm-cola-lora", ["optuna.search_space.learning_rate.low=1e-5", added])
    assert cfg.optuna is not None and cfg.optuna.search_space is not None
    assert cfg.optuna.search_space["learning_rate"].low == 1e-5
    assert cfg.optuna.search_space["weight_decay"].high == 0.1
    with pytest.raises(UserError, match="did you mean 'optuna.pruner'"):
        load_run("minilm-cola-lora", ["optuna.prunner=median"])


def test_references_that_lead_nowhere_hide_no_other_fault(tmp_path):
    text = """\
run_id: x
method: fwlora
model:
  name: m
  lora:
    rank: 4
    alpha: ${model.lora.alpha}
dataset:
  name: glue
training:
  seed: ${seed}
  epochs: three
  learning_rate: ${opt.beta}
  optimizer: "ad\\namw"
"""
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(UserError) as caught:
        load_run(path)
    faults = str(caught.value).splitlines()[1:]
    places = {fault.split(": ")[1]: int(fault.split(": ")[0].rsplit(":", 1)[1]) for fault in faults}
    assert places == {
        "model.lora.alpha": 7, "training.learning_rate": 13, "training.seed": 11, "method": 2, "training.epochs": 12,
        "training.optimizer": 14, "model.pretrained_id": 3, "dataset.subset": 8,
    }  # fmt: skip
    assert "in a circle, model.lora.alpha -> model.lora.alpha" in str(caught.value)
    assert "there is no key opt.beta" in str(caught.value) and "there is no key seed" in str(caught.value)
