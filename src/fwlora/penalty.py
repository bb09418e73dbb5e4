"""The penalty on the updates ΔW = s·B·A and its gradient in closed form, without ever forming ΔW.

With the r × r Gram matrices `AAᵀ` and `BᵀB`,

    ‖s·B·A‖_F² = s² tr((BᵀB)(AAᵀ)),   ∂/∂A = 2s² (BᵀB) A,   ∂/∂B = 2s² B (AAᵀ),

so a penalty costs O(r²(d_in + d_out)) a matrix. Matrices of equal shape are stacked into one batched product, so that
the number of kernel launches does not grow with the model's depth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from fwlora.choices import PenaltyNorm

if TYPE_CHECKING:
    from jaxtyping import Float

NORMS: tuple[PenaltyNorm, ...] = get_args(PenaltyNorm)


def update_norms(a: Float[Tensor, "n r d_in"], b: Float[Tensor, "n d_out r"]) -> Float[Tensor, " n"]:
    """`‖BA‖_F²` of each pair of a stack."""
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1))


def update_gradients(
    a: Float[Tensor, "n r d_in"], b: Float[Tensor, "n d_out r"], c: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n r d_in"], Float[Tensor, "n d_out r"]]:
    """The gradients of `Σ_n c_n ‖B_n A_n‖_F²` with respect to A and B."""
    twice = 2.0 * c[:, None, None]
    return ((b.mT @ b) * twice) @ a, b @ ((a @ a.mT) * twice)


def factor_norms(a: Float[Tensor, "n r d_in"], b: Float[Tensor, "n d_out r"]) -> Float[Tensor, " n"]:
    """`‖A‖_F² + ‖B‖_F²` of each pair, which the request's code penalizes.

    Its minimum over all factors of one product is twice the nuclear norm of BA, so unlike `‖BA‖_F²` it prefers low
    rank. It also shrinks A from the first step, while B is still zero.
    """
    return a.square().sum((-2, -1)) + b.square().sum((-2, -1))


def factor_gradients(
    a: Float[Tensor, "n r d_in"], b: Float[Tensor, "n d_out r"], c: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n r d_in"], Float[Tensor, "n d_out r"]]:
    """The gradients of `Σ_n c_n (‖A_n‖_F² + ‖B_n‖_F²)` with respect to A and B."""
    twice = 2.0 * c[:, None, None]
    return twice * a, twice * b


@dataclass
class Stack:
    """Pairs of one shape, dtype and device; `index` holds their positions in the model's list of pairs."""

    index: list[int]
    a: list[Tensor]
    b: list[Tensor]

    def stacked(self) -> tuple[Float[Tensor, "n r d_in"], Float[Tensor, "n d_out r"]]:
        """Both factors in at least fp32, because a Gram matrix of bf16 entries loses small updates."""
        return torch.stack(self.a).to(self.dtype), torch.stack(self.b).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the penalty of these pairs is computed in."""
        return torch.promote_types(self.a[0].dtype, torch.float32)


class Penalty:
    """`Σ_p c_p·‖·‖²` over a fixed list of (A, B) parameter pairs, its value and its gradients.

    `norm` is "update" (`‖B_p A_p‖_F²`) or "factors" (`‖A_p‖_F² + ‖B_p‖_F²`).
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], norm: PenaltyNorm) -> None:
        self.norms, self.gradients = {
            "update": (update_norms, update_gradients),
            "factors": (factor_norms, factor_gradients),
        }[norm]
        groups: dict[tuple[Any, ...], Stack] = defaultdict(lambda: Stack([], [], []))
        for i, (a, b) in enumerate(pairs):
            group = groups[(a.shape, b.shape, a.dtype, b.dtype, a.device)]
            group.index.append(i)
            group.a.append(a)
            group.b.append(b)
        self.stacks = list(groups.values())

    @torch.no_grad()
    def value(self, coefficients: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, ""]:
        """The penalty, as a tensor on the first pair's device; `coefficients[k]` belongs to `stacks[k]`."""
        device = self.stacks[0].a[0].device
        terms = [
            (self.norms(*stack.stacked()) * c.to(stack.a[0].device)).sum().to(device)
            for stack, c in zip(self.stacks, coefficients, strict=True)
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def gradient(self, coefficients: Sequence[Float[Tensor, " _"]]) -> list[Tensor]:
        """The gradients with respect to A_0, B_0, A_1, B_1, …, in at least fp32."""
        terms: list[Tensor] = [torch.empty(0)] * (2 * sum(len(s.index) for s in self.stacks))
        for stack, c in zip(self.stacks, coefficients, strict=True):
            for factor, batch in enumerate(self.gradients(*stack.stacked(), c)):
                for i, term in zip(stack.index, batch.unbind(), strict=True):
                    terms[2 * i + factor] = term
        return terms
