"""Lanes: each is the run that it would be alone, and the run that PEFT trains.

pytest tests/fwlora_lab/lanes/test_lanes.py
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny import World as Tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import fwlora
from fwlora import FWLoraConfig
from fwlora.penalty import NORMS
from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.data.tokens import TokenTable, collate
from fwlora_lab.lanes.attention import ATTENTION
from fwlora_lab.lanes.engine import Lanes
from fwlora_lab.lanes.packing import Shape, pack, pack_shaped, shape_of
from fwlora_lab.lanes.settings import Allocation, LaneSettings
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.models.classifier import build_classifier
from fwlora_lab.models.methods import build_method, initial_ranks
from fwlora_lab.training.lane_settings import lane_settings

F64 = torch.float64
TARGETS = ("query", "key", "value", "intermediate.dense", "output.dense")


@pytest.fixture(scope="module")
def table() -> TokenTable:
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


def classifier(kind: str, dropout: float = 0.0, seed: int = 0):
    torch.manual_seed(seed)
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SHAPE, **rates)).double()
    config = RobertaConfig(**SHAPE, **rates, pad_token_id=1, type_vocab_size=2)
    return RobertaForSequenceClassification(config).double()


def targets_of(model: nn.Module) -> list[str]:
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.endswith(TARGETS) and "attention.output" not in n
    ]


# Packed batches


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_packed_is_padded(kind, table):
    torch.manual_seed(0)
    config, model, offset, pad = {
        "bert": (BertConfig(**SHAPE), BertModel, 0, 0),
        "roberta": (RobertaConfig(**SHAPE, pad_token_id=1, type_vocab_size=2), RobertaModel, 2, 1),
        # A window much narrower than the sentences: who sees whom must be right there, too.
        "modernbert": (
            ModernBertConfig(**{**SHAPE, "num_hidden_layers": 4}, local_attention=8, pad_token_id=0),
            ModernBertModel,
            0,
            0,
        ),
    }[kind]
    encoder = model(config).double().eval()
    with torch.no_grad():  # far from the initialisation, where every output looks alike
        for p in encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    batches = [torch.arange(0, 13), torch.arange(13, 64)]
    packed = pack(table, batches, F64)
    assert packed.tokens.shape[1] == max(packed.counts) == int(table.lengths()[13:].sum())
    want = []
    for b in batches:
        batch = collate(table, b, pad, "longest", 64)
        del batch["labels"]
        if kind == "modernbert":
            del batch["token_type_ids"]
        want.append(encoder(**batch).last_hidden_state[:, 0])
    encoder.config._attn_implementation = ATTENTION
    types = {} if kind == "modernbert" else {"token_type_ids": packed.types}
    hidden = encoder(
        input_ids=packed.tokens, position_ids=packed.positions + offset, packed=packed, **types
    ).last_hidden_state
    first = hidden.reshape(-1, 16)[packed.first]
    for e, w in enumerate(want):
        assert_close(first[e, : len(w)], w, rtol=1e-9, atol=1e-11)


# Lanes against PEFT


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
    names = {
        "bert": ("bert.pooler.dense", "classifier"),
        "roberta": ("classifier.dense", "classifier.out_proj"),
    }[model.config.model_type]
    head = {
        f"{n}.{k}": 0.2 * torch.randn(p.shape, generator=g, dtype=F64)
        for n in names
        for k, p in model.get_submodule(n).named_parameters()
    }
    return adapters, head


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
        self.kind, self.table, self.dropout = kind, table, dropout
        self.targets = targets_of(classifier(kind))

    def lanes(self, which: Sequence[int], **more) -> Lanes:
        engine = Lanes(classifier(self.kind, self.dropout), self.targets, len(which), 4)
        for i in which:
            rank, _, own = RUNS[i]
            s = settings(rank, self.targets, seed=i, **{**own, **more})
            engine.admit(s, *initial(classifier(self.kind), self.targets, rank, i))
        return engine

    def train(self, engine: Lanes, which: Sequence[int], steps: int, start: int = 0) -> list[Tensor]:
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
        modules = ["classifier", "pooler"] if self.kind == "bert" else ["classifier"]
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
            batch = collate(self.table, index, 1 if self.kind == "roberta" else 0, "longest", 64)
            labels = batch.pop("labels")
            cross_entropy(peft(**batch).logits, labels).backward()
            limit = own.get("max_grad_norm", 1.0)
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(trained, limit)
            optimizer.step()
            optimizer.zero_grad()
        return peft, handle


def equal_lane(engine: Lanes, lane: int, other: Lanes, there: int, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-9}
    for name, (a, b) in engine.adapters(lane).items():
        assert_close(a, other.adapters(there)[name][0], **tolerance)
        assert_close(b, other.adapters(there)[name][1], **tolerance)
    for name, value in engine.head_of(lane).items():
        assert_close(value, other.head_of(there)[name], **tolerance)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_every_lane_is_the_run_that_peft_trains(kind, table):
    world = World(kind, table)
    which = range(len(RUNS))
    engine = world.lanes(which)
    world.train(engine, which, 25)
    for i in which:
        peft, handle = world.peft(i, 25)
        for name, (a, b) in engine.adapters(i).items():
            layer = peft.base_model.model.get_submodule(name)
            assert_close(a, layer.lora_A["default"].weight.detach(), rtol=1e-6, atol=1e-8)
            assert_close(b, layer.lora_B["default"].weight.detach(), rtol=1e-6, atol=1e-8)
        if handle is not None:
            assert handle.phase == "penalty"
            assert engine.fisher_of(i) == pytest.approx(handle.fisher(), rel=1e-6)
            fw = RUNS[i][2]["fw"]
            twice = 2 * fw.shrinkage * (4.0 if fw.norm == "update" else 1.0)
            want = [twice * w for w in handle.weights().values()]
            for factor in (engine._a_of, engine._b_of):
                assert engine.coefficients[NORMS.index(fw.norm), i, factor].tolist() == pytest.approx(want, rel=1e-6)
        else:
            assert not engine.coefficients[:, i].any()


def test_a_lane_in_company_is_the_lane_alone_over_100_steps(table):
    """With dropout everywhere: each lane draws its own masks."""
    world = World("bert", table, dropout=0.1)
    which = [3, 0, 2, 1]
    together = world.lanes(which, dropout=0.2)
    world.train(together, which, 100)
    for row, i in enumerate(which):
        alone = world.lanes([i], dropout=0.2)
        world.train(alone, [i], 100)
        equal_lane(together, row, alone, 0)


def test_a_diverging_lane_touches_no_other(table):
    world = World("bert", table, dropout=0.1)
    healthy, sick = world.lanes([1, 0, 2]), world.lanes([1, 0, 2])
    sick.factors[world.targets[0]][0].data[1] = float("nan")
    world.train(healthy, [1, 0, 2], 15)
    losses = world.train(sick, [1, 0, 2], 15)
    assert torch.isnan(losses[-1][1]) and torch.isfinite(losses[-1][[0, 2]]).all()
    equal_lane(sick, 0, healthy, 0, rtol=0, atol=0)
    equal_lane(sick, 2, healthy, 2, rtol=0, atol=0)


def test_a_released_lane_makes_room_for_the_next_run(table):
    world = World("bert", table, dropout=0.1)
    engine = world.lanes([0, 1, 2])
    world.train(engine, [0, 1, 2], 10)
    engine.release(0)
    rank, _, own = RUNS[3]
    s = settings(rank, world.targets, seed=3, **own)
    assert engine.admit(s, *initial(classifier("bert"), world.targets, rank, 3)) == 2
    for step in range(10, 20):  # the new run is at its own step 0
        batches = [
            batch_of(table, 1, step),
            batch_of(table, 2, step),
            batch_of(table, 3, step - 10),
        ]
        rates = [RUNS[1][1] * 0.99**step, RUNS[2][1] * 0.99**step, RUNS[3][1] * 0.99 ** (step - 10)]
        engine.step(pack(table, batches, F64), rates)
    for row, i, steps in ((0, 1, 20), (1, 2, 20), (2, 3, 10)):
        alone = world.lanes([i])
        world.train(alone, [i], steps)
        equal_lane(engine, row, alone, 0)


def test_padding_of_ranks_stays_zero(table):
    world = World("bert", table)
    engine = world.lanes([2, 1])
    world.train(engine, [2, 1], 20)
    for a, b in engine.factors.values():
        assert not a[0, 1:].any() and not b[0, 1:].any(), "rank 1 in a buffer of rank 4"
        assert a[1, 1:].any()


def test_prediction_of_some_lanes(table):
    world = World("bert", table, dropout=0.1)
    engine = world.lanes([0, 1, 2])
    world.train(engine, [0, 1, 2], 3)
    index = torch.arange(20)
    all_lanes = engine.predict(pack(table, [index] * 3, F64), [0, 1, 2])
    some = engine.predict(pack(table, [index] * 2, F64), [2, 0])
    assert_close(some, all_lanes[[2, 0]])
    assert not torch.allclose(all_lanes[0], all_lanes[2])


# AdaLoRA


ADA = Allocation(
    final=14,
    tinit=3,
    tfinal=8,
    delta_t=2,
    beta1=0.85,
    beta2=0.8,
    orth_reg_weight=0.5,
    total_steps=30,
)


def ada_initial(model, targets, rank: int, seed: int) -> tuple[dict, dict]:
    adapters, head = initial(model, targets, rank, seed)
    g = torch.Generator().manual_seed(seed + 50)
    return {n: (a, b, 0.3 * torch.randn(rank, generator=g, dtype=F64)) for n, (a, b) in adapters.items()}, head


def test_an_adalora_lane_is_pefts_adalora(table):
    """Importance, regulariser, budget and masks of every step, with lanes of different rank and schedule."""
    from peft import AdaLoraConfig, get_peft_model

    targets = targets_of(classifier("bert"))
    runs = [(3, ADA), (2, replace(ADA, final=11, tinit=6, tfinal=5, delta_t=3, orth_reg_weight=0.1))]
    engine = Lanes(classifier("bert"), targets, 2, 3, spectral=True)
    for i, (rank, ada) in enumerate(runs):
        s = settings(rank, targets, ada=ada, scale=2.0 / (1 + 1e-5 / rank))
        engine.admit(s, *ada_initial(classifier("bert"), targets, rank, i))
    masked = []
    for step in range(30):
        packed = pack(table, [batch_of(table, i, step) for i in range(2)], F64)
        engine.step(packed, [1e-2, 5e-3])
        masked.append([sum(int((e[2] == 0).sum()) for e in engine.adapters(i).values()) for i in range(2)])
    assert masked[-1] == [10 * 3 - 14, 10 * 2 - 11] and masked[2] == [0, 0] and 0 < masked[9][0] < 16

    for i, (rank, ada) in enumerate(runs):
        model = classifier("bert")
        adapters, head = ada_initial(model, targets, rank, i)
        with torch.no_grad():
            for name, value in head.items():
                model.get_parameter(name).copy_(value)
        config = AdaLoraConfig(
            task_type="SEQ_CLS",  # without it PEFT leaves the regulariser out
            init_r=rank,
            target_r=1,
            tinit=ada.tinit,
            tfinal=ada.tfinal,
            deltaT=ada.delta_t,
            beta1=ada.beta1,
            beta2=ada.beta2,
            orth_reg_weight=ada.orth_reg_weight,
            total_step=ada.total_steps,
            lora_alpha=2 * rank,
            target_modules=targets,
            modules_to_save=["classifier", "pooler"],
        )
        peft = get_peft_model(model, config).double()
        peft.base_model.rankallocator.target_bgt = ada.final
        for n, p in peft.named_parameters():
            if "ranknum" in n:  # see methods._freeze_ranknum
                p.requires_grad_(False)
        for name, (a, b, e) in adapters.items():
            layer = peft.base_model.model.get_submodule(name)
            layer.lora_A["default"].data.copy_(a)
            layer.lora_B["default"].data.copy_(b)
            layer.lora_E["default"].data.copy_(e[:, None])
        trained = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=(1e-2, 5e-3)[i],
        )
        for step in range(30):
            batch = collate(table, batch_of(table, i, step), 0, "longest", 64)
            peft(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            peft.base_model.update_and_allocate(step + 1)
            optimizer.zero_grad()
        for name, (a, b, e) in engine.adapters(i).items():
            layer = peft.base_model.model.get_submodule(name)
            assert_close(a, layer.lora_A["default"].detach(), rtol=1e-6, atol=1e-8)
            assert_close(b, layer.lora_B["default"].detach(), rtol=1e-6, atol=1e-8)
            assert_close(e, layer.lora_E["default"].detach()[:, 0], rtol=1e-6, atol=1e-8)


def test_an_svd_lora_lane_is_the_arm_that_peft_trains(table, tmp_path):
    """Step for step: the regulariser at two weights, the scale, ranks that differ within a run and among lanes."""
    tiny = Tiny(tmp_path, dropout=0.0)
    backbone = load_backbone(tiny.config().model)
    spec = TaskSpec("two", "classification", ("no", "yes"), 1, ("accuracy",), "accuracy")
    words = replace(table, tokens=table.tokens % 20)
    common = {"training__warmup_ratio": 0.2, "training__weight_decay": 0.1, "model__lora__dropout": 0.0}
    budget = {"model__lora__rank": None, "model__lora__alpha": None}
    cfgs = [
        tiny.config("svd_lora", **common, **budget, model__parameter_budget_percent=9.0),
        tiny.config("svd_lora", **common, model__lora__rank=3, model__lora__alpha=2.0, adalora__orth_reg_weight=0.1),
    ]
    arms = [build_method(cfg, backbone, spec, i, 30) for i, cfg in enumerate(cfgs)]
    assert len(set(initial_ranks(cfgs[0], backbone, 30).values())) == 2
    engine = Lanes(build_classifier(backbone, spec, 9).double(), list(arms[0].adapters()), 2, 3, spectral=True)
    for i, (cfg, arm) in enumerate(zip(cfgs, arms, strict=True)):
        arm.model.double().train()
        engine.admit(lane_settings(cfg, arm, i, 30), arm.adapters(), arm.head())
    for step in range(30):
        rates = [arm.learning_rate(step) for arm in arms]
        batches = [batch_of(words, i, step) for i in range(2)]
        assert [engine.phase(i) for i in range(2)] == ["training"] * 2
        losses = engine.step(pack(words, batches, F64), rates)
        for i, arm in enumerate(arms):
            loss = arm.model(**collate(words, batches[i], 0, "longest", 64)).loss
            assert_close(losses[i], loss.detach(), rtol=1e-9, atol=0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(arm.trainable, 1.0)
            arm.optimizer.step()
            arm.scheduler.step()
            arm.optimizer.zero_grad()
            for name, factors in arm.adapters().items():
                for mine, pefts in zip(engine.adapters(i)[name], factors, strict=True):
                    assert_close(mine, pefts, rtol=1e-7, atol=1e-9)


# One shape for all batches, as a graph of GPU launches needs it


SHAPED = Shape(tokens=320, sentences=12, width=32)


def shaped(table: TokenTable, which: Sequence[int], step: int):
    return pack_shaped(table, [batch_of(table, i, step) for i in which], SHAPED, F64)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_one_shape_computes_the_same(kind, table):
    """Without dropout, where nothing is drawn: every kind of lane, with room to spare in each batch."""
    world = World(kind, table)
    which = range(len(RUNS))
    ragged, one = world.lanes(which), world.lanes(which)
    for step in range(15):
        batches = [batch_of(table, i, step) for i in which]
        rates = [RUNS[i][1] for i in which]
        want = ragged.step(pack(table, batches, F64), rates)
        assert_close(one.step(shaped(table, which, step), rates), want, rtol=1e-9, atol=1e-11)
    for i in which:
        equal_lane(one, i, ragged, i)
        assert one.fisher_of(i) == pytest.approx(ragged.fisher_of(i), rel=1e-9)


def test_the_least_shape_holds_every_batch(table):
    batches = [torch.arange(0, 13), torch.arange(13, 64)]
    shape = shape_of(table, batches)
    assert shape.tokens % 64 == 0 and shape.sentences == 51 and shape.width == 32
    longest = int(table.lengths()[13:].sum())
    assert longest <= shape.tokens < longest + 64
    packed = pack_shaped(table, batches, shape, F64)
    assert packed.tokens.view(-1)[packed.true].tolist() == [*table.tokens.tolist()]
    assert packed.weights.sum(1).tolist() == pytest.approx([1.0, 1.0])


def test_with_dropout_a_shaped_lane_in_company_is_the_lane_alone(table):
    world = World("bert", table, dropout=0.1)
    which = [1, 0, 3]
    together = world.lanes(which, dropout=0.2)
    for step in range(20):
        together.step(shaped(table, which, step), [RUNS[i][1] for i in which])
    for row, i in enumerate(which):
        alone = world.lanes([i], dropout=0.2)
        for step in range(20):
            alone.step(shaped(table, [i], step), [RUNS[i][1]])
        equal_lane(together, row, alone, 0)


class Launches(TorchDispatchMode):
    """Counts what would be a kernel launch on a GPU, and forbids what would wait for it."""

    VIEWS = ("view", "slice", "select", "unbind", "split", "transpose", "t", "expand", "permute", "as_strided", "alias")
    VIEWS += ("detach", "unsqueeze", "squeeze", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty")
    WAITS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index waits for the device"
        self.count += name not in self.VIEWS
        return func(*args, **(kwargs or {}))


def launches(engine: Lanes, table: TokenTable, which: Sequence[int], monkeypatch) -> int:
    """Launches of the device's part of one step; nothing in it may come from the host either."""
    packed = shaped(table, which, 0)
    engine.memory(packed)
    plan = engine._plan_step([1e-3] * len(which), False)

    def refuse(*_, **__):
        raise AssertionError("a tensor made on the host")

    engine.model.train()
    with monkeypatch.context() as patch, Launches() as mode:
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, refuse)
        engine._compute(packed, plan)
    return mode.count


