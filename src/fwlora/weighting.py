"""From the Fisher proxies F_m to the weights w_m of the penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from fwlora.choices import Weighting, add_choice, choices_of

if TYPE_CHECKING:
    from jaxtyping import Float

WeightingFunction: TypeAlias = Callable[[Tensor], Tensor]
_REGISTERED: dict[str, WeightingFunction] = {}


def register_weighting(name: str, function: WeightingFunction) -> None:
    """Add a weighting, which `FWLoraConfig(weighting=name)` and run configs accept from then on.

    Args:
        name: an identifier that no other weighting has.
        function: takes F, the Fisher proxy of every matrix (shape [m], positive sum), and returns the weight of every
            matrix (shape [m], finite and not negative). It is called once, when the warm-up ends.

    Raises:
        ValueError: the name is taken or is not an identifier.
    """
    add_choice("weighting", name)
    _REGISTERED[name] = function


def importance(fisher: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """`I_m = F_m / Σ F`: each matrix's share of the gradient that reached the frozen weights; sums to 1."""
    return fisher / fisher.sum()


def average_ranks(values: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The rank of each value from 1 (least) to m; ties share the mean of their ranks."""
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return (below + (equal + 1) / 2).to(values)


def penalty_weights(
    fisher: Float[Tensor, " m"],
    weighting: Weighting | str,
    *,
    gamma: float = 0.5,
    max_weight_ratio: float = 4.0,
    normalize: bool = False,
    seed: int = 0,
) -> Float[Tensor, " m"]:
    """How strongly the update of each matrix is penalized; the less gradient reached it, the more.

        importance w = 1 − I_m                       the request. Nearly constant over 60 to 72 matrices.
        uniform    w = 1                             the control without Fisher information
        permuted   w = 1 − I_π(m)                    the control with F shuffled over matrices, π drawn from `seed`
        rank       w = 1 − ρ_m / M                   ρ the rank of F_m from 1 (least) to M, ties share their mean
        power      w = clamp((F̄ / F_m)^γ, 1/c, c)    F̄ the mean; real contrast, bounded by c = `max_weight_ratio`

    Args:
        fisher: F_m of every matrix.
        weighting: one of the names above, or one that was added with `register_weighting`.
        gamma, max_weight_ratio: γ and c of "power".
        normalize: divide the weights by their mean, so that two weightings penalize equally hard on average.
        seed: of the shuffle of "permuted".

    Raises:
        ValueError: an unknown weighting, or a registered one that returns no usable weights.
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
            weights = 1.0 - average_ranks(fisher) / m
        case "power":
            weights = (fisher.mean() / fisher).pow(gamma).clamp(1.0 / max_weight_ratio, max_weight_ratio)
        case _:
            weights = _registered_weights(fisher, weighting)
    return weights / weights.mean() if normalize else weights


def _registered_weights(fisher: Float[Tensor, " m"], name: str) -> Float[Tensor, " m"]:
    if name not in _REGISTERED:
        raise ValueError(f"unknown weighting {name!r}: one of {', '.join(choices_of('weighting'))}")
    weights = _REGISTERED[name](fisher)
    if weights.shape != fisher.shape:
        raise ValueError(
            f"the weighting {name!r} returned the shape {list(weights.shape)} for {len(fisher)} matrices: "
            "it must return one weight for each"
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"the weighting {name!r} returned a weight that is negative or not finite")
    return weights.to(fisher)
