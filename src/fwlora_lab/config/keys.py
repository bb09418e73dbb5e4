"""The key paths of the schema: walking them, reading and setting them, and what a short or misspelt one means."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from fwlora_lab.config.block import Block
from fwlora_lab.config.former_names import present_key, present_leaf
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, nearest


def _block_of(annotation: Any) -> type[Block] | None:
    """The block inside an annotation such as `OptunaConfig | None`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            block = _block_of(part)
            if block is not None:
                return block
    return None


def walk_schema(block: type[Block] = RunConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key path of the schema in its order, and whether it is a block."""
    for name, field in block.model_fields.items():
        inner = _block_of(field.annotation)
        yield prefix + name, inner is not None
        if inner is not None:
            yield from walk_schema(inner, f"{prefix}{name}.")


KEYS: dict[str, bool] = dict(walk_schema())
LEAVES = [key for key, is_block in KEYS.items() if not is_block]
_SEARCHED = [k for k in LEAVES if k.split(".")[0] in ("model", "dataset", "training", "fw_lora", "adalora")]


def schema_defaults(block: type[Block] = RunConfig) -> dict[str, Any]:
    """The schema as Hydra sees it: every key with its default; `???` marks a key without one."""
    defaults: dict[str, Any] = {}
    for name, field in block.model_fields.items():
        inner = _block_of(field.annotation)
        if inner is not None and (field.is_required() or field.default_factory is not None):
            defaults[name] = schema_defaults(inner)
        elif field.is_required():
            defaults[name] = "???"
        else:
            defaults[name] = field.get_default(call_default_factory=True)
    return defaults


def get_key(data: Any, key: str) -> Any:
    """The value under a dotted key of nested dicts."""
    for part in key.split("."):
        data = data[part]
    return data


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the value under a dotted key, whose blocks exist."""
    *blocks, last = key.split(".")
    for part in blocks:
        data = data[part]
    data[last] = value


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts with its dotted key, in their order; an empty dict has none."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def search_key(name: str) -> str:
    """The key that the name of a search dimension means.

    `batch_size` is `training.batch_size`, `lora_rank` is `model.lora.rank`; a whole key is itself.

    Raises:
        UserError: the name means no key, or several.
    """
    name = present_leaf(present_key(name))
    if name in _SEARCHED:
        return name
    if name.startswith("lora_") and f"model.lora.{name[5:]}" in _SEARCHED:
        return f"model.lora.{name[5:]}"
    found = [key for key in _SEARCHED if key.rsplit(".", 1)[-1] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name!r} could mean {' or '.join(found)}: write the whole key")
    names = [
        *(key.rsplit(".", 1)[-1] for key in _SEARCHED),
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
    ]
    raise UserError(f"{name!r} is not a key that can be searched{did_you_mean(name, names)}")


def nearest_key(key: str) -> str:
    """What follows the message of an unknown key: the same name in another block, or the most similar sibling."""
    present = present_key(key)
    if present != key:  # only read where its present name is not given
        return f": it is the former name of {present}, which is given too; keep one of them"
    block, _, leaf = key.rpartition(".")
    elsewhere = [k for k in KEYS if k.rsplit(".", 1)[-1] == leaf]
    if elsewhere:
        return f" (did you mean {elsewhere[0]!r}?)"
    siblings = [k.removeprefix(f"{block}.") for k in KEYS if k.rpartition(".")[0] == block]
    close = nearest(leaf, siblings)
    if close is not None:
        return f" (did you mean {(block + '.' if block else '') + close!r}?)"
    return did_you_mean(key, KEYS) or (f"; {block or 'a run config'} has {', '.join(siblings)}" if siblings else "")
