"""What a capture of gradients cannot see or has to keep, as it is said to the user."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def _warn(text: str) -> None:
    warnings.warn(f"fwlora: {text}.", stacklevel=3)


def _first(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")


def say_what_sums_take(why: str, estimator: str, size: int, matrices: int) -> None:
    """`size` bytes are about to be kept until the optimizer's step."""
    cure = "Fewer sketch_columns need less" if estimator == "sketch" else "estimator='sketch' needs a small part of it"
    _warn(
        f"{why}, so that estimator={estimator!r} keeps a statistic of every matrix until optimizer.step: "
        f"{size / 2**30:.2f} GiB for {matrices} matrices. {cure}"
    )


def say_late_accumulation(step: int) -> None:
    """Of the step's first pass only norms were kept when the second one arrived."""
    _warn(
        f"step {step} is left out of the Fisher proxies, because only then it turned out that several backward passes "
        "are accumulated"
    )


def say_changed_input(name: str, step: int) -> None:
    """X of a layer is no longer what the layer saw."""
    _warn(
        f"the input of {name!r} is changed in place after the layer: step {step} is left out of the Fisher proxies, "
        "and from now on a copy of the input is kept. estimator='sketch' needs neither"
    )


def bypass(names: Sequence[str], matrices: int) -> str:
    """Layers whose adapters get a gradient without a forward pass that a hook sees."""
    return (
        f"the adapters of {len(names)} of {matrices} layers get a gradient while the layer itself is not called "
        f"({_first(names)}): by a fused kernel, a direct call of layer.forward, or code that was compiled before "
        "fwlora.attach"
    )


def say_bypassed(cause: str, estimator: str) -> None:
    """At the first observed step: another estimate takes over for all matrices."""
    _warn(
        f"{cause}. F is estimated from LoRA's own gradients instead, for all matrices alike (estimator='adapter', a "
        f"rough ranking). Turn that off to measure estimator={estimator!r}"
    )


def say_bypassed_later(cause: str, step: int) -> None:
    """At a later step, when F holds steps that were measured in full."""
    _warn(f"{cause}. Such steps (the first is {step}) are left out of the Fisher proxies")


def say_no_gradient(names: Sequence[str], matrices: int) -> None:
    """Some adapters, but not all, never got a gradient."""
    if 0 < len(names) < matrices:
        _warn(
            f"the adapters of {len(names)} of {matrices} layers got no gradient at any observed step "
            f"({_first(names)}): their F is 0. Either no batch used them, as experts that no token was routed to, or "
            "the model reads the layer's weight without calling the layer. LoRA has no effect then: leave them out of "
            "target_modules"
        )
