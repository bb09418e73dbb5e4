"""The settings of Fisher-Weighted LoRA, checked when they are made."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fwlora import estimators
from fwlora.penalty import NORMS
from fwlora.weighting import WEIGHTINGS

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
    """The settings of Fisher-Weighted LoRA; without arguments it is the method as first written down.

    Args:
        warmup_steps: K, how long to watch before weighing: optimiser steps (int) or a fraction of the run (float in
            (0, 1), which needs `total_steps`).
        fisher_ema_decay: α of `F ← αF + (1 − α)f`, starting at 0. 0.98 remembers about 50 steps.
        estimator: how a step's `f_m` is measured: "exact", "sketch", "adapter" or "per_example" (see
            `fwlora.estimators`).
        fisher_interval: with the hooked estimators, look at every n-th step only.
        fisher_start: first step that is looked at; a new random head makes the first steps' gradients meaningless.
        sketch_columns: k, the columns of the Gaussian probe of "sketch".
        averaging: "raw" averages f itself, "normalized" each step's `f / Σf`.
        weighting: "importance", "uniform", "rank", "power" or "permuted" (see `fwlora.weighting`).
        gamma, max_weight_ratio: exponent and bound of the "power" weighting.
        normalize_weights: divide the weights by their mean.
        penalty_strength: λ.
        penalty_mode: "loss" adds the penalty's gradient to the adapters' gradients, as if it stood in the loss (after
            clipping); "decoupled" takes `lr · gradient` off the factors themselves, like AdamW's weight decay.
        penalty_norm: "update" is `‖s·B·A‖_F²`, "factors" is `‖A‖_F² + ‖B‖_F²`.
        seed: of the probes of "sketch" and of the shuffle of "permuted".

    Raises:
        ValueError: a setting outside its range, by name.
    """

    warmup_steps: int | float = 500
    fisher_ema_decay: float = 0.98
    estimator: str = "exact"
    fisher_interval: int = 1
    fisher_start: int = 0
    sketch_columns: int = 4
    averaging: str = "raw"
    weighting: str = "importance"
    gamma: float = 0.5
    max_weight_ratio: float = 4.0
    normalize_weights: bool = False
    penalty_strength: float = 1e-4
    penalty_mode: str = "loss"
    penalty_norm: str = "update"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "estimator": estimators.ESTIMATORS,
            "averaging": ("raw", "normalized"),
            "weighting": WEIGHTINGS,
            "penalty_mode": ("loss", "decoupled"),
            "penalty_norm": NORMS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"FWLoraConfig.{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        fraction = isinstance(self.warmup_steps, float)
        ranges = {
            "warmup_steps": (
                0.0 < self.warmup_steps < 1.0 if fraction else self.warmup_steps >= 1,
                "a number of steps (an int of at least 1) or a fraction of the run (a float in (0, 1))",
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
        if not fraction and self.fisher_start >= self.warmup_steps:
            raise ValueError(
                f"FWLoraConfig.fisher_start = {self.fisher_start}: no step is left to watch before "
                f"warmup_steps = {self.warmup_steps}"
            )

    def resolve_warmup_steps(self, total_steps: int | None) -> int:
        """K in optimiser steps.

        Raises:
            ValueError: a fraction of an unknown number of steps, or a K that leaves no step to shrink in.
        """
        if isinstance(self.warmup_steps, float):
            if total_steps is None:
                raise ValueError(
                    f"FWLoraConfig.warmup_steps = {self.warmup_steps} is a fraction of the run: pass total_steps, "
                    "or give warmup_steps as a number of steps."
                )
            steps = max(1, round(self.warmup_steps * total_steps))
        else:
            steps = self.warmup_steps
        if total_steps is not None and steps >= total_steps:
            raise ValueError(
                f"FWLoraConfig.warmup_steps = {self.warmup_steps} leaves no step to shrink in: the run has only "
                f"{total_steps} optimiser steps. Use a fraction such as warmup_steps=0.25, or fewer than {total_steps} "
                "steps."
            )
        if self.fisher_start >= steps:
            raise ValueError(
                f"FWLoraConfig.fisher_start = {self.fisher_start}: no step is left to watch before the end of the "
                f"warm-up at step {steps}"
            )
        return steps

    def __getattr__(self, name: str) -> Any:
        if name in FORMER_NAMES:
            _warn_of(name, FORMER_NAMES[name])
            return getattr(self, FORMER_NAMES[name])
        raise AttributeError(f"FWLoraConfig has no setting {name!r}")


FWLoraConfig.__init__ = _with_former_names(FWLoraConfig.__init__)  # type: ignore[method-assign]
