"""TODO"""

from __future__ import annotations

from dataclasses import dataclass

from fwlora import estimators
from fwlora.penalty import NORMS
from fwlora.weighting import WEIGHTINGS


@dataclass(frozen=True)
class FWLoraConfig:
    """The settings of Fisher-Weighted LoRA; without arguments it is the method as first written down.

    Args:
        warmup: K, how long to watch before weighing: optimiser steps (int) or a fraction of the run (float in
            (0, 1), which needs `total_steps`).
        ema: α of `F ← αF + (1 − α)f`, starting at 0. 0.98 remembers about 50 steps.
        estimator: how a step's `f_m` is measured: "exact", "sketch", "adapter" or "per_example" (see
            `fwlora.fisher`).
        every: with the hooked estimators, look at every n-th step only.
        start: first step that is looked at; a new random head makes the first steps' gradients meaningless.
        sketch_columns: k, the columns of the Gaussian probe of "sketch".
        averaging: "raw" averages f itself, "share" each step's `f / Σf`.
        weighting: "share", "uniform", "rank", "power" or "permuted" (see `fwlora.importance`).
        gamma, clip: exponent and bound of the "power" weighting.
        normalize_weights: divide the weights by their mean.
        shrinkage: λ.
        coupling: "loss" adds the penalty's gradient to the adapters' gradients, as if it stood in the loss (after
            clipping); "decoupled" takes `lr · gradient` off the factors themselves, like AdamW's weight decay.
        norm: "update" is `‖s·B·A‖_F²`, "factors" is `‖A‖_F² + ‖B‖_F²`.
        seed: of the probes of "sketch" and of the shuffle of "permuted".

    Raises:
        ValueError: a setting outside its range, by name.
    """

    warmup: int | float = 500
    ema: float = 0.98
    estimator: str = "exact"
    every: int = 1
    start: int = 0
    sketch_columns: int = 4
    averaging: str = "raw"
    weighting: str = "share"
    gamma: float = 0.5
    clip: float = 4.0
    normalize_weights: bool = False
    shrinkage: float = 1e-4
    coupling: str = "loss"
    norm: str = "update"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "estimator": estimators.ESTIMATORS,
            "averaging": ("raw", "share"),
            "weighting": WEIGHTINGS,
            "coupling": ("loss", "decoupled"),
            "norm": NORMS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"FWLoraConfig.{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        fraction = isinstance(self.warmup, float)
        ranges = {
            "warmup": (
                0.0 < self.warmup < 1.0 if fraction else self.warmup >= 1,
                "a number of steps (an int of at least 1) or a fraction of the run (a float in (0, 1))",
            ),
            "ema": (0.0 <= self.ema < 1.0, "in [0, 1)"),
            "every": (self.every >= 1, "an int of at least 1"),
            "start": (self.start >= 0, "an int of at least 0"),
            "sketch_columns": (self.sketch_columns >= 1, "an int of at least 1"),
            "gamma": (0.0 <= self.gamma < float("inf"), "at least 0"),
            "clip": (1.0 <= self.clip < float("inf"), "at least 1"),
            "shrinkage": (0.0 <= self.shrinkage < float("inf"), "at least 0"),
        }
        for name, (good, meaning) in ranges.items():
            if not good:
                raise ValueError(f"FWLoraConfig.{name} = {getattr(self, name)!r}: must be {meaning}")
        if not fraction and self.start >= self.warmup:
            raise ValueError(
                f"FWLoraConfig.start = {self.start}: no step is left to watch before warmup = {self.warmup}"
            )

    def warmup_steps(self, total_steps: int | None) -> int:
        """K in optimiser steps.

        Raises:
            ValueError: a fraction of an unknown number of steps, or a K that leaves no step to shrink in.
        """
        if isinstance(self.warmup, float):
            if total_steps is None:
                raise ValueError(
                    f"FWLoraConfig.warmup = {self.warmup} is a fraction of the run: pass total_steps, "
                    "or give warmup as a number of steps."
                )
            steps = max(1, round(self.warmup * total_steps))
        else:
            steps = self.warmup
        if total_steps is not None and steps >= total_steps:
            raise ValueError(
                f"FWLoraConfig.warmup = {self.warmup} leaves no step to shrink in: the run has only {total_steps} "
                f"optimiser steps. Use a fraction such as warmup=0.25, or fewer than {total_steps} steps."
            )
        if self.start >= steps:
            raise ValueError(
                f"FWLoraConfig.start = {self.start}: no step is left to watch before the end of the warm-up at "
                f"step {steps}"
            )
        return steps
