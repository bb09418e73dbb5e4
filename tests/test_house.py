"""Who imports whom: the method knows nothing of the experiments, and what reads records cannot train.

pytest tests/test_house.py
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
# In the order of the data: the readers know what the makers left behind, never the makers.
MAKERS = {f"fwlora_lab.{name}" for name in ("train", "search", "study", "lanes", "methods", "backbones")}
READERS = ("records", "stats", "verdicts", "report")
# A module imports from those before it only.
ORDER = {
    "fwlora": "fisher importance shrinkage budget pairs method trainer export",
    "fwlora_lab": (
        "errors runconfig compose request names spaces prose plan contradictions generate llm offline tasks backbones "
        "doctor records stats verdicts analysis figures views modelcards report packing laneops fusedpenalty lanes "
        "methods train progress trials launch search study bench cli"
    ),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("fwlora", "fwlora_lab"):
        for path in sorted((SRC / package).rglob("*.py")):
            parts = path.relative_to(SRC).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(tree: ast.AST, package: str, known: dict[str, Path], typing: bool) -> Iterator[str]:
    """The modules that a module's code imports anywhere, in functions too; with or without those for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:  # `from package import module` is an import of the module
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
        elif typing_only(node) and not typing:
            yield from (n for part in node.orelse for n in imported(ast.Module([part], []), package, known, typing))  # type: ignore[attr-defined]
        else:
            yield from imported(node, package, known, typing)


@cache
def imports(name: str, typing: bool = False) -> frozenset[str]:
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(imported(ast.parse(path.read_text()), package, MODULES, typing))


def reached(name: str) -> set[str]:
    """All modules of this project that come with one, whenever that may be."""
    seen: set[str] = set()
    front = {name}
    while front:
        seen |= front
        front = {n for one in front for n in imports(one) if n in MODULES} - seen
    return seen


def test_the_walk_sees_every_kind_of_import() -> None:
    code = """
import a.b, c
from typing import TYPE_CHECKING
from house import room as r, wall
from . import door
from .door import knob
if TYPE_CHECKING:
    from e import f
else:
    import g
class K:
    import h
    def m(self):
        try:
            import i
        except ImportError:
            from j.k import l
with open("x"):
    import m
"""
    known = {name: Path() for name in ("house", "house.room", "house.door")}
    without = {"a.b", "c", "typing", "house.room", "house", "house.door", "g", "h", "i", "j.k", "m"}
    assert set(imported(ast.parse(code), "house", known, typing=False)) == without
    assert set(imported(ast.parse(code), "house", known, typing=True)) == without | {"e"}


def test_the_house_has_the_rooms_that_these_rules_name() -> None:
    assert {"fwlora", "fwlora.method", "fwlora.export", "fwlora_lab.cli", "fwlora_lab.train"} <= set(MODULES)
    assert MAKERS <= set(MODULES) and {f"fwlora_lab.{name}" for name in READERS} <= set(MODULES)
    assert len(MODULES) > 30 and "fwlora_lab.lanes" in reached("fwlora_lab.train"), "the walk follows imports"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "fwlora"])
def test_the_method_never_imports_the_experiments(name: str) -> None:
    assert not [n for n in imports(name, typing=True) if n.split(".")[0] == "fwlora_lab"]


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "fwlora"])
def test_the_method_needs_torch_and_peft_and_nothing_that_does_not_come_with_them(name: str) -> None:
    def named(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", r)[0].replace("-", "_") for r in requirements if "extra ==" not in r}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert named(project["dependencies"]) == {"torch", "peft"}
    allowed = {"fwlora", "torch", "peft"} | named(requires("peft") or [])
    used = {n.split(".")[0] for n in imports(name)} - set(sys.stdlib_module_names)
    assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("name", READERS)
def test_what_reads_records_cannot_train(name: str) -> None:
    assert not reached(f"fwlora_lab.{name}") & MAKERS


def test_training_knows_no_reader_and_nothing_above_it() -> None:
    above = {f"fwlora_lab.{name}" for name in ("report", "stats", "verdicts", "search", "study", "cli")}
    assert not reached("fwlora_lab.train") & above
    assert not [name for name in MODULES if name != "fwlora_lab.cli" and "fwlora_lab.cli" in imports(name)]


@pytest.mark.parametrize("package", ORDER)
def test_imports_follow_the_data(package: str) -> None:
    order = [f"{package}.{name}" for name in ORDER[package].split()]
    assert sorted(order) == sorted(n for n in MODULES if n.startswith(f"{package}.")), "a new module needs its place"
    for place, name in enumerate(order):
        later = imports(name, typing=True) & set(order[place:])
        assert not later, f"{name} imports {sorted(later)}, which come later"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "fwlora" and n != "fwlora.trainer"])
def test_transformers_is_for_the_trainers_callback_alone(name: str) -> None:
    assert not [n for n in imports(name) if n.split(".")[0] == "transformers"]


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not at import, not in a function, not for types."""
    graph = {name: {n for n in imports(name, typing=True) if n in MODULES} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


WATCH = """
import sys

def refuse(event, args):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise RuntimeError(f"{event} {args} at import")

sys.addaudithook(refuse)
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_nothing_is_fetched_at_import() -> None:
    """Every module is imported where opening a socket is an error."""
    proof = [sys.executable, "-c", WATCH + "import socket; socket.socket()"]
    assert "socket.__new__" in subprocess.run(proof, capture_output=True, text=True).stderr
    names = [
        "fwlora",
        "fwlora_lab.cli",
        *(n for n in MODULES if n != "fwlora_lab.fusedpenalty"),
    ]  # needs a GPU's Triton
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WATCH, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_method_loads_without_anything_else() -> None:
    """Also where the packages of the experiments and of the type annotations are not installed."""
    code = (
        "import sys\n"
        "for name in ('jaxtyping', 'beartype', 'hydra', 'pydantic', 'datasets', 'optuna', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "import fwlora, fwlora.budget\n"
        "assert 'transformers.trainer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
