"""Reads a request's prompt text: Markdown sections that hold Python-like values, and an example of the output."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from fwlora_lab.design.airas import AIRAS_NAMES, AIRAS_RUN, AirasParts, environment_of, from_airas, model_resources
from fwlora_lab.design.literals import read_fields
from fwlora_lab.design.parse import check_design, read_json, read_yaml
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import ExperimentDesign
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

_DESIGN = "Experimental Design"
_RUNS = "Experiment Runs"
_OUTPUT = "\nOutput:"
_HEADING = re.compile(r"#{1,2} +(.+?)\s*")
_RUN_LINE = re.compile(r"\s*(-?)\s*(Run ID|Method|Model|Dataset):\s*(.*?)\s*")
_RUN_KEYS = {"Run ID": "run_id", "Method": "method", "Model": "model", "Dataset": "dataset"}
_AIRAS_KEYS = {ours: theirs for theirs, ours in AIRAS_RUN.items()}


@dataclass
class _Section:
    """The lines below a heading; `heading_line` is the heading's line in the file, from 1."""

    heading_line: int
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def first_line(self) -> int:
        """The line in the file of the first text below the heading."""
        return self.heading_line + next((n for n, line in enumerate(self.lines, 1) if line.strip()), 1)


def read_prompt(text: str, source: str, kind: type[ExperimentDesign]) -> DesignRequest:
    """Read a prompt text that has a section "Experimental Design".

    Raises:
        UserError: a section cannot be read, or the design has faults.
    """
    output_at = text.rfind(_OUTPUT)
    body = text if output_at < 0 else text[:output_at]
    output = "" if output_at < 0 else text[output_at + len(_OUTPUT) :]
    sections = _sections(body)
    if _DESIGN not in sections:
        raise UserError(f"{source}: the heading {_DESIGN!r} is inside a code fence or the output: put it before them")
    empty = _Section(0)
    design = read_fields(sections[_DESIGN].text, f"{source}: {_DESIGN}")
    title = "Research Hypothesis" if "Research Hypothesis" in sections else "Hypothesis"
    prose = sections.get(title, empty).text.strip()
    hypothesis: Any = prose or None
    if re.match(r"\w+=(?:['\"]|None\b)", prose):
        hypothesis = read_fields(prose, f"{source}: {title}")
    runs, lines = _read_runs(sections.get(_RUNS, empty), source)
    method = sections.get("Research Method", empty).text.strip() or None
    environment = sections.get("Experimental Environment", empty).text.strip() or environment_of(design)
    found = AirasParts(design, runs, hypothesis, method, environment)
    plain, spelling = from_airas(found, f"{_DESIGN}: ")
    spelling |= {"runs": f"{_RUNS}: runs", "hypothesis": title, "environment": "Experimental Environment"}
    lines |= dict.fromkeys(AIRAS_NAMES.values(), sections[_DESIGN].first_line)
    if title in sections:
        lines["hypothesis"] = sections[title].first_line
    # Empty lines replace the text before the output, so that an error names the line of the file.
    examples = _read_output("\n" * (body.count("\n") + 1) + output, source)
    for run_id in examples:
        before = text.find(json.dumps(run_id), len(body))
        lines[f"example:{run_id}"] = text.count("\n", 0, max(before, 0)) + 2  # its YAML is on the next line
        spelling[f"example:{run_id}"] = f"Output: {run_id}"
    checked = check_design(plain, source, lines, spelling, kind)
    ids, commits = model_resources(design)
    return DesignRequest(source, checked, spelling, lines, examples, commits, ids)


def _sections(body: str) -> dict[str, _Section]:
    """The sections by heading; those of equal headings are joined. A line in a code fence is not a heading."""
    sections: dict[str, _Section] = {}
    current = _Section(0)
    fenced = False
    for number, line in enumerate(body.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading:
            current = sections.setdefault(heading[1], _Section(number))
        else:
            current.lines.append(line)
    return sections


def _read_runs(section: _Section, source: str) -> tuple[list[Any], dict[str, int]]:
    """The runs with AIRAS' keys, and the line of each of their keys."""
    where = f"{source}: {_RUNS}"
    printed = section.text.strip()
    if printed.startswith("["):  # a printed list of ExperimentRun objects
        return read_fields(f"runs={printed}", where)["runs"], {}
    runs: list[Any] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(section.lines, section.heading_line + 1):
        where = f"{source}:{number}: {_RUNS}"
        match = _RUN_LINE.fullmatch(line)
        if match is None:
            if line.strip():
                raise UserError(f"{where}: {one_line(line)!r} is not a line of a run: write `Method: NAME`")
            continue
        name = _RUN_KEYS[match[2]]
        key = _AIRAS_KEYS[name]
        if match[1] or not runs:
            runs.append({})
            lines[f"runs.{len(runs) - 1}"] = number
        if key in runs[-1]:
            raise UserError(f"{where}: duplicate {match[2]} in one run; keep one")
        if match[3] not in ("", "None"):
            runs[-1][key] = match[3]
        lines[f"runs.{len(runs) - 1}.{name}"] = number
    return runs, lines


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
            raise UserError(f"{here}: duplicate run_id {one_line(run_id)!r}; keep one")
        found[run_id] = read_yaml(text, f"{here}.run_config_yaml")[0]
    return found
