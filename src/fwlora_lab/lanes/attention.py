"""What the lane engine computes with: dropout masks, the adapted Linear and packed attention, each by its own backward.

The products of LoRA are thin, r columns against hundreds, and their speed hangs on how the operands lie: read along
rows of d they run several times faster than along columns of r. So A is kept as [r, d_in], B transposed as
[r, d_out], and every product below reads both along their rows. What autograd would copy, these functions add
where it belongs: the gradients of A and B go straight into the flat buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from fwlora_lab.lanes.packing import Block, Packed

ATTENTION = "fwlora_packed"


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
