"""TODO"""

from __future__ import annotations

import json
import re
from typing import Any

from fwlora_lab.design.airas import AIRAS_NAMES, AIRAS_RUN, Airas, commits_of, environment_of, from_airas
from fwlora_lab.design.literals import read_fields
from fwlora_lab.design.parse import check_design, read_json, read_yaml
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import ExperimentDesign
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

_HEADING = re.compile(r"#{1,2} +(.+?)\s*")
_RUN_LINE = re.compile(r"\s*(-?)\s*(Run ID|Method|Model|Dataset):\s*(.*?)\s*")
_RUN_KEYS = {"Run ID": "run_id", "Method": "method", "Model": "model", "Dataset": "dataset"}


def read_prompt(text: str, source: str, kind: type[ExperimentDesign]) -> DesignRequest:
    sections: dict[str, list[str]] = {}
    starts: dict[str, int] = {}
    body, _, output = _cut(text, "\nOutput:")
    current: list[str] = []
    fenced = False
    for number, line in enumerate(body.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading:
            current = sections.setdefault(heading[1], [])
            starts.setdefault(heading[1], number)
        else:
            current.append(line)

    def section(name: str) -> str:
        return "\n".join(sections.get(name, ()))

    where = f"{source}: Experimental Design"
    design = read_fields(section("Experimental Design"), where)
    titled = "Research Hypothesis" if "Research Hypothesis" in sections else "Hypothesis"
    prose = section(titled).strip()
    hypothesis: Any = prose or None
    if re.match(r"\w+=(?:['\"]|None\b)", prose):
        hypothesis = read_fields(prose, f"{source}: {titled}")
    lines: dict[str, int] = {}
    runs: list[Any] = []
    first = starts.get("Experiment Runs", 0)
    listed = sections.get("Experiment Runs", [])
    printed = "\n".join(listed).strip()
    if printed.startswith("["):  # a printed list of ExperimentRun objects
        runs = read_fields(f"runs={printed}", f"{source}: Experiment Runs")["runs"]
        listed = []
    for offset, line in enumerate(listed, 1):
        match = _RUN_LINE.fullmatch(line)
        if match is None:
            if line.strip():
                raise UserError(f"{source}:{first + offset}: Experiment Runs: {one_line(line)!r} is no line of a run")
            continue
        key = _AIRAS_BACK[_RUN_KEYS[match[2]]]
        if match[1] or not runs:
            runs.append({})
            lines[f"runs.{len(runs) - 1}"] = first + offset
        if key in runs[-1]:
            raise UserError(f"{source}:{first + offset}: Experiment Runs: {match[2]} stands twice in one run")
        if match[3] not in ("", "None"):
            runs[-1][key] = match[3]
        lines[f"runs.{len(runs) - 1}.{_RUN_KEYS[match[2]]}"] = first + offset
    method = section("Research Method").strip() or None
    environment = section("Experimental Environment").strip() or environment_of(design)
    found = Airas(design, runs, hypothesis, method, environment)
    plain, spelling = from_airas(found, "Experimental Design: ")
    spelling |= {"runs": "Experiment Runs: runs", "hypothesis": titled, "environment": "Experimental Environment"}
    at = starts["Experimental Design"]
    lines |= {key: at + _offset(sections["Experimental Design"]) for key in AIRAS_NAMES.values()}
    if titled in starts:
        lines["hypothesis"] = starts[titled] + _offset(sections[titled])
    # empty lines stand for the text above, so that a fault has the file's line
    examples = _read_output("\n" * (body.count("\n") + 1) + output, source)
    for run_id in examples:
        before = text.find(json.dumps(run_id), len(body))
        lines[f"example:{run_id}"] = text.count("\n", 0, max(before, 0)) + 2  # its YAML stands on the next line
        spelling[f"example:{run_id}"] = f"Output: {run_id}"
    return DesignRequest(
        source, check_design(plain, source, lines, spelling, kind), spelling, lines, examples, commits_of(design)
    )


_AIRAS_BACK = {ours: theirs for theirs, ours in AIRAS_RUN.items()}


def _cut(text: str, mark: str) -> tuple[str, str, str]:
    at = text.rfind(mark)
    return (text, "", "") if at < 0 else (text[:at], mark, text[at + len(mark) :])


def _offset(lines: list[str]) -> int:
    """How far below its heading a section's first line stands."""
    return next((n for n, line in enumerate(lines, 1) if line.strip()), 1)


def _read_output(output: str, source: str) -> dict[str, dict[str, Any]]:
    """The request's own example output: run id -> config."""
    if not output.strip():
        return {}
    where = f"{source}: Output"
    data = read_json(output, where)
    configs = data.get("run_configs") if isinstance(data, dict) else None
    if not isinstance(configs, list):
        raise UserError(f"{where}: must hold the list run_configs")
    found: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(configs):
        here = f"{where}: run_configs[{index}]"
        run_id, text = (item.get("run_id"), item.get("run_config_yaml")) if isinstance(item, dict) else (None, None)
        if not isinstance(run_id, str) or not isinstance(text, str):
            raise UserError(f"{here}: must hold the texts run_id and run_config_yaml")
        if run_id in found:
            raise UserError(f"{here}: run_id {one_line(run_id)!r} stands twice: keep one")
        found[run_id] = read_yaml(text, f"{here}.run_config_yaml")[0]
    return found
