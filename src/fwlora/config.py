"""The settings of Fisher-Weighted LoRA, checked when they are made; importing them does not import torch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fwlora.choices import Averaging, Estimator, PenaltyMode, PenaltyNorm, Setting, Weighting, choices_of

_CHOICES: tuple[Setting, ...] = ("estimator", "averaging", "weighting", "penalty_mode", "penalty_norm")

# Names before version 0.2, and the names in the request that the method comes from. They are read and never written.
FORMER_NAMES = {
    "shrinkage": "penalty_strength",
    "lambda_fw": "penalty_strength",
    "warmup": "warmup_steps",
    "ema": "fisher_ema_decay",
    "fisher_alpha": "fisher_ema_decay",
    "every": "fisher_interval",
    "start": "fisher_start",
    "clip": "max_weight_ratio",
    "coupling": "penalty_mode",
    "norm": "penalty_norm",
}
# The request's K, and the longest warm-up that "auto" chooses.
LONGEST_WARMUP = 500
FORMER_VALUES = {"averaging": {"share": "normalized"}, "weighting": {"share": "importance"}}


def _warn_of(old: str, new: str) -> None:
    warnings.warn(f"FWLoraConfig: {old} is now called {new}.", FutureWarning, stacklevel=4)


def _with_former_names(init: Callable[..., None]) -> Callable[..., None]:
    """The dataclass's own `__init__`, which also takes former names and values, each with a FutureWarning."""

    @functools.wraps(init)
    def accept(self: Any, *args: Any, **settings: Any) -> None:
        for old in [name for name in settings if name in FORMER_NAMES]:
            new = FORMER_NAMES[old]
            if new in settings:
                raise TypeError(f"FWLoraConfig got {new} twice, once under its former name {old}: pass {new} only")
            _warn_of(old, new)
            settings[new] = settings.pop(old)
        for name, values in FORMER_VALUES.items():
            if (old := settings.get(name)) in values:
                _warn_of(f"{name}={old!r}", f"{name}={values[old]!r}")
                settings[name] = values[old]
        init(self, *args, **settings)

    return accept


