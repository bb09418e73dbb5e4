"""The place of each adapter and head parameter in a lane's row of the flat buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwlora_lab.lanes.settings import Lane


@dataclass(frozen=True)
class FactorGroup:
    """All factors whose rows have `d` entries: A of targets with d_in = d and transposed B of targets with d_out = d.

    A lane's row holds them as [count, rank, d], beginning at `start`. Factors are numbered through all groups in the
    order of the row; those of this group are `first` … `first + count − 1`.
    """

    d: int
    start: int
    first: int
    count: int

    @property
    def numbers(self) -> slice:
        return slice(self.first, self.first + self.count)


class BufferLayout:
    """The order of a lane's P parameters: the factors, AdaLoRA's Λ of all targets, the head.

    B is kept transposed, as [rank, d_out], and A and B alike are grouped by the length of their rows. So Gram
    matrices, the penalty, clipping and the optimizer's update are a dozen operations for all matrices and lanes
    together, instead of a dozen for each matrix. A lane whose rank is lower than the engine's has zeros in the rest.

    In this class `buffer` is a tensor [E, P] or [E, adapter_size], one row for each lane, and every method that takes
    it returns a view of it.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        head: Mapping[str, torch.Size],
        rank: int,
        svd_parametrized: bool,
        device: torch.device,
    ) -> None:
        """shapes: (d_in, d_out) by target; head: the shapes of the head's parameters; rank: the highest of any lane."""
        self.targets, self.shapes = list(shapes), list(shapes.values())
        self.rank, self.svd_parametrized, self.device = rank, svd_parametrized, device
        factor_lengths = [d for shape in self.shapes for d in shape]  # A of target 0, its B, A of target 1, …
        self._slots: list[tuple[int, int]] = [(0, 0)] * len(factor_lengths)  # (group, position in the group)
        self.groups: list[FactorGroup] = []
        offset = first = 0
        for d in dict.fromkeys(factor_lengths):
            members = [f for f, length in enumerate(factor_lengths) if length == d]
            for position, f in enumerate(members):
                self._slots[f] = (len(self.groups), position)
            self.groups.append(FactorGroup(d, offset, first, len(members)))
            offset += len(members) * rank * d
            first += len(members)
        self._number_factors()
        self._singular_start = offset
        self.adapter_size = offset + svd_parametrized * len(self.targets) * rank
        offset = self.adapter_size
        self.head_places: dict[str, tuple[int, torch.Size]] = {}
        for name, shape in head.items():
            self.head_places[name] = (offset, shape)
            offset += shape.numel()
        self.size = offset

    def _number_factors(self) -> None:
        """Index tensors over the factors in the order of the row, see `FactorGroup`."""
        number = [self.groups[group].first + position for group, position in self._slots]
        device = self.device
        self.number_of_a = torch.tensor(number[0::2], device=device)  # by target
        self.number_of_b = torch.tensor(number[1::2], device=device)
        self.partner = torch.empty(len(number), dtype=torch.int64, device=device)  # a target's B for its A, and back
        self.partner[self.number_of_a], self.partner[self.number_of_b] = self.number_of_b, self.number_of_a
        self.target_of = torch.empty_like(self.partner)
        self.target_of[self.number_of_a] = self.target_of[self.number_of_b] = torch.arange(
            len(self.targets), device=device
        )
        lengths = [group.d for group in self.groups for _ in range(group.count)]
        starts = [group.start + i * self.rank * group.d for group in self.groups for i in range(group.count)]
        self.factor_lengths, self.factor_starts = (torch.tensor(v, device=device) for v in (lengths, starts))

    def group(self, buffer: Tensor, group: FactorGroup) -> Tensor:
        """The factors of a group: [E, count, rank, d]."""
        size = group.count * self.rank * group.d
        return buffer[:, group.start : group.start + size].view(-1, group.count, self.rank, group.d)

    def singular_values(self, buffer: Tensor) -> Tensor:
        """Λ of all targets: [E, M, rank]. Only with `svd_parametrized`."""
        size = len(self.targets) * self.rank
        start = self._singular_start
        return buffer[:, start : start + size].view(-1, len(self.targets), self.rank)

    def factors(self, buffer: Tensor, target: int) -> tuple[Tensor, ...]:
        """A [E, rank, d_in] and transposed B [E, rank, d_out], and with `svd_parametrized` Λ [E, rank]."""
        slots = self._slots[2 * target : 2 * target + 2]
        pair = [self.group(buffer, self.groups[group])[:, position] for group, position in slots]
        return (*pair, self.singular_values(buffer)[:, target]) if self.svd_parametrized else tuple(pair)

    def head(self, buffer: Tensor, name: str) -> Tensor:
        """A parameter of the head: [E, *shape]."""
        start, shape = self.head_places[name]
        return buffer[:, start : start + shape.numel()].view(buffer.shape[0], *shape)

    def parameters_of(self, buffer: Tensor, row: int, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """One lane's parameters by name, A, B and Λ cut to the lane's own ranks; the head's if the buffer has them."""
        parameters: dict[str, Tensor] = {}
        for target, name in enumerate(self.targets):
            if rank := ranks.get(name):
                a, b, *singular = self.factors(buffer, target)
                parameters[f"{name}.A"], parameters[f"{name}.B"] = a[row, :rank], b[row, :rank].mT
                for values in singular:
                    parameters[f"{name}.E"] = values[row, :rank]
        if buffer.shape[1] == self.size:
            parameters.update((name, self.head(buffer, name)[row]) for name in self.head_places)
        return parameters

    def ranks_of(self, lanes: Sequence[Lane]) -> Tensor:
        """Each lane's rank at each target: int64 [E, M]."""
        ranks = [[lane.settings.ranks.get(name, 0) for name in self.targets] for lane in lanes]
        return torch.tensor(ranks, device=self.device).view(len(lanes), len(self.targets))