def test_launches_do_not_grow_with_the_lanes(table, monkeypatch):
    world = World("bert", table, dropout=0.1)
    counts = {}
    for lanes in (2, 8):
        engine = Lanes(classifier("bert", 0.1), world.targets, lanes, 4)
        for i in range(lanes):
            engine.admit(
                settings(4, world.targets, seed=i, fw=FW, warmup_steps=1),
                *initial(classifier("bert"), world.targets, 4, i),
            )
        engine.step(shaped(table, [0] * lanes, 0), [1e-3] * lanes)  # the only step of the warm-up
        counts[lanes] = launches(engine, table, [0] * lanes, monkeypatch)
    # One draw of random words a lane is all that is added.
    assert counts[8] - counts[2] == 6


@pytest.mark.parametrize(
    ("warmup", "at_most", "a_layer"),
    [
        pytest.param(1, 12, 0, id="penalty: a dozen, whatever the depth"),
        # A layer's targets are in three products with frozen matrices: q, k and v are one.
        pytest.param(9, 45, 2 * 3, id="sketch: two a product, and what sums them up"),
    ],
)
def test_launches_of_the_method(table, monkeypatch, warmup, at_most, a_layer):
    costs = []
    fw = replace(FW, estimator="sketch")
    for layers in (2, 4):
        config = BertConfig(**{**SHAPE, "num_hidden_layers": layers})
        counts = []
        for own in ({}, {"fw": fw, "warmup_steps": warmup}):
            model = BertForSequenceClassification(config).double()
            targets = targets_of(model)
            engine = Lanes(model, targets, 2, 4)
            for i in range(2):
                engine.admit(settings(4, targets, seed=i, **own), *initial(model_of(config), targets, 4, i))
            engine.step(shaped(table, [0, 1], 0), [1e-3] * 2)
            counts.append(launches(engine, table, [0, 1], monkeypatch))
        costs.append(counts[1] - counts[0])
    assert costs[1] - costs[0] == 2 * a_layer
    assert costs[0] - 2 * a_layer <= at_most


