"""What the bench trains on: batches with the sentence lengths of CoLA and SST-2, on MiniLM or roberta-base's shape."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.data.tokens import TokenTable
from fwlora_lab.models.backbones import Backbone, load_backbone

WHOLE, K = 800, 200  # steps of the whole run and of its warm-up
NEVER = 10**9  # steps of a run that does not end here
PADDED = 128  # tokens, to which people pad


def sentence_lengths() -> dict[str, dict[str, int]]:
    """By task, how many sentences of its training set have so many word pieces, [CLS] and [SEP] counted."""
    return json.loads(Path(__file__).with_name("lengths.json").read_text("utf-8"))


def token_table(task: str, config: PreTrainedConfig, seed: int = 0) -> TokenTable:
    """Random word pieces in sentences of the task's own lengths, every length as often as the task has it."""
    generator = np.random.default_rng(seed)
    values, counts = np.array(list(sentence_lengths()[task].items()), dtype=int).T
    lengths = generator.permutation(values.repeat(counts))
    n, total = len(lengths), int(lengths.sum())
    low = min(1000, config.vocab_size // 2)  # above the special tokens
    return TokenTable(
        tokens=torch.from_numpy(generator.integers(low, config.vocab_size, total, dtype=np.int32)),
        types=torch.zeros(total, dtype=torch.int8) if config.type_vocab_size > 1 else None,
        offsets=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
        labels=torch.from_numpy(generator.integers(0, 2, n)),
    )


@contextlib.contextmanager
def backbone_of(name: str) -> Iterator[tuple[RunConfig, Backbone]]:
    """A run's config and its encoder: the packaged MiniLM, or random weights of roberta-base's shape."""
    cfg = load_run("minilm-cola-lora", ["training.lr_scheduler=constant", "training.warmup_ratio=0"])
    if name == "minilm":
        yield cfg, load_backbone(cfg.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_random_roberta(Path(folder))
        model = cfg.model.model_copy(update={"name": "roberta-base's shape", "pretrained_id": folder})
        cfg = cfg.model_copy(update={"model": model})
        yield cfg, load_backbone(cfg.model)


def _write_random_roberta(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Workload:
    """What all contestants run on: the encoder, the examples, and the batches in their order."""

    cfg: RunConfig
    backbone: Backbone
    table: TokenTable
    batches: Sequence[Tensor]
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    spec: TaskSpec = field(
        default=TaskSpec("bench", "classification", ("0", "1"), 1, ("accuracy",), "accuracy"), repr=False
    )

    def config(self, method: str, **fw: Any) -> RunConfig:
        """The run's config for a method, with settings of FW-LoRA; AdaLoRA allocates from its first step on."""
        update: dict[str, Any] = {"method": method}
        if method == "adalora":
            update["adalora"] = self.cfg.adalora.model_copy(update={"tinit_ratio": 0.0, "tfinal_ratio": 0.5})
        if fw:
            update["fw_lora"] = self.cfg.fw_lora.model_copy(update=fw)
        return self.cfg.model_copy(update=update)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flops(self, batches: Sequence[Tensor]) -> float:
        """Arithmetic of the matrix products that a LoRA step on these batches cannot do without."""
        rank = self.cfg.model.lora.rank
        assert rank is not None
        return sum(step_flops(self.backbone.config, rank, self.table.lengths()[batch]) for batch in batches)


def step_flops(config: PreTrainedConfig, rank: int, lengths: Tensor, classes: int = 2) -> float:
    """FLOPs of the matrix products of one training step on sentences of these lengths, [b], and nothing for padding.

    Frozen matrices forwards and for the gradient of their inputs, LoRA on query, key, value and both FFN matrices
    with its gradients, attention within each sentence, and the head. The first layer's inputs need no gradient, and of
    the last layer's outputs the classifier reads each sentence's first token only.
    """
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    n, b, squares = float(lengths.sum()), float(len(lengths)), float(lengths.square().sum())

    def linear(tokens: float, d_in: int, d_out: int, adapted: bool = True, inner: bool = True) -> float:
        frozen = 2 * d_in * d_out * (1 + inner)
        # x·Aᵀ, ·Bᵀ, their transposes for the gradients of A and B, and of the inputs.
        thin = 2 * rank * (2 * d_in + 3 * d_out + inner * d_in) if adapted else 0
        return tokens * (frozen + thin)

    total = 0.0
    for layer in range(layers):
        inner, tokens = layer > 0, (n if layer < layers - 1 else b)
        total += linear(tokens, d, d, inner=inner) + 2 * linear(n, d, d, inner=inner)
        total += linear(tokens, d, d, adapted=False) + linear(tokens, d, f) + linear(tokens, f, d)
        total += 12 * d * (squares if layer < layers - 1 else n)  # two products, and two each for their gradients
    return total + 6 * b * (d * d + d * classes)
