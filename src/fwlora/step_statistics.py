"""The statistics of a step, gathered from the backward passes that accumulate into the adapters' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fwlora.estimators import HookedEstimator


@dataclass
class _Passed:
    """What a backward pass has gathered of a target.

    `continues` says whether the gradients of earlier passes of the step were still there when it began, a boolean
    tensor; None if there were none: no earlier pass, or its gradients were set to None.
    """

    statistic: Tensor
    continues: Tensor | None


class StepStatistics:
    """Each target's statistic of the present step.

    A pass is known by the number of autograd's task. What it gathers is held back until it accumulates into a factor's
    gradient (`commit`).

    Args:
        estimator: reduces what need not be summed.
        targets: how many there are.
        keeps_sums: keep statistics to which more can be added; otherwise only what `estimator.reduce` leaves of them.
        on_lost_sum: called when a second pass has to be added to a statistic that was reduced.
        may_be_replaced: whether a target may train other factors than those that `commit` is called for, so that
            `commit_left` may follow. Otherwise nothing is kept of a pass that did not accumulate
            (`torch.autograd.grad`).

    Attributes:
        sums: by target, the statistic of what was accumulated since the last step; None if there was nothing.
        accumulated: the targets whose factors got a gradient in this step.
    """

    def __init__(
        self,
        estimator: HookedEstimator,
        targets: int,
        *,
        keeps_sums: bool,
        on_lost_sum: Callable[[], None],
        may_be_replaced: Callable[[int], bool],
    ) -> None:
        self._estimator = estimator
        self._on_lost_sum = on_lost_sum
        self._may_be_replaced = may_be_replaced
        self.keeps_sums = keeps_sums
        self.sums: list[Tensor | None] = [None] * targets
        self.accumulated: set[int] = set()
        self._passes: dict[int, dict[int, _Passed]] = {}
        # Of passes that ended without accumulating into the factors that are known here, by target.
        self._left: dict[int, list[_Passed]] = {}

    def clear(self) -> None:
        """Begin the next step."""
        self._passes.clear()
        self._left.clear()
        self.sums = [None] * len(self.sums)
        self.accumulated.clear()

    def gather(self, task: int, index: int, statistic: Tensor, continues: Callable[[], Tensor | None]) -> None:
        """One use of a target in the backward pass `task`; `continues` is asked at its first use."""
        if task not in self._passes:
            self._passes[task] = {}
            engine = cast(Any, torch.autograd.Variable)._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(partial(self._end, task))
        passed = self._passes[task]
        if index in passed:
            passed[index].statistic.add_(statistic)
        else:
            passed[index] = _Passed(statistic, continues())

    def commit(self, task: int, indices: Iterable[int]) -> None:
        """The pass has accumulated into a factor of these targets, after all its uses of them."""
        indices = list(indices)
        passed = self._passes.get(task, {})
        self.accumulated.update(i for i in indices if i in passed or not any(j in passed for j in indices))
        for i in indices:
            if (part := passed.pop(i, None)) is not None:
                self._add(i, part)

    def commit_left(self, index: int) -> None:
        """Passes have accumulated into a factor of this target that was not known when they did."""
        for part in self._left.pop(index, []):
            self.accumulated.add(index)
            self._add(index, part)

    def _end(self, task: int) -> None:
        for i, part in self._passes.pop(task, {}).items():
            if self._may_be_replaced(i):
                self._left.setdefault(i, []).append(part)

    def _add(self, index: int, part: _Passed) -> None:
        before = self.sums[index]
        if part.continues is None or before is None:
            self.sums[index] = part.statistic if self.keeps_sums else self._estimator.reduce(part.statistic)
        elif self.keeps_sums:  # without waiting for the device
            before.masked_fill_(~part.continues.to(before.device), 0)
            self.sums[index] = before.add_(part.statistic)
        elif bool(part.continues):
            self._on_lost_sum()
        else:
            self.sums[index] = self._estimator.reduce(part.statistic)
