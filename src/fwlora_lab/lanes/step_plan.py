"""What the host decides before a training step, so that the device can compute the step without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fwlora.penalty import NORMS
from fwlora_lab.lanes.adamw import bias_corrections
from fwlora_lab.lanes.buffers import LaneBuffers
from fwlora_lab.lanes.fisher import draw_probes
from fwlora_lab.lanes.settings import Lane

T = TypeVar("T")


class LaneNumbers(NamedTuple, Generic[T]):
    """A lane's numbers for one step (T = float), or those of all lanes (T = Tensor [E, 1])."""

    learning_rate: T
    weight_decay: T
    bias1: T  # see `adamw.bias_corrections`
    bias2: T
    max_grad_norm: T  # infinity: no clipping
    is_observed: T  # 1 or 0, see `Lane`
    is_scored: T


@dataclass(frozen=True)
class StepPlan:
    """The kind of step and its inputs.

    Attributes:
        observed: the lanes whose Fisher statistics are taken.
        penalty_norms: the norms of the penalties that are applied, in the order of `fwlora.penalty.NORMS`.
        regression: whether the loss is the squared error instead of the cross-entropy.
        table: the rows of `LaneNumbers`, [7, E, 1]. One tensor, so that one copy brings them to the device.
        probes: see `draw_probes`.
    """

    observed: tuple[int, ...]
    penalty_norms: tuple[str, ...]
    regression: bool
    table: Tensor
    probes: Mapping[int, Tensor]

    @property
    def kind(self) -> tuple:
        """Two plans of one kind differ only in the contents of their tensors."""
        return self.observed, self.penalty_norms, self.regression, tuple(sorted(self.probes))

    def numbers(self) -> LaneNumbers[Tensor]:
        """The rows of the table by name."""
        return LaneNumbers(*self.table.unbind())

    def tensors(self) -> list[Tensor]:
        """All tensors, always in the same order."""
        return [self.table, *(self.probes[d] for d in sorted(self.probes))]


def plan_step(
    lanes: Sequence[Lane], learning_rates: Sequence[float], regression: bool, buffers: LaneBuffers
) -> StepPlan:
    """Plan the next step of these lanes, which are all lanes of the engine."""
    observed = [e for e, lane in enumerate(lanes) if lane.is_observed]
    norms = {lane.settings.fw.penalty_norm for lane in lanes if lane.settings.fw is not None and lane.is_penalized}
    numbers = []
    for lane, learning_rate in zip(lanes, learning_rates, strict=True):
        limit = lane.settings.max_grad_norm
        numbers.append(
            LaneNumbers(
                learning_rate,
                lane.settings.weight_decay,
                *bias_corrections(lane.step + 1),
                max_grad_norm=float("inf") if limit is None else limit,
                is_observed=float(lane.is_observed),
                is_scored=float(lane.is_scored),
            )
        )
    table = torch.tensor(numbers, dtype=buffers.dtype).T.contiguous()[..., None]
    return StepPlan(
        observed=tuple(observed),
        penalty_norms=tuple(norm for norm in NORMS if norm in norms),
        regression=regression,
        table=table.to(buffers.layout.device, non_blocking=True),
        probes=draw_probes(lanes, observed, buffers),
    )
