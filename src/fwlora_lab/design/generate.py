"""The command `fwlora generate`: from an experimental design to one run config each, with its contradictions named.

A design is read (`read.py`), resolved and drafted (`plan.py`), written as configs (`run_config.py`) and searched for
contradictions (`contradictions/`). The configs are valid whether or not the design contradicts itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fwlora_lab.design.contradictions.contradiction import Contradiction
from fwlora_lab.design.contradictions.find import find_contradictions
from fwlora_lab.design.plan import plan_design
from fwlora_lab.design.read import read_request
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.run_config import to_run_config
from fwlora_lab.errors import UserError
from fwlora_lab.files import write_all_atomic
from fwlora_lab.text import one_line


@dataclass(frozen=True)
class Generated:
    """What a design became; `configs` maps run ids to YAML texts, in the order of the design."""

    configs: dict[str, str]
    contradictions: list[Contradiction]


def generate_configs(request: DesignRequest) -> Generated:
    """One YAML text for every run, and every contradiction.

    Raises:
        UserError: the design cannot become run configs.
    """
    plan = plan_design(request)
    configs = {draft.run_id: to_run_config(request, draft).to_yaml(request.source) for draft in plan.drafts}
    return Generated(configs, find_contradictions(plan))


def _write(folder: Path, configs: Mapping[str, str]) -> None:
    """Write all files, or none if one of them exists with other content."""
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
    """Run the command; contradictions go to stderr.

    Args:
        source: a design file, a request or a research history.
        out: folder for the configs; without it they go to stdout as YAML documents.
        as_json: print the configs to stdout as one JSON object.
        check: write nothing if there are contradictions; without `out` and `as_json` write nothing at all.
        read: turns the source into a request.

    Returns:
        The exit code: 1 if `check` is set and the design contradicts itself, or if runs of unknown methods were left
        out, else 0.
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
    return 1 if any(item.kind == "unknown method" for item in generated.contradictions) else 0
