"""Lanes of AdaLoRA and SVD-LoRA are the runs that PEFT trains.

pytest tests/fwlora_lab/lanes/test_adalora.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lane_runs import (
    F64,
    batch_of,
    classifier,
    initial,
    settings,
    targets_of,
)
from tiny import World as Tiny
from torch import Tensor
from torch.testing import assert_close

from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.data.tokens import collate
from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.packing import pack
from fwlora_lab.models.adapter_plan import AdaLoraSchedule, plan_adapters
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.models.classifier import build_classifier
from fwlora_lab.models.methods import build_method, learning_rates
from fwlora_lab.training.lane_settings import lane_settings

ADA = AdaLoraSchedule(
    initial=3,
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
    engine = LaneEngine(classifier("bert"), targets, 2, 3, svd_parametrized=True)
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
        tiny.config("svd_lora", **common, **budget, model__parameter_budget_percent=9.0, training__seed=0),
        tiny.config(
            "svd_lora",
            **common,
            training__seed=1,
            model__lora__rank=3,
            model__lora__alpha=2.0,
            adalora__orth_reg_weight=0.1,
        ),
    ]
    arms = [build_method(cfg, backbone, spec, 30) for cfg in cfgs]
    plans = [plan_adapters(cfg, backbone, 30) for cfg in cfgs]
    assert len(set(plans[0].initial_ranks().values())) == 2
    engine = LaneEngine(
        build_classifier(backbone, spec, 9).double(), list(arms[0].state.adapters()), 2, 3, svd_parametrized=True
    )
    for cfg, plan, arm in zip(cfgs, plans, arms, strict=True):
        arm.model.double().train()
        engine.admit(lane_settings(cfg, plan, 30), arm.state.adapters(), arm.state.head())
    for step in range(30):
        rates = [learning_rates(cfg, 30)(step) for cfg in cfgs]
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
            for name, factors in arm.state.adapters().items():
                for mine, pefts in zip(engine.adapters(i)[name], factors, strict=True):
                    assert_close(mine, pefts, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 8], ids=["before the first allocation", "between two allocations"])
def test_a_restored_adalora_lane_continues_bit_by_bit(table, steps):
    """Scores, masks and Λ are restored, too."""
    targets = targets_of(classifier("bert"))

    def engine_with(adapters: dict, head: dict) -> LaneEngine:
        engine = LaneEngine(classifier("bert", 0.1), targets, 1, 3, svd_parametrized=True)
        engine.admit(settings(3, targets, ada=ADA, dropout=0.2), adapters, head)
        return engine

    def train(engine: LaneEngine, start: int, end: int) -> Tensor:
        batches = [pack(table, [batch_of(table, 0, step)], F64) for step in range(start, end)]
        return torch.stack([engine.step(batch, [1e-2]) for batch in batches])

    initial_values = ada_initial(classifier("bert"), targets, 3, 0)
    undisturbed, first, second = engine_with(*initial_values), engine_with(*initial_values), engine_with({}, {})
    want = train(undisturbed, 0, steps + 6)[steps:]
    train(first, 0, steps)
    second.restore_lane(0, first.lane_state(0))
    assert second.phase(0) == first.phase(0)
    assert torch.equal(train(second, steps, steps + 6), want)
    for name, value in second.lane_state(0).items():
        assert torch.equal(value, undisturbed.lane_state(0)[name]), name
