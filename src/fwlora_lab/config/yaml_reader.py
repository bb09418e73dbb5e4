"""YAML files of a config tree, read once and safely, with the line of every key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fwlora_lab.config.hydra_bridge import yaml_loader
from fwlora_lab.config.keys import KEYS
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, listing

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 10_000  # a run config has about 100 keys and values
_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_.]*\}")
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_PLAIN_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAGS = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "map", "seq")}


@dataclass(frozen=True)
class File:
    """A checked file: its values, its first lines (for Hydra's `# @package`), and the line of every key path in it."""

    values: dict[str, Any]
    header: str
    lines: dict[str, int]


def interpolation_fault(text: str) -> str | None:
    """What is wrong with the `${…}` in a text, or None: only a plain reference to another key is allowed."""
    if text.count("${") != len(_REFERENCE.findall(text)):
        return (
            f"{text!r} is an interpolation that would run or read something: only references to "
            "other keys such as ${training.seed} are allowed; write the value itself"
        )
    return None


def read_file(path: Path, what: str = "run config", first: str = "run_id") -> File:
    """Read one YAML file of a config tree; configs are read by no other function.

    Args:
        what: what the file is, for the messages.
        first: the key that such a file usually starts with, for the messages.

    Raises:
        UserError: the file cannot be read, or holds something that loaders read differently or that would run code;
            every such fault with its line.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name the .yaml file inside it")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(
                f"{path}: is {size:,} bytes, a {what} has at most {MAX_FILE_BYTES:,}: is it the right file?"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such file{did_you_mean(path.name, near)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    try:
        loader = yaml_loader(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: is empty: a {what} starts with {first}: <name>")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(
                f"{path}:{node.start_mark.line + 1}: must hold keys such as `{first}: <name>` at "
                f"its top, not a {'list' if node.id == 'sequence' else 'single value'}"
            )
        lines, faults = inspect_node(node)
        if faults:
            raise UserError(listing([f"{path}:{line}: {text}" for line, text in faults]))
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(syntax_message(path, error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply: a {what} has four levels") from None
    except ValueError as error:
        raise UserError(f"{path}: holds a value that cannot be read: {error}") from None
    return File(values, text[:512], lines)


def syntax_message(path: Path, error: yaml.MarkedYAMLError) -> str:
    """`file:line:column: what is not YAML: what to do`."""
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    problem = error.problem or error.context or "cannot be read"
    cure = ""
    if r"'\t'" in problem:
        cure = ": indent with spaces, not tabs"
    elif "expected a single document" in (error.context or ""):
        problem, cure = (
            "a second document starts here",
            ": one file holds one run, remove the '---'",
        )
    elif "mapping values are not allowed" in problem:
        cure = ": check the indentation, and quote values that hold ': '"
    elif "%" in problem or "'@'" in problem or "'`'" in problem:
        cure = ": quote the value"
    return f"{where}: is not YAML: {problem}{cure}"


def inspect_node(root: yaml.MappingNode) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """The line of every key path, and the line and text of every fault; no value is built before."""
    lines: dict[str, int] = {}
    faults: list[tuple[int, str]] = []
    visited = 0

    def visit(node: yaml.Node, path: str, parents: tuple[int, ...]) -> None:
        nonlocal visited
        visited += 1
        line = node.start_mark.line + 1
        if id(node) in parents:
            raise yaml.MarkedYAMLError(problem="an alias refers to itself", problem_mark=node.start_mark)
        if visited > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES:,} values once its aliases are expanded",
                problem_mark=node.start_mark,
            )
        if node.tag not in _TAGS:
            faults.append(
                (
                    line,
                    f"{path or 'the file'}: the tag {_short_tag(node.tag)} is refused: write the plain value",
                )
            )
            return
        inside = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key_node, value in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                    shown = getattr(key_node, "value", "")
                    shown = f"`{shown}`" if isinstance(shown, str) else "a list or mapping"
                    faults.append(
                        (
                            key_line,
                            f"{path or 'top level'}: {shown} cannot be a key: keys are plain words",
                        )
                    )
                    continue
                key = key_node.value
                full = f"{path}.{key}" if path else key
                if key in keys:
                    faults.append((key_line, f"{full}: duplicate key (first on line {keys[key]}); keep one"))
                keys[key] = key_line
                lines.setdefault(full, key_line)
                if key == "_target_":
                    faults.append((key_line, f"{full}: is refused: a config holds values and runs no code"))
                elif full == "hydra":
                    faults.append((key_line, "hydra: Hydra's own settings are not used here: remove the block"))
                elif "${" in key:
                    faults.append(
                        (
                            key_line,
                            f"{full}: an interpolation cannot be a key: write the key itself",
                        )
                    )
                else:
                    visit(value, full, inside)
        elif isinstance(node, yaml.SequenceNode):
            if KEYS.get(path):
                faults.append((line, f"{path}: must be a block of keys, not a list"))
            for index, item in enumerate(node.value):
                lines[f"{path}.{index}"] = item.start_mark.line + 1
                visit(item, f"{path}.{index}", inside)
        else:
            fault = _scalar_fault(node)
            if fault:
                faults.append((line, f"{path}: {fault}"))

    visit(root, "", ())
    return lines, faults


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _scalar_fault(node: yaml.Node) -> str | None:
    text = str(node.value)
    quoted = getattr(node, "style", None) is not None
    if node.tag.endswith(":str"):
        return interpolation_fault(text)
    if quoted:  # `!!int "3"`: the tag and the quotes disagree
        return f"the tag {_short_tag(node.tag)} on a quoted text is refused: write the plain value"
    if node.tag.endswith(":int") and not _PLAIN_INT.fullmatch(text):
        return f"`{text}` is read as another number by some loaders: write plain digits, or quote it"
    if node.tag.endswith(":float") and not _PLAIN_FLOAT.fullmatch(text):
        return f"`{text}` is read as a number by some loaders only: write it like 1.0e-4, or quote it"
    return None
