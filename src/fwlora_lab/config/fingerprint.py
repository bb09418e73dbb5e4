"""Which run configs give the same result: the hash that a record keeps of its config."""

from __future__ import annotations

import hashlib
import json

from fwlora_lab.config.checks import ignored_keys
from fwlora_lab.config.former_names import with_stored_names
from fwlora_lab.config.keys import get_key, set_key
from fwlora_lab.config.schema import RunConfig

# Names and places, which change no result. The data have a fingerprint of their own, whatever their files are called.
# training.seed is not hashed because a record is found by its fingerprints and its seed.
_NOT_IN_FINGERPRINT = (
    "run_id",
    "results_dir",
    "optuna",
    "model.name",
    "dataset.root",
    "dataset.train_file",
    "dataset.eval_file",
    "training.seed",
    "training.save_adapter",
)
# Keys that came after the first records, and the value that stands for what runs did before. With this value a key is
# left out of the hash, so that those records stay valid. A new key of the schema is added here.
_ADDED_LATER = {"training.engine": "peft"}
# The same for keys that change no result: they are left out whatever their value.
_ADDED_WITHOUT_EFFECT = ("training.checkpoint_minutes",)


def in_fingerprint(key: str) -> bool:
    """Whether the leaf `key`, with dots, can change a run's result, unless the run ignores it."""
    left_out = (*_NOT_IN_FINGERPRINT, *_ADDED_WITHOUT_EFFECT)
    return not f"{key}.".startswith(tuple(f"{name}." for name in left_out))


def fingerprint(cfg: RunConfig) -> str:
    """sha256 (hex) of everything in the config that changes a run's result.

    What is hashed (version 1, the only one so far): the resolved config as JSON with sorted keys, under the names of
    version 0.1 of the schema. Keys that change no result in this run are null, the method has its short name, and
    model.lora.alpha holds the scale alpha/r. Any other form would make existing records count as different runs.
    """
    data = cfg.model_dump()
    without_effect = [*_NOT_IN_FINGERPRINT, *(key for key, _ in ignored_keys(cfg))]
    if cfg.model.lora.rank is not None:
        without_effect.append("model.parameter_budget_percent")
    for key in without_effect:
        set_key(data, key, None)
    set_key(data, "method", cfg.method_name)
    set_key(data, "model.lora.alpha", cfg.model.lora.scale)
    unchanged = [key for key, former in _ADDED_LATER.items() if get_key(data, key) == former]
    for key in (*unchanged, *_ADDED_WITHOUT_EFFECT):
        block, _, leaf = key.rpartition(".")
        del get_key(data, block)[leaf]
    text = json.dumps(with_stored_names(data), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
