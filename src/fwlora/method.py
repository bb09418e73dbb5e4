"""The clock of Fisher-Weighted LoRA: watch for K steps, weigh once, then penalize at every step.

    L_total = L_task + λ Σ_m w_m ‖ΔW_m‖_F²,   w_m = 1 − F_m / ΣF,   F_m = EMA over K steps of ‖∇W_m L_task‖_F²

Everything happens in a hook that runs just before `optimizer.step`: gradients are then accumulated over
micro-batches, averaged over processes and clipped, and the penalty's gradient is added once, in closed form. It
never enters the loss that is logged or evaluated, and it needs no further forward or backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fwlora import estimators
from fwlora.adapters import Pair, Target, find_targets
from fwlora.config import FWLoraConfig
from fwlora.penalty import Penalty, update_norms
from fwlora.weighting import importance, penalty_weights

Phase: TypeAlias = Literal["warmup", "penalty", "detached"]


class FisherWeightedLoRA:
    """What `attach` returns: the method at work on one model and one optimizer.

    It is inert but for its hooks. `phase` is "warmup" while the Fisher proxies are gathered, "penalty" once the
    weights are frozen, and "detached" after `detach()`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: FWLoraConfig,
        *,
        total_steps: int | None,
        scaler: Any,
        process_group: Any,
    ) -> None:
        self.config = config
        self.warmup_steps = config.resolve_warmup_steps(total_steps)
        self.step = 0
        self._scaler = scaler
        self._group = process_group
        self._optimizer = optimizer
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self.targets = _held_targets(find_targets(model), groups)
        self.names = _unique_names(self.targets)
        self._pairs: list[Pair] = [p for t in self.targets for p in t.pairs]
        self._owner = [i for i, t in enumerate(self.targets) for _ in t.pairs]
        factors = [f for p in self._pairs for f in (p.a, p.b)]
        # Per factor, in the penalty's order: the optimizer's group that trains it, or None.
        self._factors = factors
        self._groups = [groups.get(id(f)) if f.requires_grad else None for f in factors]
        self._penalty = Penalty([(p.a, p.b) for p in self._pairs], config.penalty_norm)
        device = self._pairs[0].a.device
        self._fisher = torch.zeros(len(self.targets), dtype=_accumulation(self._pairs), device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._weights: Tensor | None = None
        self._coefficients: tuple[tuple[float, ...], list[Tensor]] | None = None
        self._statistics: list[Tensor | None] = [None] * len(self.targets)
        self._probes: dict[tuple, Tensor] = {}
        if config.estimator == "adapter" and any(not t.pairs[0].b.requires_grad for t in self.targets):
            raise ValueError(
                "FWLoraConfig.estimator = 'adapter' reads the gradient of B, which is frozen here: "
                "use estimator='sketch'."
            )
        self._taps = [
            t.layer.register_forward_hook(self._tap(i), with_kwargs=True)
            for i, t in enumerate(self.targets)
            if config.estimator != "adapter"
        ]
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        self.phase: Phase = "warmup"

    # What people read

    def fisher(self) -> dict[str, float]:
        """F_m by matrix, as averaged so far. Waits for the device."""
        return dict(zip(self.names, self._fisher.tolist(), strict=True))

    def importance(self) -> dict[str, float]:
        """I_m = F_m / ΣF by matrix, as known so far; sums to 1. Waits for the device.

        Raises:
            RuntimeError: before the first observed step.
        """
        self._check_fisher()
        return dict(zip(self.names, importance(self._fisher).tolist(), strict=True))

    def weights(self) -> dict[str, float]:
        """w_m by matrix: the frozen ones, or in the warm-up those that would be frozen now.

        Raises:
            RuntimeError: before the first observed step.
        """
        if self._weights is None:
            self._check_fisher()
        weights = self._weigh() if self._weights is None else self._weights
        return dict(zip(self.names, weights.tolist(), strict=True))

    def penalty(self) -> Tensor:
        """The value of `λ Σ w_m ‖ΔW_m‖²` now, a scalar on the device; 0 before the weights are frozen."""
        if self._weights is None:
            return self._fisher.new_zeros(())
        return self._penalty.value(self._penalty_coefficients())

    def update_norms(self) -> dict[str, float]:
        """‖s·B·A‖_F by matrix, summed over its active adapters. Waits for the device."""
        norms = dict.fromkeys(self.names, 0.0)
        with torch.no_grad():
            for pair, owner in zip(self._pairs, self._owner, strict=True):
                a, b = (f.to(self._fisher.dtype) for f in (pair.a[None], pair.b[None]))
                norms[self.names[owner]] += abs(pair.scale) * update_norms(a, b).sqrt().item()
        return norms

    @property
    def skipped_steps(self) -> int:
        """Observed steps that were left out of F because a gradient was not finite. Waits for the device."""
        return int(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """The clock and the Fisher proxies: all that a resumed run needs besides the model and the optimizer."""
        return {
            "step": self.step,
            "fisher": self._fisher.clone(),
            "skipped": self._skipped.clone(),
            "names": list(self.names),
            "config": asdict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the weights follow from F and this handle's config.

        Raises:
            ValueError: the state belongs to other matrices.
        """
        if state["names"] != self.names:
            odd = sorted(set(state["names"]) ^ set(self.names))
            raise ValueError(
                f"this state belongs to other adapters: {len(state['names'])} matrices against {len(self.names)} here"
                + (f", the first that differs is {odd[0]!r}" if odd else " in another order")
            )
        if self.phase == "detached":
            raise ValueError("this handle is detached: attach again, then load the state")
        self.step = int(state["step"])
        self._fisher.copy_(state["fisher"])
        self._skipped.copy_(state["skipped"])
        self._forget()
        if self.step >= self.warmup_steps:
            self._freeze()
        elif self.phase == "penalty":
            raise ValueError("this state is from the warm-up, which is over here: attach again, then load it")

    def detach(self) -> None:
        """Takes every hook off; the model and the optimizer are as they were without fwlora."""
        self._remove_taps()
        self._step_hook.remove()
        self.phase = "detached"

    # What happens at each step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if kwargs.get("closure") is not None or any(callable(a) for a in args[1:]):
            raise ValueError(
                "fwlora cannot work with optimizer.step(closure): the closure computes the gradients after fwlora "
                "has added its own. Call loss.backward() first and optimizer.step() without a closure."
            )
        # A fused optimizer under a GradScaler gets scaled gradients, and unscales them itself.
        scale = getattr(optimizer, "grad_scale", None)
        if self.phase == "warmup":
            if self._watching():
                self._observe(scale)
        else:
            self._shrink(scale, getattr(optimizer, "found_inf", None))
        self.step += 1
        if self.step == self.warmup_steps:
            self._freeze()

    def _watching(self) -> bool:
        ago = self.step - self.config.fisher_start
        return 0 <= ago and ago % self.config.fisher_interval == 0

    def _tap(self, index: int) -> Callable[..., Tensor | None]:
        target = self.targets[index]
        pair = target.pairs[0]
        # Without a gradient of this factor, no backward pass has reached the target since zero_grad.
        witness = pair.b if pair.b.requires_grad else pair.a

        def sink(g: Tensor, x: Tensor) -> None:
            statistic = self._statistic(g, x)
            before = self._statistics[index]
            self._statistics[index] = statistic if before is None else before.add_(statistic)

        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not (torch.is_grad_enabled() and output.requires_grad and self._watching()):
                return None
            recomputing = torch._C._current_graph_task_id() != -1
            if self._statistics[index] is not None and witness.grad is None and not recomputing:
                # The gradients were zeroed without a step, as a GradScaler does after an overflow.
                self._forget()
            x = args[0] if args else kwargs["x"]
            return estimators.tap(output, x, sink)

        return hook

    def _statistic(self, g: Tensor, x: Tensor) -> Tensor:
        match self.config.estimator:
            case "exact":
                return estimators.weight_gradient(g, x)
            case "sketch":
                dtype = torch.promote_types(x.dtype, torch.float32)
                key = (x.shape[-1], x.device, dtype)
                if key not in self._probes:
                    self._probes[key] = estimators.gaussian_probe(
                        x.shape[-1],
                        self.config.sketch_columns,
                        seed=self.config.seed,
                        step=self.step,
                        device=x.device,
                        dtype=dtype,
                    )
                return estimators.sketched_gradient(g, x, self._probes[key])
            case _:
                return estimators.per_example_energy(g, x)

    def _observe(self, scale: Tensor | None) -> None:
        kind = self.config.estimator
        if kind == "adapter":
            pairs = [t.pairs[0] for t in self.targets]
            zero = [torch.zeros_like(p.b) if p.b.grad is None else p.b.grad for p in pairs]
            scales = torch.tensor([p.scale for p in pairs], dtype=torch.float64)
            shapes = [(p.a.shape[0], p.a.shape[1]) for p in pairs]
            step = estimators.adapter_energy(zero, scales, shapes)
            if scale is not None:
                step = step / scale.to(step.device).square()
        else:
            if self._scaler is not None:
                scale = self._scaler.scale(self._fisher.new_ones(()))
            statistics = self._reduced()
            if kind == "per_example":
                factor = 1.0 if scale is None else scale.to(self._fisher.device).square()
                step = torch.stack([s.to(self._fisher.device) for s in statistics]) / factor
            else:
                step = estimators.squared_norms(statistics, 1.0 if scale is None else scale)
                if kind == "sketch":
                    step = step / self.config.sketch_columns
        self._forget()
        self._fisher, counted = estimators.update_average(
            self._fisher, step.to(self._fisher), self.config.fisher_ema_decay, self.config.averaging
        )
        self._skipped += ~counted

    def _reduced(self) -> list[Tensor]:
        """Each target's statistic of the step; the mean gradient's over the processes of a DDP run."""
        statistics = [
            s if s is not None else self._silent(t) for s, t in zip(self._statistics, self.targets, strict=True)
        ]
        if self._group is not None:
            # The loss of the step is the mean over processes: gradients are averaged, energies by the square.
            world = dist.get_world_size(self._group)
            share = world**2 if self.config.estimator == "per_example" else world
            works = [dist.all_reduce(s, group=self._group, async_op=True) for s in statistics]
            for work in works:
                work.wait()  # type: ignore[union-attr]
            torch._foreach_div_(statistics, float(share))
        return statistics

    def _silent(self, target: Target) -> Tensor:
        """The statistic of a matrix that no gradient reached in this step, of the shape that other processes have."""
        rows = target.out_features
        shape = {
            "exact": (rows, target.in_features),
            "sketch": (self.config.sketch_columns, rows),
            "per_example": (),
        }[self.config.estimator]
        return torch.zeros(shape, dtype=self._fisher.dtype, device=target.pairs[0].a.device)

    def _forget(self) -> None:
        self._statistics = [None] * len(self.targets)
        self._probes.clear()

    def _freeze(self) -> None:
        self._check_fisher()
        self._remove_taps()
        self._weights = self._weigh()
        self._coefficients = None
        self.phase = "penalty"
        if skipped := self.skipped_steps:
            warnings.warn(
                f"fwlora: {skipped} of the {self.warmup_steps} warm-up steps had a gradient that was not finite "
                "and were left out of the Fisher proxies",
                stacklevel=2,
            )

    def _check_fisher(self) -> None:
        if not float(self._fisher.sum()) > 0.0:
            skipped = self.skipped_steps
            cause = (
                f"all {skipped} observed steps had gradients that were not finite: lower the learning rate or the "
                "loss scale"
                if skipped
                else "no gradient reached a frozen matrix yet: fwlora must be attached to the model that is trained, "
                "and at least one observed step must have passed"
            )
            raise RuntimeError(f"fwlora has no Fisher proxies after {self.step} steps: {cause}.")

    def _weigh(self) -> Tensor:
        c = self.config
        return penalty_weights(
            self._fisher,
            c.weighting,
            gamma=c.gamma,
            max_weight_ratio=c.max_weight_ratio,
            normalize=c.normalize_weights,
            seed=c.seed,
        )

    def _penalty_coefficients(self) -> list[Tensor]:
        """c_p = λ·w·s² per pair of each stack (λ·w for the norm of the factors), kept until a scale changes."""
        scales = tuple(p.scale for p in self._pairs)
        if self._coefficients is None or self._coefficients[0] != scales:
            assert self._weights is not None
            weights = self._weights[torch.tensor(self._owner, device=self._weights.device)]
            if self.config.penalty_norm == "update":
                weights = weights * torch.tensor(scales, dtype=torch.float64).square().to(weights)
            all_pairs = self.config.penalty_strength * weights
            self._coefficients = (
                scales,
                [all_pairs[torch.tensor(s.index)].to(s.a[0].device) for s in self._penalty.stacks],
            )
        return self._coefficients[1]

    @torch.no_grad()
    def _shrink(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self.config.penalty_strength == 0.0:
            return
        coefficients = self._penalty_coefficients()
        if self.config.penalty_mode == "loss":
            if scale is not None:
                coefficients = [c * scale.to(c) for c in coefficients]
            terms = self._penalty.gradient(coefficients)
            chosen = [i for i, g in enumerate(self._groups) if g is not None]
            for i in chosen:
                if self._factors[i].grad is None:
                    self._factors[i].grad = torch.zeros_like(self._factors[i])
            _add([self._factors[i].grad for i in chosen], [terms[i] for i in chosen])  # type: ignore[misc]
        else:
            if found_inf is not None:  # a fused optimizer skips this step by itself
                coefficients = [c * (1.0 - found_inf.to(c)) for c in coefficients]
            terms = self._penalty.gradient(coefficients)
            by_group: dict[int, list[int]] = {}
            for i, group in enumerate(self._groups):
                if group is not None:
                    by_group.setdefault(id(group), []).append(i)
            for chosen in by_group.values():
                lr = self._groups[chosen[0]]["lr"]  # type: ignore[index]
                steps = torch._foreach_mul([terms[i] for i in chosen], -lr)
                _add([self._factors[i] for i in chosen], list(steps))

    def _remove_taps(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps = []
        self._forget()


def _add(targets: list[Tensor], terms: list[Tensor]) -> None:
    if len({id(t) for t in targets}) == len(targets):
        torch._foreach_add_(targets, terms)
    else:  # tied adapters: the batched addition may race where one tensor stands twice
        for target, term in zip(targets, terms, strict=True):
            target.add_(term)


def _accumulation(pairs: list[Pair]) -> torch.dtype:
    return torch.promote_types(pairs[0].a.dtype, torch.float32)


def _held_targets(targets: list[Target], groups: dict[int, dict]) -> list[Target]:
    """Those targets that the optimizer trains, each with the pairs that it trains."""
    held = []
    for t in targets:
        pairs = tuple(p for p in t.pairs if id(p.a) in groups or id(p.b) in groups)
        if pairs:
            held.append(Target(t.name, t.layer, pairs))
    if not held:
        raise ValueError(
            f"this optimizer trains none of the {len(targets)} LoRA layers of the model: make the optimizer after "
            "get_peft_model and from that model's parameters."
        )
    return held


def _unique_names(targets: list[Target]) -> list[str]:
    names = [t.name for t in targets]
    if len(set(names)) != len(names):
        raise ValueError("two modules of this model have one name: fwlora cannot tell their matrices apart")
    return names


def attach(
    model: nn.Module,
    optimizer: Any,
    config: FWLoraConfig = FWLoraConfig(),  # noqa: B008 (frozen)
    *,
    total_steps: int | None = None,
    scaler: Any = None,
    process_group: Any = "auto",
) -> FisherWeightedLoRA:
    """Adds Fisher-Weighted LoRA to a training run: the one added line.

    Call it once, after `get_peft_model` and after the optimizer was made, before the first step.

    Args:
        model: a PEFT model with plain LoRA adapters, also wrapped (DDP).
        optimizer: the optimizer that trains its adapters; Accelerate's wrapper is looked through.
        config: the method's settings.
        total_steps: optimiser steps of the whole run, where known. Needed for a `warmup_steps` given as a fraction.
        scaler: the GradScaler, where one is used with `estimator="exact"`, "sketch" or "per_example": without it a
            change of the loss scale during the warm-up weighs steps differently (`averaging="normalized"` does not).
        process_group: over which Fisher statistics are averaged. "auto" is DDP's own, or all processes where
            torch.distributed is set up; None keeps each process to itself.

    Returns:
        The handle: `phase`, `importance()`, `weights()`, `penalty()`, `state_dict()`, `detach()`.

    Raises:
        ValueError: nothing to attach to, or a layer, adapter, optimizer or setting that the method is not
            defined for. The message names the cause and the cure.
    """
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        # Accelerate's wrapper calls itself an Optimizer, but has none of its hooks.
        scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise ValueError(
            f"fwlora needs a torch.optim.Optimizer, and {type(optimizer).__name__} is none: pass the inner optimizer "
            "of the wrapper."
        )
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), FisherWeightedLoRA) for hook in hooks):
        raise ValueError("fwlora is attached to this optimizer already: call detach() on its handle first.")
    if process_group == "auto":
        process_group = None
        if isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            process_group = dist.group.WORLD
    return FisherWeightedLoRA(
        model,
        optimizer,
        config,
        total_steps=total_steps,
        scaler=scaler,
        process_group=process_group,
    )
