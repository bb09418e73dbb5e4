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

    a [E, r, d_in]; b, transposed: [E, r, d_out]; c [E, 1, r]: s, or s·Λ for AdaLoRA; grad_e [E, r] is Λ's. columns:
    where its d_out outputs stand among those of the Linears that are computed together.
    """

    columns: slice
    a: Tensor
    b: Tensor
    c: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scale: Tensor
    grad_e: Tensor | None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: Sequence[Adapter],
        masks: Sequence[Tensor | None],
        watch: Callable[[Tensor, Tensor], None] | None,
    ) -> Tensor:
        y = functional.linear(x, weight, bias)
        saved: list[Tensor | None] = [x]
        for adapter, mask in zip(adapters, masks, strict=True):
            z = torch.bmm(x if mask is None else x * mask, adapter.a.mT)
            low = z * adapter.c
            y[..., adapter.columns].baddbmm_(low, adapter.b)
            saved += [mask, low, z if adapter.grad_e is not None else None]
        ctx.adapters, ctx.weight, ctx.watch = adapters, weight, watch
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        x, *saved = ctx.saved_tensors
        gx = None
        with torch.no_grad():
            if ctx.watch is not None:
                ctx.watch(g, x)
            if ctx.needs_input_grad[0]:
                gx = torch.mm(g.flatten(0, 1), ctx.weight).view_as(x)
            for i, adapter in enumerate(ctx.adapters):
                mask, low, z = saved[3 * i : 3 * i + 3]
                own = g[..., adapter.columns]
                gb = torch.bmm(own, adapter.b.mT)
                adapter.grad_b.baddbmm_(low.mT, own)
                if z is not None:
                    assert adapter.grad_e is not None
                    adapter.grad_e.add_((gb * z).sum(1) * adapter.scale)
                gz = gb * adapter.c
                adapter.grad_a.baddbmm_(gz.mT, x if mask is None else x * mask)
                if gx is None:
                    continue
                if mask is None:
                    gx.baddbmm_(gz, adapter.a)
                else:
                    gx.addcmul_(torch.bmm(gz, adapter.a), mask)
        return gx, None, None, None, None, None, None


def adapted_linear(
    x: Tensor,
    anchor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    masks: Sequence[Tensor | None],
    watch: Callable[[Tensor, Tensor], None] | None,
) -> Tensor:
    """`y_e = x_e Wᵀ + bias`, and `+ ((x_e ∘ mask_e) A_eᵀ ∘ c_e) B_eᵀ` in each adapter's columns; x [E, N, d_in].

    W [d_out, d_in] is frozen. The backward pass adds ∂L/∂A, ∂L/∂B (and ∂L/∂Λ) to the adapters' gradients and calls
    `watch(∂L/∂y, x)`. `anchor` is any tensor that requires a gradient: it keeps the node in the graph where x does not.
    """
    return _AdaptedLinear.apply(x, anchor, weight, bias, adapters, masks, watch)  # type: ignore[return-value]


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


class _PackedAttention(torch.autograd.Function):
    """tokens [E·N, parts·heads·d_head] -> [E·N, heads·d_head]; `masks[i]` is block i's dropout [S·heads, t, T] or None.

    parts: query, key and value; or key and value, with one query a sentence in `queries` [E·b, heads·d_head] and as
    many rows in the result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        queries: Tensor | None,
        packed: Packed,
        heads: int,
        scaling: float,
        window: int | None,
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        parts = 3 if queries is None else 2
        rows, _ = packed.by_head(heads, parts)
        ones, back = packed.by_head(heads, 1 if queries is None else 0)
        width = tokens.shape[-1] // (parts * heads)
        flat, single = tokens.view(-1, width), None if queries is None else queries.view(-1, width)
        out = flat.new_empty(sum(map(len, ones)), width)
        saved: list[Tensor | None] = []
        done = 0
        for block, index, one, mask in zip(packed.blocks, rows, ones, masks, strict=True):
            s, t = block.rows.shape
            own = flat.index_select(0, index).view(parts, s * heads, t, width)
            q = own[0] if single is None else single.index_select(0, one).view(s * heads, 1, width)
            scores = torch.bmm(q, own[-2].mT).mul_(scaling)
            _hide(scores.view(s, heads, -1, t), block, window)
            p = scores.softmax(-1)
            here = out[done : done + len(one)].view(s * heads, -1, width)
            torch.bmm(p if mask is None else p * mask, own[-1], out=here)
            done += len(one)
            saved += [own, None if single is None else q, p, mask]
        ctx.save_for_backward(*saved)
        ctx.packed, ctx.heads, ctx.scaling, ctx.parts = packed, heads, scaling, parts
        return out.index_select(0, back).view(-1, heads * width)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        packed, heads, parts = ctx.packed, ctx.heads, ctx.parts
        rows, back = packed.by_head(heads, parts)
        ones, back_one = packed.by_head(heads, 1 if parts == 3 else 0)
        width = g.shape[-1] // heads
        g = g.reshape(-1, width)
        saved = ctx.saved_tensors
        out = g.new_empty(sum(map(len, rows)), width)
        out_one = g.new_empty(0 if parts == 3 else sum(map(len, ones)), width)
        done = done_one = 0
        for i, (block, index, one) in enumerate(zip(packed.blocks, rows, ones, strict=True)):
            own, q, p, mask = saved[4 * i : 4 * i + 4]
            s, t = block.rows.shape
            g_own = g.index_select(0, one).view(s * heads, -1, width)
            if parts == 3 and not block.full:
                # What pads a block repeats the sentence's first token; its own gradient is none.
                g_own.view(s, heads, t, width).mul_(block.keep[:, None, :, None])
            here = out[done : done + len(index)].view(parts, s * heads, t, width)
            g_q = here[0] if q is None else out_one[done_one : done_one + len(one)].view(s * heads, 1, width)
            torch.bmm((p if mask is None else p * mask).mT, g_own, out=here[-1])
            g_p = torch.bmm(g_own, own[-1].mT)
            if mask is not None:
                g_p.mul_(mask)
            g_s = torch._softmax_backward_data(g_p, p, -1, p.dtype).mul_(ctx.scaling)
            torch.bmm(g_s, own[-2], out=g_q)
            torch.bmm(g_s.mT, own[0] if q is None else q, out=here[-2])
            done += len(index)
            done_one += len(one)
        g_tokens = out.index_select(0, back).view(-1, parts * heads * width)
        if packed.padded:
            g_tokens.mul_(packed.true[:, None])
        g_queries = None
        if parts == 2:
            g_queries = out_one.index_select(0, back_one).view(-1, heads * width)
            g_queries.mul_((packed.weights > 0).view(-1, 1))  # an empty place repeats another's query
        return g_tokens, g_queries, None, None, None, None, None


