"""TODO"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LEVELS = 1 << 16  # a mask's entry is one 16-bit number against a threshold
_CHUNK = 1 << 15  # 64-bit words drawn at once


class DropoutRng:
    """Random bits for one step of several lanes, each lane's from its own generator.

    64 random bits are four 16-bit numbers, which is several times cheaper than one Bernoulli draw an entry. p is
    rounded to a multiple of 2⁻¹⁶, and the masks are divided by the rounded 1 − p, so that their mean is 1.

    What a lane gets depends on what it asks for alone. Where all lanes ask for the same sizes one tensor serves them
    all, drawn at the start of the step: `used` says after a trial pass how long it has to be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.used = 0  # 16-bit numbers that each lane has taken through `same`
        self._numbers = torch.empty(0, 0, dtype=torch.int16, device=device)
        self._rows: list[tuple[torch.Generator, Tensor]] = []

    def begin(self, generators: Sequence[torch.Generator]) -> None:
        """Forget what is left; from now on lanes ask one by one."""
        nothing = torch.empty(0, dtype=torch.int16, device=self.device)
        self._rows = [(generator, nothing) for generator in generators]

    def begin_same(self, generators: Sequence[torch.Generator], size: int | None) -> None:
        """Draw `size` numbers for each lane; None for a trial pass, which gets zeros."""
        self.used = 0
        if size is None:
            self._numbers = torch.zeros(len(generators), 0, dtype=torch.int16, device=self.device)
            return
        words = torch.empty(len(generators), -(-size // 4), dtype=torch.int64, device=self.device)
        for row, generator in zip(words, generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        self._numbers = words.view(torch.int16)

    def same(self, size: int) -> Tensor:
        """The next `size` numbers of every lane: int16 [E, size]."""
        start, self.used = self.used, self.used + size
        lanes, drawn = self._numbers.shape
        return self._numbers[:, start : self.used] if drawn else self._numbers.new_zeros(1).expand(lanes, size)

    def one(self, lane: int, size: int) -> Tensor:
        """`size` numbers for one lane: int16 [size]."""
        generator, left = self._rows[lane]
        if len(left) < size:
            words = torch.empty(max(_CHUNK, -(-size // 4)), dtype=torch.int64, device=self.device)
            left = words.random_(-(2**63), None, generator=generator).view(torch.int16)
        self._rows[lane] = (generator, left[size:])
        return left[:size]

    def keep(self, numbers: Tensor, p: float, out: Tensor) -> None:
        """Write the mask of dropout at rate p into `out`: 1/(1 − p) or 0."""
        dropped = round(p * _LEVELS)
        torch.ge(numbers.view(out.shape), dropped - _LEVELS // 2, out=out)
        out.mul_(_LEVELS / (_LEVELS - dropped))


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.addcmul(x, y, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        (mask,) = ctx.saved_tensors
        return g, g * mask, None


def add_dropped(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """`x + y ∘ mask`, the residual connection with its dropout."""
    return x + y if mask is None else _AddDropped.apply(x, y, mask)  # type: ignore[return-value]
