"""What the layers read in one forward pass over several lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwlora_lab.lanes.adapted_linear import Adapter
from fwlora_lab.lanes.buffers import LaneBuffers
from fwlora_lab.lanes.dropout import DropoutRng, write_dropout_mask
from fwlora_lab.lanes.fisher import FisherCapture
from fwlora_lab.lanes.packing import Block, Packed


@dataclass(frozen=True)
class PassContext:
    """One forward pass: its batch, the lanes in it, their dropout, and what its backward pass has to capture.

    Attributes:
        packed: the batch; its row e belongs to the e-th lane of this pass.
        buffers: the parameters of all lanes.
        selected: which rows of the buffers are in this pass, int64; None if all are, in their order.
        scales: s of the lanes in this pass, [E, 1, 1].
        adapter_dropout: dropout rates of the adapters' inputs, by lane in this pass.
        rng: where dropout masks come from; None for a pass without dropout.
        capture: collects Fisher statistics in the backward pass; None if no lane is observed.
        grad_anchor: see `adapted_linear`.
        position_counts: the rows of relative positions that each lane uses, for encoders that project these.
    """

    packed: Packed
    buffers: LaneBuffers
    selected: Tensor | None
    scales: Tensor
    adapter_dropout: Sequence[float]
    rng: DropoutRng | None
    capture: FisherCapture | None
    grad_anchor: Tensor
    position_counts: Sequence[int] = ()

    def rows(self, t: Tensor) -> Tensor:
        """Of a tensor over all lanes [E, …], the rows of the lanes in this pass."""
        return t if self.selected is None else t[self.selected]

    def adapter(self, name: str, columns: slice) -> Adapter:
        """The factors of a target for the lanes in this pass."""
        a, b, *singular = map(self.rows, self.buffers.factors[name])
        grad_a, grad_b, *grad_singular = self.buffers.factor_grads[name]
        c = self.scales * singular[0][:, None] if singular else self.scales
        scale = self.scales[:, 0]
        return Adapter(columns, a, b, c, grad_a, grad_b, scale, grad_singular[0] if grad_singular else None)

    def adapter_mask(self, x: Tensor, per_sentence: bool) -> Tensor | None:
        """Dropout of an adapter's input [E, N, d] or [E, b, d], divided by 1 − p; None without dropout.

        The input may have rows of relative positions in front.
        """
        if self.rng is None or not any(self.adapter_dropout):
            return None
        return self._mask(self.rng, x.shape, per_sentence, self.adapter_dropout)

    def hidden_mask(self, x: Tensor, p: float, per_sentence: bool = False) -> Tensor | None:
        """The same for hidden states, at one rate for all lanes."""
        if self.rng is None or p <= 0.0:
            return None
        return self._mask(self.rng, x.shape, per_sentence, [p] * len(x))

    def _mask(self, rng: DropoutRng, shape: torch.Size, per_sentence: bool, rates: Sequence[float]) -> Tensor:
        packed, buffers = self.packed, self.buffers
        dtype, device = buffers.compute_dtype, buffers.layout.device
        if packed.fixed_shape and len(set(rates)) == 1:
            mask = torch.empty(shape, dtype=dtype, device=device)
            write_dropout_mask(rng.shared_bits(shape[1:].numel()), rates[0], mask)
            return mask
        mask = torch.zeros(shape, dtype=dtype, device=device)
        shared = rng.shared_bits(shape[1:].numel()) if packed.fixed_shape else None
        counts = packed.sentence_counts if per_sentence else packed.token_counts
        front = shape[1] - (packed.first_token if per_sentence else packed.tokens).shape[1]
        for row, (n, p) in enumerate(zip(counts, rates, strict=True)):
            if shared is not None:
                write_dropout_mask(shared[row], p, mask[row])
                continue
            if front:
                used = self.position_counts[row]
                write_dropout_mask(rng.bits_for(row, used * shape[-1]), p, mask[row, :used])
            write_dropout_mask(rng.bits_for(row, n * shape[-1]), p, mask[row, front : front + n])
        return mask

    def position_mask(self, x: Tensor, p: float) -> Tensor | None:
        """Dropout of the embeddings of relative positions [E, R, d], divided by 1 − p; None without dropout."""
        if self.rng is None or p <= 0.0:
            return None
        mask = torch.zeros(x.shape, dtype=self.buffers.compute_dtype, device=self.buffers.layout.device)
        if self.packed.fixed_shape:
            write_dropout_mask(self.rng.shared_bits(x[0].numel()), p, mask)
            return mask
        for row, used in enumerate(self.position_counts):
            write_dropout_mask(self.rng.bits_for(row, used * x.shape[-1]), p, mask[row, :used])
        return mask

    def attention_masks(self, heads: int, p: float, single_query: bool) -> list[Tensor | None]:
        """By block, dropout at rate p of the attention's probabilities [S·heads, t, T], divided by 1 − p."""
        if self.rng is None or p <= 0.0:
            return [None] * len(self.packed.blocks)
        masks: list[Tensor | None] = []
        for block in self.packed.blocks:
            s, t = block.token_index.shape
            masks.append(self._attention_mask(block, (s, heads, 1 if single_query else t, t), p).flatten(0, 1))
        return masks

    def _attention_mask(self, block: Block, shape: tuple[int, ...], p: float) -> Tensor:
        rng = self.rng
        assert rng is not None
        lanes = len(self.packed.tokens)
        mask = torch.empty(shape, dtype=self.buffers.compute_dtype, device=self.buffers.layout.device)
        size = mask[0].numel()  # of one sentence
        if self.packed.fixed_shape:
            write_dropout_mask(rng.shared_bits(shape[0] // lanes * size), p, mask.view(lanes, -1))
            return mask
        start = 0
        for row, sentences in block.by_lane:
            part = mask[start : start + sentences]
            write_dropout_mask(rng.bits_for(row, sentences * size), p, part)
            start += sentences
        return mask
