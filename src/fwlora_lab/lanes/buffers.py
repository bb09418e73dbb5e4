"""The tensors that hold the lanes' runs, one row for each lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fwlora.penalty import NORMS
from fwlora_lab.lanes.layout import BufferLayout


class LaneBuffers:
    """All that training changes, as tensors over E lanes.

    Attributes:
        values, grads: what is trained and its gradient [E, P], in the order of `layout`.
        first_moment, second_moment: AdamW's [E, P].
        sensitivity, uncertainty: AdaLoRA's smoothed |w·∇w| and its uncertainty [E, adapter_size]; otherwise empty.
        fisher: F [E, M], the average squared gradient norm of each target.
        coefficients: the penalty's factor 2c by norm, [E, 2M], by lane and factor.
        compute_values, compute_grads: what the encoder reads and writes: `values` and `grads` themselves or, for an
            encoder in half precision, copies of their adapter part in its dtype.
        factors, factor_grads: views of these two by target, see `BufferLayout.factors`.
        head_values: views of `values` as autograd leaves by the parameter's name; their gradients go to `grads`.
    """

    def __init__(self, layout: BufferLayout, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        self.layout, self.dtype, self.compute_dtype = layout, dtype, compute_dtype

        def empty(size: int) -> Tensor:
            return torch.zeros(0, size, dtype=dtype, device=layout.device)

        # A tensor each: autograd would count a write to the gradients as one to the values if they shared a storage.
        self.values, self.grads, self.first_moment, self.second_moment = (empty(layout.size) for _ in range(4))
        scores = layout.adapter_size if layout.svd_parametrized else 0
        self.sensitivity, self.uncertainty = empty(scores), empty(scores)
        self.fisher = empty(len(layout.targets))
        self.coefficients = {norm: empty(2 * len(layout.targets)) for norm in NORMS}
        self.resize(0)

    def resize(self, lanes: int, kept: Sequence[int] = ()) -> None:
        """Make space for this many lanes. The rows `kept` come first, in this order; all others are zero."""
        rows = torch.tensor(list(kept), dtype=torch.int64, device=self.layout.device)

        def resized(old: Tensor) -> Tensor:
            new = torch.zeros(lanes, old.shape[1], dtype=old.dtype, device=old.device)
            new[: len(rows)] = old[rows]
            return new

        self.values, self.grads = resized(self.values), resized(self.grads)
        self.first_moment, self.second_moment = resized(self.first_moment), resized(self.second_moment)
        self.sensitivity, self.uncertainty = resized(self.sensitivity), resized(self.uncertainty)
        self.fisher = resized(self.fisher)
        self.coefficients = {norm: resized(old) for norm, old in self.coefficients.items()}
        self._make_views()

    def _make_views(self) -> None:
        layout = self.layout
        self.compute_values, self.compute_grads = self.values, self.grads
        if self.compute_dtype != self.dtype:
            self.compute_values, self.compute_grads = (
                torch.zeros(len(self.values), layout.adapter_size, dtype=self.compute_dtype, device=layout.device)
                for _ in range(2)
            )
        self.factors = {name: layout.factors(self.compute_values, m) for m, name in enumerate(layout.targets)}
        self.factor_grads = {name: layout.factors(self.compute_grads, m) for m, name in enumerate(layout.targets)}
        self.head_values = {
            name: _leaf(layout.head(self.values, name), layout.head(self.grads, name)) for name in layout.head_places
        }

    def column(self, values: Sequence[float | bool], dtype: torch.dtype | None = None) -> Tensor:
        """One number for each lane as a tensor [E, 1]."""
        return torch.tensor(values, dtype=dtype or self.dtype, device=self.layout.device)[:, None]

    def update_compute_values(self) -> None:
        """Bring the encoder's copy of the adapters up to date."""
        if self.compute_values is not self.values:
            self.compute_values.copy_(self.values[:, : self.layout.adapter_size])

    def zero_grads(self) -> None:
        """Set all gradients to zero."""
        self.grads.zero_()
        if self.compute_grads is not self.grads:
            self.compute_grads.zero_()

    def collect_grads(self) -> None:
        """Bring the gradients of the encoder's copy to the others, after a backward pass."""
        if self.compute_grads is not self.grads:
            self.grads[:, : self.layout.adapter_size].copy_(self.compute_grads)

    def state_of(self, row: int, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """Views of all that makes up the run in a lane, by name and cut to its ranks.

        Gradients are left out, since every step begins with none, and so are the penalty's coefficients, which
        follow from F.
        """
        parts = {"values": self.values, "first_moment": self.first_moment, "second_moment": self.second_moment}
        if self.layout.svd_parametrized:
            parts |= {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        state = {
            f"{part}/{name}": value
            for part, buffer in parts.items()
            for name, value in self.layout.parameters_of(buffer, row, ranks).items()
        }
        owned = [m for m, name in enumerate(self.layout.targets) if ranks.get(name)]
        return state | {f"fisher/{self.layout.targets[m]}": self.fisher[row, m] for m in owned}

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept from step to step."""
        moments, scores = [self.first_moment, self.second_moment], [self.sensitivity, self.uncertainty]
        return [self.values, self.grads, *moments, self.compute_values, self.compute_grads, *scores]


class FactorStacks:
    """The factors of all lanes at the time of a step, and their Gram matrices; each is computed when first asked for.

    The penalty and AdaLoRA's regulariser need both, so a step makes them once.
    """

    def __init__(self, buffers: LaneBuffers) -> None:
        self._buffers = buffers

    @cached_property
    def by_group(self) -> list[Tensor]:
        """[E·count, rank, d] of adjacent matrices for each group of the layout."""
        layout = self._buffers.layout
        return [layout.group(self._buffers.values, group).flatten(0, 1) for group in layout.groups]

    @cached_property
    def grams(self) -> Tensor:
        """`AAᵀ` and `BᵀB` of every factor: [E, 2M, rank, rank]."""
        lanes, rank = len(self._buffers.values), self._buffers.layout.rank
        return torch.cat([torch.bmm(s, s.mT).view(lanes, -1, rank, rank) for s in self.by_group], 1)


def _leaf(value: Tensor, grad: Tensor) -> Tensor:
    """A view of the values that autograd trains; its gradient accumulates in the view `grad`."""
    leaf = value.detach().requires_grad_(True)
    leaf.grad = grad
    return leaf
