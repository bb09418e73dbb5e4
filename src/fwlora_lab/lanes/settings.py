"""TODO"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import fwlora


@dataclass(frozen=True)
class Allocation:
    """AdaLoRA's schedule, in steps counted from 1, under PEFT's names; `final` is the ranks left over all targets.

    AdaLoRA (arXiv 2303.10512) trains ΔW = s·B·diag(Λ)·A with A and B held near orthogonal, scores each (row of A,
    λ, column of B) by a smoothed |w·∇w| times its uncertainty, and sets the λ of the least ones to zero on a
    budget that falls with the cube of the remaining time. With tinit = tfinal = total_steps nothing is ever scored or
    masked: that is SVD-LoRA.
    """

    final: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float
    orth_reg_weight: float
    total_steps: int

    def budget(self, step: int, initial: int) -> int | None:
        """Ranks to keep after this step; None where nothing is masked."""
        if step <= self.tinit:
            return None
        if step >= self.total_steps - self.tfinal:  # the last allocation is forced, then it stays
            return self.final
        if step % self.delta_t:
            return None
        left = 1 - (step - self.tinit) / (self.total_steps - self.tfinal - self.tinit)
        return int((initial - self.final) * left**3 + self.final)


@dataclass
class LaneSettings:
    """What makes a lane's run differ from its neighbours'.

    ranks by target (0: no adapter there); scale: s of ΔW = s·B·A; dropout: of the adapters' input; seed: of its
    dropout masks; warmup_steps: K in steps; fw: the method's settings; ada: AdaLoRA's; both None for plain LoRA.
    """

    ranks: Mapping[str, int]
    scale: float
    dropout: float
    weight_decay: float
    max_grad_norm: float | None
    seed: int
    fw: fwlora.FWLoraConfig | None = None
    warmup_steps: int = 0
    ada: Allocation | None = None


@dataclass
class Lane:
    """What the engine remembers of a lane besides its row of the buffers."""

    settings: LaneSettings
    generator: torch.Generator
    step: int = 0


def supports(config) -> bool:
    """Whether the engine knows this architecture's head and attention."""
    return config.model_type in ("bert", "roberta", "xlm-roberta", "camembert")
