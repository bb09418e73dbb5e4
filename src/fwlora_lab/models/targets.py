"""Finds the matrices that lora.target_modules means in an encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fwlora_lab.catalog.encoders import ROLES
from fwlora_lab.errors import UserError
from fwlora_lab.models.classifier import head_parts
from fwlora_lab.text import did_you_mean


def target_linears(model_or_config: PreTrainedModel | PreTrainedConfig, names: Sequence[str]) -> list[str]:
    """The full names, in the model's order, of the encoder's Linear (or Conv1D) layers that `names` mean.

    `query`, `key`, `value` and `attention.output` are the four matrices of the attention, `intermediate` and `output`
    the two of the feed-forward layer, in all encoders of `ROLES` (ModernBERT's fused Wqkv is meant by each of query,
    key and value). `all-linear` means every Linear layer. Any other name means the modules whose full name ends in it,
    as in PEFT, or where there are none, those of the same role: `intermediate.dense` is DistilBERT's `ffn.lin1`. The
    head is never a target.

    Raises:
        UserError: a name without a match.
    """
    if isinstance(model_or_config, PreTrainedConfig):
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(model_or_config, trust_remote_code=False)
    else:
        model = model_or_config
    linears = _linears(model)
    if isinstance(names, str) or not names:
        raise UserError(
            "model.lora.target_modules must be a list with at least one name, for instance "
            "[query, key, value, intermediate, output]"
        )
    found: set[str] = set()
    for name in names:
        if name == "all-linear":
            matches = set(linears)
        else:
            matches = {full for full in linears if _below_layer(full) in ROLES.get(name, ())}
            # In another architecture, the name of a role may still be the name of its modules.
            matches = matches or {f for f in linears if f == name or f.endswith(f".{name}")}
            matches = matches or {full for full in linears if _below_layer(full) in _paths_like(name)}
        if not matches:
            raise UserError(_no_such_target(model, name, linears))
        found |= matches
    return [name for name in linears if name in found]


def _linears(model: PreTrainedModel) -> list[str]:
    head = {id(module) for part in head_parts(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in head
    ]


def _paths_like(path: str) -> frozenset[str]:
    """All architectures' paths of the role that a path has in one of them."""
    return next((paths for paths in ROLES.values() if path in paths), frozenset())


def _below_layer(full_name: str) -> str:
    """`roberta.encoder.layer.3.attention.self.query` -> `attention.self.query`."""
    return re.sub(r"^.*\.\d+\.", "", full_name)


def _no_such_target(model: PreTrainedModel, name: str, linears: list[str]) -> str:
    below = {_below_layer(full) for full in linears}
    roles = [role for role, paths in ROLES.items() if paths & below]
    ends = {path.rpartition(".")[2] for path in below} - {"dense", *roles}
    usable = [*roles, *sorted(ends), "all-linear"]
    others = [type(module).__name__ for full, module in model.named_modules() if full.rpartition(".")[2] == name]
    what = f"names a {others[0]} and no" if others else "matches no"
    return (
        f"model.lora.target_modules: {name!r} {what} Linear layer of this "
        f"{model.config.model_type} encoder{did_you_mean(name, [*usable, *below])}. Usable names: {', '.join(usable)}."
    )