def _hide(scores: Tensor, block: Block, window: int | None) -> None:
    """−∞ where a token must not look: padding, and what is `window` tokens away or more."""
    t = scores.shape[-1]
    if not block.full:
        scores.masked_fill_(~block.keep[:, None, None, :], float("-inf"))
    if window is not None and t > window:
        place = torch.arange(t, device=scores.device)
        scores.masked_fill_((place[:, None] - place).abs() >= window, float("-inf"))


def attention(
    tokens: Tensor,
    queries: Tensor | None,
    packed: Packed,
    heads: int,
    scaling: float,
    drop: Callable[[Block, tuple[int, ...]], Tensor] | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention within each sentence: tokens [E, N, 3·heads·d_head], queries, keys and values -> [E, N, heads·d_head].

    With one query a sentence, queries [E, b, heads·d_head], tokens are [E, N, 2·heads·d_head] and the result is as
    queries. `drop(block, shape)` draws the mask of attention dropout, already divided by 1 − p. A token sees the tokens
    of its sentence that are less than `window` away.
    """
    masks: list[Tensor | None] = [None] * len(packed.blocks)
    if drop is not None:
        for i, block in enumerate(packed.blocks):
            s, t = block.rows.shape
            masks[i] = drop(block, (s, heads, t if queries is None else 1, t)).flatten(0, 1)
    own = None if queries is None else queries.flatten(0, 1)
    out = _PackedAttention.apply(tokens.flatten(0, 1), own, packed, heads, scaling, window, masks)
    like = tokens if queries is None else queries
    return out.view(*like.shape[:2], -1)  # type: ignore[union-attr]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Packed,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attention` as transformers' own layers call it: [E, heads, N, d_head] each -> [E, N, heads, d_head]."""
    lanes, heads, n, width = query.shape
    tokens = torch.stack((query, key, value), 1).permute(0, 3, 1, 2, 4).reshape(lanes, n, -1)
    return attention(tokens, None, packed, heads, scaling, window=sliding_window).view(lanes, n, heads, width), None


AttentionInterface.register(ATTENTION, packed_attention)
# The encoder must build no mask of its own: which tokens see each other is known from `packed`.
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
