"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class Adapter:
    """The factors of one target over all lanes, and where their gradients go.

    a [E, r, d_in]; b, transposed: [E, r, d_out]; c [E, 1, r]: s, or s·Λ for AdaLoRA; grad_e [E, r] is Λ's. columns:
    where its d_out outputs stand among those of the Linears that are computed together.
    """

    columns: slice
    a: Tensor
    b: Tensor
    c: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scale: Tensor
    grad_e: Tensor | None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: Sequence[Adapter],
        masks: Sequence[Tensor | None],
        watch: Callable[[Tensor, Tensor], None] | None,
    ) -> Tensor:
        y = functional.linear(x, weight, bias)
        saved: list[Tensor | None] = [x]
        for adapter, mask in zip(adapters, masks, strict=True):
            z = torch.bmm(x if mask is None else x * mask, adapter.a.mT)
            low = z * adapter.c
            y[..., adapter.columns].baddbmm_(low, adapter.b)
            saved += [mask, low, z if adapter.grad_e is not None else None]
        ctx.adapters, ctx.weight, ctx.watch = adapters, weight, watch
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        x, *saved = ctx.saved_tensors
        gx = None
        with torch.no_grad():
            if ctx.watch is not None:
                ctx.watch(g, x)
            if ctx.needs_input_grad[0]:
                gx = torch.mm(g.flatten(0, 1), ctx.weight).view_as(x)
            for i, adapter in enumerate(ctx.adapters):
                mask, low, z = saved[3 * i : 3 * i + 3]
                own = g[..., adapter.columns]
                gb = torch.bmm(own, adapter.b.mT)
                adapter.grad_b.baddbmm_(low.mT, own)
                if z is not None:
                    assert adapter.grad_e is not None
                    adapter.grad_e.add_((gb * z).sum(1) * adapter.scale)
                gz = gb * adapter.c
                adapter.grad_a.baddbmm_(gz.mT, x if mask is None else x * mask)
                if gx is None:
                    continue
                if mask is None:
                    gx.baddbmm_(gz, adapter.a)
                else:
                    gx.addcmul_(torch.bmm(gz, adapter.a), mask)
        return gx, None, None, None, None, None, None


def adapted_linear(
    x: Tensor,
    anchor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    masks: Sequence[Tensor | None],
    watch: Callable[[Tensor, Tensor], None] | None,
) -> Tensor:
    """`y_e = x_e Wᵀ + bias`, and `+ ((x_e ∘ mask_e) A_eᵀ ∘ c_e) B_eᵀ` in each adapter's columns; x [E, N, d_in].

    W [d_out, d_in] is frozen. The backward pass adds ∂L/∂A, ∂L/∂B (and ∂L/∂Λ) to the adapters' gradients and calls
    `watch(∂L/∂y, x)`. `anchor` is any tensor that requires a gradient: it keeps the node in the graph where x does not.
    """
    return _AdaptedLinear.apply(x, anchor, weight, bias, adapters, masks, watch)  # type: ignore[return-value]
