"""How much gradient reaches a frozen matrix: the estimators, as pure tensor functions.

A frozen layer computes `y = x Wᵀ`. With `X` the inputs of all tokens of a step, one row a token, and `G` the
gradients of the loss with respect to the outputs, the gradient that `W` would get if it were not frozen is

    ∇W L = Gᵀ X                       [d_out, d_in]

and the Fisher proxy of the step is `‖∇W L‖_F²`. The estimators differ in what they keep of it:

    exact        Gᵀ X                 the request's quantity; costs as much as a weight gradient
    sketch       (X Ω)ᵀ G             Ω a Gaussian probe of k columns, fresh each step: E ‖(XΩ)ᵀG‖_F² = k ‖GᵀX‖_F²
                                      (Hutchinson's estimator; relative standard error at most √(2/k))
    per_example  Σ_i ‖G_iᵀ X_i‖_F²    the diagonal of the empirical Fisher matrix, a different quantity
    adapter      ‖∇B L‖_F²            free, from LoRA's own gradient, and unbiased only at initialisation

`exact` and `sketch` keep a statistic that is linear in the batch, so that micro-batches, several uses of one
module and several processes are summed before the norm is taken, as they are for a real gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

ESTIMATORS = ("exact", "sketch", "adapter", "per_example")


class _Tap(torch.autograd.Function):
    """x goes through `save_for_backward`, so that gradient checkpointing frees and recomputes it as any other
    activation; where the checkpointed forward runs without gradients, the tap sits in the recomputed graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.sink(grads[0], x)
        return grads[0], None, None


def tap(y: Tensor, x: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
    """y unchanged, such that the backward pass calls `sink(∂L/∂y, x)`: a layer's G and X, without a weight gradient."""
    return _Tap.apply(y, x.detach(), sink)  # type: ignore[return-value]


def _rows(t: Float[Tensor, "*batch d"]) -> Float[Tensor, "n d"]:
    """All tokens as rows, in at least fp32: squares of half-precision gradients overflow or vanish."""
    return t.reshape(-1, t.shape[-1]).to(torch.promote_types(t.dtype, torch.float32))


def weight_gradient(g: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The gradient `GᵀX` that the frozen weight does not get, summed over all leading dimensions."""
    return _rows(g).T @ _rows(x)


def sketched_gradient(
    g: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    probe: Float[Tensor, "d_in k"],
) -> Float[Tensor, "k d_out"]:
    """`(XΩ)ᵀG`, which costs k·(d_in + d_out) a token instead of d_in·d_out.

    The transpose of `Gᵀ(XΩ)`: read along its rows, the tall G goes through the product several times faster.
    """
    return (_rows(x) @ probe).T @ _rows(g)


def per_example_energy(g: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, ""]:
    """`Σ_i ‖G_iᵀX_i‖_F²` over the examples i (the first dimension), the loss scaled as it was in the batch.

    Through `‖GᵀX‖_F² = Σ_tu (GGᵀ ∘ XXᵀ)_tu`, so a sentence of T tokens costs T²·(d_in + d_out). Where the loss is
    the mean over n examples, `n` times this is the trace of the matrix's block of the empirical Fisher.
    A two-dimensional input has one token per example.
    """
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    g, x = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in (g, x))
    return ((g @ g.mT) * (x @ x.mT)).sum()


def gaussian_probe(
    d_in: int, columns: int, *, seed: int, step: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "d_in k"]:
    """A probe Ω with independent N(0, 1) entries that is a function of (seed, step, d_in) alone.

    Fresh each step, because a probe that stays fixed never averages out; the same in every process, so that
    sketches can be summed over processes.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + d_in) % 2**63)
    # Its columns lie in memory as rows: a thin product reads them several times faster.
    return torch.randn(columns, d_in, generator=generator, device=device, dtype=dtype).T


def squared_norms(statistics: Sequence[Tensor], loss_scale: Tensor | float = 1.0) -> Float[Tensor, " m"]:
    """`‖S_m‖_F²` of each statistic, after division by the factor by which a GradScaler enlarged the loss."""
    norms = torch._foreach_norm(list(statistics))
    return (torch.stack([n.to(norms[0].device) for n in norms]) / loss_scale).square()


def adapter_energy(
    grads_b: Sequence[Tensor], scales: Float[Tensor, " m"], shapes: Sequence[tuple[int, int]]
) -> Float[Tensor, " m"]:
    """`3·d_in/(s²·r) · ‖∇B‖_F²`, an estimate of `‖∇W‖_F²` that costs nothing.

    `∇B = s·∇W·Aᵀ`, and PEFT draws A's entries from U(±1/√d_in), so `E‖∇B‖_F² = s²·r/(3·d_in)·‖∇W‖_F²` at
    initialisation, with LoRA's dropout off. A then aligns with the gradient and the estimate grows, unevenly over
    matrices (9x after 20 steps was seen): for a rough ranking only. `shapes` holds (r, d_in).
    """
    squares = squared_norms([g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads_b])
    factor = torch.tensor([3.0 * d_in / r for r, d_in in shapes], dtype=squares.dtype)
    return squares * factor.to(squares.device) / scales.to(squares).square()


def update_average(
    fisher: Float[Tensor, "*lanes m"],
    step: Float[Tensor, "*lanes m"],
    decay: float | Float[Tensor, "*lanes 1"],
    averaging: str,
) -> tuple[Float[Tensor, "*lanes m"], Tensor]:
    """`F ← α·F + (1 − α)·f` (the request), or the same over the step's normalized `f / Σf`.

    Raw values follow the global size of the gradient, so steps with a large loss dominate; normalized values weigh
    every step alike. A step with a non-finite value leaves F as it is. Returns the new F and whether the step counted,
    boolean [*lanes]: nothing here waits for the device.
    """
    if averaging == "normalized":
        step = step / step.sum(-1, keepdim=True)
    counted = torch.isfinite(step).all(-1)
    return torch.where(counted[..., None], decay * fisher + (1.0 - decay) * step, fisher), counted
