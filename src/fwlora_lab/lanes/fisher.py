"""Fisher-Weighted LoRA's warm-up over lanes: capture each target's squared gradient norm and average it into F."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fwlora import estimators
from fwlora_lab.lanes.adapted_linear import CaptureHook, LinearGroup
from fwlora_lab.lanes.buffers import LaneBuffers
from fwlora_lab.lanes.packing import Packed
from fwlora_lab.lanes.settings import Lane


def draw_probes(lanes: Sequence[Lane], observed: Sequence[int], buffers: LaneBuffers) -> dict[int, Tensor]:
    """The sketches' Gaussian probes Ωᵀ of this step by d_in: [E, k, d_in], zero for lanes without a sketch.

    Empty if none of the observed lanes has one.
    """
    sketching = [(e, fw) for e in observed if (fw := lanes[e].settings.fw) is not None and fw.estimator == "sketch"]
    if not sketching:
        return {}
    most = max(fw.sketch_columns for _, fw in sketching)
    device, dtype = buffers.layout.device, buffers.compute_dtype
    probes = {}
    for d in dict.fromkeys(d_in for d_in, _ in buffers.layout.shapes):
        probes[d] = torch.zeros(len(lanes), most, d, dtype=dtype, device=device)
        for e, fw in sketching:
            probes[d][e, : fw.sketch_columns] = estimators.gaussian_probe(
                d, fw.sketch_columns, seed=fw.seed, step=lanes[e].step, device=device, dtype=dtype
            ).T
    return probes


class FisherCapture:
    """What the hooked estimators of `fwlora.estimators` collect in one backward pass, for the observed lanes."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        observed: Sequence[int],
        probes: Mapping[int, Tensor],
        packed: Packed,
        dtype: torch.dtype,
    ) -> None:
        """`observed` are the numbers of the lanes to capture, `probes` from `draw_probes`, `dtype` that of F."""
        self._lanes, self._observed, self._probes = lanes, observed, probes
        self._packed, self._dtype = packed, dtype
        self.sketches: dict[LinearGroup, Tensor] = {}  # (XΩ)ᵀG [E, k, d_out] of all Linears of a group
        self.squared_grad_norms: dict[str, Tensor] = {}  # [E] by target, 0 for lanes with another estimator

    def hook(self, group: LinearGroup, x: Tensor) -> CaptureHook:
        """The function that the backward pass of this product has to call."""
        projected = None
        if self._probes:
            # In the forward pass, because x is still in the cache.
            with torch.no_grad():
                projected = torch.bmm(x, self._probes[x.shape[-1]].mT)
        return partial(self._collect, group, projected)

    def _collect(self, group: LinearGroup, projected: Tensor | None, g: Tensor, x: Tensor) -> None:
        """g = ∂L/∂y [E, N, d_out] and x [E, N, d_in], a row a token, or a sentence if `group.per_sentence`.

        Rows of relative positions may be in front. As one use of the matrix, they count as an example of their own.
        """
        if projected is not None:
            self.sketches[group] = torch.bmm(projected.mT, g)
        packed = self._packed
        counts = packed.sentence_counts if group.per_sentence else packed.token_counts
        front = g.shape[1] - (packed.first_token if group.per_sentence else packed.tokens).shape[1]
        for e in self._observed:
            fw, n = self._lanes[e].settings.fw, counts[e]
            assert fw is not None
            if fw.estimator not in ("exact", "per_example"):
                continue
            for name, columns in group.adapted:
                if fw.estimator == "exact":
                    used = slice(0, front + n)
                    squared = estimators.weight_gradient(g[e, used, columns], x[e, used]).square().sum()
                elif group.per_sentence:
                    used = slice(front, front + n)
                    squared = estimators.per_example_squared_norm(g[e, used, None, columns], x[e, used, None])
                else:
                    squared = self._per_example(e, g[:, front:, columns], x[:, front:])
                if front and fw.estimator == "per_example":
                    squared += estimators.per_example_squared_norm(g[e, None, :front, columns], x[e, None, :front])
                if name not in self.squared_grad_norms:
                    self.squared_grad_norms[name] = torch.zeros(len(self._lanes), dtype=self._dtype, device=g.device)
                self.squared_grad_norms[name][e] = squared

    def _per_example(self, lane: int, g: Tensor, x: Tensor) -> Tensor:
        """Squared gradient norms of the lane's sentences, summed; the blocks say which tokens form a sentence."""
        packed = self._packed
        flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        total = torch.zeros((), dtype=self._dtype, device=g.device)
        for block in packed.blocks:
            start = 0
            for row, sentences in block.by_lane:
                rows = slice(start, start + sentences)
                start += sentences
                if row == lane:
                    used = block.is_token[rows, :, None]
                    if packed.fixed_shape:  # an unused place is not an example
                        used = used & (packed.weights[lane] > 0)[:, None, None]
                    index = block.token_index[rows]
                    total = total + estimators.per_example_squared_norm(flat_g[index] * used, flat_x[index] * used)
        return total


