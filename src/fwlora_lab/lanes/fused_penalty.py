"""The gradient of `Σ c ‖B·A‖_F²` over the lanes' flat buffers in one kernel launch, for GPUs.

A factor's gradient is its partner's Gram matrix times the factor, `∂/∂A = 2c·(BᵀB)·A` and `∂/∂Bᵀ = 2c·(AAᵀ)·Bᵀ`. One
program for each factor and lane reads the partner once for the Gram matrix, which stays in registers, and the factor
once. `LanePenalty.add_stacked` computes the same in a dozen launches and copies every factor. Needs Triton, which comes
with PyTorch's CUDA builds; with `TRITON_INTERPRET=1` it runs without a GPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128  # entries of a row at a time


@triton.jit
def _kernel(
    values,
    grads,
    coefficients,
    starts,
    lengths,
    partners,
    lane_stride,
    coefficient_stride,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, PADDED)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    partner = tl.load(partners + factor)
    length = tl.load(lengths + partner)
    partner_start = values + lane * lane_stride + tl.load(starts + partner)
    gram = tl.zeros((PADDED, PADDED), dtype=tl.float32)
    for done in range(0, length, BLOCK):
        inside = (row < R) & (done + column < length)
        part = tl.load(partner_start + row * length + done + column, mask=inside, other=0.0)
        gram += tl.dot(part, tl.trans(part), input_precision="ieee")
    gram *= tl.load(coefficients + lane * coefficient_stride + factor)
    length = tl.load(lengths + factor)
    factor_start = lane * lane_stride + tl.load(starts + factor)
    for done in range(0, length, BLOCK):
        inside = (row < R) & (done + column < length)
        offsets = factor_start + row * length + done + column
        part = tl.load(values + offsets, mask=inside, other=0.0)
        term = tl.dot(gram, part, input_precision="ieee")
        tl.store(grads + offsets, tl.load(grads + offsets, mask=inside, other=0.0) + term, mask=inside)


def add_gradient(
    values: Tensor, grads: Tensor, coefficients: Tensor, starts: Tensor, lengths: Tensor, partners: Tensor, rank: int
) -> None:
    """Add `c_f · Gram(partner of f) · f` to the gradient of every factor f [rank, d_f] of every lane, in fp32.

    Args:
        values, grads: float32 [E, P], rows contiguous.
        coefficients: float32 [E, F], 2c by factor.
        starts: int64 [F], where each factor begins in a lane's row.
        lengths: int64 [F], its d.
        partners: int64 [F], the number of the other factor of its target.
        rank: rows of every factor.
    """
    assert values.dtype == torch.float32 and values.stride() == grads.stride() and values.stride(1) == 1
    _kernel[(len(starts), len(values))](
        values,
        grads,
        coefficients,
        starts,
        lengths,
        partners,
        values.stride(0),
        coefficients.stride(0),
        R=rank,  # type: ignore[arg-type]
        PADDED=max(16, triton.next_power_of_2(rank)),  # type: ignore[arg-type]  # the smallest that tl.dot takes
        BLOCK=_BLOCK,  # type: ignore[arg-type]
    )
