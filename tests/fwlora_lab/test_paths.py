"""Folders and files with names that shells, URLs and override grammars read in their own way.

pytest tests/fwlora_lab/test_paths.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import World

from fwlora_lab.cli.main import main
from fwlora_lab.config.validation import with_values
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.search import results
from fwlora_lab.search.session import open_study
from fwlora_lab.search.spec import SearchSpec

NAMES = ["a?b 50% off", "c#d  $HOME", 'it\'s "x"', "größe a=b,c", "{x} [y] &;`"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_a_search_and_a_report_in_such_a_folder(tiny, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(results, "_plot", lambda *_, **__: None)
    home = tmp_path / name
    shutil.copytree(tiny.backbone, home / "backbone")
    for file in (tiny.train_file, tiny.dev_file):
        shutil.copy(file, home)
    space = {"learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-1}}
    cfg = tiny.config(
        "lora",
        results_dir=str(home / "r"),
        training__epochs=1,
        model__pretrained_id=str(home / "backbone"),
        dataset__train_file=str(home / Path(tiny.train_file).name),
        dataset__eval_file=str(home / Path(tiny.dev_file).name),
        optuna={"n_trials": 1, "search_space": space},
    )
    (home / "run.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    run = f"run={home / 'run.yaml'}"
    monkeypatch.chdir(home)
    for words in (["train", run], ["search", run], ["validate", "run.yaml"], ["report", "r"], ["verify", "r"]):
        assert main(words) == 0, (words, capsys.readouterr().err)
    other = with_values(cfg, {"results_dir": str(tmp_path / (name + "2") / "r")})
    assert len(open_study(SearchSpec.of(cfg)).trials()) == 1
    assert open_study(SearchSpec.of(other)).trials() == [], "two folders are two searches"
    assert {p.name for p in tmp_path.iterdir()} == {name, name + "2"}, "nothing is written beside the folder"
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train it: ")]
    command = printed[0].removeprefix("train it: ").replace("fwlora ", f"{sys.executable} -m fwlora_lab.cli ", 1)
    again = subprocess.run(["bash", "-c", f"{command} training.epochs=1"], capture_output=True, text=True, cwd=home)
    assert again.returncode == 0, again.stderr
    assert len(list((home / "r").glob("*/seed-*/record.json"))) == 4
