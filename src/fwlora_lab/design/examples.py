"""Example configs that a request gives of its own output, in the two forms in which requests write search spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fwlora_lab.config.keys import get_key


def example_value(example: Mapping[str, Any] | None, key: str) -> Any:
    """The value of a run config's key in an example config; None without one."""
    try:
        return get_key(example, key)
    except (KeyError, TypeError, IndexError):
        return None


def example_space(example: Mapping[str, Any]) -> dict[str, Any]:
    """The search dimensions of an example config by name, from `optuna.search_space` or `optuna.search_spaces`."""
    optuna = example.get("optuna")
    if not isinstance(optuna, dict):
        return {}
    space = optuna.get("search_space") or named_dimensions(optuna.get("search_spaces"))
    return {str(k): v for k, v in space.items() if isinstance(v, dict)} if isinstance(space, dict) else {}


def named_dimensions(spaces: Any) -> dict[str, dict[str, Any]]:
    """The list `[{param_name, distribution_type, low, …}]` as dimensions by name.

    AIRAS stores low and high as floats also for an int dimension: 300.0 means 300.
    """
    found = {}
    for given in spaces if isinstance(spaces, list) else ():
        if isinstance(given, dict):
            kind = given.get("distribution_type")
            found[str(given.get("param_name"))] = {
                "type" if key == "distribution_type" else key: int(value)
                if kind == "int" and isinstance(value, float) and value.is_integer()
                else value
                for key, value in given.items()
                if key != "param_name" and value is not None
            }
    return found
