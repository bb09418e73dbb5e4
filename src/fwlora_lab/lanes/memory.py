"""How much memory a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def storage_sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind these tensors by its address, so that shared memory is counted once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def saved_for_backward(forward: Callable[[], object]) -> dict[int, int]:
    """Run `forward` and return the sizes of what autograd saves for a backward pass, as `storage_sizes`."""
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved.update(storage_sizes([t]))
        return t.detach()  # a node that saved its own output would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        forward()
    return saved
