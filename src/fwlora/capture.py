"""Measures f_m, how much gradient reached each frozen matrix, at the observed steps of the warm-up.

What counts is what the optimizer steps on. A backward pass hands over G and X of each layer; its statistics become
part of the step when the pass has accumulated into the `.grad` of the layer's factors. So `torch.autograd.grad`, a
pass whose gradients are zeroed, and a pass with the adapters disabled count for nothing.
"""

# Parts of torch are untyped, and its batched operations (_foreach_*) have no public names.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from accelerate.state import GradientState  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fwlora.adapters import Target
from fwlora.estimators import HookedEstimator, adapter_squared_norm
from fwlora.layer_hooks import ForwardHook, autograd_task, capture, no_autocast
from fwlora.penalty_step import PenaltyStep
from fwlora.step_statistics import StepStatistics
from fwlora.trained import TrainedAdapters

# Statistics of less than this, all matrices together, are kept until the step without asking whether they must be.
SMALL = 64 * 2**20


class Capture(Protocol):
    """Where the method gets the f of a step from."""

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        """f_m of the step, [m]. `grad_scale` is by what a GradScaler still has to divide the optimizer's gradients.

        It is NaN where the step could not be measured in full; such a step is left out of the average.
        """
        ...

    def follow(self) -> None:
        """The adapters that are trained have changed."""
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

    def follow(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def remove(self) -> None:
        pass


class HookCapture:
    """The hooked estimators: a forward hook on each target, whose backward pass hands over G and X.

    If the gradients of a target's factors come from somewhere else (a fused kernel, a call of `layer.forward`, code
    compiled before the hooks were there), its G and X are never seen. At the first observed step f of *all* targets
    is then estimated from LoRA's own gradients from there on, because the two estimates differ in scale; at a later
    step that step is left out. Either is said in a warning that names the layers.

    Args:
        trained: the frozen matrices and their adapters.
        penalty: the adapters' factors, which know whether they are split over processes.
        estimator: what is kept of G and X.
        dtype: of the statistics of matrices that no gradient reached.
        step: returns the present optimizer step.
        is_observing: returns whether f is measured at this step.
        scaler: the GradScaler that enlarges the loss, or None.
        group: the processes over which statistics are averaged; None for this one alone, "auto" for all there are.
    """

    def __init__(
        self,
        trained: TrainedAdapters,
        penalty: PenaltyStep,
        estimator: HookedEstimator,
        *,
        dtype: torch.dtype,
        step: Callable[[], int],
        is_observing: Callable[[], bool],
        scaler: Any,
        group: Any,
    ) -> None:
        targets = trained.targets
        self._trained = trained
        self._penalty = penalty
        self._targets = targets
        self._estimator = estimator
        self._dtype = dtype
        self._step = step
        self._is_observing = is_observing
        self._scaler = scaler
        self._given_group = group
        self._ever_accumulated: set[int] = set()
        self._changed_inputs: set[int] = set()  # targets whose inputs are changed in place after the layer
        self._spoiled = False  # a part of this step was not seen
        self._measured_before = False
        self._warned_of_missed = False
        self._instead: AdapterCapture | None = None
        self._bytes = sum(estimator.bytes(t.out_features, t.in_features, dtype) for t in targets)
        several = self._group is not None
        self._gathered = StepStatistics(
            estimator,
            len(targets),
            keeps_sums=several or not estimator.reduces or self._bytes <= SMALL,
            on_lost_sum=self._keep_sums_from_the_next_step_on,
            may_be_replaced=lambda i: self._is_split or not _all_known(self._targets[i]),
        )
        if self._gathered.keeps_sums:
            self._say_what_sums_take("several processes are averaged" if several else "each step")
        self._handles: list[RemovableHandle] = [
            t.layer.register_forward_hook(ForwardHook(t.layer, partial(self._observe, i)), with_kwargs=True)
            for i, t in enumerate(targets)
        ]
        self._factor_handles: list[RemovableHandle] = []
        self._watch_factors()

    @property
    def _group(self) -> Any:
        """The processes to average over now: torch.distributed may be initialised after attach."""
        if self._given_group != "auto":
            return self._given_group
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return dist.group.WORLD if several else None

    @property
    def _is_split(self) -> bool:
        """Whether FSDP splits the adapters over processes: then gradients do not come to the factors by autograd."""
        return self._penalty.factors.is_split

    @property
    def _device(self) -> torch.device:
        return (self._trained.factors or list(self._targets[0].layer.parameters()))[0].device

    def _watch_factors(self) -> None:
        for handle in self._factor_handles:
            handle.remove()
        self._factor_handles = [
            cast(RemovableHandle, cast(Any, factor).register_post_accumulate_grad_hook(_CommitHook(self, indices)))
            for indices, factor in _trained_factors(self._targets)
        ]

    def follow(self) -> None:
        if not self._handles:
            return
        before, self._targets = self._targets, self._trained.targets
        for i, (old, new) in enumerate(zip(before, self._targets, strict=True)):
            if old.pairs != new.pairs and any(f.grad is not None for f in _factors(new)):
                # The parameters were replaced before the pass (Accelerate and fully_shard do that), so it went unseen.
                self._gathered.commit_left(i)
        self._watch_factors()

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        if autograd_task() != -1:
            raise RuntimeError(
                "fwlora: optimizer.step() was called inside the backward pass (an optimizer in a gradient hook), when "
                "the gradients of other layers are not known yet. Call it after loss.backward()."
            )
        for i, target in enumerate(self._targets):
            if self._is_split or _is_in_flat_parameter(target):
                self._gathered.commit_left(i)
        if self._instead is None:
            self._look_for_missed_targets()
        self._measured_before = True
        self._ever_accumulated |= self._gathered.accumulated
        if self._instead is not None:
            return self._instead.measure(grad_scale)
        device = self._device
        if self._spoiled and self._group is None:
            return torch.full((len(self._targets),), torch.nan, dtype=self._dtype, device=device)
        if self._scaler is not None:
            grad_scale = self._scaler.scale(torch.ones((), dtype=self._dtype, device=device))
        loss_scale = 1.0 if grad_scale is None else grad_scale.to(device)
        f = self._estimator.measure(self._reduced(), loss_scale)
        if self._is_split:
            return f
        # Gradients that were zeroed after the last pass leave nothing for the optimizer to step on. If they all were,
        # the batch was given up, and the step is left out like one whose gradients are not finite.
        reached = _reached(self._targets, f.device)
        given_up = self._group is not None or any(s is not None for s in self._gathered.sums)
        return torch.where(reached, f, torch.where(reached.any(), 0.0, torch.nan if given_up else 0.0).to(f))

    def forget(self) -> None:
        self._gathered.clear()
        self._spoiled = False
        self._estimator.end_step()

    def remove(self) -> None:
        for handle in (*self._handles, *self._factor_handles):
            handle.remove()
        self._handles, self._factor_handles = [], []
        self.forget()
        if self._measured_before and self._instead is None and self._group is None:
            self._say_which_targets_got_no_gradient()

    # What happens in a forward and in a backward pass

    def _observe(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The layer's output, such that its backward pass is seen; None to leave it as it is."""
        rest = cast(tuple[Any, ...], output[1:]) if type(output) is tuple else None
        y = cast(Any, output if rest is None else output[0])
        if not (torch.is_grad_enabled() and isinstance(y, Tensor) and y.requires_grad and self._is_observing()):
            return None
        if getattr(self._targets[index].layer, "disable_adapters", False):
            return None  # a reference pass, from which the adapters learn nothing
        x = cast(Tensor, args[0] if args else kwargs["x"])
        with torch.no_grad(), no_autocast(x.device):
            kept = self._estimator.compress(x.detach(), self._step())
            if index in self._changed_inputs:
                kept = kept.clone()
        y = capture(y, kept, partial(self._on_backward, index, self._step()))
        return y if rest is None else (y, *rest)

    def _on_backward(self, index: int, step: int, g: Tensor, x: Tensor | None) -> None:
        """Called before this pass accumulates into the factors' `.grad`; x is None if it was changed in place."""
        if self._spoiled or self._instead is not None or not self._is_observing():
            return
        if x is None:
            self._keep_a_copy_of_the_inputs(index)
            return
        with no_autocast(g.device):
            statistic = self._estimator.statistic(g, x, step)
        self._gathered.gather(autograd_task(), index, statistic, partial(self._continues, index))

    def _continues(self, index: int) -> Tensor | None:
        """Whether the pass that begins adds to gradients that are there, as `_Passed` has it."""
        if self._is_split:  # a process may hold nothing of this target's factors, so any gradient will do
            there = any(f.grad is not None for f in self._trained.factors)
            return torch.ones((), dtype=torch.bool, device=self._device) if there else None
        before = [f.grad for f in _factors(self._targets[index]) if f.grad is not None]
        return None if self._gathered.sums[index] is None or not before else _any_nonzero(before)

    def commit(self, indices: list[int], factor: Tensor) -> None:
        """The pass has accumulated into a factor's `.grad`, after all its uses: its statistics belong to the step."""
        if self._spoiled or not self._is_observing():
            return
        if not self._gathered.keeps_sums and not GradientState().sync_gradients:
            self._gathered.keeps_sums = True  # Accelerate and the Trainer say so: further micro-batches will follow
            self._say_what_sums_take("micro-batches are accumulated")
        self._gathered.commit(autograd_task(), indices)

    # What cannot be seen

    def _keep_sums_from_the_next_step_on(self) -> None:
        """A second pass arrives, but of the first one only the norm was kept, to which nothing can be added."""
        self._spoiled = self._gathered.keeps_sums = True
        self._say_what_sums_take("micro-batches are accumulated")
        _warn(
            f"step {self._step()} is left out of the Fisher proxies, because only then it turned out that several "
            "backward passes are accumulated"
        )

    def _say_what_sums_take(self, why: str) -> None:
        if self._bytes > SMALL:
            name = self._estimator.config.estimator
            cure = (
                "Fewer sketch_columns need less" if name == "sketch" else "estimator='sketch' needs a small part of it"
            )
            _warn(
                f"{why}, so that estimator={name!r} keeps a statistic of every matrix until optimizer.step: "
                f"{self._bytes / 2**30:.2f} GiB for {len(self._targets)} matrices. {cure}"
            )

    def _keep_a_copy_of_the_inputs(self, index: int) -> None:
        self._spoiled = True
        if index not in self._changed_inputs:
            self._changed_inputs.add(index)
            _warn(
                f"the input of {self._targets[index].name!r} is changed in place after the layer: step {self._step()} "
                "is left out of the Fisher proxies, and from now on a copy of the input is kept. estimator='sketch' "
                "needs neither"
            )

    def _look_for_missed_targets(self) -> None:
        """Targets whose factors got a gradient in this step, while their forward and backward pass was not seen."""
        missed = [
            i for i in sorted(self._gathered.accumulated)
            if self._gathered.sums[i] is None and any(f.grad is not None for f in _factors(self._targets[i]))
        ]  # fmt: skip
        if self._spoiled:
            missed = []
        if self._group is not None and not self._measured_before:
            flags = torch.zeros(len(self._targets), device=self._device)
            flags[missed] = 1
            dist.all_reduce(flags, group=self._group)
            missed = cast(list[int], flags.nonzero().flatten().tolist())
        if not missed:
            return
        cause = (
            f"the adapters of {len(missed)} of {len(self._targets)} layers get a gradient while the layer itself is "
            f"not called ({self._names(missed)}): by a fused kernel, a direct call of layer.forward, or code that was "
            "compiled before fwlora.attach"
        )
        if self._measured_before:
            self._spoiled = True
            if not self._warned_of_missed:
                _warn(f"{cause}. Such steps (the first is {self._step()}) are left out of the Fisher proxies")
            self._warned_of_missed = True
            return
        if any(t.pairs and not t.pairs[0].b.requires_grad for t in self._targets):
            raise RuntimeError(f"fwlora: {cause}. Turn that off, so that the layers are called.")
        _warn(
            f"{cause}. F is estimated from LoRA's own gradients instead, for all matrices alike (estimator='adapter', "
            f"a rough ranking). Turn that off to measure estimator={self._estimator.config.estimator!r}"
        )
        self._instead = AdapterCapture(self._trained, self._penalty)
        self.remove()

    def _say_which_targets_got_no_gradient(self) -> None:
        never = [i for i in range(len(self._targets)) if i not in self._ever_accumulated]
        if 0 < len(never) < len(self._targets):
            _warn(
                f"the adapters of {len(never)} of {len(self._targets)} layers got no gradient at any observed step "
                f"({self._names(never)}): their F is 0. Either no batch used them, as experts that no token was routed "
                "to, or the model reads the layer's weight without calling the layer. LoRA has no effect then: leave "
                "them out of target_modules"
            )

    def _names(self, indices: list[int]) -> str:
        return ", ".join(repr(self._targets[i].name) for i in indices[:5]) + (", …" if len(indices) > 5 else "")

    # The statistics of the step

    def _reduced(self) -> list[Tensor]:
        """Each target's statistic of the step; over several processes, that of the mean of their losses."""
        statistics = [
            self._zeros(t) if s is None else s for s, t in zip(self._gathered.sums, self._targets, strict=True)
        ]
        if self._group is not None:
            if self._spoiled:
                for s in statistics:
                    s.fill_(torch.nan)  # all processes must leave the step out
            world = dist.get_world_size(self._group)
            works = [cast(Any, dist.all_reduce(s, group=self._group, async_op=True)) for s in statistics]
            for work in works:
                work.wait()
            torch._foreach_div_(statistics, float(world**self._estimator.loss_power))
        return statistics

    def _zeros(self, target: Target) -> Tensor:
        """The statistic of a matrix that no gradient reached in this step, of the shape that other processes have."""
        reduced = self._group is None and self._estimator.reduces
        shape = () if reduced else self._estimator.shape(target.out_features, target.in_features)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)


def _factors(target: Target) -> list[nn.Parameter]:
    return [f for p in target.pairs for f in (p.a, p.b)]


def _all_known(target: Target) -> bool:
    """Whether the layer trains no other factors now, as it does once an adapter is switched or FSDP replaces them."""
    if _is_in_flat_parameter(target):
        return False
    layer: Any = target.layer
    known = {id(f) for f in _factors(target)}
    modules = [
        holder[name] for holder in (layer.lora_A, layer.lora_B) for name in layer.active_adapters if name in holder
    ]
    return all(id(m.weight) in known or not m.weight.requires_grad for m in modules)


def _is_in_flat_parameter(target: Target) -> bool:
    """Whether FSDP1 has put the factors into a flat parameter: autograd accumulates there, not into the factors."""
    return any(getattr(f, "_fsdp_flattened", False) for f in _factors(target))


def _trained_factors(targets: list[Target]) -> list[tuple[list[int], nn.Parameter]]:
    """Every factor that gets gradients, once, with the positions of the targets that have it."""
    found: dict[int, tuple[list[int], nn.Parameter]] = {}
    for i, target in enumerate(targets):
        for factor in _factors(target):
            if factor.requires_grad:
                indices = found.setdefault(id(factor), ([], factor))[0]
                if i not in indices:
                    indices.append(i)
    return list(found.values())


def _any_nonzero(tensors: Sequence[Tensor]) -> Tensor:
    """Whether an entry is not zero (NaN is not), as a tensor, so that nothing waits for the device."""
    largest = torch._foreach_norm(list(tensors), float("inf"))
    return torch.stack([n.to(largest[0].device) for n in largest]).ne(0).any()


def _reached(targets: list[Target], device: torch.device) -> Tensor:
    """For each target, whether the optimizer has a gradient other than zero for one of its factors, [m]."""
    factors = [_factors(t) for t in targets]
    zero = torch.zeros((), device=device)
    grads = [zero if f.grad is None else f.grad for fs in factors for f in fs]
    if not grads:
        return torch.zeros(len(targets), dtype=torch.bool, device=device)
    nonzero = torch.stack([n.to(zero) for n in torch._foreach_norm(grads, float("inf"))]).ne(0)
    if all(len(fs) == 2 for fs in factors):  # one adapter on each
        return nonzero.view(-1, 2).any(1)
    parts = cast(tuple[Tensor, ...], nonzero.split([len(fs) for fs in factors]))
    return torch.stack([part.any() for part in parts])


def _warn(text: str) -> None:
    warnings.warn(f"fwlora: {text}.", stacklevel=2)


class _CommitHook:
    """Calls `commit` when a factor has got its gradient.

    A parameter keeps its hooks where the garbage collector does not look, so this must not keep the model alive.
    """

    def __init__(self, capture: HookCapture, indices: list[int]) -> None:
        self._capture = weakref.ref(capture)
        self._indices = indices

    def __call__(self, factor: Tensor) -> None:
        if (capture := self._capture()) is not None:
            capture.commit(self._indices, factor)
