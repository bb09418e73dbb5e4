"""Small runs for the tests of the lane engine: six lanes of different methods, and the same runs with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

import fwlora
from fwlora import FWLoraConfig
from fwlora_lab.data.tokens import TokenTable, collate
from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.packing import Shape, pack, pack_shaped
from fwlora_lab.lanes.settings import LaneSettings
from fwlora_lab.models.classifier import head_modules, head_parts
from fwlora_lab.models.targets import target_linears

F64 = torch.float64
TARGETS = ["query", "key", "value", "intermediate", "output"]


def token_table() -> TokenTable:
    """64 examples of 3 to 29 random tokens with two classes."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (64,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    n = int(lengths.sum())
    return TokenTable(
        tokens=torch.randint(5, 90, (n,), generator=g).int(),
        types=torch.randint(0, 2, (n,), generator=g).to(torch.int8),
        offsets=offsets,
        labels=torch.randint(0, 2, (64,), generator=g),
    )


SHAPE = dict(
    vocab_size=100,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
)


def _deberta(rates: dict[str, float], **more) -> DebertaV2Config:
    given = {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0, **rates, **more}
    return DebertaV2Config(
        **SHAPE,
        relative_attention=True,
        max_relative_positions=24,
        pooler_dropout=rates["hidden_dropout_prob"],
        **given,
    )  # type: ignore[arg-type]


