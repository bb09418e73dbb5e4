"""From the Fisher proxies F_m to the weights w_m of the penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHTINGS = ("importance", "uniform", "rank", "power", "permuted")


def importance(fisher: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """`I_m = F_m / Σ F`: each matrix's share of the gradient that reached the frozen weights; sums to 1."""
    return fisher / fisher.sum()


def penalty_weights(
    fisher: Float[Tensor, " m"],
    weighting: str,
    *,
    gamma: float = 0.5,
    max_weight_ratio: float = 4.0,
    normalize: bool = False,
    seed: int = 0,
) -> Float[Tensor, " m"]:
    """How strongly the update of each matrix is shrunk; larger where less gradient arrived.

        importance w = 1 − I_m                       the request. Nearly constant over 60 to 72 matrices.
        uniform    w = 1                             the control without Fisher information
        permuted   w = 1 − I_π(m)                    the control with F shuffled over matrices, π drawn from `seed`
        rank       w = 1 − ρ_m / M                   ρ the rank of F_m from 1 (least) to M, ties share their mean
        power      w = clamp((F̄ / F_m)^γ, 1/c, c)    F̄ the mean; real contrast, bounded by c = `max_weight_ratio`

    `normalize` divides by the mean, so that two weightings shrink equally hard on average.
    """
    m = fisher.numel()
    match weighting:
        case "importance":
            weights = 1.0 - importance(fisher)
        case "uniform":
            weights = torch.ones_like(fisher)
        case "permuted":
            order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
            weights = 1.0 - importance(fisher)[order.to(fisher.device)]
        case "rank":
            below = (fisher[None, :] < fisher[:, None]).sum(1)
            equal = (fisher[None, :] == fisher[:, None]).sum(1)
            rank = below + (equal + 1) / 2
            weights = 1.0 - rank.to(fisher) / m
        case "power":
            weights = (fisher.mean() / fisher).pow(gamma).clamp(1.0 / max_weight_ratio, max_weight_ratio)
        case _:
            raise ValueError(f"unknown weighting {weighting!r}: one of {', '.join(WEIGHTINGS)}")
    return weights / weights.mean() if normalize else weights
