"""Measures f_m, how much gradient reached each frozen matrix, at the observed steps of the warm-up."""

# Parts of torch are untyped, and its batched operations (_foreach_*) have no public names.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fwlora.adapters import Target
from fwlora.estimators import HookedEstimator, adapter_squared_norm
from fwlora.penalty_step import PenaltyStep
from fwlora.trained import TrainedAdapters


class Capture(Protocol):
    """Where the method gets the f of a step from."""

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        """f_m of the step, [m]. `grad_scale` is by what a GradScaler still has to divide the optimizer's gradients."""
        ...

    def follow(self, targets: list[Target]) -> None:
        """The adapters of the matrices changed: the same matrices in the same order, with the pairs trained now."""
        ...

    def forget(self) -> None:
        """Drop what was gathered since the last observed step."""
        ...

    def remove(self) -> None:
        """Take every hook off the model."""
        ...


class AdapterCapture:
    """The estimator "adapter": f from the gradients of B, which PEFT computes anyway."""

    def __init__(self, trained: TrainedAdapters, penalty: PenaltyStep) -> None:
        if any(not t.pairs[0].b.requires_grad for t in trained.targets):
            raise ValueError(
                "FWLoraConfig.estimator = 'adapter' reads the gradient of B, which is frozen here: "
                "use estimator='sketch'."
            )
        self._trained = trained
        self._penalty = penalty

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        pairs, owner = self._trained.pairs, self._trained.owner
        first = [k for k in range(len(pairs)) if k == owner.index(owner[k])]  # the first pair of each matrix
        factors = self._penalty.factors
        of_b = [2 * k + 1 for k in first]
        scales = torch.tensor([pairs[k].scale for k in first], dtype=torch.float64)
        shapes = [(factors.full[i - 1].shape[0], factors.full[i - 1].shape[1]) for i in of_b]
        own = adapter_squared_norm([factors.gradient(i) for i in of_b], scales, shapes)
        f = own.new_zeros(len(self._trained.targets))
        f[[owner[k] for k in first]] = factors.sum_over_pieces(own, of_b)
        return f if grad_scale is None else f / grad_scale.to(f.device).square()

    def follow(self, targets: list[Target]) -> None:
        pass

    def forget(self) -> None:
        pass

    def remove(self) -> None:
        pass


class HookCapture:
    """The hooked estimators: a forward hook on each target, whose backward pass hands over G and X.

    Args:
        targets: the frozen matrices.
        estimator: what is kept of G and X.
        dtype: of the statistics of matrices that no gradient reached.
        step: returns the present optimizer step.
        is_observing: returns whether f is measured at this step.
        scaler: the GradScaler that enlarges the loss, or None.
        group: the processes over which statistics are averaged; None for this one alone, "auto" for all there are.
    """

    def __init__(
        self,
        targets: list[Target],
        estimator: HookedEstimator,
        *,
        dtype: torch.dtype,
        step: Callable[[], int],
        is_observing: Callable[[], bool],
        scaler: Any,
        group: Any,
    ) -> None:
        self._targets = targets
        self._estimator = estimator
        self._dtype = dtype
        self._device = targets[0].pairs[0].a.device
        self._step = step
        self._is_observing = is_observing
        self._scaler = scaler
        self._group = group
        self._statistics: list[Tensor | None] = [None] * len(targets)
        self._handles: list[RemovableHandle] = [
            t.layer.register_forward_hook(self._forward_hook(i), with_kwargs=True) for i, t in enumerate(targets)
        ]

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        if self._scaler is not None:
            grad_scale = self._scaler.scale(torch.ones((), dtype=self._dtype, device=self._device))
        loss_scale = 1.0 if grad_scale is None else grad_scale.to(self._device)
        return self._estimator.measure(self._reduced(), loss_scale)

    def follow(self, targets: list[Target]) -> None:
        self._targets = targets

    def forget(self) -> None:
        self._statistics = [None] * len(self._targets)
        self._estimator.end_step()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def _forward_hook(self, index: int) -> Callable[..., Tensor | None]:
        def on_backward(g: Tensor, x: Tensor) -> None:
            statistic = self._estimator.statistic(g, x, self._step())
            before = self._statistics[index]
            self._statistics[index] = statistic if before is None else before.add_(statistic)

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not (torch.is_grad_enabled() and output.requires_grad and self._is_observing()):
                return None
            # Gradient checkpointing runs this forward pass again, inside the backward pass.
            recomputing = torch._C._current_graph_task_id() != -1
            if self._statistics[index] is not None and not recomputing and not self._was_reached(index):
                # The gradients were zeroed without a step, as a GradScaler does after an overflow.
                self.forget()
            x: Tensor = args[0] if args else kwargs["x"]
            return capture(output, x, on_backward)

        return hook

    def _was_reached(self, index: int) -> bool:
        """Whether a backward pass has reached the target since zero_grad: its adapter then has a gradient."""
        return any(f.grad is not None for p in self._targets[index].pairs for f in (p.a, p.b))

    def _reduced(self) -> list[Tensor]:
        """Each target's statistic of the step; over several processes, that of the mean of their losses."""
        statistics = [self._zeros(t) if s is None else s for s, t in zip(self._statistics, self._targets, strict=True)]
        if (group := _processes(self._group)) is not None:
            world = dist.get_world_size(group)
            works = [cast(Any, dist.all_reduce(s, group=group, async_op=True)) for s in statistics]
            for work in works:
                work.wait()
            torch._foreach_div_(statistics, float(world**self._estimator.loss_power))
        return statistics

    def _zeros(self, target: Target) -> Tensor:
        """The statistic of a matrix that no gradient reached in this step, of the shape that other processes have."""
        shape = self._estimator.shape(target.out_features, target.in_features)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)


def _processes(group: Any) -> Any:
    """The processes that "auto" stands for now: all of them, if there are several; None for this one alone."""
    if group != "auto":
        return group
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


class _Capture(torch.autograd.Function):
    """Identity on y, which also calls back in the backward pass.

    x goes through `save_for_backward`, so that gradient checkpointing frees and recomputes it like any other
    activation. If the checkpointed forward pass runs without gradients, this node is part of the recomputed graph.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, on_backward: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.on_backward = on_backward
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.on_backward(grad_outputs[0], x)
        return grad_outputs[0], None, None


def capture(y: Tensor, x: Tensor, on_backward: Callable[[Tensor, Tensor], None]) -> Tensor:
    """y, such that the backward pass calls `on_backward(∂L/∂y, x)`: a layer's G and X without a weight gradient."""
    return cast(Tensor, _Capture.apply(y, x.detach(), on_backward))