class LaneFisher:
    """F, the exponential moving average of each target's squared gradient norm, over lanes."""

    def __init__(self, buffers: LaneBuffers, groups: Sequence[LinearGroup]) -> None:
        """`groups` are the products whose sketches a capture may hold."""
        self._buffers = buffers
        # Sketches are laid next to each other, those of equal width together, so one sum reduces all of a width.
        self._groups = sorted(groups, key=lambda group: group.width)
        self._widths = Counter(group.width for group in self._groups for _ in group.names)
        place = {name: i for i, name in enumerate(name for group in self._groups for name in group.names)}
        layout = buffers.layout
        self._sketch_of = torch.tensor([place[name] for name in layout.targets], device=layout.device)

    def arrange(self, lanes: Sequence[Lane]) -> None:
        """Take over the settings of these lanes."""
        column, layout = self._buffers.column, self._buffers.layout
        fws = [lane.settings.fw for lane in lanes]
        ranks = layout.ranks_of(lanes)
        self._owned = ranks > 0
        self._decay = column([fw.fisher_ema_decay if fw else 0.0 for fw in fws])
        self._normalized = column([bool(fw and fw.averaging == "normalized") for fw in fws], torch.bool)
        self._sketch_columns = column([fw.sketch_columns if fw else 1 for fw in fws])
        from_adapter = [bool(fw and fw.estimator == "adapter") for fw in fws]
        self._from_adapter, self._any_from_adapter = column(from_adapter, torch.bool), any(from_adapter)
        # 3·d_in/(s²·r), see `fwlora.estimators.adapter_squared_norm`.
        d_in = torch.tensor([d for d, _ in layout.shapes], device=layout.device)
        scales = column([lane.settings.scale for lane in lanes])
        self._adapter_factor = 3.0 * d_in / ranks.clamp_min(1) / scales.square()

    def update(self, capture: FisherCapture, observed: Tensor) -> None:
        """`F ← α·F + (1 − α)·f` with the step's f, for the lanes where `observed` [E, 1] is true."""
        buffers, layout = self._buffers, self._buffers.layout
        squared = torch.zeros_like(buffers.fisher)
        if capture.squared_grad_norms:
            squared = torch.stack([capture.squared_grad_norms[name] for name in layout.targets], -1)
        if capture.sketches:
            squared = squared + self._from_sketches(capture.sketches)
        if self._any_from_adapter:
            norms = [layout.group(buffers.grads, group).square().sum((-2, -1)) for group in layout.groups]
            of_b = torch.cat(norms, 1)[:, layout.number_of_b]
            squared = torch.where(self._from_adapter, of_b * self._adapter_factor, squared)
        squared = torch.where(self._owned, squared, 0.0)
        # Steps that are not finite are left out and not counted: their update makes the lane NaN, so its run fails.
        raw, normalized = (
            estimators.update_average(buffers.fisher, squared, self._decay, averaging)[0]
            for averaging in ("raw", "normalized")
        )
        averaged = torch.where(self._normalized, normalized, raw)
        buffers.fisher.copy_(torch.where(observed, averaged, buffers.fisher))

    def _from_sketches(self, sketches: Mapping[LinearGroup, Tensor]) -> Tensor:
        """`‖(XΩ)ᵀG‖_F² / k` by target [E, M]."""
        side_by_side = torch.cat([sketches[group] for group in self._groups], -1)
        squares = side_by_side.to(self._buffers.dtype).square_().sum(1)
        by_width = squares.split([width * count for width, count in self._widths.items()], -1)
        sums = [own.unflatten(-1, (-1, width)).sum(-1) for own, width in zip(by_width, self._widths, strict=True)]
        return torch.cat(sums, -1)[:, self._sketch_of] / self._sketch_columns
