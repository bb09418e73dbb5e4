"""Reads the source of a design: a design file, a request's prompt text, or an AIRAS research history.

Which of the three it is follows from what it holds. Nothing in a source is evaluated.
"""

from __future__ import annotations

import re
from pathlib import Path

from fwlora_lab.catalog.extensions import load_extensions
from fwlora_lab.design.airas import airas_part, from_airas, model_resources, run_configs_of
from fwlora_lab.design.parse import MAX_YAML_BYTES, check_design, read_json, read_text, read_yaml
from fwlora_lab.design.prompt import read_prompt
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import ExperimentDesign, PartialDesign
from fwlora_lab.errors import UserError

_DESIGN_KEY = re.compile(rf"^['\"]?(?:{'|'.join(ExperimentDesign.model_fields)})['\"]?\s*:", re.M)
_PROMPT = re.compile(r"^#{1,2} Experimental Design\s*$", re.M)


def read_request(source: str, complete: bool = True) -> DesignRequest:
    """Read the source of a design.

    Args:
        source: path of a file.
        complete: refuse a design without methods, models or data sets. Otherwise the design is a `PartialDesign`, and
            a text or Markdown file that names no key of a design is taken as prose, the hypothesis.

    Raises:
        UserError: with every fault found.
    """
    load_extensions()
    path = Path(source)
    text = read_text(path)
    start = text.lstrip()
    kind = ExperimentDesign if complete else PartialDesign
    if path.suffix.lower() == ".json" or start.startswith(("{", "[")):
        data = read_json(text, source)
        found = airas_part(data)
        if found is not None:
            plain, spelling = from_airas(found, "")
            examples = run_configs_of(found, source)
            design = check_design(plain, source, {}, spelling, kind)
            ids, commits = model_resources(found.design)
            return DesignRequest(source, design, spelling, {}, examples, commits, ids)
        return DesignRequest(source, check_design(data, source, {}, {}, kind))
    if _PROMPT.search(text):
        return read_prompt(text, source, kind)
    if not complete and path.suffix.lower() in (".txt", ".md") and not _DESIGN_KEY.search(text):
        return DesignRequest(source, check_design({"hypothesis": text}, source, {}, {}, kind))
    if len(text.encode()) > MAX_YAML_BYTES:
        raise UserError(f"{source}: a design file has at most {MAX_YAML_BYTES:,} bytes: is it the right file?")
    data, lines = read_yaml(text, source)
    return DesignRequest(source, check_design(data, source, lines, {}, kind), lines=lines)
