"""DeBERTa's attention in lanes: contents attend to contents and to relative positions, and positions to contents.

With r(i, j) the bucket of the distance from j to i, and P_q, P_k the projected embeddings of the buckets, scores are

    s(i, j) = scaling · (q_i·k_j + q_i·P_k[r(i, j)] + k_j·P_q[r(j, i)])        (arXiv 2006.03654, equation 4)

Only the buckets that a batch's sentences reach are projected. They are ordered by distance, so that those of a shorter
sentence come first: a lane then computes and draws the same whatever the lengths in other lanes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from fwlora_lab.lanes.packing import Packed
from fwlora_lab.lanes.pass_context import PassContext


@dataclass(frozen=True)
class WidthPositions:
    """Buckets of the relative positions in a block of T tokens.

    Attributes:
        rows: how many of the ordered buckets occur.
        of_keys: int64 [T, T], the row of r(i, j) for query i and key j.
        of_queries: int64 [T, T], the row of r(j, i) for key j and query i, in this order.
    """

    rows: int
    of_keys: Tensor
    of_queries: Tensor


@dataclass(frozen=True)
class PassPositions:
    """What a batch needs of the relative positions.

    Attributes:
        embeddings: of the R buckets that occur, [R, d].
        widths: by block.
        lanes: by block, the lane of each sentence, int64 [S].
        counts: rows that a lane's own sentences use, by lane.
    """

    embeddings: Tensor
    widths: tuple[WidthPositions, ...]
    lanes: tuple[Tensor, ...]
    counts: tuple[int, ...]


class RelativePositions:
    """DeBERTa-v2's relative positions: the same embeddings in all layers, each of which projects them."""

    def __init__(self, encoder: Any) -> None:
        own = encoder.encoder.layer[0].attention.self
        self._buckets, self._longest, span = own.position_buckets, own.max_relative_positions, own.pos_ebd_size
        self._span = span
        embeddings = encoder.encoder.get_rel_embedding().detach()
        device = embeddings.device
        order = (torch.arange(2 * span, device=device) - span).abs().argsort(stable=True)
        self._embeddings = embeddings[order]
        self._row_of = torch.empty_like(order)
        self._row_of[order] = torch.arange(2 * span, device=device)
        self._widths: dict[int, WidthPositions] = {}

    def __call__(self, packed: Packed) -> PassPositions:
        widths = tuple(self._of_width(block.token_index.shape[1]) for block in packed.blocks)
        counts = [0] * len(packed.tokens)
        for block, width in zip(packed.blocks, widths, strict=True):
            for lane, _ in block.by_lane:
                counts[lane] = max(counts[lane], width.rows)
        sentences = packed.first_token.shape[1]
        lanes = tuple(block.sentence_index // sentences for block in packed.blocks)
        return PassPositions(self._embeddings[: max(counts)], widths, lanes, tuple(counts))

    def _of_width(self, width: int) -> WidthPositions:
        if width not in self._widths:
            tokens = self._embeddings.new_empty(width, 1)
            distance = build_relative_position(tokens, tokens, self._buckets, self._longest)[0]
            of_keys, of_queries = (
                self._row_of[(sign * distance + self._span).clamp(0, 2 * self._span - 1)] for sign in (1, -1)
            )
            rows = int(torch.maximum(of_keys.max(), of_queries.max())) + 1
            self._widths[width] = WidthPositions(rows, of_keys, of_queries)
        return self._widths[width]


class DisentangledAttention(nn.Module):
    """The attention of one layer.

    With `share_att_key` the layer's own query and key matrices, adapters included, project the positions as well. They
    then go through these matrices as rows in front of the tokens (`rows_in_front`), so that every gradient and every
    Fisher statistic of a matrix comes from one product.
    """

    def __init__(self, own: Any) -> None:
        """own: transformers' attention of the layer."""
        super().__init__()
        self.shared, self.heads = own.share_att_key, own.num_attention_heads
        self.to_keys, self.to_queries = "c2p" in own.pos_att_type, "p2c" in own.pos_att_type
        self.dropout = own.pos_dropout.p
        factor = 1 + self.to_keys + self.to_queries
        # In float32 whatever the model's dtype is, as transformers computes it.
        self.scaling = 1.0 / torch.tensor(float(own.attention_head_size * factor)).sqrt().item()
        self.key = None if self.shared or not self.to_keys else own.pos_key_proj
        self.query = None if self.shared or not self.to_queries else own.pos_query_proj

    def rows(self, context: PassContext, positions: PassPositions) -> Tensor:
        """The positions' embeddings with this layer's dropout, [E, R, d]."""
        rows = positions.embeddings.expand(len(context.packed.tokens), -1, -1)
        mask = context.position_mask(rows, self.dropout)
        return rows if mask is None else rows * mask

    def forward(
        self,
        tokens: Tensor,
        queries: Tensor | None,
        rows: Tensor,
        packed: Packed,
        positions: PassPositions,
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        """As `attention.attention`, with `rows` in front of tokens and queries if the projections are shared."""
        width = tokens.shape[-1] // (3 if queries is None else 2)
        front = rows.shape[1] if self.shared else 0
        of_queries, of_keys = (
            None if linear is None else functional.linear(rows, linear.weight, linear.bias)
            for linear in (self.query, self.key)
        )
        if self.shared:
            of_queries = (tokens if queries is None else queries)[:, :front, :width] if self.to_queries else None
            begin = width if queries is None else 0
            of_keys = tokens[:, :front, begin : begin + width] if self.to_keys else None
        tokens = tokens[:, front:]
        queries = None if queries is None else queries[:, front:]
        parts, like = (3, tokens) if queries is None else (2, queries)
        flat = tokens.reshape(-1, width // self.heads)
        single = None if queries is None else queries.reshape(-1, width // self.heads)
        token_indices, _ = packed.head_indices(self.heads, parts)
        query_indices, back = packed.head_indices(self.heads, 1 if queries is None else 0)
        results = []
        for i, block in enumerate(packed.blocks):
            s, t = block.token_index.shape
            own = flat.index_select(0, token_indices[i]).view(parts, s * self.heads, t, -1)
            q = own[0]
            if single is not None:
                q = single.index_select(0, query_indices[i]).view(s * self.heads, 1, -1)
            scores = torch.bmm(q, own[-2].mT)
            at, lanes = positions.widths[i], positions.lanes[i]
            if of_keys is not None:
                index = at.of_keys[: q.shape[1]].expand(len(q), -1, -1)
                scores = scores + torch.bmm(q, self._by_sentence(of_keys, at.rows, lanes).mT).gather(-1, index)
            if of_queries is not None:
                index = at.of_queries[:, : q.shape[1]].expand(len(q), -1, -1)
                by_key = torch.bmm(own[-2], self._by_sentence(of_queries, at.rows, lanes).mT)
                scores = scores + by_key.gather(-1, index).mT
            scores = scores * self.scaling
            if not block.full:
                hidden = ~block.is_token[:, None, None, :]
                scores = scores.view(s, self.heads, -1, t).masked_fill(hidden, float("-inf")).flatten(0, 1)
            p = scores.softmax(-1)
            mask = masks[i]
            results.append(torch.bmm(p if mask is None else p * mask, own[-1]).flatten(0, 1))
        return torch.cat(results).index_select(0, back).view(*like.shape[:2], width)

    def _by_sentence(self, projected: Tensor, rows: int, lanes: Tensor) -> Tensor:
        """The first rows of [E, R, heads·d_head] for each sentence's lane: [S·heads, rows, d_head]."""
        split = projected[:, :rows].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split.index_select(0, lanes).flatten(0, 1)
