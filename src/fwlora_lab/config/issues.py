"""pydantic's errors as issues under the keys that people wrote, in plain words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from fwlora_lab.config.faults import InvalidRun, Issue, IssueKind
from fwlora_lab.config.keys import nearest_key
from fwlora_lab.text import did_you_mean

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list, e.g. [a, b]",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
}


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a block of keys"
    return f"the list {str(value)[:80]}" if isinstance(value, list) else str(value)[:80]


def _kind(pydantic_type: str) -> IssueKind:
    if pydantic_type in _WANTED:
        return "type"
    kinds: dict[str, IssueKind] = {
        "missing": "missing",
        "extra_forbidden": "unknown_key",
        "literal_error": "choice",
    }
    return kinds.get(pydantic_type, "value")


def _explain(error: Any, key: str, suggest: Callable[[str], str]) -> str:
    kind, value, ctx = error["type"], error.get("input"), error.get("ctx", {})
    if kind == "missing":
        return "is missing: add it"
    if kind == "extra_forbidden":
        return f"unknown key{suggest(key)}"
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "literal_error":
        allowed = ctx["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        near = did_you_mean(str(value), allowed)
        return f"{_shown(value)} is not allowed{near}: use one of {', '.join(allowed)}"
    if kind == "finite_number":
        return f"must be a finite number, not {value}: a text such as a commit goes in quotes"
    if kind in _WANTED:
        cure = ""
        if kind == "string_type" and not isinstance(value, dict | list):
            cure = ": put it in quotes"
        elif kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
            cure = ": remove the quotes" if re.fullmatch(r"[-+.\deE]+|true|false", value) else ""
        return f"must be {_WANTED[kind]}, not {_shown(value)}{cure}"
    return f"{re.sub('^(Input|List|String) should', 'must', error['msg'])}, not {_shown(value)}"


def issues_of(error: ValidationError, data: Any, suggest: Callable[[str], str] = nearest_key) -> list[Issue]:
    """pydantic's errors as issues under the keys that people wrote, one for each key.

    Args:
        data: what was validated.
        suggest: what follows the message of an unknown key, such as " (did you mean 'x'?)"; without it, keys of a run
            config are suggested.
    """
    issues: dict[str, Issue] = {}
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, InvalidRun):
            for issue in inner.issues:
                issues.setdefault(issue.key, issue)
            continue
        key, at = "", data
        for part in item["loc"]:  # the branches of a union (`int`, `list[str]`) are not part of the key
            last = part == item["loc"][-1]
            if isinstance(at, Mapping) and (part in at or (last and item["type"] == "missing")):
                at = at.get(part)
            elif isinstance(at, list) and isinstance(part, int) and part < len(at):
                at = at[part]
            else:
                continue
            key = f"{key}.{part}" if key else str(part)
        item["input"] = at if item["type"] != "value_error" else None
        text = _explain(item, key, suggest)
        if key in issues:  # every branch of a union complains once
            if text not in issues[key].text and item["type"] in _WANTED:
                issues[key] = replace(issues[key], text=_either(issues[key].text, text))
            continue
        issues[key] = Issue(key, text, _kind(item["type"]))
    return list(issues.values())


def _either(first: str, second: str) -> str:
    """`must be a whole number or a number, not …` from two branches of a union."""
    if not (first.startswith("must be ") and second.startswith("must be ")):
        return first
    wanted = second.removeprefix("must be ").split(", not ")[0]
    head, sep, tail = first.partition(", not ")
    return f"{head} or {wanted}{sep}{tail}" if sep else first
