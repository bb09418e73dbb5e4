"""Each lane of the engine trains the run that it would train alone, and the run that PEFT trains.

pytest tests/fwlora_lab/lanes/test_engine.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lane_runs import (
    F64,
    FW,
    KINDS,
    RUNS,
    World,
    batch_of,
    classifier,
    equal_lane,
    initial,
    settings,
    shaped,
    targets_of,
)
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig, DebertaV2Config, ModernBertConfig

from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.packing import pack


def assert_lane_is_peft(engine: LaneEngine, lane: int, peft: PeftModel) -> None:
    """Every trained number, to 1e-9."""
    trained = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p.detach()
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    for name, factors in engine.adapters(lane).items():
        for letter, value in zip("AB", factors, strict=True):
            assert_close(value, trained.pop(f"{name}.lora_{letter}.default.weight"), rtol=0, atol=1e-9)
    for name, value in engine.head_of(lane).items():
        assert_close(value, trained.pop(name), rtol=0, atol=1e-9)
    assert not trained


@pytest.mark.parametrize("kind", KINDS)
def test_after_100_steps_a_lane_is_the_run_that_peft_trains(kind, table):
    """In the company of a lane of another rank; the embeddings of positions are large enough to matter."""
    world = World(kind, table)
    engine = world.lanes([1, 0])
    world.train(engine, [1, 0], 100)
    assert_lane_is_peft(engine, 0, world.peft(1, 100)[0])


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v3"])
def test_every_lane_is_the_run_that_peft_trains(kind, table):
    """DeBERTa-v3 sends its relative positions through adapted matrices, which every estimator has to see."""
    world = World(kind, table)
    which = range(len(RUNS))
    engine = world.lanes(which)
    world.train(engine, which, 25)
    for i in which:
        peft, handle = world.peft(i, 25)
        assert_lane_is_peft(engine, i, peft)
        if handle is not None:
            assert handle.phase == "penalty"
            assert engine.fisher_of(i) == pytest.approx(handle.fisher(), rel=1e-6)
            fw = RUNS[i][2]["fw"]
            twice = 2 * fw.penalty_strength * (4.0 if fw.penalty_norm == "update" else 1.0)
            want = [twice * w for w in handle.weights().values()]
            coefficients, layout = engine.buffers.coefficients, engine.buffers.layout
            for factor in (layout.number_of_a, layout.number_of_b):
                assert coefficients[fw.penalty_norm][i, factor].tolist() == pytest.approx(want, rel=1e-6)
        else:
            assert not any(of_norm[i].any() for of_norm in engine.buffers.coefficients.values())


@pytest.mark.parametrize(("kind", "steps"), [("bert", 100), *((kind, 20) for kind in KINDS[2:])])
def test_a_lane_in_company_is_the_lane_alone(kind, steps, table):
    """With dropout everywhere: each lane draws its own masks."""
    world = World(kind, table, dropout=0.1)
    which = [3, 0, 2, 1] if kind == "bert" else [3, 0]
    together = world.lanes(which, dropout=0.2)
    world.train(together, which, steps)
    for row, i in enumerate(which):
        alone = world.lanes([i], dropout=0.2)
        world.train(alone, [i], steps)
        equal_lane(together, row, alone, 0)


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


def test_a_lane_with_dropout_may_join_lanes_without(table):
    """In a fixed shape, where a step draws all its random numbers at once: how many there are changes."""
    world = World("bert", table)

    def admit(engine: LaneEngine, i: int, dropout: float) -> None:
        rank, _, own = RUNS[i]
        run = settings(rank, world.targets, seed=i, **{**own, "dropout": dropout})
        engine.admit(run, *initial(classifier("bert"), world.targets, rank, i))

    losses = []
    for steps_alone, dropout in ((0, 0.2), (1, 0.2), (0, 0.0)):
        engine = LaneEngine(classifier("bert"), world.targets, 2, 4)
        admit(engine, 0, 0.0)
        for step in range(steps_alone):
            engine.step(shaped(table, [0], step), [1e-3])
        admit(engine, 2, dropout)
        losses.append(engine.step(shaped(table, [0, 2], 0), [1e-3] * 2)[1])
    assert losses[0] == losses[1] != losses[2]


def test_a_diverging_lane_touches_no_other(table):
    world = World("bert", table, dropout=0.1)
    healthy, sick = world.lanes([1, 0, 2]), world.lanes([1, 0, 2])
    sick.buffers.factors[world.targets[0]][0].data[1] = float("nan")
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
    for a, b in engine.buffers.factors.values():
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


def test_an_encoder_in_half_precision_trains_masters_in_fp32(table):
    which = [0, 1]
    world = World("bert", table)
    engines = []
    for dtype in (torch.bfloat16, torch.float32):
        engine = LaneEngine(classifier("bert").to(dtype), world.targets, 2, 4)
        for i in which:
            rank, _, own = RUNS[i]
            engine.admit(
                settings(rank, world.targets, seed=i, **own), *initial(classifier("bert"), world.targets, rank, i)
            )
        for step in range(12):
            engine.step(pack(table, [batch_of(table, i, step) for i in which]), [1e-3] * 2)
        engines.append(engine)
    half, full = engines
    assert half.buffers.values.dtype == half.buffers.grads.dtype == torch.float32
    assert next(iter(half.buffers.factors.values()))[0].dtype == torch.bfloat16
    for i in which:
        for name, (a, b) in half.adapters(i).items():
            assert a.dtype == torch.float32
            assert_close(a, full.adapters(i)[name][0], rtol=0.05, atol=5e-3)
            assert_close(b, full.adapters(i)[name][1], rtol=0.05, atol=5e-3)
    assert half.fisher_of(1) == pytest.approx(full.fisher_of(1), rel=0.1)


@pytest.mark.parametrize("i", [1, 3, 4], ids=["exact", "per_example", "sketch"])
@pytest.mark.parametrize("steps", [3, 9], ids=["in the warm-up", "after the warm-up"])
def test_a_restored_lane_continues_bit_by_bit(table, i, steps):
    """With dropout, in a fresh engine."""
    world = World("bert", table, dropout=0.1)
    undisturbed = world.lanes([0, i], dropout=0.2)
    want = world.train(undisturbed, [0, i], steps + 3)[steps:]

    first = world.lanes([0, i], dropout=0.2)
    world.train(first, [0, i], steps)
    states = [first.lane_state(lane) for lane in (0, 1)]
    world.train(first, [0, i], 1, steps)  # the states are copies
    second = world.lanes([0, i], dropout=0.2)
    for lane, state in enumerate(states):
        second.restore_lane(lane, state)
    assert [lane.step for lane in second.lanes] == [steps, steps]
    assert [second.phase(lane) for lane in (0, 1)] == ["training", "warmup" if steps == 3 else "penalty"]
    assert torch.equal(torch.stack(world.train(second, [0, i], 3, steps)), torch.stack(want))
    for lane in (0, 1):
        equal_lane(second, lane, undisturbed, lane, rtol=0, atol=0)
        assert second.fisher_of(lane) == undisturbed.fisher_of(lane)
        for name, value in second.lane_state(lane).items():
            assert torch.equal(value, undisturbed.lane_state(lane)[name]), name

    # In another lane sums over tokens are added up in another order.
    other = world.lanes([i, 0], dropout=0.2)
    other.restore_lane(0, states[1])
    other.restore_lane(1, states[0])
    world.train(other, [i, 0], 3, steps)
    equal_lane(other, 0, undisturbed, 1)
    equal_lane(other, 1, undisturbed, 0)


@pytest.mark.parametrize(("more_targets", "dropout"), [(False, 0.2), (True, 0.0)])
def test_a_lane_continues_in_a_larger_engine(table, more_targets, dropout):
    """Of higher rank and, without dropout, with targets that the lane does not have."""
    world = World("bert", table, dropout=dropout)
    few = world.targets[::2]
    run = settings(2, few, fw=FW, warmup_steps=8, dropout=dropout)
    small = LaneEngine(classifier("bert", dropout), few, 1, 2)
    large = LaneEngine(classifier("bert", dropout), world.targets if more_targets else few, 1, 4)
    small.admit(run, *initial(classifier("bert"), few, 2, 0))
    world.train(small, [1], 10)
    large.admit(run, {}, {})
    large.restore_lane(0, small.lane_state(0))
    world.train(small, [1], 3, 10)
    world.train(large, [1], 3, 10)
    equal_lane(large, 0, small, 0)
    assert large.fisher_of(0) == pytest.approx(small.fisher_of(0))


def test_the_state_of_another_run_is_refused(table):
    world = World("bert", table)
    engine = world.lanes([0, 2])
    state = engine.lane_state(0)
    missing = next(iter(state))
    with pytest.raises(KeyError, match=missing):
        engine.restore_lane(0, {name: value for name, value in state.items() if name != missing})
    with pytest.raises(KeyError, match="another"):
        engine.restore_lane(0, {**state, "values/another.A": state[missing]})
    assert all(torch.equal(value, state[name]) for name, value in engine.lane_state(0).items())


def test_the_engine_leaves_the_models_config_as_it_was(table):
    """A second model from the same config must not get the engine's attention."""
    model = classifier("bert")
    before = model.config.to_dict(), model.config._attn_implementation
    LaneEngine(model, targets_of(model), 1, 4)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


