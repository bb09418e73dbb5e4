"""Every command line and every YAML file in README, docs and `--help` is read as it is printed there.

pytest tests/test_doc_commands.py

Commands that train are run up to the first step: their words, configs, studies and searches are checked as a user's
are, with no data and no encoder. All others are run as they are.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from designs import DESIGN

from fwlora_lab.bench import run as bench_run
from fwlora_lab.cli import compare as compare_command
from fwlora_lab.cli.main import COMMANDS, command_named, main
from fwlora_lab.config.load import load_run
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.search import run as search_run
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.storage import storage_url
from fwlora_lab.study import estimate
from fwlora_lab.training import scheduler

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Not run: it measures for minutes what the tests of `bench` measure in seconds.
NOT_RUN = {"bench"}


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for name, text in FENCE.findall(page.read_text()):
            if name == language:
                yield page, text


def command_lines() -> list[str]:
    """What stands behind `fwlora` in shell blocks and in the helps' examples, each once."""
    lines = [
        line.removeprefix("fwlora ")
        for _, text in blocks("sh")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("fwlora ")
    ]
    lines += [line for name in COMMANDS for line, _ in command_named(name).examples]
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines))


def written_studies() -> dict[str, str]:
    """The studies that the docs print whole, by the name of the file that their page's commands give them."""
    found = {}
    for page, text in blocks("yaml"):
        if {"tasks", "methods"} <= (yaml.safe_load(text) or {}).keys():
            named = re.findall(r"study=(my-[\w-]+\.yaml)", page.read_text())
            found.update({name: text for name in named if name not in found})
    return found


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the lines name, and nothing that trains."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "offline"):
        shutil.copytree(ROOT / "tests" / "fixtures" / "v0.1" / "old-study", tmp_path / "results" / name)
    text = yaml.safe_dump({**DESIGN, "models": ["roberta-base (110M)"], "datasets": ["SST-2 (GLUE)"]})
    for name in ("request.txt", "REQUEST.txt"):
        (tmp_path / name).write_text(text)
    (tmp_path / "design.yaml").write_text(text)
    space = {"learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2}}
    mine = load_run("demo-lora", [f"+optuna={{n_trials: 2, search_space: {space}}}".replace("'", "")])
    (tmp_path / "runs").mkdir()
    for file in (tmp_path / "my-run.yaml", tmp_path / "runs" / "my-run.yaml"):
        file.write_text(to_yaml(mine))
    for name in ("my-study.yaml", "my-a-a.yaml"):
        (tmp_path / name).write_text(written_studies()[name])
    for name in ("DIR", "DIR_WITH_GLUE"):
        (tmp_path / name).mkdir()
    trained: list[object] = []

    def search(cfg, workers=1, launcher=()):
        storage_url(SearchSpec.of(cfg))
        trained.append(cfg)
        return 0

    monkeypatch.setattr(scheduler, "train_runs", lambda runs, *_, **__: trained.extend(runs) or [])
    monkeypatch.setattr(search_run, "run_search", search)
    monkeypatch.setattr(compare_command, "run_planned", lambda plan, workers: trained.extend(plan.cells) or 0)
    monkeypatch.setattr("fwlora_lab.cli.demo.run_planned", lambda plan, workers: trained.extend(plan.cells) or 0)
    monkeypatch.setattr(estimate, "estimate", lambda plan: trained.extend(plan.cells) or ())
    return trained


@pytest.mark.parametrize("line", command_lines())
def test_a_printed_command_line_is_taken(desk, capsys, line):
    words = shlex.split(line)
    if words[0] in NOT_RUN:
        command_named(words[0]).parse(words[1:])
        assert callable(bench_run.bench)
        return
    if "run=OUT/" in line:
        assert main(["generate", "REQUEST.txt", "-o", "OUT"]) == 0
    words = [str(next(Path().glob(word))) if "*" in word else word for word in words]  # as the shell does it
    # The request's own contradiction, a model's size, is found.
    assert main(words) == (1 if "--check" in words else 0), capsys.readouterr().err
    if words[0] in ("train", "search", "compare", "demo"):
        assert desk, "something would have been trained"


def test_there_are_lines_of_every_command():
    assert {line.split()[0] for line in command_lines()} == set(COMMANDS)


@pytest.mark.parametrize(("page", "text"), [pytest.param(p, t, id=p.name) for p, t in blocks("yaml")])
def test_printed_yaml_is_yaml(page, text):
    assert isinstance(yaml.safe_load(text), dict)
