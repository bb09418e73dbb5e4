"""What a captured CUDA graph demands of a step: few launches, and nothing that waits for the device.

pytest tests/fwlora_lab/lanes/test_captured_step.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from lane_runs import (
    FW,
    SHAPE,
    World,
    classifier,
    initial,
    settings,
    shaped,
    targets_of,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from fwlora_lab.data.tokens import TokenTable
from fwlora_lab.lanes import captured_step
from fwlora_lab.lanes.captured_step import StepCache
from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.step_plan import plan_step


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


def launches(engine: LaneEngine, table: TokenTable, which: Sequence[int], monkeypatch) -> int:
    """Launches of the device's part of one step; nothing in it may come from the host either."""
    packed = shaped(table, which, 0)
    drawn = engine._numbers_drawn(packed)
    plan = plan_step(engine.lanes, [1e-3] * len(which), False, engine.buffers)

    def refuse(*_, **__):
        raise AssertionError("a tensor made on the host")

    with monkeypatch.context() as patch, Launches() as mode:
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, refuse)
        engine._compute(packed, plan, drawn)
    return mode.count


def test_launches_do_not_grow_with_the_lanes(table, monkeypatch):
    world = World("bert", table, dropout=0.1)
    counts = {}
    for lanes in (2, 8):
        engine = LaneEngine(classifier("bert", 0.1), world.targets, lanes, 4)
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
            engine = LaneEngine(model, targets, 2, 4)
            for i in range(2):
                engine.admit(settings(4, targets, seed=i, **own), *initial(model_of(config), targets, 4, i))
            engine.step(shaped(table, [0, 1], 0), [1e-3] * 2)
            counts.append(launches(engine, table, [0, 1], monkeypatch))
        costs.append(counts[1] - counts[0])
    assert costs[1] - costs[0] == 2 * a_layer
    assert costs[0] - 2 * a_layer <= at_most


def model_of(config: BertConfig) -> nn.Module:
    return BertForSequenceClassification(config).double()


class FakeCapture:
    """Stands for a captured graph where there is no GPU: counts captures and replays."""

    made: ClassVar[list[FakeCapture]] = []

    def __init__(self, inputs, generators, compute) -> None:
        self.inputs, self.generators, self.replays = inputs, generators, 0
        self.made.append(self)

    def __call__(self, inputs) -> Tensor:
        self.replays += 1
        return torch.tensor([-1.0])


def run(steps: StepCache, kind: str) -> float:
    return float(steps.run(kind, [torch.zeros(1)], [torch.Generator()], lambda: torch.tensor([1.0])))


def test_a_step_is_captured_at_the_second_of_its_kind(monkeypatch):
    monkeypatch.setattr(captured_step, "CapturedStep", FakeCapture)
    monkeypatch.setattr(FakeCapture, "made", [])
    steps = StepCache(enabled=True)
    assert [run(steps, kind) for kind in ("a", "b", "a", "a", "b")] == [1.0, 1.0, -1.0, -1.0, -1.0]
    assert [capture.replays for capture in FakeCapture.made] == [2, 1]
    steps.clear()
    assert [run(steps, "a") for _ in range(2)] == [1.0, -1.0], "after a change of the lanes the first one runs directly"
    off = StepCache(enabled=False)
    assert [run(off, "a") for _ in range(3)] == [1.0] * 3 and len(FakeCapture.made) == 3


def test_a_step_that_cannot_be_captured_runs_directly_and_is_not_tried_again(monkeypatch):
    tried = []

    def refuse(*_):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured_step, "CapturedStep", refuse)
    steps = StepCache(enabled=True)
    assert run(steps, "a") == 1.0
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        assert run(steps, "a") == 1.0
    assert [run(steps, kind) for kind in "aabb"] == [1.0] * 4 and len(tried) == 1