def classifier(kind: str, dropout: float = 0.0, seed: int = 0):
    torch.manual_seed(seed)
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    configs: dict[str, PretrainedConfig] = {
        "bert": BertConfig(**SHAPE, **rates),
        "roberta": RobertaConfig(**SHAPE, **rates, pad_token_id=1, type_vocab_size=2),
        "mpnet": MPNetConfig(**SHAPE, **rates, pad_token_id=1),
        "electra": ElectraConfig(**SHAPE, **rates, embedding_size=12, pad_token_id=0),
        "distilbert": DistilBertConfig(
            vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64, pad_token_id=0,
            dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
        ),
        "deberta-v3": _deberta(rates, share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm"),
        "deberta-v2": _deberta(rates, share_att_key=False, type_vocab_size=2, position_biased_input=True),
        "deberta-c2p": _deberta(rates, share_att_key=True, position_buckets=4, pos_att_type=["c2p"]),
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(configs[kind]).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative" in name or "rel_embeddings" in name:
                parameter.normal_(std=1.0)  # large enough that positions matter
    return model


def targets_of(model: PreTrainedModel) -> list[str]:
    return target_linears(model, TARGETS)


def settings(rank: int, targets: Sequence[str], **more) -> LaneSettings:
    given = dict(
        ranks=dict.fromkeys(targets, rank),
        scale=2.0,
        dropout=0.0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=0,
    )
    return LaneSettings(**{**given, **more})  # type: ignore[arg-type]


def initial(model, targets, rank: int, seed: int) -> tuple[dict, dict]:
    g = torch.Generator().manual_seed(seed)
    adapters = {}
    for n in targets:
        base = model.get_submodule(n)
        a = torch.randn(rank, base.in_features, generator=g, dtype=F64) / base.in_features**0.5
        adapters[n] = (a, 0.1 * torch.randn(base.out_features, rank, generator=g, dtype=F64))
    parts = {id(p) for part in head_parts(model) for p in part.parameters()}
    head = {
        n: 0.2 * torch.randn(p.shape, generator=g, dtype=F64) for n, p in model.named_parameters() if id(p) in parts
    }
    return adapters, head


WITHOUT_TYPES = ("mpnet", "distilbert", "deberta-v3", "deberta-c2p")
KINDS = ("bert", "roberta", "mpnet", "distilbert", "electra", "deberta-v3", "deberta-v2", "deberta-c2p")
FW = FWLoraConfig(warmup_steps=8, fisher_ema_decay=0.9, penalty_strength=0.01)
RUNS = [
    # (rank, learning rate, settings of the lane)
    (2, 1e-2, {}),
    (4, 5e-3, {"fw": FW, "warmup_steps": 8}),
    (
        1,
        2e-2,
        {"fw": FWLoraConfig(warmup_steps=5, penalty_mode="decoupled", penalty_strength=0.05), "warmup_steps": 5},
    ),
    (
        3,
        1e-2,
        {"fw": FWLoraConfig(warmup_steps=6, penalty_norm="factors", estimator="per_example"), "warmup_steps": 6},
    ),
    (3, 1e-2, {"fw": FWLoraConfig(warmup_steps=6, estimator="sketch", fisher_interval=2), "warmup_steps": 6}),
    (
        2,
        1e-2,
        {
            "fw": FWLoraConfig(warmup_steps=4, estimator="adapter"),
            "warmup_steps": 4,
            "max_grad_norm": None,
        },
    ),
]


def batch_of(table: TokenTable, lane: int, step: int) -> Tensor:
    return torch.randperm(64, generator=torch.Generator().manual_seed(100 * lane + step))[: 5 + lane]


class World:
    def __init__(self, kind: str, table: TokenTable, dropout: float = 0.0) -> None:
        self.kind, self.dropout = kind, dropout
        self.table = replace(table, types=None) if kind in WITHOUT_TYPES else table
        self.targets = targets_of(classifier(kind))

    def lanes(self, which: Sequence[int], **more) -> LaneEngine:
        engine = LaneEngine(classifier(self.kind, self.dropout), self.targets, len(which), 4)
        for i in which:
            rank, _, own = RUNS[i]
            s = settings(rank, self.targets, seed=i, **{**own, **more})
            engine.admit(s, *initial(classifier(self.kind), self.targets, rank, i))
        return engine

    def train(self, engine: LaneEngine, which: Sequence[int], steps: int, start: int = 0) -> list[Tensor]:
        losses = []
        for step in range(start, start + steps):
            packed = pack(self.table, [batch_of(self.table, i, step) for i in which], F64)
            losses.append(engine.step(packed, [RUNS[i][1] * 0.99**step for i in which]))
        return losses

    def peft(self, i: int, steps: int):
        """The same run with PEFT, padding, torch's AdamW and fwlora.attach."""
        from peft import LoraConfig, get_peft_model

        rank, lr, own = RUNS[i]
        model = classifier(self.kind)
        adapters, head = initial(model, self.targets, rank, i)
        with torch.no_grad():
            for name, value in head.items():
                model.get_parameter(name).copy_(value)
        modules = head_modules(model)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=self.targets, modules_to_save=modules)
        peft = get_peft_model(model, lora).double()
        for name, (a, b) in adapters.items():
            layer = peft.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(a)
            layer.lora_B["default"].weight.data.copy_(b)
        trained = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=lr,
        )
        handle = fwlora.attach(peft, optimizer, own["fw"]) if "fw" in own else None
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.99**step
            index = batch_of(self.table, i, step)
            batch = collate(self.table, index, model.config.pad_token_id, "longest", 64)
            labels = batch.pop("labels")
            cross_entropy(peft(**batch).logits, labels).backward()
            limit = own.get("max_grad_norm", 1.0)
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(trained, limit)
            optimizer.step()
            optimizer.zero_grad()
        return peft, handle


def equal_lane(engine: LaneEngine, lane: int, other: LaneEngine, there: int, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-9}
    for name, (a, b) in engine.adapters(lane).items():
        assert_close(a, other.adapters(there)[name][0], **tolerance)
        assert_close(b, other.adapters(there)[name][1], **tolerance)
    for name, value in engine.head_of(lane).items():
        assert_close(value, other.head_of(there)[name], **tolerance)


SHAPED = Shape(tokens=320, sentences=12, width=32)


def shaped(table: TokenTable, which: Sequence[int], step: int):
    return pack_shaped(table, [batch_of(table, i, step) for i in which], SHAPED, F64)