@dataclass(frozen=True)
class FWLoraConfig:
    """The settings of Fisher-Weighted LoRA; the defaults are the method as first written down, but for K.

    The request's K = 500 leaves a short run no step to penalize in; `warmup_steps=500` is how to get it.

    Args:
        warmup_steps: K, the length of the warm-up in which F is measured: optimizer steps (int; the request has 500), a
            fraction of the run (float in (0, 1), which needs `total_steps`), or "auto": min(500, a quarter of
            `total_steps`) where they are known. Where they are not, the warm-up ends once F ranks the matrices
            reliably (see `fwlora.warmup.SplitHalf`), and 128 steps after `fisher_start` at the latest.
        fisher_ema_decay: α of `F ← αF + (1 − α)f`, which starts at 0. 0.98 averages over about 50 steps.
        estimator: how a step's `f_m` is measured: "exact", "sketch", "adapter" or "per_example" (see
            `fwlora.estimators`), or a name that was added with `fwlora.register_estimator`.
        fisher_interval: measure f at every n-th step only.
        fisher_start: the first step at which f is measured. With a new random head, the gradients of the first steps
            say little about the task.
        sketch_columns: k, the columns of the Gaussian probe of "sketch".
        averaging: "raw" averages f itself, "normalized" averages each step's `f / Σf`.
        weighting: "importance", "uniform", "rank", "power" or "permuted" (see `fwlora.weighting`), or a name that was
            added with `fwlora.register_weighting`.
        gamma, max_weight_ratio: exponent and bound of the "power" weighting.
        normalize_weights: divide the weights by their mean.
        penalty_strength: λ.
        penalty_mode: "loss" adds the penalty's gradient to the adapters' gradients, as a term of the loss would (but
            after gradient clipping); "decoupled" subtracts `lr · gradient` from the factors, like AdamW's weight decay.
        penalty_norm: "update" is `‖s·B·A‖_F²`, "factors" is `‖A‖_F² + ‖B‖_F²`.
        seed: of the probes of "sketch" and of the shuffle of "permuted".

    Raises:
        ValueError: a setting outside its range; the message names it.
    """

    warmup_steps: int | float | Literal["auto"] = "auto"
    fisher_ema_decay: float = 0.98
    estimator: Estimator | str = "exact"
    fisher_interval: int = 1
    fisher_start: int = 0
    sketch_columns: int = 4
    averaging: Averaging = "raw"
    weighting: Weighting | str = "importance"
    gamma: float = 0.5
    max_weight_ratio: float = 4.0
    normalize_weights: bool = False
    penalty_strength: float = 1e-4
    penalty_mode: PenaltyMode = "loss"
    penalty_norm: PenaltyNorm = "update"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _CHOICES:
            if getattr(self, name) not in (allowed := choices_of(name)):
                raise ValueError(f"FWLoraConfig.{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        ranges = {
            "warmup_steps": (
                _is_warmup(self.warmup_steps),
                "a number of steps (an int of at least 1), a fraction of the run (a float in (0, 1)) or 'auto'",
            ),
            "fisher_ema_decay": (0.0 <= self.fisher_ema_decay < 1.0, "in [0, 1)"),
            "fisher_interval": (self.fisher_interval >= 1, "an int of at least 1"),
            "fisher_start": (self.fisher_start >= 0, "an int of at least 0"),
            "sketch_columns": (self.sketch_columns >= 1, "an int of at least 1"),
            "gamma": (0.0 <= self.gamma < float("inf"), "at least 0"),
            "max_weight_ratio": (1.0 <= self.max_weight_ratio < float("inf"), "at least 1"),
            "penalty_strength": (0.0 <= self.penalty_strength < float("inf"), "at least 0"),
        }
        for name, (good, meaning) in ranges.items():
            if not good:
                raise ValueError(f"FWLoraConfig.{name} = {getattr(self, name)!r}: must be {meaning}")
        if isinstance(self.warmup_steps, int) and self.fisher_start >= self.warmup_steps:
            raise ValueError(
                f"FWLoraConfig.fisher_start = {self.fisher_start}: no step is left to observe before "
                f"warmup_steps = {self.warmup_steps}"
            )

    def resolve_warmup_steps(self, total_steps: int | None) -> int | None:
        """K in optimizer steps; None where "auto" has to find it in the run.

        Args:
            total_steps: optimizer steps of the whole run; None where they are not known.

        Raises:
            ValueError: a fraction of an unknown number of steps, or a K after which no step is left to penalize.
        """
        if isinstance(self.warmup_steps, float) and total_steps is None:
            raise ValueError(
                f"FWLoraConfig.warmup_steps = {self.warmup_steps} is a fraction of the run: pass total_steps, "
                "or give warmup_steps as a number of steps."
            )
        if self.warmup_steps == "auto":
            if total_steps is None:
                return None
            steps = min(LONGEST_WARMUP, max(1, total_steps // 4))
        else:
            steps = warmup_in_steps(self.warmup_steps, total_steps or 0)
        if total_steps is not None and steps >= total_steps:
            raise ValueError(
                f"FWLoraConfig.warmup_steps = {self.warmup_steps} leaves no step to penalize in: the run has only "
                f"{total_steps} optimizer steps. Use a fraction such as warmup_steps=0.25, or fewer than {total_steps} "
                "steps."
            )
        if self.fisher_start >= steps:
            raise ValueError(
                f"FWLoraConfig.fisher_start = {self.fisher_start}: no step is left to observe before the end of the "
                f"warm-up at step {steps}"
            )
        return steps

    if not TYPE_CHECKING:  # a type checker must refuse the former names, and every other name that is wrong

        def __getattr__(self, name: str) -> Any:
            if name in FORMER_NAMES:
                _warn_of(name, FORMER_NAMES[name])
                return getattr(self, FORMER_NAMES[name])
            raise AttributeError(f"FWLoraConfig has no setting {name!r}")


FWLoraConfig.__init__ = _with_former_names(FWLoraConfig.__init__)


def _is_warmup(value: Any) -> bool:
    if isinstance(value, float):
        return 0.0 < value < 1.0
    return value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def warmup_in_steps(warmup_steps: int | float, total_steps: int) -> int:
    """K in optimizer steps from a number of steps (int) or a fraction of the run (float), at least 1."""
    return max(1, round(warmup_steps * total_steps)) if isinstance(warmup_steps, float) else warmup_steps
