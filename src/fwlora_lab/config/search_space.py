"""The search space of a run config, in both of its dialects: what it means, and what is wrong with it."""

from __future__ import annotations

import json

from pydantic import ValidationError

from fwlora_lab.config.faults import Issue
from fwlora_lab.config.issues import issues_of
from fwlora_lab.config.keys import search_key, set_key
from fwlora_lab.config.schema import Dimension, OptunaConfig, RunConfig
from fwlora_lab.errors import UserError


def dimensions_of(optuna: OptunaConfig) -> dict[str, Dimension]:
    """Both dialects as one: dotted key of the run config -> its dimension."""
    named = optuna.search_space or {
        d.param_name: Dimension(type=d.distribution_type, low=d.low, high=d.high, step=d.step, choices=d.choices)
        for d in optuna.search_spaces or ()
    }
    return {search_key(name): dimension for name, dimension in named.items()}


def unsearchable(cfg: RunConfig, optuna: OptunaConfig) -> list[Issue]:
    """Dimensions that name no key, or whose ends and choices the key would refuse."""
    issues: list[Issue] = []
    named = optuna.search_space or {d.param_name: d for d in optuna.search_spaces or ()}
    plain = cfg.model_dump() | {"optuna": None}
    seen: dict[str, str] = {}
    for name, dimension in named.items():
        where = f"optuna.{'search_space' if optuna.search_space else 'search_spaces'}.{name}"
        try:
            key = search_key(name)
        except UserError as error:
            issues.append(Issue(where, str(error)))
            continue
        if key in seen:
            issues.append(Issue(where, f"means {key}, as {seen[key]} does: keep one of them", related=(key,)))
            continue
        seen[key] = name
        ends = [dimension.low, dimension.high]
        kind = dimension.type if isinstance(dimension, Dimension) else dimension.distribution_type
        if kind in ("uniform", "loguniform"):
            ends = [float(end) for end in ends if end is not None]  # what a trial would draw between them
        for value in dimension.choices or ends:
            trial = json.loads(json.dumps(plain))
            set_key(trial, key, value)
            try:
                RunConfig.model_validate(trial)
            except ValidationError as error:
                reasons = [i.text for i in issues_of(error, trial) if i.key == key]
                if reasons:  # other keys' faults are reported as their own
                    issues.append(Issue(where, f"{value!r} is refused by {key}: {reasons[0]}", related=(key,)))
    return issues
