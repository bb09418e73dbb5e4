"""Only true tokens: each lane's sentences stand one behind the other in one row, without padding between them.

Everything in an encoder works on single tokens but attention, so a row of packed tokens costs what its tokens cost.
For attention the sentences are gathered into blocks of similar length, and no sentence sees another. How a
sentence is treated depends on its own lane alone: a lane computes the same thing whatever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from fwlora_lab.tasks import TokenTable

ATTENTION = "fwlora_packed"
# Widths of attention blocks. Fixed, not fitted to the batch: a lane alone gets the blocks that it gets in company.
_WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Block:
    """Sentences of up to T tokens for attention.

    rows: int64 [S, T], where each token stands in the flattened [E·N] row; keep: bool [S, T], false for padding;
    lanes: (lane, sentences) for the runs of sentences that belong to one lane, in order.
    """

    rows: Tensor
    keep: Tensor
    lanes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """A batch of every lane. E lanes, rows of N tokens (the longest lane's), up to b sentences a lane.

    tokens, types, positions: int64 [E, N]; counts: true tokens by lane; first: int64 [E, b], each sentence's first
    token in the flattened [E·N] row; labels [E, b]; weights [E, b]: 1/(sentences of the lane), 0 where there is none;
    back: int64 [E·N], where each token stands among the blocks' tokens, block after block.
    """

    tokens: Tensor
    types: Tensor | None
    positions: Tensor
    counts: tuple[int, ...]
    first: Tensor
    labels: Tensor
    weights: Tensor
    blocks: tuple[Block, ...]
    back: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same batch on `device`."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        return Packed(
            moved(self.tokens),
            None if self.types is None else moved(self.types),
            moved(self.positions),
            self.counts,
            moved(self.first),
            moved(self.labels),
            moved(self.weights),
            tuple(Block(moved(b.rows), moved(b.keep), b.lanes) for b in self.blocks),
            moved(self.back),
        )


def pack(table: TokenTable, batches: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Packed:
    """The examples `batches[e]` (int64 [b_e]) of the table, one lane a row."""
    lanes = len(batches)
    lengths = [table.offsets[i + 1] - table.offsets[i] for i in batches]
    counts = tuple(int(n.sum()) for n in lengths)
    width, most = max(counts), max(len(i) for i in batches)
    tokens = torch.zeros(lanes, width, dtype=torch.int64)
    types = torch.zeros_like(tokens) if table.types is not None else None
    positions = torch.zeros_like(tokens)
    first = torch.zeros(lanes, most, dtype=torch.int64)
    weights = torch.zeros(lanes, most, dtype=dtype)
    labels = torch.zeros(lanes, most, dtype=table.labels.dtype)
    for e, (index, n) in enumerate(zip(batches, lengths, strict=True)):
        starts = n.cumsum(0) - n
        positions[e, : counts[e]] = torch.arange(counts[e]) - starts.repeat_interleave(n)
        source = table.offsets[index].repeat_interleave(n) + positions[e, : counts[e]]
        tokens[e, : counts[e]] = table.tokens[source].long()
        if types is not None:
            types[e, : counts[e]] = table.types[source].long()  # type: ignore[index]
        first[e, : len(index)] = e * width + starts
        first[e, len(index) :] = e * width  # a sentence of the lane's own: its neighbours' may be NaN
        weights[e, : len(index)] = 1.0 / len(index)
        labels[e, : len(index)] = table.labels[index]
    blocks, back = _blocks(lengths, width)
    return Packed(tokens, types, positions, counts, first, labels, weights, blocks, back)


def _blocks(lengths: Sequence[Tensor], width: int) -> tuple[tuple[Block, ...], Tensor]:
    back = torch.zeros(len(lengths) * width, dtype=torch.int64)
    widths = torch.tensor(_WIDTHS)
    chosen = [torch.bucketize(n, widths) for n in lengths]
    blocks, done = [], 0
    for k in sorted({int(c) for choice in chosen for c in choice}):
        wide = _WIDTHS[k] if k < len(_WIDTHS) else max(int(n.max()) for n in lengths)
        rows, keeps, owners = [], [], []
        for e, (n, choice) in enumerate(zip(lengths, chosen, strict=True)):
            here = (choice == k).nonzero()[:, 0]
            if not len(here):
                continue
            start = e * width + (n.cumsum(0) - n)[here]
            column = torch.arange(wide)
            keep = column < n[here, None]
            rows.append(torch.where(keep, start[:, None] + column, start[:, None]))
            keeps.append(keep)
            owners.append((e, len(here)))
        row, keep = torch.cat(rows), torch.cat(keeps)
        back[row[keep]] = done + keep.flatten().nonzero()[:, 0]
        done += row.numel()
        blocks.append(Block(row, keep, tuple(owners)))
    # What pads a lane's row reads a token of its own lane.
    ends = [int(n.sum()) for n in lengths]
    for e, end in enumerate(ends):
        back[e * width + end : (e + 1) * width] = back[e * width]
    return tuple(blocks), back


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Packed,
    drop: Any = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each sentence: query, key, value [E, heads, N, d_head] -> [E, N, heads, d_head].

    `drop(block, shape, p)` draws the mask of attention dropout, already divided by 1 − p. A token sees the tokens of
    its sentence that are less than `sliding_window` away.
    """
    lanes, heads, n, width = query.shape
    flat = [t.transpose(1, 2).reshape(lanes * n, heads * width) for t in (query, key, value)]
    out = []
    for block in packed.blocks:
        s, t = block.rows.shape
        index = block.rows.flatten()
        q, k, v = (x.index_select(0, index).view(s, t, heads, width).transpose(1, 2) for x in flat)
        keep = block.keep[:, None, None, :]
        if sliding_window is not None and t > sliding_window:
            place = torch.arange(t, device=keep.device)
            keep = keep & ((place[:, None] - place).abs() < sliding_window)
        if dropout > 0.0 and drop is not None:
            scores = (q @ k.mT * scaling).masked_fill(~keep, float("-inf"))
            probabilities = scores.softmax(-1)
            result = (probabilities * drop(block, probabilities.shape, dropout)) @ v
        else:
            mask = None if bool(block.keep.all()) and keep.shape[2] == 1 else keep
            result = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out.append(result.transpose(1, 2).reshape(s * t, heads * width))
    return torch.cat(out).index_select(0, packed.back).view(lanes, n, heads, width), None


AttentionInterface.register(ATTENTION, packed_attention)
# The encoder must build no mask of its own: which tokens see each other is known from `packed`.
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
