"""When the warm-up of a run of unknown length ends: once the ranking by F is reliable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fwlora.weighting import average_ranks

if TYPE_CHECKING:
    from jaxtyping import Float

# Halves of fewer steps say little, and a check waits for the device, so it happens after 32, 64 and 128 observations.
_FIRST_HALF = 16
# By default F forgets what is more than about 50 steps old, so a longer warm-up would not make it more precise.
LATEST = 128
# Spearman's correlation between two independent halves from which their ranking counts as reliable.
RELIABLE = 0.95


def rank_correlation(one: Float[Tensor, " m"], other: Float[Tensor, " m"]) -> float:
    """Spearman's ρ: the correlation of ranks, ties sharing their mean; 1 for a single value."""
    a, b = (r - r.mean() for r in (average_ranks(one).double(), average_ranks(other).double()))
    size = float((a @ a) * (b @ b)) ** 0.5
    return 1.0 if size == 0.0 else float(a @ b) / size


class SplitHalf:
    """Says from what step on F ranks the matrices reliably, by its split-half reliability.

    After n observations, n = 16, 32, 64, …, F is remembered. At the next such n, what the later half of the
    observations alone gives is `F_2n − αⁿ F_n`, because F is an exponential moving average that starts at 0. The two
    halves share no observation. If they rank the matrices alike (Spearman's ρ ≥ 0.95), the ranking is not noise.

    Args:
        decay: α of the moving average.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._half: tuple[int, Tensor] | None = None
        self._next = _FIRST_HALF

    def is_reliable(self, fisher: Float[Tensor, " m"], observations: int, skipped: Tensor) -> bool:
        """Whether the warm-up can end here. Waits for the device at 16, 32, 64, … observations.

        Args:
            fisher: F so far.
            observations: how many steps were observed so far, with the skipped ones.
            skipped: how many of them were left out of F, a scalar on the device.
        """
        if observations < self._next:
            return False
        self._next *= 2
        counted = observations - int(skipped)
        half, self._half = self._half, (counted, fisher.clone())
        if half is None or not 0 < half[0] < counted:
            return False
        later = fisher - self._decay ** (counted - half[0]) * half[1]
        return rank_correlation(half[1], later) >= RELIABLE

    def state_dict(self, fisher: Float[Tensor, " m"]) -> dict[str, Any]:
        """What `load_state_dict` takes; `fisher` says how F looks, for the time before the first half is over."""
        counted, half = self._half or (0, torch.zeros_like(fisher))
        return {"next_check": self._next, "half_counted": counted, "half_fisher": half.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next_check"]
        self._half = (state["half_counted"], state["half_fisher"]) if state["half_counted"] else None
