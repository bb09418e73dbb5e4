"""Finds every adapted matrix of a PEFT model with its factors A and B and its scale, whatever the layer's class."""

# PEFT's layers and parts of torch are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd  # pyright: ignore[reportPrivateUsage]
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

# These move a part of the frozen weight into B·A at the start, so that s·B·A is not the change of the weight.
_SPLITTING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """One adapter's factors: `ΔW = s·B·A`, A [r, d_in], B [d_out, r]."""

    layer: LoraLayer
    adapter: str
    a: nn.Parameter
    b: nn.Parameter

    @property
    def scale(self) -> float:
        """s, as PEFT has it now (alpha/r, or alpha/√r with rsLoRA)."""
        scaling: dict[str, float] = self.layer.scaling
        return scaling[self.adapter]


@dataclass(frozen=True)
class Target:
    """A frozen matrix and the active, trainable adapters on it."""

    name: str
    layer: nn.Module
    pairs: tuple[Pair, ...]

    @property
    def in_features(self) -> int:
        return self.layer.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.layer.out_features  # type: ignore[return-value]


def find_targets(model: nn.Module) -> list[Target]:
    """Every frozen matrix of `model` that has an active, trainable LoRA adapter, in the model's order.

    A module that is used in several places (tied) is one target.

    Raises:
        ValueError: there is no such matrix, or a kind of adapter for which ΔW is not s·B·A of a Linear layer.
    """
    refuse_splitting_inits(model)
    targets: list[Target] = []
    seen_layer = False
    for name, module in named_modules(model):
        if not isinstance(module, LoraLayer):
            continue
        seen_layer = True
        if pairs := active_pairs(name, module):
            targets.append(Target(bare_name(name), cast(nn.Module, module), pairs))
    if targets:
        return targets
    if seen_layer:
        raise ValueError(
            "fwlora found LoRA layers, but none whose active adapter is trainable: load it with "
            "is_trainable=True, or choose the adapter to train with model.set_adapter(name)."
        )
    raise ValueError(
        "fwlora found no LoRA layer in this model: wrap it first, for example with "
        "peft.get_peft_model(model, LoraConfig(...)), and pass the wrapped model."
    )


def active_pairs(name: str, layer: LoraLayer) -> tuple[Pair, ...]:
    """The factors of the layer's active, trainable adapters.

    Raises:
        ValueError: as `pair_of` does.
    """
    return tuple(pair_of(name, layer, adapter) for adapter in layer.active_adapters if _trainable(layer, adapter))


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, which torch leaves untyped."""
    return cast(Iterator[tuple[str, nn.Module]], model.named_modules())


def bare_name(name: str) -> str:
    """The module's name in the model that the user knows, without the wrappers' prefixes."""
    name = re.sub(r"(^|\.)(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)(?=\.|$)", "", name).lstrip(".")
    while (bare := re.sub(r"^(module|base_model\.model)\.", "", name)) != name:
        name = bare
    return name


def _trainable(layer: LoraLayer, adapter: str) -> bool:
    holders = (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B)
    return any(p.requires_grad for holder in holders if adapter in holder for p in _parameters(holder[adapter]))


def _parameters(item: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [item] if isinstance(item, nn.Parameter) else list(item.parameters())


def pair_of(name: str, layer: LoraLayer, adapter: str) -> Pair:
    """The factors of one adapter of a layer.

    Raises:
        ValueError: the change of the weight is not s·B·A of a Linear layer, or the factors cannot be read here.
    """

    def refuse(cause: str, cure: str) -> ValueError:
        return ValueError(f"fwlora cannot work with {bare_name(name)!r} (adapter {adapter!r}): {cause}. {cure}")

    if isinstance(layer, Embedding) or adapter in layer.lora_embedding_A:
        raise refuse(
            "it is an embedding, where the rows that a batch does not use get no gradient",
            "Leave it out of target_modules, or name it in exclude_modules.",
        )
    if isinstance(layer, (_ConvNd, MultiheadAttention, ParamWrapper)):
        raise refuse(
            f"{type(layer).__name__} is not a Linear layer",
            "Leave it out of target_modules (and of target_parameters).",
        )
    variant = layer.lora_variant.get(adapter)
    if variant is not None or layer.use_dora.get(adapter):
        kind = type(variant).__name__ if variant is not None else "DoRA"
        raise refuse(
            f"with {kind} the change of the weight is not s·B·A",
            "Use plain LoRA (use_dora=False and no other variant).",
        )
    a = getattr(layer.lora_A[adapter], "weight", None)
    b = getattr(layer.lora_B[adapter], "weight", None)
    if not isinstance(a, nn.Parameter) or not isinstance(b, nn.Parameter):
        raise refuse(
            f"{type(layer).__name__} does not hold A and B as Linear layers (AdaLoRA, for example, does not)",
            "Use a LoraConfig.",
        )
    if hasattr(a, "ds_id") or hasattr(b, "ds_id"):
        raise refuse(
            "its factors are partitioned by ZeRO stage 3",
            "Use ZeRO stage 2 or lower: adapters are too small to be worth partitioning.",
        )
    if layer.merged:
        raise refuse("the adapter is merged into the weight", "Call model.unmerge_adapter() first.")
    return Pair(layer, adapter, a, b)


def refuse_deepspeed(parameters: Iterable[nn.Parameter], optimizer: object = None) -> None:
    """Refuse DeepSpeed's ZeRO, which keeps the trained values in flat buffers that no hook on the optimizer sees.

    Args:
        parameters: the model's parameters, as they are now.
        optimizer: what was passed as the optimizer, with the optimizers that it wraps.

    Raises:
        ValueError: the optimizer or the parameters are DeepSpeed's.
    """
    wrapped = optimizer
    by_optimizer = False
    while wrapped is not None and not by_optimizer:
        by_optimizer = "deepspeed" in type(wrapped).__module__.lower() or "DeepSpeed" in type(wrapped).__name__
        wrapped = getattr(wrapped, "optimizer", None)
    if by_optimizer or any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters):
        raise ValueError(
            "fwlora cannot work with DeepSpeed, whose optimizer trains flat copies of the parameters and not the "
            "adapters themselves. Use DDP, or FSDP2 (torch.distributed.fsdp.fully_shard) if the model must be split: "
            "the adapters' optimizer states are small."
        )


def refuse_splitting_inits(model: nn.Module) -> None:
    """Refuse a model whose adapters were initialised with a part of the frozen weight.

    Raises:
        ValueError: such an initialisation; the message names it.
    """
    for module in model.modules():
        if not isinstance(module, BaseTuner):
            continue
        for adapter, config in module.peft_config.items():
            init = getattr(config, "init_lora_weights", None)
            if isinstance(init, str) and init.lower().startswith(_SPLITTING_INITS):
                raise ValueError(
                    f"fwlora cannot work with adapter {adapter!r}: init_lora_weights={init!r} moves a part of the "
                    "frozen weight into B·A, so that s·B·A is not the change of the weight. "
                    "Use init_lora_weights=True or 'gaussian'."
                )
