"""The encoder families that the lane engine trains: one description each of where their parts are.

To add a family, add its description to `ARCHITECTURES`, its matrices to `fwlora_lab.catalog.encoders.ROLES` and its
config to the tests of the engine, which compare it with PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from fwlora_lab.lanes.attention import biases_of_blocks
from fwlora_lab.lanes.disentangled import RelativePositions
from fwlora_lab.lanes.packing import Packed

HeadStep = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Architecture:
    """Paths of an encoder's parts in the classifiers of transformers.

    Every family here adds its embeddings, normalises them, and normalises again after each residual connection.

    Attributes:
        head: from the config to what the classifier does with the first token's state: names of Linears and Dropouts,
            and functions.
        layers: the list of layers, below the encoder.
        query, key, value, projection, intermediate, output: Linears below a layer.
        attention_norm, output_norm: the norms after attention and feed-forward layer.
        activation: the function between the two Linears of the feed-forward layer.
        attention_dropout, projection_dropout, output_dropout: of the attention's probabilities and of what is added to
            the residual stream; None where the family has none.
        token_types: whether the embeddings take token types.
        embeddings_projection: a frozen Linear from the embeddings' width to the layers', if the encoder has one.
        positions: from the encoder to a function of a batch, called once a pass, that gives what the attention of all
            layers needs of relative positions: biases by block (see `biases_of_blocks`), or with `disentangled` a
            `PassPositions`. None for an encoder without relative positions.
        disentangled: whether its attention is DeBERTa's.
        missing: what a model of the family may have and lanes do not compute, in words; None for a model without it.
    """

    head: Callable[[PreTrainedConfig], tuple[HeadStep, ...]]
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
    positions: Callable[[Any], Callable[[Packed], Any]] | None = None
    disentangled: bool = False
    missing: Callable[[Any], str | None] = lambda config: None

    @property
    def matrices(self) -> frozenset[str]:
        """The Linears of a layer that lanes can adapt."""
        return frozenset({self.query, self.key, self.value, self.projection, self.intermediate, self.output})


def _bucketed_bias(encoder: Any) -> Callable[[Packed], list[Tensor]]:
    """MPNet's bias: one number a head for each bucket of relative positions, as in T5."""
    table = encoder.encoder.relative_attention_bias.weight
    of_width: dict[int, Tensor] = {}

    def bias(width: int) -> Tensor:
        if width not in of_width:
            position = torch.arange(width, device=table.device)
            bucket = encoder.encoder.relative_position_bucket(position - position[:, None])
            of_width[width] = table[bucket].permute(2, 0, 1).contiguous()
        return of_width[width]

    return lambda packed: biases_of_blocks(packed, bias)


def _missing_of_deberta(config: Any) -> str | None:
    if getattr(config, "conv_kernel_size", 0) > 0:
        return "deberta-v2 with a convolution (conv_kernel_size)"
    if not config.relative_attention or not {"c2p", "p2c"} & set(config.pos_att_type or ()):
        return "deberta-v2 without relative attention (relative_attention, pos_att_type)"
    return None


def _classifier(activation: Callable[[Tensor], Tensor]) -> Callable[[PreTrainedConfig], tuple[HeadStep, ...]]:
    return lambda config: (
        "classifier.dropout",
        "classifier.dense",
        activation,
        "classifier.dropout",
        "classifier.out_proj",
    )


_BERT = Architecture(lambda config: ("bert.pooler.dense", torch.tanh, "dropout", "classifier"))
_ROBERTA = Architecture(_classifier(torch.tanh))
ARCHITECTURES: dict[str, Architecture] = {  # by the config's model_type
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Architecture(_classifier(functional.gelu), embeddings_projection="embeddings_project"),
    "mpnet": replace(
        _ROBERTA,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        projection="attention.attn.o",
        attention_norm="attention.LayerNorm",
        attention_dropout="attention.attn.dropout",
        projection_dropout="attention.dropout",
        token_types=False,
        positions=_bucketed_bias,
    ),
    "distilbert": Architecture(
        lambda config: ("pre_classifier", torch.relu, "dropout", "classifier"),
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        projection="attention.out_lin",
        intermediate="ffn.lin1",
        output="ffn.lin2",
        attention_norm="sa_layer_norm",
        output_norm="output_layer_norm",
        activation="ffn.activation",
        attention_dropout="attention.dropout",
        projection_dropout=None,
        output_dropout="ffn.dropout",
        token_types=False,
    ),
    "deberta-v2": Architecture(
        lambda config: (
            "pooler.dropout",
            "pooler.dense",
            ACT2FN[config.pooler_hidden_act],  # type: ignore[attr-defined]
            "dropout",
            "classifier",
        ),
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        positions=RelativePositions,
        disentangled=True,
        missing=_missing_of_deberta,
    ),
}


def missing_in_lanes(config: PreTrainedConfig, targets: Iterable[str] = ()) -> str | None:
    """What of this encoder, or of adapters on these matrices, the engine does not compute; None where it does all."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        return config.model_type
    if getattr(config, "is_decoder", False):
        return f"{config.model_type} as a decoder (is_decoder)"
    below_layer = re.compile(rf".*\.{re.escape(architecture.layers)}\.\d+\.(.*)")
    for name in targets:
        match = below_layer.fullmatch(name)
        if match is None or match[1] not in architecture.matrices:
            return f"adapters on {name}"
    return architecture.missing(config)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The description of this encoder.

    Raises:
        TypeError: the engine does not support it.
    """
    if missing := missing_in_lanes(config):
        raise TypeError(f"The lane engine does not support {missing}")
    return ARCHITECTURES[config.model_type]
