"""Fisher-Weighted LoRA's penalty over lanes: its weights from F, and its gradient."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fwlora.weighting import penalty_weights
from fwlora_lab.lanes.buffers import FactorStacks, LaneBuffers
from fwlora_lab.lanes.settings import Lane


class LanePenalty:
    """The gradient of `Σ_m c_m ‖s·B_m·A_m‖_F²`, or of the norm of the factors themselves, with each lane's own c_m.

    Two implementations give the same gradient: batched products over stacks of factors, which run everywhere, and one
    Triton kernel (`fused_penalty`), which is taken where it is faster.
    """

    def __init__(self, buffers: LaneBuffers) -> None:
        self._buffers = buffers
        self.fused = False

    def arrange(self, lanes: Sequence[Lane]) -> None:
        """Take over the settings of these lanes."""
        fws = [lane.settings.fw for lane in lanes]
        in_loss = [not fw or fw.penalty_mode == "loss" for fw in fws]
        self._in_loss = self._buffers.column(in_loss, torch.bool)[:, None, None]
        self._any_decoupled = not all(in_loss)
        self._all_fusable = all(in_loss) and all(not fw or fw.penalty_norm == "update" for fw in fws)

    def set_weights(self, row: int, lane: Lane) -> None:
        """Compute a lane's weights from its F, once, at the end of its warm-up; they stay for the rest of its run."""
        settings, fw = lane.settings, lane.settings.fw
        assert fw is not None
        buffers, layout = self._buffers, self._buffers.layout
        targets = [m for m, name in enumerate(layout.targets) if settings.ranks.get(name)]
        own = torch.tensor(targets, device=layout.device)
        weights = penalty_weights(
            buffers.fisher[row, own],
            fw.weighting,
            gamma=fw.gamma,
            max_weight_ratio=fw.max_weight_ratio,
            normalize=fw.normalize_weights,
            seed=fw.seed,
        )
        square = settings.scale**2 if fw.penalty_norm == "update" else 1.0
        twice = (
            2.0 * fw.penalty_strength * square * weights
        )  # the gradient of ‖·‖² has a factor of 2, for A and B alike
        for numbers in (layout.number_of_a, layout.number_of_b):
            buffers.coefficients[fw.penalty_norm][row, numbers[own]] = twice
        self.fused = self._is_fused_faster()

    def add_gradient(self, norm: str, factors: FactorStacks, learning_rate: Tensor) -> None:
        """Add the penalty's gradient to the gradients of lanes with penalty_mode "loss".

        For lanes with "decoupled" the learning rate [E, 1] times the gradient is subtracted from the values.
        """
        if self.fused:
            self.add_fused()
        else:
            self.add_stacked(norm, factors, learning_rate)

    def add_stacked(self, norm: str, factors: FactorStacks, learning_rate: Tensor) -> None:
        """`fwlora.penalty.update_gradients` over the flat buffers, in batched products.

        Each factor is multiplied with its partner's Gram matrix: A with BᵀB and Bᵀ with AAᵀ. The gradient of the norm
        of the factors themselves is the factor.
        """
        buffers, layout = self._buffers, self._buffers.layout
        partners = factors.grams[:, layout.partner] if norm == "update" else None
        for group, term in zip(layout.groups, factors.by_group, strict=True):
            if partners is not None:
                term = torch.bmm(partners[:, group.numbers].flatten(0, 1), term)
            values, grads = layout.group(buffers.values, group), layout.group(buffers.grads, group)
            term, c = term.view_as(values), buffers.coefficients[norm][:, group.numbers, None, None]
            if not self._any_decoupled:
                grads.addcmul_(term, c)
            else:
                term = term * c
                grads.add_(torch.where(self._in_loss, term, 0.0))
                values.sub_(torch.where(self._in_loss, 0.0, term) * learning_rate[..., None, None])

    def add_fused(self) -> None:
        """The same for the norm "update" and lanes with penalty_mode "loss", in one kernel launch."""
        # Imported here because Triton comes with PyTorch's CUDA builds only.
        from fwlora_lab.lanes.fused_penalty import add_gradient

        buffers, layout = self._buffers, self._buffers.layout
        add_gradient(
            buffers.values,
            buffers.grads,
            buffers.coefficients["update"],
            layout.factor_starts,
            layout.factor_lengths,
            layout.partner,
            layout.rank,
        )

    def _is_fused_faster(self) -> bool:
        """Whether the kernel can be used for the present lanes and is faster, measured on this device."""
        buffers, layout = self._buffers, self._buffers.layout
        if layout.device.type != "cuda" or buffers.dtype != torch.float32:
            return False
        if layout.svd_parametrized or not self._all_fusable or importlib.util.find_spec("triton") is None:
            return False
        learning_rate = torch.zeros(len(buffers.values), 1, dtype=buffers.dtype, device=layout.device)

        def stacked() -> None:
            self.add_stacked("update", FactorStacks(buffers), learning_rate)

        # Both add to gradients that the next step sets to zero.
        return _milliseconds(self.add_fused) < _milliseconds(stacked)


def _milliseconds(call: Callable[[], None], repeats: int = 20) -> float:
    """GPU time of so many calls, after one that warms up."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
