"""Plain values checked as a run config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fwlora_lab.config.faults import InvalidRun
from fwlora_lab.config.former_names import present_key
from fwlora_lab.config.issues import issues_of
from fwlora_lab.config.keys import set_key
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.search_space import unsearchable
from fwlora_lab.errors import UserError
from fwlora_lab.text import listing


def validate_run(data: Mapping[str, Any]) -> RunConfig:
    """The run config in plain values, its search space checked too.

    Raises:
        InvalidRun: with every fault found.
    """
    try:
        cfg = RunConfig.model_validate(data)
    except ValidationError as error:
        raise InvalidRun(issues_of(error, data)) from None
    if cfg.optuna is not None and (issues := unsearchable(cfg, cfg.optuna)):
        raise InvalidRun(issues)
    return cfg


def with_values(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with other values under some of its keys; a UserError names every value that is refused."""
    data = json.loads(json.dumps(cfg.model_dump()))
    for key, value in values.items():
        set_key(data, present_key(key), value)
    try:
        return validate_run(data)
    except InvalidRun as error:
        raise UserError(listing([str(issue) for issue in error.issues])) from None
