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

import sys
import warnings
import weakref
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fwlora.adapters import Target, find_targets, refuse_deepspeed
from fwlora.capture import AdapterCapture, Capture, HookCapture
from fwlora.config import FWLoraConfig
from fwlora.estimators import hooked_estimator, update_average
from fwlora.penalty_step import PenaltyStep
from fwlora.sharding import refuse_flat_parameters
from fwlora.trained import TrainedAdapters
from fwlora.warmup import LATEST, SplitHalf
from fwlora.weighting import importance, penalty_weights

Phase: TypeAlias = Literal["warmup", "penalty", "detached"]

# The handles that are not detached, so that two of them never work on the same adapters.
_ATTACHED: weakref.WeakSet[FisherWeightedLoRA] = weakref.WeakSet()


@dataclass
class _Progress:
    """How far a run came: what the last message needs, without keeping the model alive."""

    longest: int
    step: int = 0
    is_over: bool = False
    reached: bool = False


class FisherWeightedLoRA:
    """What `attach` returns: Fisher-Weighted LoRA on one model and one optimizer.

    It acts through hooks alone: there is nothing to call in the training loop. Where FSDP splits the adapters over
    processes, `penalty()` and `update_norms()` must be called by all of them.

    Attributes:
        phase: "warmup" while F is measured, "penalty" once the weights are fixed, "detached" after `detach()`.
        warmup_steps: K in optimizer steps; None until a warm-up of `warmup_steps="auto"` and unknown length has ended.
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
        self.phase: Phase = "warmup"
        self._model = model
        refuse_flat_parameters(model)
        self._trained = TrainedAdapters(find_targets(model), optimizer)
        self.targets = [t for t in self._trained.targets if t.pairs]
        if not self.targets:
            raise ValueError(
                f"this optimizer trains none of the {len(self._trained.targets)} LoRA layers of the model: make the "
                "optimizer after get_peft_model and from that model's parameters."
            )
        self.names = _unique_names(self.targets)
        self._trained = TrainedAdapters(self.targets, optimizer)
        self._penalty = PenaltyStep(model, self._trained, config)
        self._said: set[str] = set()
        first = self._trained.factors[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        self._fisher = torch.zeros(len(self.targets), dtype=dtype, device=first.device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self._fisher.device)
        self._observations = 0
        self._split_half = SplitHalf(config.fisher_ema_decay)
        self._weights: Tensor | None = None
        self._progress = _Progress(
            self.warmup_steps or config.fisher_start + LATEST, is_over=config.penalty_strength == 0.0
        )
        self._capture: Capture
        if config.estimator == "adapter":
            self._capture = AdapterCapture(self._trained, self._penalty)
        else:
            self._capture = HookCapture(
                self._trained,
                self._penalty,
                hooked_estimator(config),
                dtype=self._fisher.dtype,
                step=lambda: self.step,
                is_observing=self._is_observing,
                scaler=scaler,
                group=process_group,
            )
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        self._mark = _mark_when_trained(self._trained.factors, self._progress)
        # Runs when the handle is collected, or at the interpreter's end.
        self._last_word = weakref.finalize(self, _say_if_nothing_was_penalized, self._progress)
        for other in [h for h in _ATTACHED if h is not self and h._shares_adapters_with(self)]:
            if other.phase == "penalty":
                warnings.warn(
                    "fwlora: these adapters are attached to another optimizer already; that handle is detached now.",
                    stacklevel=4,
                )
            other.detach()
        _ATTACHED.add(self)

    def __repr__(self) -> str:
        longest = str(self.warmup_steps) if self.warmup_steps else f"at most {self._progress.longest}"
        value = (
            f", penalty={float(self.penalty()):.4g}"
            if self._weights is not None and not self._penalty.factors.is_split
            else ""
        )
        return (
            f"<FisherWeightedLoRA phase={self.phase!r} step={self.step} warmup_steps={longest} "
            f"matrices={len(self.names)} penalty_strength={self.config.penalty_strength:g}{value}>"
        )

    # What can be read

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._progress.step

    @step.setter
    def step(self, step: int) -> None:
        self._progress.step = step

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
        self._follow()
        return self._fisher.new_zeros(()) if self._weights is None else self._penalty.value(self._weights)

    def update_norms(self) -> dict[str, float]:
        """‖s·B·A‖_F by matrix, summed over its active adapters. Waits for the device."""
        self._follow()
        norms = dict.fromkeys(self.names, 0.0)
        for norm, owner in zip(self._penalty.update_norms(), self._trained.owner, strict=True):
            norms[self.names[owner]] += norm
        return norms

    @property
    def skipped_steps(self) -> int:
        """Observed steps that were left out of F because a gradient was not finite. Waits for the device."""
        return int(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model and the optimizer: numbers, strings and tensors."""
        return {
            "step": self.step,
            "fisher": self._fisher.clone(),
            "skipped": self._skipped.clone(),
            "names": list(self.names),
            "config": asdict(self.config),
            "warmup_steps": self.warmup_steps,
            "observations": self._observations,
            **self._split_half.state_dict(self._fisher),
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
        self._fisher.copy_(torch.as_tensor(state["fisher"]))
        self._skipped.copy_(torch.as_tensor(state["skipped"]))
        if "half_fisher" in state:  # not in states from before version 0.2
            self.warmup_steps = self.warmup_steps or state["warmup_steps"]
            self._observations = state["observations"]
            self._split_half.load_state_dict(
                {**state, "half_fisher": torch.as_tensor(state["half_fisher"]).to(self._fisher)}
            )
        self._capture.forget()
        if self.warmup_steps is not None and self.step >= self.warmup_steps:
            self._freeze()
        elif self.phase == "penalty":
            raise ValueError("this state is from the warm-up, which is over here: attach again, then load it")

    def detach(self) -> None:
        """Remove every hook: the model and the optimizer are as they were without fwlora. F and w stay readable."""
        self._capture.remove()
        self._step_hook.remove()
        self._mark.remove()
        self.phase = "detached"
        _ATTACHED.discard(self)
        self._last_word()

    # What happens at each step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(a) for a in args[1:]):
            raise ValueError(
                "fwlora cannot work with optimizer.step(closure): the closure computes the gradients after fwlora "
                "has added its own. Call loss.backward() first and optimizer.step() without a closure."
            )
        self._follow()
        # A fused optimizer under a GradScaler gets scaled gradients, and unscales them itself.
        scale = getattr(optimizer, "grad_scale", None)
        if self._weights is not None:
            self._penalty.apply(self._weights, scale, getattr(optimizer, "found_inf", None))
        elif self._is_observing():
            self._observe(scale)
        self.step += 1
        if self._weights is None and self._warmup_is_over():
            self._freeze()

    def _follow(self) -> None:
        """Notice what was done to the model or the optimizer since the last step."""
        before = self._trained.untrained
        if not self._trained.refresh():
            return
        self._penalty.rebuild()
        self._capture.follow()
        refuse_deepspeed(self._trained.factors or [p for t in self.targets for p in t.layer.parameters()])
        if new := self._trained.untrained - before:
            names = ", ".join(map(repr, sorted(new)))
            self._say(
                f"fwlora: the adapter {names} is active, but the optimizer that fwlora is attached to does not hold "
                "its parameters, so it is not penalized: add them with optimizer.add_param_group, or attach to the "
                "optimizer that trains it."
            )
        elif not self._trained.pairs:
            self._say(
                "fwlora: the optimizer that fwlora is attached to trains no active adapter any more, so nothing is "
                "penalized: attach again, to the model and the optimizer as they are now."
            )
        if new := self._trained.unmeasured(self._model):
            self._say(
                f"fwlora: {len(new)} matrices got an adapter after attach, so F was not measured there and they are "
                f"not penalized, the first of them {new[0]!r}: attach after all adapters were added."
            )

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)

    def _shares_adapters_with(self, other: FisherWeightedLoRA) -> bool:
        return bool({id(f) for f in self._trained.factors} & {id(f) for f in other._trained.factors})

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
        self._observations += 1

    def _warmup_is_over(self) -> bool:
        if self.warmup_steps is not None:
            return self.step == self.warmup_steps
        latest = self.config.fisher_start + LATEST
        return self.step >= latest or self._split_half.is_reliable(self._fisher, self._observations, self._skipped)

    def _freeze(self) -> None:
        self._progress.is_over = True
        self._check_fisher()
        self.warmup_steps = self.step if self.warmup_steps is None else self.warmup_steps
        self._capture.remove()
        self._weights = self._weigh()
        self._penalty.forget()
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

    def _by_name(self, values: Tensor) -> dict[str, float]:
        numbers = cast(list[float], values.tolist())
        return dict(zip(self.names, numbers, strict=True))


