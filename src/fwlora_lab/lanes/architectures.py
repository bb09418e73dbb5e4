"""The encoder families that the lane engine trains: one description each of where their parts are.

To add a family, add its description to `ARCHITECTURES`, its matrices to `fwlora_lab.catalog.encoders.ROLES` and its
config to the tests of the engine, which compare it with PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

HeadStep = str | Callable[[Tensor], Tensor]
PositionBias = Callable[[int], Tensor]


@dataclass(frozen=True)
class Architecture:
    """Paths of an encoder's parts in the classifiers of transformers.

    Every family here adds its embeddings, normalises them, and normalises again after each residual connection.

    Attributes:
        head: what the classifier does with the first token's state: names of Linears and Dropouts, and functions.
        layers: the list of layers, below the encoder.
        query, key, value, projection, intermediate, output: Linears below a layer.
        attention_norm, output_norm: the norms after attention and feed-forward layer.
        activation: the function between the two Linears of the feed-forward layer.
        attention_dropout, projection_dropout, output_dropout: of the attention's probabilities and of what is added to
            the residual stream; None where the family has none.
        token_types: whether the embeddings take token types.
        embeddings_projection: a frozen Linear from the embeddings' width to the layers', if the encoder has one.
        position_bias: from the encoder to a function T -> [heads, T, T], which is added to the attention's scaled
            scores of sentences of T tokens in all layers.
        missing: what a model of the family may have and lanes do not compute, in words; None for a model without it.
    """

    head: tuple[HeadStep, ...]
    layers: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    projection: str = "attention.output.dense"
    intermediate: str = "intermediate.dense"
    output: str = "output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    output_norm: str = "output.LayerNorm"
    activation: str = "intermediate.intermediate_act_fn"
    attention_dropout: str = "attention.self.dropout"
    projection_dropout: str | None = "attention.output.dropout"
    output_dropout: str | None = "output.dropout"
    token_types: bool = True
    embeddings_projection: str | None = None
    position_bias: Callable[[Any], PositionBias] | None = None
    missing: Callable[[PreTrainedConfig], str | None] = lambda config: None


def _bucketed_bias(encoder: Any) -> PositionBias:
    """MPNet's bias: one number a head for each bucket of relative positions (T5's buckets)."""
    table = encoder.encoder.relative_attention_bias.weight
    of_width: dict[int, Tensor] = {}

    def bias(width: int) -> Tensor:
        if width not in of_width:
            position = torch.arange(width, device=table.device)
            bucket = encoder.encoder.relative_position_bucket(position - position[:, None])
            of_width[width] = table[bucket].permute(2, 0, 1).contiguous()
        return of_width[width]

    return bias


def _classifier_head(activation: Callable[[Tensor], Tensor]) -> tuple[HeadStep, ...]:
    return "classifier.dropout", "classifier.dense", activation, "classifier.dropout", "classifier.out_proj"


_BERT = Architecture(("bert.pooler.dense", torch.tanh, "dropout", "classifier"))
_ROBERTA = Architecture(_classifier_head(torch.tanh))
_MPNET = replace(
    _ROBERTA,
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    projection="attention.attn.o",
    attention_norm="attention.LayerNorm",
    attention_dropout="attention.attn.dropout",
    projection_dropout="attention.dropout",
    token_types=False,
    position_bias=_bucketed_bias,
)
ARCHITECTURES: dict[str, Architecture] = {  # by the config's model_type
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _MPNET,
}


def missing_in_lanes(config: PreTrainedConfig) -> str | None:
    """What of this encoder the engine does not compute, in words; None where it computes all of it."""
    architecture = ARCHITECTURES.get(config.model_type)
    return config.model_type if architecture is None else architecture.missing(config)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The description of this encoder.

    Raises:
        TypeError: the engine does not support it.
    """
    if missing := missing_in_lanes(config):
        raise TypeError(f"The lane engine does not support {missing}")
    return ARCHITECTURES[config.model_type]
