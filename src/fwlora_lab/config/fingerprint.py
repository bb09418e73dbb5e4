"""TODO"""

from __future__ import annotations

import hashlib
import json

from fwlora_lab.config.checks import ignored_keys
from fwlora_lab.config.former_names import with_stored_names
from fwlora_lab.config.keys import set_key
from fwlora_lab.config.schema import RunConfig

# Names and places, which change no result. Whether the files of two places hold the same data, the data's own
# fingerprint tells.
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


def in_fingerprint(key: str) -> bool:
    """Whether the leaf `key`, with dots, can change a run's result, unless the run ignores it."""
    return not f"{key}.".startswith(tuple(f"{name}." for name in _NOT_IN_FINGERPRINT))


def fingerprint(cfg: RunConfig) -> str:
    """sha256 (hex) of everything in the config that changes a run's result.

    Left out: names and places (run_id, model.name, results_dir, the data's files), optuna, training.seed (a run is
    known by its fingerprints, of config and data, and its seed), save_adapter, and every setting that this run ignores.
    """
    data = cfg.model_dump()
    data["method"] = cfg.method_name
    data["model"]["lora"]["alpha"] = cfg.model.lora.scale
    dropped = [*_NOT_IN_FINGERPRINT, *(key for key, _ in ignored_keys(cfg))]
    if cfg.model.lora.rank is not None:
        dropped.append("model.parameter_budget_percent")
    for key in dropped:
        if key != "model.lora.alpha":
            set_key(data, key, None)
    if cfg.training.engine == "peft":
        del data["training"]["engine"]  # records from before there was a choice stay what they are
    text = json.dumps(with_stored_names(data), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
