"""The gradient of `Σ c ‖B·A‖_F²` over the lanes' flat buffer in one kernel launch, for GPUs.

A factor's gradient is its partner's Gram matrix times itself, `∂/∂A = 2c·(BᵀB)·A` and `∂/∂Bᵀ = 2c·(AAᵀ)·Bᵀ`. So one
program a factor and lane reads its partner once for the Gram matrix, which stays in registers, and itself once;
the plain path, `Lanes._shrink`, takes a dozen launches and copies every factor. Needs Triton, which comes with
PyTorch's CUDA builds; `TRITON_INTERPRET=1` runs it without a GPU, for tests.
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
    at = values + lane * lane_stride + tl.load(starts + partner)
    gram = tl.zeros((PADDED, PADDED), dtype=tl.float32)
    for done in range(0, length, BLOCK):
        inside = (row < R) & (done + column < length)
        part = tl.load(at + row * length + done + column, mask=inside, other=0.0)
        gram += tl.dot(part, tl.trans(part), input_precision="ieee")
    gram *= tl.load(coefficients + lane * coefficient_stride + factor)
    length = tl.load(lengths + factor)
    place = lane * lane_stride + tl.load(starts + factor)
    for done in range(0, length, BLOCK):
        inside = (row < R) & (done + column < length)
        here = place + row * length + done + column
        part = tl.load(values + here, mask=inside, other=0.0)
        term = tl.dot(gram, part, input_precision="ieee")
        tl.store(grads + here, tl.load(grads + here, mask=inside, other=0.0) + term, mask=inside)


def add_gradient(
    values: Tensor, grads: Tensor, coefficients: Tensor, starts: Tensor, lengths: Tensor, partners: Tensor, rank: int
) -> None:
    """Adds `c_f · Gram(partner of f) · f` to the gradient of every factor f [rank, d_f] of every lane, in fp32.

    values, grads: float32 [E, P], rows contiguous; coefficients: float32 [E, F], 2c by factor; starts, lengths,
    partners: int64 [F], a factor's place in a lane's row, its d, and the number of its partner.
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
        PADDED=max(16, triton.next_power_of_2(rank)),  # type: ignore[arg-type]  # the least that a matrix product takes
        BLOCK=_BLOCK,  # type: ignore[arg-type]
    )
