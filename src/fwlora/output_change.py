"""How far a model's outputs move when some of its tensors are replaced."""

# Models and their outputs are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class OutputChange:
    """The change of a model's outputs, over all examples and, in sequences, all tokens that the attention mask keeps.

    Attributes:
        mean: mean |Δ| of an output.
        max: max |Δ|.
        kl: mean of KL(p ‖ q), in nats, of the softmax p of the model's logits and q of the exported adapter's; None
            where the last dimension has one entry, as in regression.
    """

    mean: float
    max: float
    kl: float | None


def output_change(model: nn.Module, replaced: Mapping[str, Tensor], batches: Iterable[Any]) -> OutputChange:
    """Compare the model's outputs with those that it has with other tensors, in evaluation mode.

    Args:
        replaced: tensors by the names of `model.named_parameters()`; the model itself keeps its own.
        batches: what the model is called with: keyword arguments (a mapping), a tuple of arguments, or one tensor.

    Raises:
        ValueError: no batch.
    """
    device = next(model.parameters()).device
    total = divergence = 0.0
    elements = rows = 0
    highest = 0.0
    has_logits = False
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            args, kwargs = _arguments(batch, device)
            with torch.no_grad():
                before = _outputs(model(*args, **kwargs), kwargs.get("attention_mask"))
                after = _outputs(functional_call(model, dict(replaced), args, kwargs), kwargs.get("attention_mask"))
            difference = (after - before).abs()
            total += float(difference.sum())
            highest = max(highest, float(difference.max()))
            elements += difference.numel()
            rows += len(before)
            has_logits = before.shape[1] > 1
            log_p, log_q = before.log_softmax(1), after.log_softmax(1)
            divergence += float((log_p.exp() * (log_p - log_q)).sum())
    finally:
        for module, training in modes.items():
            module.training = training
    if not elements:
        raise ValueError("batches is empty: the change of the outputs needs at least one batch")
    return OutputChange(total / elements, highest, divergence / rows if has_logits else None)


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def here(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {str(key): here(value) for key, value in batch.items()}
    return tuple(here(value) for value in (batch if isinstance(batch, tuple | list) else (batch,))), {}


def _outputs(result: Any, mask: Any) -> Tensor:
    """The logits, or what stands in their place, as [rows, classes] in float64."""
    if not isinstance(result, Tensor):
        logits = getattr(result, "logits", None)
        result = result[0] if logits is None else logits
    if isinstance(mask, Tensor) and mask.shape == result.shape[:-1]:
        return result[mask.bool()].double()
    return result.reshape(-1, result.shape[-1]).double()