def test_what_the_engine_cannot_train_is_refused(table):
    model = classifier("bert")
    with pytest.raises(TypeError, match=r"bert\.encoder\.layer is ModuleList, not Linear"):
        LaneEngine(model, ["bert.encoder.layer"], 1, 4)
    with pytest.raises(TypeError, match="classifier is not a matrix of an encoder layer"):
        LaneEngine(classifier("bert"), ["classifier"], 1, 4)
    tiny: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    for config, what in (
        (ModernBertConfig(**tiny, num_hidden_layers=1, pad_token_id=0), "support modernbert"),
        (BertConfig(**tiny, num_hidden_layers=1, is_decoder=True), "bert as a decoder"),
        (
            DebertaV2Config(**tiny, num_hidden_layers=1, relative_attention=True, conv_kernel_size=3),  # type: ignore
            r"deberta-v2 with a convolution \(conv_kernel_size\)",
        ),
        (DebertaV2Config(**tiny, num_hidden_layers=1), "deberta-v2 without relative attention"),
    ):
        with pytest.raises(TypeError, match=what):
            LaneEngine(AutoModelForSequenceClassification.from_config(config), [], 1, 4)
    engine = World("bert", table).lanes([0])
    with pytest.raises(RuntimeError, match="All 1 lanes are taken"):
        engine.admit(engine.lanes[0].settings, {}, {})
