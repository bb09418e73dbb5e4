"""Which adapters the optimizer trains now: found anew whenever somebody changed the model or the optimizer.

After `attach`, people choose another adapter, add or delete one, move the model, load the optimizer's state (which
replaces its parameter groups) or shard both (which replaces the parameters themselves). Looking once, at the start,
would penalize what is no longer trained, and leave alone what is.
"""

# PEFT's layers and parts of torch are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fwlora.adapters import Pair, Target, active_pairs, bare_name, named_modules

ParamGroup = dict[str, Any]


class TrainedAdapters:
    """The (A, B) pairs of some frozen matrices that one optimizer trains, in the order of the matrices.

    Args:
        targets: the frozen matrices of one model, as `find_targets` returned them.
        optimizer: the optimizer that trains their adapters.

    Attributes:
        pairs: the pairs that are active and in the optimizer.
        owner: the position of each pair's matrix among the targets.
        factors: A and B of each pair in turn, [2 · pairs].
        groups: the parameter group that trains each factor; None for a factor that is frozen.
        untrained: adapters that are active and trainable, but not in the optimizer.
    """

    def __init__(self, targets: Sequence[Target], optimizer: torch.optim.Optimizer) -> None:
        self._targets = list(targets)
        self._optimizer = optimizer
        self._find()

    def refresh(self) -> bool:
        """Look again; returns whether anything changed. Costs about a microsecond a matrix if nothing did."""
        if self._is_unchanged():
            return False
        self._find()
        return True

    def _find(self) -> None:
        trained_by = {id(p): g for g in self._optimizer.param_groups for p in g["params"]}
        self.pairs: list[Pair] = []
        self.owner: list[int] = []
        self.untrained: set[str] = set()
        for i, target in enumerate(self._targets):
            layer = cast(LoraLayer, target.layer)
            if layer.disable_adapters or layer.merged:
                continue
            for pair in active_pairs(target.name, layer):
                if id(pair.a) in trained_by or id(pair.b) in trained_by:
                    self.pairs.append(pair)
                    self.owner.append(i)
                else:
                    self.untrained.add(pair.adapter)
        self.factors: list[nn.Parameter] = [f for p in self.pairs for f in (p.a, p.b)]
        self.groups: list[ParamGroup | None] = [
            trained_by.get(id(f)) if f.requires_grad else None for f in self.factors
        ]
        self._remember()

    @property
    def targets(self) -> list[Target]:
        """The matrices, in their order, each with the pairs that are trained now: perhaps none."""
        pairs: list[list[Pair]] = [[] for _ in self._targets]
        for pair, owner in zip(self.pairs, self.owner, strict=True):
            pairs[owner].append(pair)
        return [Target(t.name, t.layer, tuple(p)) for t, p in zip(self._targets, pairs, strict=True)]

    def unmeasured(self, model: nn.Module) -> list[str]:
        """The names of the matrices of `model` whose adapters the optimizer trains, and which are not among these."""
        known = {id(t.layer) for t in self._targets}
        held = {id(p) for g in self._optimizer.param_groups for p in g["params"]}
        return [
            bare_name(name)
            for name, layer in named_modules(model)
            if isinstance(layer, LoraLayer) and id(layer) not in known
            for pair in active_pairs(name, layer)
            if id(pair.a) in held or id(pair.b) in held
        ]

    # What was there at the last look. This runs before every step, so it reads the dictionaries behind the attributes
    # of a Module, which are ten times slower.

    def _remember(self) -> None:
        self._layers_seen: list[tuple[dict[str, Any], Any, bool]] = []
        self._factors_seen: list[tuple[dict[str, Any], str, Any, nn.Parameter | None, bool]] = []
        for target in self._targets:
            layer = cast(Any, target.layer)
            own = layer.__dict__
            active = copy.copy(own.get("_active_adapter", layer.active_adapter))
            self._layers_seen.append((own, active, bool(layer.disable_adapters or layer.merged)))
            for holder in (layer.lora_A._modules, layer.lora_B._modules):
                for adapter in layer.active_adapters:
                    linear = holder.get(adapter)
                    factor = None if linear is None else linear._parameters.get("weight")
                    self._factors_seen.append(
                        (holder, adapter, linear, factor, bool(factor is not None and factor.requires_grad))
                    )
        self._groups_seen = [(g, list(g["params"])) for g in self._optimizer.param_groups]
        self._first_seen = self._first_factor()

    def _is_unchanged(self) -> bool:
        for own, active, is_off in self._layers_seen:
            if own.get("_active_adapter", active) != active:
                return False
            if bool(own.get("_disable_adapters") or own.get("merged_adapters")) != is_off:
                return False
        for holder, adapter, linear, factor, is_trained in self._factors_seen:
            if holder.get(adapter) is not linear:
                return False
            if factor is not None and (
                linear._parameters.get("weight") is not factor or factor.requires_grad != is_trained
            ):
                return False
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups_seen) or self._first_factor() != self._first_seen:
            return False
        for group, (seen, parameters) in zip(groups, self._groups_seen, strict=True):
            now = group["params"]
            if group is not seen or len(now) != len(parameters) or any(map(operator.is_not, now, parameters)):
                return False
        return True

    def _first_factor(self) -> list[Any]:
        """What moving the model (`.to`) or splitting it (FSDP1) changes about parameters that stay the same objects."""
        return [(f.device, f.dtype, f.shape) for f in self.factors[:1]]
