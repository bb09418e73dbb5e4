"""Who imports whom: the method knows nothing of the experiments, and what reads records cannot train.

pytest tests/test_architecture.py
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
# What reads records must not be able to train.
MAKERS = {f"fwlora_lab.{name}" for name in ("training", "search", "study", "lanes", "models")}
READERS = ("records", "analysis", "report")
FOUNDATION = ("errors", "files", "seeds", "text")  # modules beside the folders; every folder may import them


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


def folders() -> list[str]:
    """The folders of fwlora_lab from the top down, as its docstring lists them."""
    docstring = ast.get_docstring(ast.parse((SRC / "fwlora_lab" / "__init__.py").read_text())) or ""
    return re.findall(r"^    (\w+) {2,}\S", docstring, re.M)


def folder_of(module: str) -> str:
    """`fwlora_lab.config.keys` -> `config`; a module beside the folders is its own."""
    return module.split(".")[1] if module.count(".") else ""


def test_the_docstring_lists_the_folders_that_exist() -> None:
    there = {path.parent.name for path in (SRC / "fwlora_lab").glob("*/__init__.py")}
    assert sorted(folders()) == sorted(there)
    loose = {path.stem for path in (SRC / "fwlora_lab").glob("*.py")} - {"__init__"}
    assert loose == {name for name in FOUNDATION if (SRC / "fwlora_lab" / f"{name}.py").exists()}
    assert MAKERS <= set(MODULES) and {f"fwlora_lab.{name}" for name in READERS} <= set(MODULES)
    assert "fwlora_lab.lanes.engine" in reached("fwlora_lab.training.scheduler"), "the walk follows imports"


@pytest.mark.parametrize("path", sorted((SRC / "fwlora_lab").glob("**/__init__.py")), ids=lambda p: p.parent.name)
def test_every_folder_says_in_a_sentence_what_it_holds(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert docstring.split("\n")[0].endswith(".")
    if path.parent != SRC / "fwlora_lab":
        assert "\n\n" not in docstring, "one sentence"


def test_imports_point_downward_only() -> None:
    """A folder imports from the folders below it, and the modules beside the folders from each other."""
    order = folders()
    for name in MODULES:
        own = folder_of(name)
        if not name.startswith("fwlora_lab.") or not own:
            continue
        below = set(FOUNDATION) | (set(order[order.index(own) :]) if own in order else set())
        used = {folder_of(n) for n in imports(name, typing=True) if n.startswith("fwlora_lab.")}
        assert used <= below, f"{name} imports from {sorted(used - below)}, which are not below it"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "fwlora"])
def test_the_method_never_imports_the_experiments(name: str) -> None:
    assert not [n for n in imports(name, typing=True) if n.split(".")[0] == "fwlora_lab"]


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "fwlora"])
def test_the_method_needs_torch_and_peft_and_nothing_that_does_not_come_with_them(name: str) -> None:
    def named(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", r)[0].replace("-", "_") for r in requirements if "extra ==" not in r}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {"fwlora", "torch", "peft"} | named(requires("peft") or [])
    assert {"torch", "peft"} <= named(project["dependencies"]) <= allowed
    used = {n.split(".")[0] for n in imports(name)} - set(sys.stdlib_module_names)
    assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("fwlora_lab.") and folder_of(n) in READERS])
def test_what_reads_records_cannot_train(name: str) -> None:
    assert not {f"fwlora_lab.{folder_of(n)}" for n in reached(name) if n.count(".")} & MAKERS


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "fwlora" and n != "fwlora.callback"])
def test_transformers_is_for_the_trainers_callback_alone(name: str) -> None:
    assert not [n for n in imports(name) if n.split(".")[0] == "transformers"]


@pytest.mark.parametrize("name", [n for n in MODULES if n != "fwlora_lab.config.hydra_bridge"])
def test_hydra_and_omegaconf_are_used_through_one_module(name: str) -> None:
    assert not [n for n in imports(name, typing=True) if n.split(".")[0] in ("hydra", "omegaconf", "hydra_plugins")]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_too_long_to_read(name: str) -> None:
    """Modules of 500 lines, classes of 300, functions of 80, unless a docstring says why: "Long because …"."""
    source = MODULES[name].read_text()
    assert source.count("\n") <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            excused = "Long because" in (ast.get_docstring(node) or "")
            assert lines <= (300 if isinstance(node, ast.ClassDef) else 80) or excused, f"{node.name}: {lines} lines"


# Libraries that say only in words what happened: each place names the library and its version in a comment.
ONLY_IN_WORDS = {"fwlora_lab.files", "fwlora_lab.search.shared_study"}


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ONLY_IN_WORDS])
def test_nothing_is_decided_by_the_wording_of_a_message(name: str) -> None:
    """No comparison with, and no `startswith` on, an error's, a warning's or an issue's text."""

    def is_message(node: ast.AST) -> bool:
        text = ast.unparse(node)
        return bool(
            re.fullmatch(r"(str\((e|error|exc|warning)\)|\w*(error|issue|warning|w)\.(message|text|msg))", text)
        )

    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            literal = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides)
            assert not (literal and any(map(is_message, sides))), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith"):
                assert not is_message(node.func.value), ast.unparse(node)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_holds(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
    assert len(docstring.split()) > 3


def test_help_loads_no_slow_package() -> None:
    """Neither of `fwlora` nor of any of its commands, so that each is there at once."""
    code = (
        "import sys\n"
        "from fwlora_lab.cli.main import COMMANDS, main\n"
        "assert main(['--help']) == 0 and len(COMMANDS) == 11\n"
        "assert all(main([name, '--help']) == 0 for name in COMMANDS)\n"
        "slow = {'hydra', 'omegaconf', 'torch', 'transformers', 'peft', 'optuna', 'pydantic', 'numpy', 'rich'}\n"
        "sys.exit(str(sorted(slow & set(sys.modules))) if slow & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: fwlora" in done.stdout, done.stderr


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
        *(n for n in MODULES if n != "fwlora_lab.lanes.fused_penalty"),  # needs a GPU's Triton
    ]
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
