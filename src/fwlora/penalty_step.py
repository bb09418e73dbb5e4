"""The penalty on the adapters that an optimizer trains now: its value, and its gradient added just before a step."""

# Parts of torch are untyped, and its batched operations (_foreach_*) have no public names.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fwlora.config import FWLoraConfig
from fwlora.penalty import Penalty, update_norms
from fwlora.sharding import Factors
from fwlora.trained import TrainedAdapters

if TYPE_CHECKING:
    from jaxtyping import Float


class PenaltyStep:
    """`λ Σ_m w_m ‖ΔW_m‖_F²` over the adapters that are trained.

    If the adapters are split over processes (FSDP), every method but `forget` must be called by all of them at once.

    Args:
        model: the model, which knows how its parameters are split.
        trained: the adapters; call `rebuild` after they changed.
        config: λ, the norm and the mode.
    """

    def __init__(self, model: nn.Module, trained: TrainedAdapters, config: FWLoraConfig) -> None:
        self._model = model
        self._trained = trained
        self._config = config
        self.rebuild()

    def rebuild(self) -> None:
        """Begin anew with the adapters that are trained now."""
        self.factors = Factors(self._trained.factors, self._model)
        full = self.factors.full
        self._penalty = Penalty(list(zip(full[::2], full[1::2], strict=True)), self._config.penalty_norm)
        self.forget()

    def forget(self) -> None:
        """The weights changed: work the coefficients out again."""
        self._coefficients: tuple[tuple[float, ...], list[Tensor]] | None = None

    def value(self, weights: Float[Tensor, " m"]) -> Float[Tensor, ""]:
        """The penalty now, in float32 or higher."""
        if not self._trained.pairs:
            return weights.new_zeros(())
        self.factors.gather()
        return self._penalty.value(self._coefficients_for(weights))

    @torch.no_grad()
    def update_norms(self) -> list[float]:
        """‖s·B·A‖_F of each pair. Waits for the device."""
        self.factors.gather()
        norms: list[float] = []
        for pair, a, b in zip(self._trained.pairs, self.factors.full[::2], self.factors.full[1::2], strict=True):
            dtype = torch.promote_types(a.dtype, torch.float32)
            norms.append(abs(pair.scale) * update_norms(a[None].to(dtype), b[None].to(dtype)).sqrt().item())
        return norms

    @torch.no_grad()
    def apply(self, weights: Float[Tensor, " m"], loss_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Add the penalty's gradient to the adapters' gradients ("loss"), or take a step along it ("decoupled").

        Args:
            weights: w_m of every matrix.
            loss_scale: the factor that a fused optimizer still divides the gradients by; None without one.
            found_inf: 1 if that optimizer is going to skip this step, else 0; None without one.
        """
        if self._config.penalty_strength == 0.0 or not self._trained.pairs:
            return
        coefficients = self._coefficients_for(weights)
        in_loss = self._config.penalty_mode == "loss"
        if in_loss and loss_scale is not None:
            coefficients = [c * loss_scale.to(c) for c in coefficients]
        if not in_loss and found_inf is not None:
            coefficients = [c * (1.0 - found_inf.to(c)) for c in coefficients]
        self.factors.gather()
        terms = self._penalty.gradient(coefficients)
        groups = self._trained.groups
        if in_loss:
            chosen = [i for i, group in enumerate(groups) if group is not None and self.factors.holds(i)]
            _add([self.factors.local_gradient(i) for i in chosen], self._pieces(terms, chosen))
            return
        by_group: dict[int, list[int]] = {}
        for i, group in enumerate(groups):
            if group is not None and self.factors.holds(i):
                by_group.setdefault(id(group), []).append(i)
        for chosen in by_group.values():
            lr = cast(float, groups[chosen[0]]["lr"])  # type: ignore[index]
            _add([self.factors.local(i) for i in chosen], [-lr * piece for piece in self._pieces(terms, chosen)])

    def _pieces(self, terms: list[Tensor], chosen: list[int]) -> list[Tensor]:
        return [self.factors.piece(i, terms[i]) for i in chosen]

    def _coefficients_for(self, weights: Float[Tensor, " m"]) -> list[Tensor]:
        """c_p = λ·w·s² per pair of each stack (λ·w for the norm of the factors), kept until a scale changes."""
        scales = tuple(p.scale for p in self._trained.pairs)
        if self._coefficients is None or self._coefficients[0] != scales:
            weights = weights[torch.tensor(self._trained.owner, device=weights.device)]
            if self._config.penalty_norm == "update":
                weights = weights * torch.tensor(scales, dtype=torch.float64).square().to(weights)
            all_pairs = self._config.penalty_strength * weights
            stacks = self._penalty.stacks
            self._coefficients = scales, [all_pairs[torch.tensor(s.index)].to(s.a[0].device, s.dtype) for s in stacks]
        return self._coefficients[1]


def _add(targets: list[Tensor], terms: list[Tensor]) -> None:
    if not targets:  # another process holds all pieces
        return
    if len({id(t) for t in targets}) == len(targets):
        torch._foreach_add_(targets, terms)
    else:  # tied adapters: the batched addition may race on a tensor that is listed twice
        for target, term in zip(targets, terms, strict=True):
            target.add_(term)
