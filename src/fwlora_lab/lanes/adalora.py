"""AdaLoRA over lanes: the orthogonality regulariser, the importance scores, and the masks of the allocation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fwlora_lab.lanes.buffers import FactorStacks, LaneBuffers
from fwlora_lab.lanes.settings import Lane
from fwlora_lab.models.adapter_plan import AdaLoraSchedule


class LaneAdaLora:
    """What AdaLoRA adds to a training step (arXiv 2303.10512), for lanes of different rank and schedule."""

    def __init__(self, buffers: LaneBuffers) -> None:
        self._buffers = buffers

    def arrange(self, lanes: Sequence[Lane]) -> None:
        """Take over the settings of these lanes."""
        self._allocations = [_allocation_of(lane) for lane in lanes]
        self._initial_ranks = [sum(lane.settings.ranks.values()) for lane in lanes]
        column, layout = self._buffers.column, self._buffers.layout
        self._beta1 = column([allocation.beta1 for allocation in self._allocations])
        self._beta2 = column([allocation.beta2 for allocation in self._allocations])
        self._weight = column([allocation.orth_reg_weight for allocation in self._allocations])[:, 0]
        ranks = layout.ranks_of(lanes)
        self._targets = (ranks > 0).sum(1)
        # Each lane's own triplets [E, M, r]; and for each factor the identity of the lane's own rank [E, 2M, r, r],
        # because the zeros that pad a smaller rank need not be orthogonal to anything.
        self._own = torch.arange(layout.rank, device=layout.device) < ranks[..., None]
        self._identity = self._own[:, layout.target_of].to(self._buffers.dtype).diag_embed()

    def add_orthogonality(self, factors: FactorStacks) -> Tensor:
        """Add the gradient of `w · mean(‖AAᵀ − I‖_F, ‖BᵀB − I‖_F)` over all A and B; returns its value by lane [E]."""
        layout, buffers = self._buffers.layout, self._buffers
        difference = factors.grams - self._identity
        norms = torch.linalg.matrix_norm(difference)
        weight = self._weight / (2.0 * self._targets)
        # For C = AAᵀ − I, which is symmetric, ∂‖C‖/∂A = 2·C·A/‖C‖, and 0 where C is 0.
        floor = torch.finfo(buffers.dtype).tiny
        scaled = difference * (2.0 * weight[:, None] / norms.clamp_min(floor))[..., None, None]
        for group, values in zip(layout.groups, factors.by_group, strict=True):
            grads = layout.group(buffers.grads, group)
            own = scaled[:, group.numbers].flatten(0, 1)
            grads.add_(torch.bmm(own, values).view_as(grads))
        return weight * norms.sum(1)

    def update_scores(self, scored: Tensor) -> None:
        """Smooth sensitivity and uncertainty after the optimizer's step, for lanes where `scored` [E, 1] is true."""
        buffers, size = self._buffers, self._buffers.layout.adapter_size
        now = (buffers.values[:, :size] * buffers.grads[:, :size]).abs_()
        sensitivity = torch.lerp(now, buffers.sensitivity, self._beta1)
        uncertainty = torch.lerp((now - sensitivity).abs_(), buffers.uncertainty, self._beta2)
        buffers.sensitivity.copy_(torch.where(scored, sensitivity, buffers.sensitivity))
        buffers.uncertainty.copy_(torch.where(scored, uncertainty, buffers.uncertainty))

    def allocate(self, lanes: Sequence[Lane]) -> None:
        """Mask the least important λ of each lane whose schedule asks for it after this step."""
        budgets = [
            allocation.budget(lane.step + 1, initial)
            for allocation, lane, initial in zip(self._allocations, lanes, self._initial_ranks, strict=True)
        ]
        if all(budget is None for budget in budgets):
            return
        buffers, layout = self._buffers, self._buffers.layout
        score = buffers.sensitivity * buffers.uncertainty
        means = torch.cat([layout.group(score, group).mean(-1) for group in layout.groups], 1)
        triplets = layout.singular_values(score) + (means[:, layout.number_of_a] + means[:, layout.number_of_b])
        for e, (budget, initial) in enumerate(zip(budgets, self._initial_ranks, strict=True)):
            if budget is None or initial <= budget:
                continue
            threshold = triplets[e][self._own[e]].kthvalue(initial - budget).values
            layout.singular_values(buffers.values)[e].masked_fill_(triplets[e] <= threshold, 0.0)


def _allocation_of(lane: Lane) -> AdaLoraSchedule:
    allocation = lane.settings.ada
    assert allocation is not None
    return allocation
