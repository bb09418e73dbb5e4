"""The encoder's layers and the classification head as they run over packed lanes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fwlora_lab.lanes.adapted_linear import LinearGroup, adapted_linear
from fwlora_lab.lanes.architectures import Architecture, architecture_of
from fwlora_lab.lanes.attention import attention
from fwlora_lab.lanes.disentangled import DisentangledAttention, PassPositions
from fwlora_lab.lanes.dropout import add_dropped
from fwlora_lab.lanes.pass_context import PassContext


class LaneLinear(nn.Module):
    """Frozen Linears of one input and equal width as one product, with one adapter a lane on those that are targets.

    `y_e = x_e Wᵀ + bias`, and in a target's columns `+ s_e (x_e A_eᵀ) B_eᵀ`.
    """

    def __init__(
        self, model: PreTrainedModel, names: Sequence[str], targets: Collection[str], per_sentence: bool = False
    ) -> None:
        """names: the Linears in `model`; per_sentence: x will be [E, b, d_in], one row a sentence, not [E, N, d_in]."""
        super().__init__()
        linears = [cast(nn.Linear, model.get_submodule(name)) for name in names]
        self.weight, self.bias = linears[0].weight, linears[0].bias
        if len(linears) > 1:
            self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), False)
            self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), False)
        width = linears[0].out_features
        columns = [slice(i * width, (i + 1) * width) for i in range(len(names))]
        adapted = tuple((name, own) for name, own in zip(names, columns, strict=True) if name in targets)
        self.group = LinearGroup(tuple(names), width, adapted, per_sentence)

    def forward(self, x: Tensor, context: PassContext) -> Tensor:
        group = self.group
        if not group.adapted:
            return functional.linear(x, self.weight, self.bias)
        adapters = [context.adapter(name, columns) for name, columns in group.adapted]
        masks = [context.adapter_mask(x, group.per_sentence) for _ in adapters]
        capture = None if context.capture is None else context.capture.hook(group, x)
        return adapted_linear(x, context.grad_anchor, self.weight, self.bias, adapters, masks, capture)


class LaneLayer(nn.Module):
    """A layer of an encoder over packed lanes: [E, N, d] -> [E, N, d].

    The classifier reads only each sentence's first token from the last layer. So the last layer takes its keys and
    values from all tokens and computes the rest for first tokens only: [E, N, d] -> [E, b, d].
    """

    def __init__(
        self, model: PreTrainedModel, parts: Architecture, name: str, targets: Collection[str], last: bool
    ) -> None:
        super().__init__()
        layer = model.get_submodule(name)
        self.last, self.heads = last, model.config.num_attention_heads
        self.scaling = (cast(nn.Linear, layer.get_submodule(parts.query)).out_features // self.heads) ** -0.5
        self.disentangled = DisentangledAttention(layer.get_submodule("attention.self")) if parts.disentangled else None
        self.attention_dropout, self.projection_dropout, self.output_dropout = (
            0.0 if path is None else _dropout_rate(layer, path)
            for path in (parts.attention_dropout, parts.projection_dropout, parts.output_dropout)
        )
        query, *others = (f"{name}.{path}" for path in (parts.query, parts.key, parts.value))

        def linear(names: Sequence[str], per_sentence: bool) -> LaneLinear:
            return LaneLinear(model, names, targets, per_sentence)

        self.first_query = linear([query], True) if last else None
        self.inputs = linear(others if last else [query, *others], False)
        self.projection = linear([f"{name}.{parts.projection}"], last)
        self.intermediate = linear([f"{name}.{parts.intermediate}"], last)
        self.output = linear([f"{name}.{parts.output}"], last)
        self.activation = attrgetter(parts.activation)(layer)
        self.attention_norm = layer.get_submodule(parts.attention_norm)
        self.output_norm = layer.get_submodule(parts.output_norm)

    def linears(self) -> list[LaneLinear]:
        """Its matrices, in the order in which a pass uses them."""
        found = [self.first_query, self.inputs, self.projection, self.intermediate, self.output]
        return [linear for linear in found if linear is not None]

    def forward(self, x: Tensor, context: PassContext, positions: Any) -> Tensor:
        """positions: what the family's `Architecture.positions` gives for this batch."""
        packed, first, rows = context.packed, None, None
        if self.last:
            index = packed.first_token
            first = x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)
        if self.disentangled is not None:
            rows = self.disentangled.rows(context, positions)
        front = rows if self.disentangled is not None and self.disentangled.shared else None
        tokens, queries = self.inputs(_stacked(front, x), context), None
        if first is not None:
            assert self.first_query is not None
            x, queries = first, self.first_query(_stacked(front, first), context)
        masks = context.attention_masks(self.heads, self.attention_dropout, self.last)
        if self.disentangled is None:
            attended = attention(tokens, queries, packed, self.heads, self.scaling, masks, positions)
        else:
            assert rows is not None
            attended = self.disentangled(tokens, queries, rows, packed, positions, masks)
        y = self.projection(attended, context)
        x = self.attention_norm(add_dropped(x, y, context.hidden_mask(y, self.projection_dropout, self.last)))
        y = self.output(self.activation(self.intermediate(x, context)), context)
        return self.output_norm(add_dropped(x, y, context.hidden_mask(y, self.output_dropout, self.last)))


