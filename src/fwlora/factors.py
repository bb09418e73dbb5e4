"""The factors of a trained adapter, matrix by matrix, and their best approximation of a lower rank.

By Eckart and Young (1936) the nearest matrix of rank k to `ΔW = Σ_i σ_i u_i v_iᵀ`, σ falling, is the sum of its first k
terms, at a distance of `(Σ_{i>k} σ_i²)^½`.
"""

# PEFT's layers and parts of torch are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fwlora.adapters import bare_name, named_modules, pair_of


@dataclass(frozen=True)
class Factors:
    """`ΔW = s·B·A` of one matrix: A [r, d_in], B [d_out, r].

    Everything that cutting needs comes from `svd`: what a rank is worth (σ²), the matrix that is kept, and what is
    lost. Another measure of worth is another decomposition there.
    """

    layer: LoraLayer
    path: str  # the layer's name in the PEFT model
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def cost(self) -> int:
        """Parameters of one rank: d_in + d_out."""
        return self.a.shape[1] + len(self.b)

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F, by ‖B·A‖² = tr(BᵀB·AAᵀ)."""
        a, b = self.a.double(), self.b.double()
        return self.scale * float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())

    def at_most(self, rank: int) -> int:
        """The rank that is kept if `rank` is the highest allowed."""
        return self.rank if rank >= self.rank else min(rank, len(self.b), self.a.shape[1])

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [d_out, k], σ [k], V [d_in, k] of ΔW in float64, k = min(r, d_in, d_out), by the SVD of an r × r one."""
        q_b, r_b = cast(tuple[Tensor, Tensor], torch.linalg.qr(self.b.double()))
        q_a, r_a = cast(tuple[Tensor, Tensor], torch.linalg.qr(self.a.double().T))
        thin = torch.linalg.svd(self.scale * r_b @ r_a.T, full_matrices=False)
        u, sigma, vt = cast(tuple[Tensor, Tensor, Tensor], thin)
        return q_b @ u, sigma, q_a @ vt.T

    def cut(self, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """A [rank, d_in] and B [d_out, rank] of the nearest matrix of that rank, to be multiplied by `scale`."""
        if rank == self.rank:
            return self.a, self.b if scale == self.scale else self.b * (self.scale / scale)
        u, sigma, v = (t[..., :rank] for t in self.svd)
        root = (sigma / scale).sqrt()
        return (v * root).T.to(self.a), (u * root).to(self.b)

    def lost(self, rank: int) -> float:
        """‖ΔW − ΔW_k‖_F."""
        return 0.0 if rank == self.rank else float(cast(Tensor, self.svd[1][rank:].norm()))


def factors_of(model: PeftModel, adapter: str) -> dict[str, Factors]:
    """The adapted matrices by their names in the plain model, in its order, without the ranks that AdaLoRA masked.

    Raises:
        ValueError: no adapter of that name, or one whose ΔW is not s·B·A of a Linear layer.
    """
    found: dict[str, Factors] = {}
    for path, layer in named_modules(model):
        if not isinstance(layer, LoraLayer) or not (adapter in layer.lora_A or adapter in layer.lora_embedding_A):
            continue
        name = bare_name(path)
        if isinstance(layer, AdaLoraLayer):
            a, b, scale = _adalora_factors(layer, adapter)
        else:
            pair = pair_of(path, layer, adapter)
            if getattr(layer.lora_B[adapter], "bias", None) is not None:
                raise ValueError(f"{name} has a bias inside its adapter (lora_bias=True): ΔW is not all of it")
            a, b, scale = pair.a.detach(), pair.b.detach(), pair.scale
        found[name] = Factors(layer, path, a, b, scale)
    if not found:
        raise ValueError("the model has no LoRA layer whose adapter is active")
    return found


def _adalora_factors(layer: AdaLoraLayer, adapter: str) -> tuple[Tensor, Tensor, float]:
    """A and B·diag(Λ) of the ranks that are left, and s as AdaLoRA's layers divide it."""
    spectrum: Tensor = layer.lora_E[adapter].detach()[:, 0]
    left = spectrum.nonzero()[:, 0]
    scaling: dict[str, float] = layer.scaling
    scale = scaling[adapter] / (float(layer.ranknum[adapter].detach()) + 1e-5)
    return layer.lora_A[adapter].detach()[left], (layer.lora_B[adapter].detach() * spectrum)[:, left], scale


def replacing(factors: Factors, adapter: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The tensors under the names of `model.named_parameters()` with which the layer computes `s·b·a` instead.

    `s` is the layer's own; `a` [k, d_in], `b` [d_out, k].
    """
    if isinstance(factors.layer, AdaLoraLayer):
        ones = torch.ones(len(a), 1, dtype=a.dtype, device=a.device)
        named = {"lora_A": a, "lora_B": b, "lora_E": ones}
        return {f"{factors.path}.{holder}.{adapter}": tensor for holder, tensor in named.items()}
    named = {"lora_A": a, "lora_B": b}
    return {f"{factors.path}.{holder}.{adapter}.weight": tensor for holder, tensor in named.items()}


def ranks_within(factors: Mapping[str, Factors], budget: int) -> dict[str, int]:
    """The ranks that buy the most Σ σ² for `budget` parameters, greedily by σ²/cost.

    Raises:
        ValueError: the budget buys no rank of an adapter that does something.
    """
    offers: list[tuple[float, int, str]] = []
    for name, f in factors.items():
        spectrum: list[float] = f.svd[1].tolist()
        offers += [(sigma**2 / f.cost, f.cost, name) for sigma in spectrum]
    ranks = dict.fromkeys(factors, 0)
    left = budget
    for gain, cost, name in sorted(offers, key=lambda offer: -offer[0]):
        if gain > 0 and cost <= left:
            ranks[name] += 1
            left -= cost
    if not any(ranks.values()):
        raise ValueError(f"a budget of {budget} parameters buys no rank of an adapter that does something")
    return ranks
