"""What is put on a layer: a forward hook that ends with the layer, and an autograd node that hands over G and X."""

# Parts of torch are untyped.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


def autograd_task() -> int:
    """The number of the backward pass under way (an inner one in reentrant checkpointing), -1 if there is none."""
    return torch._C._current_graph_task_id()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Statistics are products of gradients: in a region of autocast they would be computed in fp16 and overflow."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class ForwardHook:
    """Calls `observe` when `layer` is called, and does nothing on copies of it (EMA models, DPO's reference model).

    A copy of this object, by `copy.deepcopy` or pickle, is a function that observes nothing.
    """

    def __init__(self, layer: nn.Module, observe: Callable[[tuple[Any, ...], dict[str, Any], Any], Any]) -> None:
        self._layer = layer
        self._call_observe = observe

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self._call_observe(args, kwargs, output) if layer is self._layer else None

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _hook_of_a_copy, ()


def _hook_of_a_copy() -> Callable[..., None]:
    return _observe_nothing


def _observe_nothing(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    pass


class _Capture(torch.autograd.Function):
    """Identity on y, which also calls back in the backward pass.

    The output is an alias of y that autograd does not take for a view: code after the layer may change it in place,
    as it may change y, and G is then the gradient with respect to the value before the change.

    x goes through `save_for_backward`, so that gradient checkpointing frees and recomputes it like any other
    activation. If the checkpointed forward pass runs without gradients, this node is part of the recomputed graph.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, on_backward: Callable[[Tensor, Tensor | None], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.on_backward = on_backward
        # Shares x's counter of changes in place, and no memory.
        ctx.changes = x.detach()
        ctx.changes.data = torch.empty(0, dtype=x.dtype, device=x.device)
        ctx.changes_before = ctx.changes._version
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        unchanged = ctx.changes._version == ctx.changes_before
        with torch.no_grad():
            ctx.on_backward(grad_outputs[0].detach(), ctx.saved_tensors[0] if unchanged else None)
        return grad_outputs[0], None, None


def capture(y: Tensor, x: Tensor, on_backward: Callable[[Tensor, Tensor | None], None]) -> Tensor:
    """y, such that the backward pass calls `on_backward(∂L/∂y, x)`: a layer's G and X without a weight gradient.

    x is None there if it was changed in place in between.
    """
    return cast(Tensor, _Capture.apply(y, x.detach(), on_backward))
