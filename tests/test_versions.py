"""The versions that pyproject.toml claims are those that CI tests.

pytest tests/test_versions.py
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("core_versions", ROOT / "scripts" / "core_versions.py")
assert spec and spec.loader
core_versions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core_versions)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_oldest_versions_are_the_floors_of_pyproject() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "scripts" / "core_versions.py", "oldest"], capture_output=True, text=True, check=True
    ).stdout.split()
    declared = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared
    floors = [requirement.strip('" ') for requirement in declared[1].split(",")]
    assert [line.replace("==", ">=") for line in printed[: len(floors)]] == floors
    assert [line.partition("==")[0] for line in printed[len(floors) :]] == list(core_versions.TOOLS)


@pytest.mark.parametrize("name", ["torch", "peft", "transformers"])
def test_the_pinned_versions_are_not_below_the_floors(name: str) -> None:
    assert numbers(core_versions.pins()[name]) >= numbers(core_versions.floors()[name])


def test_torch_s_floor_is_the_version_that_the_makefile_installs_first() -> None:
    """torch is tested in one version here: another one costs gigabytes of CUDA libraries from PyPI."""
    assert f"install --quiet torch=={core_versions.pins()['torch']}\n" in (ROOT / "Makefile").read_text()


def test_ci_runs_the_core_on_the_oldest_and_the_newest_versions() -> None:
    assert "\nmake floors\n" in (ROOT / ".ci" / "run").read_text()
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert "run: .ci/run" in workflow and "run: make newest" in workflow
