"""Dropout masks of several lanes, each lane's from its own random generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LEVELS = 1 << 16  # an entry of a mask is one 16-bit number, compared with a threshold
_CHUNK = 1 << 15  # 64-bit words that are drawn at once


class DropoutRng:
    """Random bits for one training step of several lanes.

    64 random bits give four 16-bit numbers, which is several times cheaper than one Bernoulli draw for each entry of a
    mask. The rate p is rounded to a multiple of 2⁻¹⁶, and masks are divided by the rounded 1 − p, so their mean is 1.

    The numbers of a lane depend on nothing but its generator and on what this lane asks for. There are two ways to
    draw them, of which a step uses one:

    - by lane (`start_by_lane`, then `bits_for`): lanes may ask for different sizes;
    - shared (`start_shared`, then `shared_bits`): all lanes ask for the same sizes, so one tensor [E, …] serves all
      of them. It is drawn as a whole at the start of the step, and `used` says after a trial pass how long it must be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.used = 0  # 16-bit numbers that each lane has taken through `shared_bits`
        self._shared = torch.empty(0, 0, dtype=torch.int16, device=device)
        self._by_lane: list[tuple[torch.Generator, Tensor]] = []  # with the numbers that are drawn but not used

    def start_by_lane(self, generators: Sequence[torch.Generator]) -> None:
        """Start a step in which each lane asks for its own sizes."""
        none_left = torch.empty(0, dtype=torch.int16, device=self.device)
        self._by_lane = [(generator, none_left) for generator in generators]

    def start_shared(self, generators: Sequence[torch.Generator], size: int | None) -> None:
        """Start a step in which all lanes ask for the same sizes, `size` numbers in all.

        With None it is a trial pass, which gets zeros and draws nothing.
        """
        self.used = 0
        if size is None:
            self._shared = torch.zeros(len(generators), 0, dtype=torch.int16, device=self.device)
            return
        words = torch.empty(len(generators), -(-size // 4), dtype=torch.int64, device=self.device)
        for row, generator in zip(words, generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        self._shared = words.view(torch.int16)

    def shared_bits(self, size: int) -> Tensor:
        """The next `size` numbers of every lane: int16 [E, size]."""
        start, self.used = self.used, self.used + size
        lanes, drawn = self._shared.shape
        return self._shared[:, start : self.used] if drawn else self._shared.new_zeros(1).expand(lanes, size)

    def bits_for(self, lane: int, size: int) -> Tensor:
        """The next `size` numbers of one lane: int16 [size]."""
        generator, left = self._by_lane[lane]
        if len(left) < size:
            words = torch.empty(max(_CHUNK, -(-size // 4)), dtype=torch.int64, device=self.device)
            left = words.random_(-(2**63), None, generator=generator).view(torch.int16)
        self._by_lane[lane] = (generator, left[size:])
        return left[:size]


def write_dropout_mask(bits: Tensor, p: float, out: Tensor) -> None:
    """Fill `out` with a mask of dropout at rate p: 1/(1 − p) or 0 for each of the 16-bit numbers."""
    dropped = round(p * _LEVELS)
    torch.ge(bits.view(out.shape), dropped - _LEVELS // 2, out=out)
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
    """`x + y ∘ mask`, a residual connection with dropout on its branch y."""
    return x + y if mask is None else _AddDropped.apply(x, y, mask)  # type: ignore[return-value]
