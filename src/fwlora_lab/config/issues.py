"""pydantic's errors as issues under the keys that people wrote, in plain words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fwlora_lab.config.faults import InvalidRun, Issue, IssueKind
from fwlora_lab.config.keys import nearest_key
from fwlora_lab.text import did_you_mean

_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list, e.g. [a, b]",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
}
_KINDS: dict[str, IssueKind] = {
    **dict.fromkeys(_TYPES, "type"),
    "missing": "missing",
    "extra_forbidden": "unknown_key",
    "literal_error": "choice",
}


def issues_of(error: ValidationError, data: Any, suggest: Callable[[str], str] = nearest_key) -> list[Issue]:
    """pydantic's errors as issues under the keys that people wrote, one for each key.

    Args:
        data: what was validated.
        suggest: what follows the message of an unknown key, such as " (did you mean 'x'?)"; without it, keys of a run
            config are suggested.
    """
    issues: dict[str, Issue] = {}
    wanted: dict[str, list[str]] = {}  # the types that a key may have: each branch of a union complains for itself
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, InvalidRun):
            for issue in inner.issues:
                issues.setdefault(issue.key, issue)
            continue
        key, value = _written_key(item, data)
        kind = _KINDS.get(item["type"], "value")
        if kind == "type":
            wanted.setdefault(key, []).append(_TYPES[item["type"]])
            text = _wrong_type(list(dict.fromkeys(wanted[key])), value)
        else:
            text = _explain(item, key, value, suggest)
        if key not in issues or kind == issues[key].kind == "type":
            issues[key] = Issue(key, text, kind)
    return list(issues.values())


def _written_key(item: Any, data: Any) -> tuple[str, Any]:
    """The dotted key of an error and its value; branches of a union (`int`, `list[str]`) are not part of the key."""
    key, value = "", data
    for number, part in enumerate(item["loc"], 1):
        is_missing = number == len(item["loc"]) and item["type"] == "missing"
        if isinstance(value, Mapping) and (part in value or is_missing):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        key = f"{key}.{part}" if key else str(part)
    return key, value


def _wrong_type(wanted: Sequence[str], value: Any) -> str:
    cure = ""
    if wanted[0] == _TYPES["string_type"] and not isinstance(value, dict | list):
        cure = ": put it in quotes"
    elif isinstance(value, str) and re.fullmatch(r"[-+.\deE]+|true|false", value) and wanted[0] in _UNQUOTED:
        cure = ": remove the quotes"
    return f"must be {' or '.join(wanted)}, not {_display(value)}{cure}"


_UNQUOTED = (_TYPES["int_type"], _TYPES["float_type"], _TYPES["bool_type"])


def _explain(item: Any, key: str, value: Any, suggest: Callable[[str], str]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return "is missing: add it"
    if kind == "extra_forbidden":
        return f"unknown key{suggest(key)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":  # pydantic gives the choices as a text only: "'a', 'b' or 'c'"
        allowed = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{_display(value)} is not allowed{did_you_mean(str(value), allowed)}: use one of {', '.join(allowed)}"
    if kind == "finite_number":
        return f"must be a finite number, not {value}: a text such as a commit goes in quotes"
    return f"{re.sub('^(Input|List|String) should', 'must', item['msg'])}, not {_display(value)}"


def _display(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a block of keys"
    return f"the list {str(value)[:80]}" if isinstance(value, list) else str(value)[:80]
