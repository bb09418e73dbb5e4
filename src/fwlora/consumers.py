"""Who will load an exported adapter: what each consumer multiplies B·A by, and what it cannot hold.

All three formats are PEFT's two files, and PEFT reads each of them rightly. They differ in s, the factor before B·A:

    peft        s = alpha / r of each matrix, from rank_pattern and alpha_pattern (alpha / √r with rsLoRA)
    vllm        s = lora_alpha / r of the whole file: vllm/lora/peft_helper.py reads no pattern
    llama.cpp   s = lora_alpha / (the matrix's own rank): llama_adapter_lora_weight::get_scale in src/llama-adapter.h

Both others take matrices of unequal rank (vLLM copies each into a slot of zeros, vllm/lora/layers/base_linear.py), but
stack those of a layer's experts (vllm/lora/lora_weights.py:pack_moe; modify_tensors of llama.cpp's converter), which
needs equal ranks.
"""

# PEFT's layers and parts of torch are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from peft import LoraConfig
from torch import Tensor, nn

from fwlora.factors import Factors

Consumer = Literal["peft", "vllm", "llama.cpp"]

# vllm/config/lora.py: the highest --max-lora-rank.
_VLLM_HIGHEST_RANK = 512

_MERGE = 'Merge it into the model for that (model.merge_and_unload()), or export it for_="peft".'


def check_consumer(consumer: str) -> None:
    if consumer not in get_args(Consumer):
        names = ", ".join(map(repr, get_args(Consumer)))
        raise ValueError(f"for_ is {consumer!r}; it must be one of {names}")


def scales(
    consumer: Consumer, factors: Mapping[str, Factors], ranks: Mapping[str, int], scale: float | None
) -> dict[str, float]:
    """The s by which the consumer will multiply each matrix's B·A.

    Args:
        ranks: the rank of each matrix in the file; 0 is not in it.
        scale: s of all matrices (`peft`, `vllm`) or of the widest (`llama.cpp`); by default each one's own (`peft`) or
            that of the first.
    """
    if consumer == "peft":
        return {name: f.scale if scale is None else scale for name, f in factors.items()}
    scale = next(iter(factors.values())).scale if scale is None else scale
    if consumer == "vllm":
        return dict.fromkeys(factors, scale)
    alpha = scale * max(ranks.values())
    return {name: alpha / (rank or 1) for name, rank in ranks.items()}


def ranks_in_file(consumer: Consumer, ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks with those of a layer's experts made equal, which zeros fill up, where the consumer stacks them."""
    if consumer == "peft":
        return dict(ranks)
    stacks = {name: re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in ranks}
    highest: dict[str, int] = {}
    for name, stack in stacks.items():
        highest[stack] = max(highest.get(stack, 0), ranks[name])
    return {name: highest[stack] for name, stack in stacks.items()}


def refuse_unloadable(
    consumer: Consumer,
    model: nn.Module,
    config: LoraConfig,
    factors: Mapping[str, Factors],
    ranks: Mapping[str, int],
    others: Mapping[str, Tensor],
) -> None:
    """Refuse what the consumer would refuse, drop or read wrongly.

    Args:
        others: the adapter's tensors besides A and B, by their names in the file.

    Raises:
        ValueError: the message names the cause and the cure.
    """
    if consumer == "peft":
        return
    who = {"vllm": "vLLM", "llama.cpp": "llama.cpp's converter"}[consumer]
    # Both skip the frozen weight below an adapter, which PEFT saves with an adapted embedding or output layer.
    if extra := [name for name in others if not name.endswith(".base_layer.weight")]:
        settings = {s: getattr(config, s) for s in ("modules_to_save", "trainable_token_indices", "bias")}
        causes = [f"{name}={value!r}" for name, value in settings.items() if value and value != "none"]
        raise ValueError(
            f"{who} loads A and B only, and this adapter also holds {len(extra)} other tensors, "
            f"{extra[0]!r} the first ({', '.join(causes) or 'the vocabulary was resized'}). {_MERGE}"
        )
    if config.layer_replication:
        raise ValueError(
            f'{who} knows no layer_replication: its model lacks the repeated layers. Export the adapter for_="peft".'
        )
    if consumer == "vllm":
        if (widest := max(ranks.values())) > _VLLM_HIGHEST_RANK:
            raise ValueError(f"vLLM loads ranks up to {_VLLM_HIGHEST_RANK}, and the highest is {widest}: pass ranks=")
        return
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    for name, f in factors.items():
        if not ranks[name]:
            continue
        # The converter transposes these weights, and B·A with them, though B·A is not stored transposed.
        if getattr(f.layer, "fan_in_fan_out", False):
            raise ValueError(f"llama.cpp's converter would transpose the adapter of {name}, a Conv1D layer. {_MERGE}")
        weight = f.layer.get_base_layer().weight
        if any(weight is embedding for embedding in embeddings):
            raise ValueError(
                f"llama.cpp has no matrix of its own for {name}, which is tied to the embedding. "
                f"Leave it out: ranks={{{name!r}: 0}}."
            )
