"""Passwords and tokens reach no file, message or page; tests/fwlora_lab/search has those of a real database.

pytest tests/fwlora_lab/test_secrets.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import World

from fwlora_lab.cli.main import main
from fwlora_lab.config.validation import with_values
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.errors import UserError
from fwlora_lab.search import results
from fwlora_lab.search.run import run_search
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.storage import storage_url
from fwlora_lab.text import without_secrets

SECRET = "hunter2-Kf93"
SPACE = {"learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-1}}
URLS = [
    f"postgresql://somebody:{SECRET}@127.0.0.1:1/none",
    f"postgresql+psycopg://somebody:{SECRET}@127.0.0.1:1/none?connect_timeout=1",
    f"postgresql://somebody@127.0.0.1:1/none?password={SECRET}",
    f"postgresql://127.0.0.1:1/none?user=somebody&PASSWORD={SECRET}&connect_timeout=1",
    f"postgresql://somebody:{SECRET}@127.0.0.1:port/none",
    f"postgresql:/somebody:{SECRET}@127.0.0.1/none",
    f"postgresql://somebody:a@b:{SECRET}@127.0.0.1:1/none",
    f"mysql://somebody:{SECRET}@127.0.0.1:1/none",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:secret@h:1/d?x=1", "postgresql://u:***@h:1/d?x=1"),
        ("postgresql://u:s%40cr/et@h/d", "postgresql://u:***@h/d"),
        ("a postgresql://u:x@h/d and postgresql://v:y@i/d", "a postgresql://u:***@h/d and postgresql://v:***@i/d"),
        ("postgresql://h/d?user=u&password=abc&x=1", "postgresql://h/d?user=u&password=***&x=1"),
        ("HF_TOKEN=abc123", "HF_TOKEN=***"),
        ("hf_abcdefghijkl", "hf_***"),
        ("the ratio 1:2 @ home, http://host:8000/v1, me@example.org", None),
        ("sqlite:////tmp/a:b/study.db", None),
    ],
)
def test_what_is_hidden_and_what_is_not(text, shown):
    assert without_secrets(text) == (shown or text)


def test_secrets_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("A_TOKEN", "ab")  # too short to be one
    assert without_secrets(f"refused: {SECRET} about ab") == "refused: *** about ab"


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", ["optuna.storage", "optuna.storge", "+storage"])
def test_no_command_prints_or_writes_it(tiny, tmp_path, monkeypatch, capfd, url, key):
    pytest.importorskip("psycopg")
    cfg = tiny.config("lora", results_dir=str(tmp_path / "r"), training__epochs=1)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(with_values(cfg, {"optuna": {"n_trials": 1, "search_space": SPACE}})))
    for command in ("search", "train", "show", "validate"):
        words = [command, f"run={file}", f"{key}='{url}'"] if command != "validate" else ["validate", str(file)]
        monkeypatch.setattr(sys, "argv", ["fwlora", *words])
        main(words)
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    if key == "optuna.storage":
        assert list((tmp_path / "r" / "lora").glob("seed-*/record.json")), "a training does not need the storage"


def test_the_environment_gives_the_storage(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_plot", lambda *_, **__: None)
    database = tmp_path / "elsewhere.db"
    cfg = tiny.config("lora", results_dir=str(tmp_path / "r"), training__epochs=1)
    cfg = with_values(cfg, {"optuna": {"n_trials": 1, "search_space": SPACE}})
    monkeypatch.setenv("FWLORA_STORAGE", f"sqlite:///{database}")
    assert run_search(cfg) == 0
    assert database.exists() and not (tmp_path / "r/lora/search/study.db").exists()
    written = with_values(cfg, {"optuna.storage": "postgresql://somebody:***@127.0.0.1:1/none"})
    assert storage_url(SearchSpec.of(written)).database == str(database)
    monkeypatch.delenv("FWLORA_STORAGE")
    with pytest.raises(UserError, match="FWLORA_STORAGE"):
        run_search(written)


def test_a_cluster_does_not_get_the_password_in_its_files(tiny, tmp_path):
    cfg = tiny.config("lora", results_dir=str(tmp_path / "r"))
    cfg = with_values(cfg, {"optuna": {"n_trials": 1, "search_space": SPACE, "storage": f"sqlite:///{tmp_path}/a.db"}})
    cfg = with_values(cfg, {"optuna.storage": f"sqlite:///{tmp_path}/a.db?password={SECRET}"})
    with pytest.raises(UserError, match="FWLORA_STORAGE") as refused:
        run_search(cfg, 1, ["hydra/launcher=submitit_local"])
    assert SECRET not in str(refused.value)
    assert not [p for p in Path(tmp_path).rglob("*.pkl")]
