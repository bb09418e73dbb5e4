"""Former names of keys and values, which old run configs, records and searches still use.

They are read and never written. Fingerprints and the storage of a search were computed under the former names, and
go on using them, so that what an earlier version left still counts as the same run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from fwlora import config as core

# Where the core had the same former name, it means the same there; lambda_fw and fisher_alpha are the request's.
FORMER_KEYS = {
    "fw_lora.lambda_fw": "fw_lora.penalty_strength",
    "fw_lora.fisher_alpha": "fw_lora.fisher_ema_decay",
    "fw_lora.every": "fw_lora.fisher_interval",
    "fw_lora.start": "fw_lora.fisher_start",
    "fw_lora.clip": "fw_lora.max_weight_ratio",
    "fw_lora.coupling": "fw_lora.penalty_mode",
    "fw_lora.norm": "fw_lora.penalty_norm",
    "dataset.selection_fraction": "dataset.validation_fraction",
}
FORMER_VALUES = {
    **{f"fw_lora.{name}": values for name, values in core.FORMER_VALUES.items()},
    "training.evaluate_on": {"selection": "validation"},
}
_STORED_KEYS = {new: old for old, new in FORMER_KEYS.items()}
_warned: set[str] = set()


class FormerName(FutureWarning):
    """A key or value is written under its former name."""


def present_key(key: str, warn: bool = False) -> str:
    """The present name of a key; a key that was never renamed stays as it is."""
    new = FORMER_KEYS.get(key, key)
    if warn and new != key:
        _warn(f"{key} is now called {new}")
    return new


def present_leaf(name: str) -> str:
    """The same for a key without its block, as search spaces name them: `lambda_fw` -> `penalty_strength`."""
    leaves = {old.rsplit(".", 1)[-1]: new.rsplit(".", 1)[-1] for old, new in FORMER_KEYS.items()}
    return leaves.get(name, name)


def with_present_names(tree: Mapping[str, Any], warn: bool = False) -> dict[str, Any]:
    """A copy of a run config's plain values in which every former key and value has its present name.

    A former key beside its present name is left as it is, so that checking the config names it as unknown.
    """
    out = copy.deepcopy(dict(tree))
    for old, new in FORMER_KEYS.items():
        name, _, before = old.partition(".")
        after = new.partition(".")[2]
        block = out.get(name)
        if isinstance(block, dict) and before in block and after not in block:
            # Rebuilt in place, so that the keys keep their order.
            out[name] = {after if key == before else key: value for key, value in block.items()}
            if warn:
                _warn(f"{old} is now called {new}")
    for key, values in FORMER_VALUES.items():
        name, _, leaf = key.partition(".")
        block = out.get(name)
        value = block.get(leaf) if isinstance(block, dict) else None
        if isinstance(block, dict) and isinstance(value, str) and value in values:
            block[leaf] = values[value]
            if warn:
                _warn(f"{key}={value} is now written {key}={values[value]}")
    return out


def stored_key(key: str) -> str:
    """The name under which version 0.1 stored a key in fingerprints and searches."""
    return _STORED_KEYS.get(key, key)


def with_stored_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `with_present_names`, for what is hashed."""
    out = copy.deepcopy(dict(tree))
    for key, values in FORMER_VALUES.items():
        name, _, leaf = key.partition(".")
        block = out.get(name)
        if isinstance(block, dict) and leaf in block:
            former = {new: old for old, new in values.items()}
            block[leaf] = former.get(str(block[leaf]), block[leaf])
    for new, old in _STORED_KEYS.items():
        name, _, after = new.partition(".")
        block = out.get(name)
        if isinstance(block, dict) and after in block:
            block[old.partition(".")[2]] = block.pop(after)
    return out


def _warn(text: str) -> None:
    """Warn once a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"{text}; the former name is still read.", FormerName, stacklevel=3)
