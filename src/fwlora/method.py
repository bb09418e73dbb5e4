"""Attach Fisher-Weighted LoRA to an optimizer: warm-up, weighting, penalty.

For K steps (the warm-up) the method measures how much gradient reaches each frozen matrix; it then fixes the weights
once, and penalizes the updates at every later step:

    L_total = L_task + λ Σ_m w_m ‖ΔW_m‖_F²,   w_m = 1 − F_m / ΣF,   F_m = EMA over K steps of ‖∇W_m L_task‖_F²

Everything happens in a hook that runs just before `optimizer.step`: gradients are then accumulated over
micro-batches, averaged over processes and clipped, and the penalty's gradient is added once, in closed form. It
never enters the loss that is logged or evaluated, and it needs no further forward or backward pass.
"""

# Parts of torch are untyped, and its batched operations (_foreach_*) have no public names.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fwlora.adapters import Pair, Target, find_targets
from fwlora.capture import AdapterCapture, Capture, HookCapture
from fwlora.config import FWLoraConfig
from fwlora.estimators import hooked_estimator, update_average
from fwlora.penalty import Penalty, update_norms
from fwlora.weighting import importance, penalty_weights

Phase: TypeAlias = Literal["warmup", "penalty", "detached"]


class FisherWeightedLoRA:
    """What `attach` returns: Fisher-Weighted LoRA on one model and one optimizer.

    It acts through hooks alone: there is nothing to call in the training loop.

    Attributes:
        phase: "warmup" while F is measured, "penalty" once the weights are fixed, "detached" after `detach()`.
        step: optimizer steps so far.
        warmup_steps: K in optimizer steps.
        names: the adapted matrices, in the order of all values.
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
        self._optimizer = optimizer
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self.targets = _trained_targets(find_targets(model), groups)
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
        self._capture: Capture
        if config.estimator == "adapter":
            self._capture = AdapterCapture(self.targets)
        else:
            self._capture = HookCapture(
                self.targets,
                hooked_estimator(config),
                dtype=self._fisher.dtype,
                step=lambda: self.step,
                is_observing=self._is_observing,
                scaler=scaler,
                group=process_group,
            )
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        self.phase: Phase = "warmup"

    # What can be read

    def fisher(self) -> dict[str, float]:
        """F_m by matrix, as averaged so far, in the squared units of a gradient. Waits for the device."""
        return self._by_name(self._fisher)

    def importance(self) -> dict[str, float]:
        """I_m = F_m / ΣF by matrix, as known so far; sums to 1. Waits for the device.

        Raises:
            RuntimeError: before the first observed step.
        """
        self._check_fisher()
        return self._by_name(importance(self._fisher))

    def weights(self) -> dict[str, float]:
        """w_m by matrix: the fixed ones; during the warm-up, those that would be fixed now.

        Raises:
            RuntimeError: before the first observed step.
        """
        if self._weights is None:
            self._check_fisher()
        weights = self._weigh() if self._weights is None else self._weights
        return self._by_name(weights)

    def penalty(self) -> Tensor:
        """The value of `λ Σ w_m ‖ΔW_m‖²` now, a scalar on the device; 0 before the weights are fixed."""
        if self._weights is None:
            return self._fisher.new_zeros(())
        return self._penalty.value(self._penalty_coefficients())

    def _by_name(self, values: Tensor) -> dict[str, float]:
        numbers = cast(list[float], values.tolist())
        return dict(zip(self.names, numbers, strict=True))

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
        """The step and the Fisher proxies: all that a resumed run needs besides the model and the optimizer."""
        return {
            "step": self.step,
            "fisher": self._fisher.clone(),
            "skipped": self._skipped.clone(),
            "names": list(self.names),
            "config": asdict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken; the weights follow from F and this handle's config.

        Raises:
            ValueError: the state belongs to other matrices, or this handle is detached or already past the warm-up
                that the state is from.
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
        self._capture.forget()
        if self.step >= self.warmup_steps:
            self._freeze()
        elif self.phase == "penalty":
            raise ValueError("this state is from the warm-up, which is over here: attach again, then load it")

    def detach(self) -> None:
        """Remove every hook: the model and the optimizer are as they were without fwlora."""
        self._capture.remove()
        self._step_hook.remove()
        self.phase = "detached"

    # What happens at each step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(a) for a in args[1:]):
            raise ValueError(
                "fwlora cannot work with optimizer.step(closure): the closure computes the gradients after fwlora "
                "has added its own. Call loss.backward() first and optimizer.step() without a closure."
            )
        # A fused optimizer under a GradScaler gets scaled gradients, and unscales them itself.
        scale = getattr(optimizer, "grad_scale", None)
        if self.phase == "warmup":
            if self._is_observing():
                self._observe(scale)
        else:
            self._penalize(scale, getattr(optimizer, "found_inf", None))
        self.step += 1
        if self.step == self.warmup_steps:
            self._freeze()

    def _is_observing(self) -> bool:
        since_start = self.step - self.config.fisher_start
        return 0 <= since_start and since_start % self.config.fisher_interval == 0

    def _observe(self, scale: Tensor | None) -> None:
        f = self._capture.measure(scale)
        self._capture.forget()
        self._fisher, counted = update_average(
            self._fisher, f.to(self._fisher), self.config.fisher_ema_decay, self.config.averaging
        )
        self._skipped += ~counted

    def _freeze(self) -> None:
        self._check_fisher()
        self._capture.remove()
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
    def _penalize(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
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
                lr = cast(float, self._groups[chosen[0]]["lr"])  # type: ignore[index]
                steps = torch._foreach_mul([terms[i] for i in chosen], -lr)
                _add([self._factors[i] for i in chosen], list(steps))


def _add(targets: list[Tensor], terms: list[Tensor]) -> None:
    if len({id(t) for t in targets}) == len(targets):
        torch._foreach_add_(targets, terms)
    else:  # tied adapters: the batched addition may race on a tensor that is listed twice
        for target, term in zip(targets, terms, strict=True):
            target.add_(term)


def _accumulation(pairs: list[Pair]) -> torch.dtype:
    return torch.promote_types(pairs[0].a.dtype, torch.float32)


def _trained_targets(targets: list[Target], groups: dict[int, dict[str, Any]]) -> list[Target]:
    """The targets that the optimizer trains, each with the pairs that it trains."""
    trained: list[Target] = []
    for t in targets:
        pairs = tuple(p for p in t.pairs if id(p.a) in groups or id(p.b) in groups)
        if pairs:
            trained.append(Target(t.name, t.layer, pairs))
    if not trained:
        raise ValueError(
            f"this optimizer trains none of the {len(targets)} LoRA layers of the model: make the optimizer after "
            "get_peft_model and from that model's parameters."
        )
    return trained


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
    """Add Fisher-Weighted LoRA to a training run: the one added line.

    Call it once, after `get_peft_model` and after the optimizer was made, before the first step.

    Args:
        model: a PEFT model with plain LoRA adapters, also wrapped (DDP).
        optimizer: the optimizer that trains its adapters; Accelerate's wrapper around one is accepted too.
        config: the method's settings.
        total_steps: optimizer steps of the whole run, if known. Needed for a `warmup_steps` given as a fraction.
        scaler: the GradScaler, if one is used with an estimator other than "adapter". Without it, a change of the loss
            scale during the warm-up weighs steps differently (with `averaging="normalized"` it does not).
        process_group: the processes over which Fisher statistics are averaged. "auto" is DDP's own group, or all
            processes if torch.distributed is initialised; None averages over no other process.

    Returns:
        The handle: `phase`, `importance()`, `weights()`, `penalty()`, `state_dict()`, `detach()`.

    Raises:
        ValueError: nothing to attach to, or a layer, adapter, optimizer or setting that the method is not
            defined for. The message says what to do.
    """
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        # Accelerate's wrapper calls itself an Optimizer, but has none of its hooks.
        scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise ValueError(
            f"fwlora needs a torch.optim.Optimizer, not a {type(optimizer).__name__}: pass the inner optimizer "
            "of the wrapper."
        )
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), FisherWeightedLoRA) for hook in hooks):
        raise ValueError("fwlora is attached to this optimizer already: call detach() on its handle first.")
    if process_group == "auto":
        process_group = None
        if isinstance(model, DistributedDataParallel):
            process_group = cast(Any, model.process_group)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            process_group = cast(Any, dist.group.WORLD)
    return FisherWeightedLoRA(
        model,
        optimizer,
        config,
        total_steps=total_steps,
        scaler=scaler,
        process_group=process_group,
    )
