"""What the lane engine computes with: dropout masks, the adapted Linear and packed attention, each by its own backward.

The products of LoRA are thin, r columns against hundreds, and their speed hangs on how the operands lie: read along
rows of d they run several times faster than along columns of r. So A is kept as [r, d_in], B transposed as
[r, d_out], and every product below reads both along their rows. What autograd would copy, these functions add
where it belongs: the gradients of A and B go straight into the flat buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from fwlora_lab.packing import Block, Packed

ATTENTION = "fwlora_packed"

_LEVELS = 1 << 16  # a mask's entry is one 16-bit number against a threshold
_CHUNK = 1 << 15  # 64-bit words drawn at once


class Draws:
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


@dataclass
class Adapter:
    """The factors of one target over all lanes, and where their gradients go.

    a [E, r, d_in]; b, transposed: [E, r, d_out]; c [E, 1, r]: s, or s·Λ for AdaLoRA; grad_e [E, r] is Λ's.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scale: Tensor
    grad_e: Tensor | None
    watch: Callable[[Tensor, Tensor], None] | None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: Adapter,
        mask: Tensor | None,
    ) -> Tensor:
        seen = x if mask is None else x * mask
        z = torch.bmm(seen, adapter.a.mT)
        low = z * adapter.c
        ctx.adapter, ctx.weight = adapter, weight
        ctx.save_for_backward(x, mask, low, z if adapter.grad_e is not None else None)
        y = functional.linear(x, weight, bias)
        return y.baddbmm_(low, adapter.b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        adapter: Adapter = ctx.adapter
        x, mask, low, z = ctx.saved_tensors
        with torch.no_grad():
            seen = x if mask is None else x * mask
            gb = torch.bmm(g, adapter.b.mT)
            adapter.grad_b.baddbmm_(low.mT, g)
            if z is not None:
                assert adapter.grad_e is not None
                adapter.grad_e.add_((gb * z).sum(1) * adapter.scale)
            gz = gb * adapter.c
            adapter.grad_a.baddbmm_(gz.mT, seen)
            if adapter.watch is not None:
                adapter.watch(g, x)
            if not ctx.needs_input_grad[0]:
                return None, None, None, None, None, None
            gx = torch.mm(g.flatten(0, 1), ctx.weight).view_as(x)
            if mask is None:
                gx.baddbmm_(gz, adapter.a)
            else:
                gx.addcmul_(torch.bmm(gz, adapter.a), mask)
        return gx, None, None, None, None, None


def adapted_linear(
    x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, mask: Tensor | None
) -> Tensor:
    """`y_e = x_e Wᵀ + bias + ((x_e ∘ mask_e) A_eᵀ ∘ c_e) B_eᵀ` for x [E, N, d_in], W [d_out, d_in] frozen.

    The backward pass adds ∂L/∂A, ∂L/∂B (and ∂L/∂Λ) to the adapter's gradients and calls `adapter.watch(∂L/∂y, x)`.
    `anchor` is any tensor that requires a gradient: it keeps the node in the graph where x does not.
    """
    return _AdaptedLinear.apply(x, anchor, weight, bias, adapter, mask)  # type: ignore[return-value]


class _PackedAttention(torch.autograd.Function):
    """q, k, v [E·N·heads, d_head] -> [E·N, heads·d_head]; `masks[i]` is block i's dropout [S·heads, T, T] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        heads: int,
        scaling: float,
        window: int | None,
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        rows, back = packed.by_head(heads)
        saved: list[Tensor | None] = []
        out = []
        for block, index, mask in zip(packed.blocks, rows, masks, strict=True):
            s, t = block.rows.shape
            own_q, own_k, own_v = (x.index_select(0, index).view(s * heads, t, -1) for x in (q, k, v))
            scores = torch.bmm(own_q, own_k.mT).mul_(scaling)
            _hide(scores.view(s, heads, t, t), block, window)
            p = scores.softmax(-1)
            dropped = p if mask is None else p * mask
            out.append(torch.bmm(dropped, own_v).view(s * heads * t, -1))
            saved += [own_q, own_k, own_v, p, mask]
        ctx.save_for_backward(*saved)
        ctx.packed, ctx.heads, ctx.scaling = packed, heads, scaling
        return _joined(out).index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        packed, heads = ctx.packed, ctx.heads
        rows, back = packed.by_head(heads)
        saved = ctx.saved_tensors
        pieces: tuple[list[Tensor], ...] = ([], [], [])
        g = g.reshape(-1, g.shape[-1])
        for i, (block, index) in enumerate(zip(packed.blocks, rows, strict=True)):
            q, k, v, p, mask = saved[5 * i : 5 * i + 5]
            s, t = block.rows.shape
            own = g.index_select(0, index).view(s * heads, t, -1)
            # What pads a block repeats the sentence's first token; its own gradient is none.
            own = own.view(s, heads, t, -1).mul_(block.keep[:, None, :, None]).view(s * heads, t, -1)
            dropped = p if mask is None else p * mask
            g_p = torch.bmm(own, v.mT)
            if mask is not None:
                g_p.mul_(mask)
            g_s = torch._softmax_backward_data(g_p, p, -1, p.dtype).mul_(ctx.scaling)
            for piece, grad in zip(
                pieces, (torch.bmm(g_s, k), torch.bmm(g_s.mT, q), torch.bmm(dropped.mT, own)), strict=True
            ):
                piece.append(grad.view(s * heads * t, -1))
        g_q, g_k, g_v = (_joined(piece).index_select(0, back) for piece in pieces)
        if packed.padded:
            for grad in (g_q, g_k, g_v):
                grad.view(len(packed.true), -1).mul_(packed.true[:, None])
        return g_q, g_k, g_v, None, None, None, None, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _hide(scores: Tensor, block: Block, window: int | None) -> None:
    """−∞ where a token must not look: padding, and what is `window` tokens away or more."""
    t = scores.shape[-1]
    if not block.full:
        scores.masked_fill_(~block.keep[:, None, None, :], float("-inf"))
    if window is not None and t > window:
        place = torch.arange(t, device=scores.device)
        scores.masked_fill_((place[:, None] - place).abs() >= window, float("-inf"))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Packed,
    drop: Callable[[Block, tuple[int, ...], float], Tensor] | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each sentence: query, key, value [E, heads, N, d_head] -> [E, N, heads, d_head].

    `drop(block, shape, p)` draws the mask of attention dropout, already divided by 1 − p. A token sees the tokens of
    its sentence that are less than `sliding_window` away.
    """
    lanes, heads, n, width = query.shape
    q, k, v = (t.transpose(1, 2).reshape(lanes * n * heads, width) for t in (query, key, value))
    masks: list[Tensor | None] = [None] * len(packed.blocks)
    if dropout > 0.0 and drop is not None:
        for i, block in enumerate(packed.blocks):
            s, t = block.rows.shape
            masks[i] = drop(block, (s, heads, t, t), dropout).view(s * heads, t, t)
    out = _PackedAttention.apply(q, k, v, packed, heads, scaling, sliding_window, masks)
    return out.view(lanes, n, heads, width), None  # type: ignore[union-attr]


AttentionInterface.register(ATTENTION, packed_attention)
# The encoder must build no mask of its own: which tokens see each other is known from `packed`.
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
