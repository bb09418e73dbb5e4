"""Imports run one way: the house's plan, held.

pytest tests/test_layers.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# In the order in which data flows: a module imports from those above it only.
METHOD = ["fisher", "importance", "shrinkage", "budget", "pairs", "method", "trainer"]
LAB = [
    "errors",
    "runconfig",
    "compose",
    "request",
    "names",
    "spaces",
    "prose",
    "plan",
    "contradictions",
    "generate",
    "llm",
    "offline",
    "tasks",
    "backbones",
    "doctor",
    "records",
    "stats",
    "verdicts",
    "analysis",
    "figures",
    "views",
    "modelcards",
    "report",
    "packing",
    "laneops",
    "fusedpenalty",
    "lanes",
    "methods",
    "train",
    "progress",
    "trials",
    "launch",
    "search",
    "cli",
]


def imported(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, relative names resolved."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module or ""}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(package: str) -> dict[str, set[str]]:
    return {f.stem: imported(f) for f in (SRC / package).glob("*.py") if f.stem != "__init__"}


@pytest.mark.parametrize(("package", "order"), [("fwlora", METHOD), ("fwlora_lab", LAB)])
def test_imports_follow_the_data(package, order):
    found = modules(package)
    assert sorted(found) == sorted(order), "a new module needs its place in the order"
    for name, imports in found.items():
        for later in order[order.index(name) :]:
            assert f"{package}.{later}" not in imports, f"{name} imports {later}, which comes later"


def test_the_method_needs_torch_and_peft_only():
    allowed = {"torch", "peft", "fwlora", "transformers", *sys.stdlib_module_names}
    for name, imports in modules("fwlora").items():
        third = {i.split(".")[0] for i in imports if i} - allowed
        assert third <= ({"jaxtyping"} if name in METHOD[:3] else set()), f"{name}: {third}"
        if name != "trainer":
            assert not any(i.startswith("transformers") for i in imports), name
        assert not any(i.startswith("fwlora_lab") for i in imports), name


def test_the_method_loads_without_anything_else():
    """Also where the packages of the experiments and of the type annotations are not installed."""
    code = (
        "import sys\n"
        "for name in ('jaxtyping', 'beartype', 'hydra', 'pydantic', 'datasets', 'optuna', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "import fwlora, fwlora.budget\n"
        "assert 'transformers.trainer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_trained_where_records_are_read():
    found = modules("fwlora_lab")
    for reader in ("records",):
        assert not any(i.startswith("fwlora_lab.train") for i in found[reader])