def model_of(config: BertConfig) -> nn.Module:
    return BertForSequenceClassification(config).double()


def test_an_encoder_in_half_precision_trains_masters_in_fp32(table):
    which = [0, 1]
    world = World("bert", table)
    engines = []
    for dtype in (torch.bfloat16, torch.float32):
        engine = Lanes(classifier("bert").to(dtype), world.targets, 2, 4)
        for i in which:
            rank, _, own = RUNS[i]
            engine.admit(
                settings(rank, world.targets, seed=i, **own), *initial(classifier("bert"), world.targets, rank, i)
            )
        for step in range(12):
            engine.step(pack(table, [batch_of(table, i, step) for i in which]), [1e-3] * 2)
        engines.append(engine)
    half, full = engines
    assert half.values.dtype == half.grads.dtype == torch.float32
    assert next(iter(half.factors.values()))[0].dtype == torch.bfloat16
    for i in which:
        for name, (a, b) in half.adapters(i).items():
            assert a.dtype == torch.float32
            assert_close(a, full.adapters(i)[name][0], rtol=0.05, atol=5e-3)
            assert_close(b, full.adapters(i)[name][1], rtol=0.05, atol=5e-3)
    assert half.fisher_of(1) == pytest.approx(full.fisher_of(1), rel=0.1)


