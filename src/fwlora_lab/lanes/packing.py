"""Pack variable-length sentences without padding, one row of tokens for each lane.

Outside of attention an encoder works on single tokens, so a row of packed tokens costs what its tokens cost. For
attention the sentences are gathered into blocks of similar length, and no sentence sees another. How a sentence is
treated depends on its own lane alone, not on the runs that share the engine with it.

A row is either as long as the tokens of the longest lane, which suits a CPU (`pack`), or all batches of a run have one
fixed `Shape`, which a captured CUDA graph needs (`pack_shaped`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fwlora_lab.data.tokens import TokenTable

# Widths of attention blocks. They are fixed instead of fitted to the batch, so that a lane gets the same blocks
# whether it trains alone or with others.
_WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Shape(NamedTuple):
    """The fixed shape of all batches of a run: tokens in a row, sentences in a batch, tokens in a sentence."""

    tokens: int
    sentences: int
    width: int


@dataclass(frozen=True)
class Block:
    """S sentences of similar length, from all lanes, gathered as a padded [S, T] table for attention.

    Attributes:
        token_index: int64 [S, T], the position of each token in the flattened row of all lanes' tokens [E·N]. Padding
            repeats the sentence's first token.
        is_token: bool [S, T], false for padding.
        sentence_index: int64 [S], the position of each sentence in the flattened [E·b] of all lanes' sentences.
        full: whether no entry of the table is padding, so that attention needs no mask.
        by_lane: (lane, number of its sentences); the sentences of a lane are adjacent, in this order.
    """

    token_index: Tensor
    is_token: Tensor
    sentence_index: Tensor
    full: bool
    by_lane: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """One batch for each of E lanes: up to b sentences a lane, whose tokens follow each other in a row of N.

    A lane with fewer tokens than N or fewer sentences than b has unused places at its end. They hold a token or a
    sentence of the same lane (another lane's could be NaN) and have no effect on the loss.

    Attributes:
        tokens: int64 [E, N], token ids.
        types: int64 [E, N], segment ids; None if the encoder has none.
        positions: int64 [E, N], each token's position in its sentence, from 0.
        is_token: bool [E·N], false for unused places.
        first_token: int64 [E, b], the position of each sentence's first token in the flattened row [E·N].
        labels: [E, b].
        weights: [E, b], a sentence's weight in its lane's loss: 1/(sentences of the lane), 0 for unused places.
        from_blocks: int64 [E·N], the position of each token among the [S·T] tokens of all blocks, block after block.
        sentences_from_blocks: int64 [E·b], the same for sentences among the S of all blocks.
        blocks: the same sentences, gathered for attention.
        token_counts, sentence_counts: by lane.
        padded: whether any row has unused places for tokens.
        fixed_shape: whether all batches of the run have this shape. Then nothing may depend on the counts, which are
            N and b for every lane.
    """

    tokens: Tensor
    types: Tensor | None
    positions: Tensor
    is_token: Tensor
    first_token: Tensor
    labels: Tensor
    weights: Tensor
    from_blocks: Tensor
    sentences_from_blocks: Tensor
    blocks: tuple[Block, ...]
    token_counts: tuple[int, ...]
    sentence_counts: tuple[int, ...]
    padded: bool
    fixed_shape: bool = False
    _head_indices: dict[tuple[int, int], tuple[list[Tensor], Tensor]] = field(default_factory=dict, compare=False)

    @property
    def shape(self) -> Shape:
        """The batch's shape; of the first block, so it says all only with `fixed_shape`."""
        return Shape(self.tokens.shape[1], self.first_token.shape[1], self.blocks[0].token_index.shape[1])

    def tensors(self) -> list[Tensor]:
        """All tensors, always in the same order."""
        own = [getattr(self, f.name) for f in fields(self)]
        own = [t for t in own if isinstance(t, Tensor)]
        return own + [t for b in self.blocks for t in (b.token_index, b.is_token, b.sentence_index)]

    def to(self, device: torch.device) -> Packed:
        """The same batch on `device`."""
        if self.tokens.device == device:
            return self
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        names = ("token_index", "is_token", "sentence_index")
        blocks = tuple(
            replace(b, **{name: getattr(b, name).to(device, non_blocking=True) for name in names}) for b in self.blocks
        )
        return replace(self, **moved, blocks=blocks, _head_indices={})

    def head_indices(self, heads: int, parts: int = 1) -> tuple[list[Tensor], Tensor]:
        """Where the attention heads of each token go in the blocks, and where they come back from.

        Tokens are rows of `parts` vectors a head, flattened to [E·N·parts·heads]; a block holds [parts, S, heads, T].
        With parts = 3 these are query, key and value. parts = 0 means one token a sentence: [E·b·heads] and [S, heads].

        Returns:
            For each block the int64 positions to gather from, flattened; and the positions in all blocks' results, one
            after the other, to gather from on the way back. Computed once for a batch.
        """
        if (heads, parts) not in self._head_indices:
            device, each, done = self.from_blocks.device, max(parts, 1), 0
            inner = torch.arange(each * heads, device=device)
            gather, places = [], []
            for block in self.blocks:
                outer = block.token_index if parts else block.sentence_index[:, None]
                s, t = outer.shape
                index = (outer[..., None] * (each * heads) + inner).view(s, t, each, heads)
                gather.append(index.permute(2, 0, 3, 1).flatten())
                at = torch.arange(index.numel(), device=device).view(each, s, heads, t) + done
                places.append(at.permute(1, 3, 0, 2).reshape(s * t, each * heads))
                done += index.numel()
            back = torch.cat(places)[self.from_blocks if parts else self.sentences_from_blocks]
            self._head_indices[heads, parts] = gather, back.flatten()
        return self._head_indices[heads, parts]


def pack(table: TokenTable, batches: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Packed:
    """Pack the examples `batches[e]` (int64 [b_e]) of the table for lane e; rows as long as the longest lane's."""
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
        first[e, len(index) :] = e * width
        weights[e, : len(index)] = 1.0 / len(index)
        labels[e, : len(index)] = table.labels[index]
    blocks, from_blocks, sentences_from_blocks = _blocks(lengths, width, most)
    return Packed(
        tokens=tokens,
        types=types,
        positions=positions,
        is_token=(torch.arange(width) < torch.tensor(counts)[:, None]).flatten(),
        first_token=first,
        labels=labels,
        weights=weights,
        from_blocks=from_blocks,
        sentences_from_blocks=sentences_from_blocks,
        blocks=blocks,
        token_counts=counts,
        sentence_counts=tuple(len(i) for i in batches),
        padded=min(counts) < width,
    )


def pack_shaped(
    table: TokenTable, batches: Sequence[Tensor], shape: Shape, dtype: torch.dtype = torch.float32
) -> Packed:
    """As `pack`, but in one fixed shape, and computed on the table's device, so that only example numbers are copied.

    All sentences are in one block of the shape's width. The batches must fit into the shape, see `shape_of`.
    """
    lanes, device = len(batches), table.tokens.device
    n, b, t = shape.tokens, shape.sentences, shape.width
    index = torch.full((lanes, b), -1)
    for e, batch in enumerate(batches):
        index[e, : len(batch)] = batch
    index = index.to(device, non_blocking=True)
    used = index >= 0
    index = index.clamp_min(0)
    begin = table.offsets[index]
    length = (table.offsets[index + 1] - begin) * used
    start = (length.cumsum(1) - length) * used
    lane = torch.arange(lanes, device=device)[:, None] * n
    column = torch.arange(t, device=device)
    is_token = column < length[..., None]
    token_index = (lane + start)[..., None] + column * is_token
    source = begin[..., None] + column * is_token
    # The row gets one more entry at its end, which padding is written to and which is then cut off.
    target = torch.where(is_token, token_index, lanes * n).flatten()

    def spread(values: Tensor) -> Tensor:
        out = torch.zeros(lanes * n + 1, dtype=torch.int64, device=device)
        return out.scatter_(0, target, values.expand(lanes, b, t).reshape(-1).long())[:-1]

    in_row = spread(is_token).bool()
    in_block = spread(torch.arange(lanes * b * t, device=device).view(lanes, b, t))
    lanes_first = torch.arange(lanes, device=device).repeat_interleave(n) * (b * t)
    return Packed(
        tokens=spread(table.tokens[source]).view(lanes, n),
        types=None if table.types is None else spread(table.types[source]).view(lanes, n),
        positions=spread(column).view(lanes, n),
        is_token=in_row,
        first_token=lane + start,
        labels=table.labels[index],
        weights=used.to(dtype) / used.sum(1, keepdim=True),
        from_blocks=torch.where(in_row, in_block, lanes_first),
        sentences_from_blocks=torch.arange(lanes * b, device=device),
        blocks=(
            Block(
                token_index=token_index.view(lanes * b, t),
                is_token=(is_token | (column == 0)).view(lanes * b, t),
                sentence_index=torch.arange(lanes * b, device=device),
                full=False,
                by_lane=tuple((e, b) for e in range(lanes)),
            ),
        ),
        token_counts=(n,) * lanes,
        sentence_counts=(b,) * lanes,
        padded=True,
        fixed_shape=True,
    )


def shape_of(table: TokenTable, batches: Sequence[Tensor]) -> Shape:
    """The smallest shape that holds each of these batches, in steps of 64 tokens a row and of 8 tokens a sentence."""
    lengths = table.lengths()
    tokens = max(int(lengths[i].sum()) for i in batches)
    return Shape(_round_up(tokens, 64), max(len(i) for i in batches), _round_up(int(lengths.max()), 8))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _blocks(lengths: Sequence[Tensor], width: int, most: int) -> tuple[tuple[Block, ...], Tensor, Tensor]:
    """One block for each width that occurs, `from_blocks` and `sentences_from_blocks` (see `Packed`).

    lengths: tokens of each sentence, by lane; width: N; most: b.
    """
    from_blocks = torch.zeros(len(lengths) * width, dtype=torch.int64)
    sentences_from_blocks = torch.zeros(len(lengths) * most, dtype=torch.int64)
    widths = torch.tensor(_WIDTHS)
    chosen = [torch.bucketize(n, widths) for n in lengths]
    blocks, tokens_done, sentences_done = [], 0, 0
    for k in sorted({int(c) for choice in chosen for c in choice}):
        block_width = _WIDTHS[k] if k < len(_WIDTHS) else max(int(n.max()) for n in lengths)
        indices, masks, sentences, by_lane = [], [], [], []
        for e, (n, choice) in enumerate(zip(lengths, chosen, strict=True)):
            members = (choice == k).nonzero()[:, 0]
            if not len(members):
                continue
            start = e * width + (n.cumsum(0) - n)[members]
            column = torch.arange(block_width)
            is_token = column < n[members, None]
            indices.append(torch.where(is_token, start[:, None] + column, start[:, None]))
            masks.append(is_token)
            sentences.append(e * most + members)
            by_lane.append((e, len(members)))
        index, is_token, sentence = torch.cat(indices), torch.cat(masks), torch.cat(sentences)
        from_blocks[index[is_token]] = tokens_done + is_token.flatten().nonzero()[:, 0]
        sentences_from_blocks[sentence] = sentences_done + torch.arange(len(sentence))
        tokens_done += index.numel()
        sentences_done += len(sentence)
        blocks.append(Block(index, is_token, sentence, bool(is_token.all()), tuple(by_lane)))
    # Unused places read a token or a sentence of their own lane.
    for e, n in enumerate(lengths):
        from_blocks[e * width + int(n.sum()) : (e + 1) * width] = from_blocks[e * width]
        sentences_from_blocks[e * most + len(n) : (e + 1) * most] = sentences_from_blocks[e * most]
    return tuple(blocks), from_blocks, sentences_from_blocks
