"""Only true tokens: each lane's sentences stand one behind the other in one row, without padding between them.

Everything in an encoder works on single tokens but attention, so a row of packed tokens costs what its tokens cost.
For attention the sentences are gathered into blocks of similar length, and no sentence sees another. How a
sentence is treated depends on its own lane alone: a lane computes the same thing whatever its neighbours are.

Rows are as long as the longest lane's tokens, which is what a CPU wants; or every batch of a run has one and the same
`Shape`, which is what a graph of GPU launches needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fwlora_lab.data.tokens import TokenTable

# Widths of attention blocks. Fixed, not fitted to the batch: a lane alone gets the blocks that it gets in company.
_WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Shape(NamedTuple):
    """The one shape of all batches of a run: tokens in a row, sentences in a batch, tokens in a sentence."""

    tokens: int
    sentences: int
    width: int


@dataclass(frozen=True)
class Block:
    """Sentences of up to T tokens for attention.

    rows: int64 [S, T], where each token stands in the flattened [E·N] row; keep: bool [S, T], false for padding, and
    `full` where there is none; places: int64 [S], where each sentence stands in [E·b]; lanes: (lane, sentences) for
    the runs of sentences that belong to one lane, in order.
    """

    rows: Tensor
    keep: Tensor
    places: Tensor
    full: bool
    lanes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """A batch of every lane. E lanes, rows of N tokens, up to b sentences a lane.

    tokens, types, positions: int64 [E, N]; true: bool [E·N], false for what fills a row up, and `padded` where there
    is such; first: int64 [E, b], each sentence's first token in the flattened [E·N] row; labels [E, b];
    weights [E, b]: 1/(sentences of the lane), 0 where there is none; back: int64 [E·N], where each token stands among
    the blocks' tokens, block after block; order: int64 [E·b], the same for sentences; counts and sentences: tokens and
    sentences by lane; uniform: all batches of the run have this shape, and nothing may depend on the counts.
    """

    tokens: Tensor
    types: Tensor | None
    positions: Tensor
    true: Tensor
    first: Tensor
    labels: Tensor
    weights: Tensor
    back: Tensor
    order: Tensor
    blocks: tuple[Block, ...]
    counts: tuple[int, ...]
    sentences: tuple[int, ...]
    padded: bool
    uniform: bool = False
    _by_head: dict[tuple[int, int], tuple[list[Tensor], Tensor]] = field(default_factory=dict, compare=False)

    def tensors(self) -> list[Tensor]:
        """All tensors, in one order."""
        own = [getattr(self, f.name) for f in fields(self)]
        return [t for t in own if isinstance(t, Tensor)] + [t for b in self.blocks for t in (b.rows, b.keep, b.places)]

    def to(self, device: torch.device) -> Packed:
        """The same batch on `device`."""
        if self.tokens.device == device:
            return self
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        blocks = tuple(
            replace(b, **{name: getattr(b, name).to(device, non_blocking=True) for name in ("rows", "keep", "places")})
            for b in self.blocks
        )
        return replace(self, **moved, blocks=blocks, _by_head={})

    def by_head(self, heads: int, parts: int = 1) -> tuple[list[Tensor], Tensor]:
        """How tokens of [E·N·parts·heads] go to the blocks, each [parts, S, heads, T], and back from all of them.

        parts: 3 for query, key and value side by side; 0 stands for one token a sentence: [E·b·heads], [S, heads].
        Int64, flattened; worked out once per batch.
        """
        if (heads, parts) not in self._by_head:
            device, each, done = self.back.device, max(parts, 1), 0
            inner = torch.arange(each * heads, device=device)
            rows, places = [], []
            for block in self.blocks:
                outer = block.rows if parts else block.places[:, None]
                s, t = outer.shape
                index = (outer[..., None] * (each * heads) + inner).view(s, t, each, heads)
                rows.append(index.permute(2, 0, 3, 1).flatten())
                at = torch.arange(index.numel(), device=device).view(each, s, heads, t) + done
                places.append(at.permute(1, 3, 0, 2).reshape(s * t, each * heads))
                done += index.numel()
            back = torch.cat(places)[self.back if parts else self.order]
            self._by_head[heads, parts] = rows, back.flatten()
        return self._by_head[heads, parts]


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
    blocks, back, order = _blocks(lengths, width, most)
    return Packed(
        tokens=tokens,
        types=types,
        positions=positions,
        true=(torch.arange(width) < torch.tensor(counts)[:, None]).flatten(),
        first=first,
        labels=labels,
        weights=weights,
        back=back,
        order=order,
        blocks=blocks,
        counts=counts,
        sentences=tuple(len(i) for i in batches),
        padded=min(counts) < width,
    )


def pack_shaped(
    table: TokenTable, batches: Sequence[Tensor], shape: Shape, dtype: torch.dtype = torch.float32
) -> Packed:
    """As `pack`, in one given shape and with the table's device at work: only the examples' numbers go there.

    All sentences stand in one block of the widest. An empty place holds the lane's first token and has no weight.
    The batches must fit, see `shape_of`.
    """
    lanes, device = len(batches), table.tokens.device
    n, b, t = shape.tokens, shape.sentences, shape.width
    index = torch.full((lanes, b), -1)
    for e, batch in enumerate(batches):
        index[e, : len(batch)] = batch
    index = index.to(device, non_blocking=True)
    there = index >= 0
    index = index.clamp_min(0)
    begin = table.offsets[index]
    length = (table.offsets[index + 1] - begin) * there
    start = (length.cumsum(1) - length) * there
    lane = torch.arange(lanes, device=device)[:, None] * n
    column = torch.arange(t, device=device)
    keep = column < length[..., None]
    rows = (lane + start)[..., None] + column * keep
    source = begin[..., None] + column * keep
    place = torch.where(keep, rows, lanes * n).flatten()  # behind the last row lies what is thrown away

    def spread(values: Tensor, fill: int = 0) -> Tensor:
        out = torch.full((lanes * n + 1,), fill, dtype=torch.int64, device=device)
        return out.scatter_(0, place, values.expand(lanes, b, t).reshape(-1).long())[:-1]

    true = spread(keep).bool()
    own = spread(torch.arange(lanes * b * t, device=device).view(lanes, b, t))
    # What fills a lane's row up reads a token of its own lane.
    filler = torch.arange(lanes, device=device).repeat_interleave(n) * (b * t)
    return Packed(
        tokens=spread(table.tokens[source]).view(lanes, n),
        types=None if table.types is None else spread(table.types[source]).view(lanes, n),
        positions=spread(column).view(lanes, n),
        true=true,
        first=lane + start,
        labels=table.labels[index],
        weights=there.to(dtype) / there.sum(1, keepdim=True),
        back=torch.where(true, own, filler),
        order=torch.arange(lanes * b, device=device),
        blocks=(
            Block(
                rows.view(lanes * b, t),
                (keep | (column == 0)).view(lanes * b, t),
                torch.arange(lanes * b, device=device),
                False,
                tuple((e, b) for e in range(lanes)),
            ),
        ),
        counts=(n,) * lanes,
        sentences=(b,) * lanes,
        padded=True,
        uniform=True,
    )


def shape_of(table: TokenTable, batches: Sequence[Tensor]) -> Shape:
    """The least shape, in steps of 64 tokens and of 8 in a sentence, that holds each of these batches."""
    lengths = table.lengths()
    tokens = max(int(lengths[i].sum()) for i in batches)
    return Shape(_up(tokens, 64), max(len(i) for i in batches), _up(int(lengths.max()), 8))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _blocks(lengths: Sequence[Tensor], width: int, most: int) -> tuple[tuple[Block, ...], Tensor, Tensor]:
    """Blocks of similar sentences, as many as there are widths among them, `back` and `order`."""
    back = torch.zeros(len(lengths) * width, dtype=torch.int64)
    order = torch.zeros(len(lengths) * most, dtype=torch.int64)
    widths = torch.tensor(_WIDTHS)
    chosen = [torch.bucketize(n, widths) for n in lengths]
    blocks, done, seen = [], 0, 0
    for k in sorted({int(c) for choice in chosen for c in choice}):
        wide = _WIDTHS[k] if k < len(_WIDTHS) else max(int(n.max()) for n in lengths)
        rows, keeps, places, owners = [], [], [], []
        for e, (n, choice) in enumerate(zip(lengths, chosen, strict=True)):
            here = (choice == k).nonzero()[:, 0]
            if not len(here):
                continue
            start = e * width + (n.cumsum(0) - n)[here]
            column = torch.arange(wide)
            keep = column < n[here, None]
            rows.append(torch.where(keep, start[:, None] + column, start[:, None]))
            keeps.append(keep)
            places.append(e * most + here)
            owners.append((e, len(here)))
        row, keep, place = torch.cat(rows), torch.cat(keeps), torch.cat(places)
        back[row[keep]] = done + keep.flatten().nonzero()[:, 0]
        order[place] = seen + torch.arange(len(place))
        done += row.numel()
        seen += len(place)
        blocks.append(Block(row, keep, place, bool(keep.all()), tuple(owners)))
    # What fills a lane's row up reads a token of its own lane, and an empty place a sentence of its own.
    for e, n in enumerate(lengths):
        back[e * width + int(n.sum()) : (e + 1) * width] = back[e * width]
        order[e * most + len(n) : (e + 1) * most] = order[e * most]
    return tuple(blocks), back, order