def _stacked(front: Tensor | None, x: Tensor) -> Tensor:
    return x if front is None else torch.cat([front, x], 1)


class LaneHead:
    """A classifier's head on each sentence's first token, one a lane: x [E, b, d] -> logits [E, b, classes].

    Its parameters are the lanes' own and trained in full: `shapes` has them by their name in the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # A step is the name of a Linear, the rate of a dropout, or a function.
        self.steps: list[str | float | Callable[[Tensor], Tensor]] = []
        for step in architecture_of(model.config).head(model.config):
            if isinstance(step, str) and isinstance(dropout := model.get_submodule(step), nn.Dropout):
                step = dropout.p
            self.steps.append(step)
        self.shapes: dict[str, torch.Size] = {
            f"{step}.{name}": parameter.shape
            for step in self.steps
            if isinstance(step, str)
            for name, parameter in model.get_submodule(step).named_parameters()
        }

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        for step in self.steps:
            if isinstance(step, str):
                values = context.buffers.head_values
                weight, bias = (context.rows(values[f"{step}.{name}"]) for name in ("weight", "bias"))
                x = torch.baddbmm(bias[:, None], x, weight.mT)
            elif callable(step):
                x = step(x)
            else:
                mask = context.hidden_mask(x, step, per_sentence=True)
                x = x if mask is None else x * mask
        return x


def _dropout_rate(module: nn.Module, path: str) -> float:
    return cast(nn.Dropout, module.get_submodule(path)).p


class LaneEncoder:
    """A model's frozen encoder with its layers replaced by `LaneLayer`s: a packed batch -> first tokens [E, b, d]."""

    def __init__(self, model: PreTrainedModel, targets: Collection[str]) -> None:
        """Takes over the encoder of `model`.

        Raises:
            TypeError: a target is not a Linear of an encoder layer.
        """
        encoder, prefix = model.base_model, model.base_model_prefix
        parts = architecture_of(model.config)
        self._embeddings: Any = encoder.get_submodule("embeddings")
        self._dropout = _dropout_rate(self._embeddings, "dropout")
        self._embeddings.dropout = nn.Identity()
        self._token_types = parts.token_types
        # Where both widths are equal, no projection exists.
        self._projection: Any = getattr(encoder, parts.embeddings_projection or "", None)
        self._positions = None if parts.positions is None else parts.positions(encoder)
        self._layers = cast(nn.ModuleList, encoder.get_submodule(parts.layers))
        self.groups: list[LinearGroup] = []  # the products with a target, in the order of the layers
        for i in range(len(self._layers)):
            name = f"{prefix}.{parts.layers}.{i}"
            layer = LaneLayer(model, parts, name, targets, last=i == len(self._layers) - 1)
            self.groups += [linear.group for linear in layer.linears() if linear.group.adapted]
            self._layers[i] = layer  # frees what the layer holds in another form
        if missing := set(targets) - {name for group in self.groups for name, _ in group.adapted}:
            raise TypeError(f"{min(missing)} is not a matrix of an encoder layer")
        # RoBERTa-style models count positions from padding_idx + 1.
        table: Any = getattr(self._embeddings, "position_embeddings", None)
        self._first_position = 0 if table is None or table.padding_idx is None else table.padding_idx + 1

    def __call__(self, context: PassContext) -> Tensor:
        packed = context.packed
        inputs = {"input_ids": packed.tokens, "position_ids": packed.positions + self._first_position}
        if packed.types is not None and self._token_types:
            inputs["token_type_ids"] = packed.types
        x = self._embeddings(**inputs)
        mask = context.hidden_mask(x, self._dropout)
        if mask is not None:
            x = x * mask
        if self._projection is not None:
            x = self._projection(x)
        positions = None if self._positions is None else self._positions(packed)
        if isinstance(positions, PassPositions):
            context = replace(context, position_counts=positions.counts)
        for layer in self._layers:
            x = layer(x, context, positions)
        return x
