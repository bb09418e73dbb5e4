"""Attention within each sentence of a packed batch, as one autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fwlora_lab.lanes.packing import Packed


class _PackedAttention(torch.autograd.Function):
    """tokens [E·N, parts·heads·d_head] -> [E·N, heads·d_head]; `masks[i]` is block i's dropout [S·heads, t, T] or None.

    parts: query, key and value; or key and value, with one query a sentence in `queries` [E·b, heads·d_head] and as
    many rows in the result. The backward pass computes the gradients of all blocks into one tensor and gathers once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        queries: Tensor | None,
        packed: Packed,
        heads: int,
        scaling: float,
        masks: Sequence[Tensor | None],
        biases: Sequence[Tensor] | None,
    ) -> Tensor:
        parts = 3 if queries is None else 2
        token_indices, _ = packed.head_indices(heads, parts)
        query_indices, back = packed.head_indices(heads, 1 if queries is None else 0)
        width = tokens.shape[-1] // (parts * heads)
        flat, single = tokens.view(-1, width), None if queries is None else queries.view(-1, width)
        out = flat.new_empty(sum(map(len, query_indices)), width)
        saved: list[Tensor | None] = []
        done = 0
        for i, (block, index, query_index) in enumerate(zip(packed.blocks, token_indices, query_indices, strict=True)):
            mask, (s, t) = masks[i], block.token_index.shape
            own = flat.index_select(0, index).view(parts, s * heads, t, width)
            q = own[0] if single is None else single.index_select(0, query_index).view(s * heads, 1, width)
            if biases is not None:
                scores = torch.baddbmm(biases[i][:, : q.shape[1]], q, own[-2].mT, alpha=scaling)
            else:
                scores = torch.bmm(q, own[-2].mT).mul_(scaling)
                if not block.full:
                    hidden = ~block.is_token[:, None, None, :]
                    scores.view(s, heads, -1, t).masked_fill_(hidden, float("-inf"))
            p = scores.softmax(-1)
            result = out[done : done + len(query_index)].view(s * heads, -1, width)
            torch.bmm(p if mask is None else p * mask, own[-1], out=result)
            done += len(query_index)
            saved += [own, None if single is None else q, p, mask]
        ctx.save_for_backward(*saved)
        ctx.packed, ctx.heads, ctx.scaling, ctx.parts = packed, heads, scaling, parts
        return out.index_select(0, back).view(-1, heads * width)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        packed, heads, parts = ctx.packed, ctx.heads, ctx.parts
        token_indices, back = packed.head_indices(heads, parts)
        query_indices, back_queries = packed.head_indices(heads, 1 if parts == 3 else 0)
        width = g.shape[-1] // heads
        g = g.reshape(-1, width)
        saved = ctx.saved_tensors
        out = g.new_empty(sum(map(len, token_indices)), width)
        out_queries = g.new_empty(0 if parts == 3 else sum(map(len, query_indices)), width)
        done = done_queries = 0
        for i, (block, index, query_index) in enumerate(zip(packed.blocks, token_indices, query_indices, strict=True)):
            own, q, p, mask = saved[4 * i : 4 * i + 4]
            s, t = block.token_index.shape
            g_own = g.index_select(0, query_index).view(s * heads, -1, width)
            if parts == 3 and not block.full:
                # Padding repeats the sentence's first token, whose gradient must not be counted again.
                g_own.view(s, heads, t, width).mul_(block.is_token[:, None, :, None])
            result = out[done : done + len(index)].view(parts, s * heads, t, width)
            g_q = result[0]
            if q is not None:
                g_q = out_queries[done_queries : done_queries + len(query_index)].view(s * heads, 1, width)
            torch.bmm((p if mask is None else p * mask).mT, g_own, out=result[-1])
            g_p = torch.bmm(g_own, own[-1].mT)
            if mask is not None:
                g_p.mul_(mask)
            g_s = torch._softmax_backward_data(g_p, p, -1, p.dtype).mul_(ctx.scaling)
            torch.bmm(g_s, own[-2], out=g_q)
            torch.bmm(g_s.mT, own[0] if q is None else q, out=result[-2])
            done += len(index)
            done_queries += len(query_index)
        g_tokens = out.index_select(0, back).view(-1, parts * heads * width)
        if packed.padded:
            g_tokens.mul_(packed.is_token[:, None])
        g_queries = None
        if parts == 2:
            g_queries = out_queries.index_select(0, back_queries).view(-1, heads * width)
            g_queries.mul_((packed.weights > 0).view(-1, 1))  # an unused place repeats another sentence's query
        return g_tokens, g_queries, None, None, None, None, None


def attention(
    tokens: Tensor,
    queries: Tensor | None,
    packed: Packed,
    heads: int,
    scaling: float,
    masks: Sequence[Tensor | None] | None = None,
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """`softmax(scaling · QKᵀ + bias) V` within each sentence: [E, N, 3·heads·d_head] -> [E, N, heads·d_head].

    Args:
        tokens: query, key and value of each token side by side; without the query if `queries` is given.
        queries: one query a sentence, [E, b, heads·d_head]; the result then has its shape.
        packed: which tokens belong to which sentence.
        heads: number of attention heads.
        scaling: usually 1/√d_head.
        masks: by block, dropout of the attention's probabilities, see `PassContext.attention_masks`.
        biases: by block, see `biases_of_blocks`; no gradient flows into them.
    """
    masks = [None] * len(packed.blocks) if masks is None else masks
    flat_queries = None if queries is None else queries.flatten(0, 1)
    out = _PackedAttention.apply(tokens.flatten(0, 1), flat_queries, packed, heads, scaling, masks, biases)
    like = tokens if queries is None else queries
    return out.view(*like.shape[:2], -1)  # type: ignore[union-attr]


def biases_of_blocks(packed: Packed, bias: Callable[[int], Tensor]) -> list[Tensor]:
    """What the attention's scores of each block begin with, [S·heads, T, T]: a bias, and −∞ for padding.

    Sentences begin at the first column of a block, so the bias depends on its width only. All layers use the result,
    and adding it costs no more than masking the padding.

    Args:
        bias: gives [heads, T, T] for sentences of T tokens.
    """
    found = []
    for block in packed.blocks:
        added = bias(block.token_index.shape[1]).expand(len(block.token_index), -1, -1, -1)
        if not block.full:
            added = torch.where(block.is_token[:, None, None, :], added, float("-inf"))
        found.append(added.flatten(0, 1))
    return found
