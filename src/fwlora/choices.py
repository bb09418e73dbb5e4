"""The choices that `FWLoraConfig` offers by name, and the names that others have added to them."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Estimator: TypeAlias = Literal["exact", "sketch", "adapter", "per_example"]
Weighting: TypeAlias = Literal["importance", "uniform", "rank", "power", "permuted"]
Averaging: TypeAlias = Literal["raw", "normalized"]
PenaltyMode: TypeAlias = Literal["loss", "decoupled"]
PenaltyNorm: TypeAlias = Literal["update", "factors"]

Setting: TypeAlias = Literal["estimator", "weighting", "averaging", "penalty_mode", "penalty_norm"]
Extensible: TypeAlias = Literal["estimator", "weighting"]

_BUILT_IN: dict[Setting, tuple[str, ...]] = {
    "estimator": get_args(Estimator),
    "weighting": get_args(Weighting),
    "averaging": get_args(Averaging),
    "penalty_mode": get_args(PenaltyMode),
    "penalty_norm": get_args(PenaltyNorm),
}
_ADDED: dict[Setting, list[str]] = {"estimator": [], "weighting": []}


def choices_of(setting: Setting) -> tuple[str, ...]:
    """Every name that the setting accepts now: the built-in ones, then the registered ones."""
    return (*_BUILT_IN[setting], *_ADDED.get(setting, ()))


def add_choice(setting: Extensible, name: str) -> None:
    """Make `setting` accept `name`; `fwlora.register_weighting` and `fwlora.register_estimator` call this.

    Raises:
        ValueError: the name is not an identifier, or is taken.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot name a {setting}: use letters, digits and underscores")
    if name in choices_of(setting):
        raise ValueError(f"the {setting} {name!r} exists already: choose another name")
    _ADDED[setting].append(name)
