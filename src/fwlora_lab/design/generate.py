"""From an experimental design to one run config each, and what in the design contradicts itself.

Where two sources of a value disagree, or cannot stand together, the contradiction is reported with both places; the
configs are valid either way.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fwlora_lab.config.yaml_writer import Writer
from fwlora_lab.design.contradictions import find_contradictions
from fwlora_lab.design.plan import Contradiction, DesignPlan
from fwlora_lab.design.read import read_request
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.errors import UserError
from fwlora_lab.files import write_all_atomic
from fwlora_lab.text import one_line


class Generated(NamedTuple):
    """`configs` maps run ids to YAML texts, in the order of the design."""

    configs: dict[str, str]
    contradictions: list[Contradiction]


class _FlowWriter(Writer):
    """The writer of run configs, for one value in one line."""


@functools.lru_cache(maxsize=4096)
def _cached(kind: str, shown: str, value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(value, Dumper=_FlowWriter, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _in_line(value: Any) -> str:
    value = tuple(value) if isinstance(value, list) else value
    return _cached(type(value).__name__, repr(value), value)  # 1, 1.0 and True are equal, their YAML is not


def _emit(data: Mapping[str, Any], notes: Mapping[str, str], prefix: str = "", pad: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield f"{pad}{_in_line(name)}:"
            yield from _emit(value, notes, f"{prefix}{name}.", pad + "  ")
        else:
            note = notes.get(prefix + name, "")
            yield f"{pad}{_in_line(name)}: {_in_line(value)}" + (f"  # {note}" if note else "")


def generate_configs(request: DesignRequest) -> Generated:
    """One YAML text for every run, and every contradiction; UserError for what cannot become a run."""
    plan = DesignPlan(request)
    source = one_line(Path(request.source).name)
    configs = {}
    for draft in plan.drafts:
        data, notes = plan.config(draft)
        head = f"# Generated from {source}. A value without a comment is stated there."
        configs[draft.run_id] = "\n".join([head, *_emit(data, notes)]) + "\n"
    find_contradictions(plan)
    return Generated(configs, plan.found)


def _write(folder: Path, configs: Mapping[str, str]) -> None:
    """All files or none that would replace something else."""
    files = {folder / f"{run_id}.yaml": text.encode() for run_id, text in configs.items()}
    for path, content in files.items():
        try:
            changed = path.exists() and path.read_bytes() != content
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{one_line(path)}: cannot be read: {reason}") from None
        if changed:
            raise UserError(f"{path}: exists with other content: remove it, or choose another folder")
    write_all_atomic(files)


def generate(
    source: str,
    out: str | None,
    as_json: bool,
    check: bool,
    read: Callable[[str], DesignRequest] = read_request,
) -> int:
    """The command `fwlora generate`; 0, or 1 with `check` where the design contradicts itself.

    Configs go to the folder `out`, as one JSON object to stdout, or as YAML documents to stdout; contradictions go to
    stderr. With `check` nothing is written while there are any, and without `out` and `as_json` nothing at all. `read`
    turns the source into a request.
    """
    generated = generate_configs(read(source))
    for item in generated.contradictions:
        print(f"{'error' if check else 'warning'}: {item}", file=sys.stderr)
    if generated.contradictions and check:
        count = len(generated.contradictions)
        print(f"{count} contradiction{'s' if count > 1 else ''}; nothing was written", file=sys.stderr)
        return 1
    if out is not None:
        _write(Path(out), generated.configs)
        print(f"{len(generated.configs)} run configs in {out}", file=sys.stderr)
    if as_json:
        configs = [{"run_id": i, "run_config_yaml": text} for i, text in generated.configs.items()]
        print(json.dumps({"run_configs": configs}, indent=2))
    elif out is None and not check:
        print("---\n".join(generated.configs.values()), end="")
    return 0
