"""AdamW's update of all lanes at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fwlora_lab.lanes.buffers import LaneBuffers

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # the defaults of torch.optim.AdamW


def bias_corrections(step: int) -> tuple[float, float]:
    """`1 − β₁ᵗ` and `√(1 − β₂ᵗ)` at step t, counted from 1."""
    return 1.0 - _BETA1**step, (1.0 - _BETA2**step) ** 0.5


class LaneAdamW:
    """`torch.optim.AdamW` over the flat buffers; learning rate and weight decay differ from lane to lane."""

    def __init__(self, buffers: LaneBuffers) -> None:
        self._buffers = buffers
        layout = buffers.layout
        # Biases of the head are not decayed.
        self._decays = torch.ones(layout.size, dtype=buffers.dtype, device=layout.device)
        for start, shape in layout.head_places.values():
            if len(shape) < 2:
                self._decays[start : start + shape.numel()] = 0.0

    def step(self, learning_rate: Tensor, weight_decay: Tensor, bias1: Tensor, bias2: Tensor) -> None:
        """Update values and moments; each argument is [E, 1], the last two from `bias_corrections`."""
        buffers = self._buffers
        values, grads = buffers.values, buffers.grads
        values.addcmul_(values, learning_rate * weight_decay * self._decays, value=-1.0)
        buffers.first_moment.lerp_(grads, 1.0 - _BETA1)
        buffers.second_moment.mul_(_BETA2).addcmul_(grads, grads, value=1.0 - _BETA2)
        denominator = buffers.second_moment.sqrt().div_(bias2).add_(_EPS)
        values.sub_((buffers.first_moment / denominator).mul_(learning_rate / bias1))