# Memory


def test_memory_is_that_of_the_lanes_and_does_not_grow_with_the_steps(table):
    world = World("bert", table, dropout=0.1)

    def alive() -> int:
        gc.collect()
        return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor)

    engine = world.lanes([0, 1])
    batch = pack(table, [batch_of(table, i, 0) for i in (0, 1)], F64)
    before = engine.memory(batch)
    state = engine.lanes[0].generator.get_state()
    assert engine.memory(batch) == before and torch.equal(engine.lanes[0].generator.get_state(), state)
    sizes = []
    for start, steps in ((0, 10), (10, 40)):  # over the end of the warm-up first
        world.train(engine, [0, 1], steps, start)
        engine.step(batch, [1e-3] * 2)
        assert engine.memory(batch) == before
        sizes.append(alive())
    assert sizes[1] <= sizes[0]
    more = world.lanes([0, 1, 2, 3])
    twice = more.memory(pack(table, [batch_of(table, i, 0) for i in (0, 1, 0, 1)], F64))
    assert 1.8 < twice / before < 2.2


# Packed is padded, example by example


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_each_examples_logits_and_adapter_gradients_are_those_of_a_padded_batch(kind, table):
    """In fp32, to 1e-5: the loss is one example's, the batch holds its neighbours."""
    from peft import LoraConfig, get_peft_model

    world = World(kind, table)
    adapters, head = initial(classifier(kind), world.targets, 4, 0)
    engine = Lanes(classifier(kind).float(), world.targets, 1, 4)
    engine.admit(settings(4, world.targets), adapters, head)
    model = classifier(kind).float().eval()
    with torch.no_grad():
        for name, value in head.items():
            model.get_parameter(name).copy_(value)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=world.targets))
    for name, (a, b) in adapters.items():
        layer = peft.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    index = torch.arange(0, 9)
    batch = collate(table, index, 1 if kind == "roberta" else 0, "longest", 64)
    labels = batch.pop("labels")
    padded = peft.eval()(**batch).logits
    engine.model.eval()
    packed = engine.logits(pack(table, [index]))[0]
    assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    for i in range(len(index)):
        peft.zero_grad()
        engine.grads.zero_()
        cross_entropy(padded[i : i + 1], labels[i : i + 1]).backward(retain_graph=True)
        cross_entropy(packed[i : i + 1], labels[i : i + 1]).backward(retain_graph=True)
        for m, name in enumerate(engine.targets):
            layer = peft.base_model.model.get_submodule(name)
            a, b = engine._factors(engine.grads, m)
            assert_close(a[0], layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
            assert_close(b[0].T, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)
