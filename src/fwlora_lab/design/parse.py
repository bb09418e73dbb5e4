"""Text -> plain values, safely: files of limited size, JSON and YAML, and the check against the design's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fwlora_lab.config.hydra_bridge import yaml_loader
from fwlora_lab.config.issues import issues_of
from fwlora_lab.config.yaml_reader import inspect_node, syntax_message
from fwlora_lab.design.names import method_defined_in, method_in, unknown_text
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DESIGN_KEYS, ExperimentDesign
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, listing, one_line

MAX_YAML_BYTES = 1_000_000
MAX_BYTES = 5_000_000  # a research history carries whole papers
MAX_KEY = 1_000  # characters
MAX_DEPTH = 100
MAX_BRACKETS = 500  # open at once, in YAML


def read_text(path: Path) -> str:
    """The text of a request; UserError if it is missing, empty, too long or not UTF-8."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder: name the file inside it")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: is {size:,} bytes, a request has at most {MAX_BYTES:,}: is it the right file?")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text: save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)[:200]!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise UserError(f"{path}: is empty: a design names proposed_method, models and datasets")
    return text


def read_json(text: str, where: str) -> Any:
    """Read JSON.

    Raises:
        UserError: it is not JSON, is nested too deeply, or holds a duplicate key, NaN, infinity or `_target_`.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if len(key) > MAX_KEY:
                raise UserError(f"{where}: the key {one_line(key, 60)!r} is {len(key):,} characters long")
            if key in seen:
                raise UserError(f"{where}: duplicate key {one_line(key)!r} in one block; keep one")
            if key == "_target_":
                raise UserError(f"{where}: the key '_target_' is refused: a design holds values and runs no code")
            seen[key] = value
        return seen

    def constant(name: str) -> Any:
        raise UserError(f"{where}: {name} is not a JSON number: write a finite one")

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        _check_depth(data)
        return data
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply: a design has four levels") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}:{error.colno}: is not JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{where}: holds a number that cannot be read: {one_line(error)}") from None


def _check_depth(data: Any) -> None:
    """Raise RecursionError for data that is nested more than MAX_DEPTH levels deep."""
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
        if not level:
            return
    raise RecursionError


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Read YAML with the checks of run configs: the values, and the line of every key.

    Raises:
        UserError: it is not YAML, or holds something that a run config may not hold either.
    """
    depth = deepest = 0
    for match in re.finditer(r"[\[\]{}]", text):  # PyYAML's time grows with the square of the open brackets
        depth += 1 if match[0] in "[{" else -1
        deepest = max(deepest, depth)
    try:
        if deepest > MAX_BRACKETS:
            raise RecursionError
        loader = yaml_loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where}: must hold keys such as `proposed_method:` at its top")
        lines, faults = inspect_node(node)
        if faults:
            raise UserError(listing([f"{where}:{line}: {fault}" for line, fault in faults]))
        longest = max(lines, key=len, default="")
        if len(longest) > MAX_KEY:
            raise UserError(f"{where}: the key {one_line(longest, 60)!r} is {len(longest):,} characters long")
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        raise UserError(one_line(syntax_message(Path(where), error), 400)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply: a design has four levels") from None
    except ValueError as error:
        raise UserError(f"{where}: holds a value that cannot be read: {one_line(error)}") from None


def check_design(
    data: Any,
    source: str,
    lines: Mapping[str, int],
    spelling: Mapping[str, str],
    kind: type[ExperimentDesign],
) -> ExperimentDesign:
    """The design in plain values.

    Args:
        lines, spelling: as in DesignRequest, for the messages.
        kind: ExperimentDesign, or PartialDesign if it need not be complete.

    Raises:
        UserError: with every fault found.
    """
    if not isinstance(data, dict):
        raise UserError(f"{source}: must hold keys such as proposed_method, models and datasets")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        request = DesignRequest(source, ExperimentDesign.model_construct(), spelling, lines)
        messages = []
        for issue in issues_of(error, data, lambda key: did_you_mean(key.rsplit(".", 1)[-1], DESIGN_KEYS)):
            messages.append(str(request.locate(one_line(issue.key), one_line(issue.text, 400))))
        messages += [f"{request.locate(location)}: {unknown_text(name)}" for location, name in _unknown_methods(data)]
        raise UserError(listing(messages)) from None


def _unknown_methods(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Location and name of the methods that are not known, in a design that has other faults too."""
    compared = data.get("comparative_methods")
    given = [("proposed_method", data.get("proposed_method"), method_defined_in)]
    given += [
        (f"comparative_methods.{n}", method, method_in)
        for n, method in enumerate(compared if isinstance(compared, list) else ())
    ]
    names = [(where, m.get("name") if isinstance(m, dict) else m, meaning) for where, m, meaning in given]
    return [(where, name) for where, name, meaning in names if isinstance(name, str) and meaning(name) is None]