def _mark_when_trained(factors: list[nn.Parameter], progress: _Progress) -> RemovableHandle:
    """Note in `progress` that a gradient has reached the adapters."""
    factor = next(f for f in factors if f.requires_grad)

    def mark(_: Tensor) -> None:
        progress.reached = True

    return cast(RemovableHandle, factor.register_post_accumulate_grad_hook(mark))


def _say_if_nothing_was_penalized(progress: _Progress) -> None:
    if progress.is_over or hasattr(sys, "last_value"):  # the latter: the program ends by an error, which says enough
        return
    progress.is_over = True
    if progress.step > 0:
        warnings.warn(
            f"fwlora: training ended after {progress.step} steps, within the warm-up of {progress.longest} steps: "
            "nothing was penalized, and the adapters are those of plain LoRA. Pass total_steps to fwlora.attach with "
            f"warmup_steps='auto' or a fraction such as 0.25, or a number of steps below {progress.step}.",
            stacklevel=2,
        )
    elif progress.reached:
        warnings.warn(
            "fwlora: the adapters were trained, but the optimizer that fwlora is attached to never made a step, so "
            "nothing was measured or penalized: attach to the optimizer whose step() trains them.",
            stacklevel=2,
        )


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
        total_steps: optimizer steps of the whole run, if known: a quarter of them, at most 500, is then the default
            warm-up. Needed for a `warmup_steps` given as a fraction.
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
    refuse_deepspeed(model.parameters(), optimizer)
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
    if process_group == "auto" and isinstance(model, DistributedDataParallel):
        process_group = cast(Any, model.process_group)
    return FisherWeightedLoRA(
        model,
        optimizer,
        config,
        total_steps=total_steps,
        scaler=scaler,
        process_group=process_group,
    )
