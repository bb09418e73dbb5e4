"""A frozen linear layer plus the low-rank adapters of all lanes, as one autograd function.

LoRA's products are thin: r columns against hundreds. They run several times faster when both operands are read along
rows of d entries than along columns of r. So A is stored as [r, d_in] and B transposed as [r, d_out], and every
product here reads both along their rows. The backward pass adds the gradients of A and B straight to the flat buffer,
where autograd would make a copy of each first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CaptureHook = Callable[[Tensor, Tensor], None]  # called in the backward pass with (∂L/∂y, x)


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """Frozen Linears of one input and equal width that are computed as one product.

    Attributes:
        names: the Linears.
        width: d_out of each of them.
        adapted: those that are targets, each with its columns of the product's output.
        per_sentence: whether the input is one row a sentence [E, b, d_in] instead of one a token [E, N, d_in].
    """

    names: tuple[str, ...]
    width: int
    adapted: tuple[tuple[str, slice], ...]
    per_sentence: bool


@dataclass
class Adapter:
    """The factors of one target over E lanes, and the buffers that its gradients are added to.

    Attributes:
        columns: the target's d_out columns of the output of its `LinearGroup`.
        a: A [E, r, d_in].
        b: B transposed [E, r, d_out].
        c: what the r inner activations are multiplied with, [E, 1, r] or [E, 1, 1]: s, or s·Λ for AdaLoRA.
        grad_a, grad_b: as a and b.
        scale: s [E, 1].
        grad_singular: gradient of AdaLoRA's Λ [E, r]; None without one.
    """

    columns: slice
    a: Tensor
    b: Tensor
    c: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scale: Tensor
    grad_singular: Tensor | None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        grad_anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: Sequence[Adapter],
        masks: Sequence[Tensor | None],
        capture: CaptureHook | None,
    ) -> Tensor:
        y = functional.linear(x, weight, bias)
        saved: list[Tensor | None] = [x]
        for adapter, mask in zip(adapters, masks, strict=True):
            inner = torch.bmm(x if mask is None else x * mask, adapter.a.mT)
            scaled = inner * adapter.c
            y[..., adapter.columns].baddbmm_(scaled, adapter.b)
            saved += [mask, scaled, inner if adapter.grad_singular is not None else None]
        ctx.adapters, ctx.weight, ctx.capture = adapters, weight, capture
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        x, *saved = ctx.saved_tensors
        gx = None
        with torch.no_grad():
            if ctx.capture is not None:
                ctx.capture(g, x)
            if ctx.needs_input_grad[0]:
                gx = torch.mm(g.flatten(0, 1), ctx.weight).view_as(x)
            for i, adapter in enumerate(ctx.adapters):
                mask, scaled, inner = saved[3 * i : 3 * i + 3]
                own = g[..., adapter.columns]
                g_scaled = torch.bmm(own, adapter.b.mT)
                adapter.grad_b.baddbmm_(scaled.mT, own)
                if inner is not None:
                    assert adapter.grad_singular is not None
                    adapter.grad_singular.add_((g_scaled * inner).sum(1) * adapter.scale)
                g_inner = g_scaled * adapter.c
                adapter.grad_a.baddbmm_(g_inner.mT, x if mask is None else x * mask)
                if gx is None:
                    continue
                if mask is None:
                    gx.baddbmm_(g_inner, adapter.a)
                else:
                    gx.addcmul_(torch.bmm(g_inner, adapter.a), mask)
        return gx, None, None, None, None, None, None


def adapted_linear(
    x: Tensor,
    grad_anchor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    masks: Sequence[Tensor | None],
    capture: CaptureHook | None,
) -> Tensor:
    """`y_e = x_e Wᵀ + bias`, and in each adapter's columns `+ ((x_e ∘ mask_e) A_eᵀ ∘ c_e) B_eᵀ`.

    The backward pass adds ∂L/∂A, ∂L/∂B (and ∂L/∂Λ) to the adapters' gradient buffers.

    Args:
        x: [E, N, d_in], a row of N tokens (or sentences) for each lane.
        grad_anchor: any tensor that requires a gradient. The first layer's x requires none, and without this argument
            autograd would then leave the function out of the graph.
        weight: frozen W [d_out, d_in].
        bias: frozen, [d_out].
        adapters: of the targets among the Linears that W was put together from.
        masks: dropout of each adapter's input, as x, divided by 1 − p; None for no dropout.
        capture: called in the backward pass with ∂L/∂y and x.
    """
    return _AdaptedLinear.apply(x, grad_anchor, weight, bias, adapters, masks, capture)  # type: ignore[return-value]
