"""`fwlora bench`: everybody does the same work, and what is made of the times.

pytest tests/fwlora_lab/bench/test_bench.py
"""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import World
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fwlora_lab.bench import cases, run, workload
from fwlora_lab.bench.cases import LaneCase, PeftLoop, Roofline, TrainerBaseline
from fwlora_lab.bench.measure import interval, judge, measure, order_of
from fwlora_lab.bench.workload import Workload, step_flops
from fwlora_lab.cli.main import main
from fwlora_lab.errors import UserError
from fwlora_lab.lanes import packing
from fwlora_lab.models.backbones import load_backbone

NAMES = [
    "aa_control",
    "penalty_steady",
    "penalty_whole_run",
    "attach_steady",
    "adalora_over_lora",
    "usual_over_ours_one_lane",
    "usual_over_ours_best",
    "lanes_cost",
    "matmul_share",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), dropout=0.0)


def course(world: World, learning_rate: float, batch: int = 8, batches: int = 6) -> Workload:
    cfg = world.config(
        "lora",
        model__lora__dropout=0.0,
        training__learning_rate=learning_rate,
        training__batch_size=batch,
        training__lr_scheduler="constant",
        training__warmup_ratio=0.0,
    )
    backbone = load_backbone(cfg.model)
    table = workload.token_table("cola", backbone.config)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(1))
    return Workload(cfg, backbone, table, list(order[: batch * batches].split(batch)), torch.device("cpu"))


# The same work


def test_lengths_are_the_tasks_own(world):
    for task, n, mean, most in (("cola", 8551, 11.327, 47), ("sst2", 67349, 13.319, 66)):
        lengths = workload.token_table(task, load_backbone(world.config().model).config).lengths()
        assert len(lengths) == n and int(lengths.max()) == most
        assert float(lengths.double().mean()) == pytest.approx(mean, abs=1e-3)


def test_all_compute_the_same_loss_on_the_same_batches(world, monkeypatch):
    """From one start, in fp32 and without dropout, over steps that change the weights."""
    monkeypatch.setattr(cases, "PADDED", 64)  # what the tiny model can read
    here = course(world, 5e-3)
    contestants = LaneCase(here), PeftLoop(here), TrainerBaseline(here)
    for batches in (here.batches[:3], here.batches[3:]):  # the Trainer goes on where it was
        for contestant in contestants:
            assert contestant.train(batches) > 0
        ours, plain, usual = (c.losses for c in contestants)
        assert len(set(ours)) == 3
        np.testing.assert_allclose(ours, plain, rtol=1e-4)
        np.testing.assert_allclose(np.mean(ours), usual, rtol=1e-4)


def test_lanes_and_length_groups_train_on_the_same_examples(world):
    """At a learning rate that changes nothing, where batches may be formed in any order."""
    here = course(world, 1e-12)
    plain, grouped, two = PeftLoop(here), TrainerBaseline(here, grouped=True), LaneCase(here, lanes=2)
    for contestant in (plain, grouped, two):
        contestant.train(here.batches)
    np.testing.assert_allclose(grouped.losses, np.mean(plain.losses), rtol=1e-5)
    assert len(two.losses) == len(plain.losses)
    np.testing.assert_allclose(two.losses[0::2], plain.losses[0::2], rtol=1e-5)  # the other lane has another head


def sentences(model: nn.Module, contestant, batches) -> list[tuple[int, ...]]:
    """What the model reads while the contestant trains, without its padding."""
    seen: list[tuple[int, ...]] = []

    def read(_, args, kwargs) -> None:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))

    hook = model.register_forward_pre_hook(read, with_kwargs=True)
    contestant.train(batches)
    hook.remove()
    return seen


def test_half_is_the_same_work_in_bf16(world):
    here = course(world, 1e-3)
    full, half = LaneCase(here, lanes=2), LaneCase(here, lanes=2, half=True)
    for contestant in (full, half):
        contestant.train(here.batches)
    assert half.losses == pytest.approx(full.losses, rel=0.05) and half.losses != full.losses


def test_every_peer_reads_the_batches_sentences_and_pads_as_it_says(world, monkeypatch):
    monkeypatch.setattr(cases, "PADDED", 64)
    here = course(world, 1e-3)
    want = []
    for i in torch.cat(list(here.batches)).tolist():
        want.append(tuple(here.table.tokens[here.table.offsets[i] : here.table.offsets[i + 1]].tolist()))
    plain, padded, grouped = PeftLoop(here), TrainerBaseline(here), TrainerBaseline(here, grouped=True)
    assert sentences(plain.method.model, plain, here.batches) == want
    assert sentences(padded.trainer.model, padded, here.batches) == want
    got = sentences(grouped.trainer.model, grouped, here.batches)
    assert got != want and sorted(got) == sorted(want)
    packs: list[Tensor] = []
    pack = packing.pack
    monkeypatch.setattr(cases, "pack", lambda table, batches: packs.extend(batches) or pack(table, batches))
    LaneCase(here, lanes=2).train(here.batches)
    assert torch.equal(torch.cat(packs), torch.cat(list(here.batches)))


class Seen(Exception):
    """Stops a pass: the tiny model has no 128 positions."""


def test_the_usual_is_padded_to_128(world):
    here = course(world, 1e-3)
    usual, shapes = TrainerBaseline(here), []

    def look(_, args, kwargs) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))
        raise Seen

    usual.trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Seen):
        usual.train(here.batches[:1])
    assert shapes == [(8, 128)]


# Arithmetic


def test_flops_by_hand():
    """Two layers, d = 2, FFN 3, rank 1, sentences of 2 and 3 tokens."""
    config = SimpleNamespace(hidden_size=2, intermediate_size=3, num_hidden_layers=2)
    first = 3 * 5 * (8 + 20) + 5 * 16 + 5 * (24 + 30) + 5 * (24 + 30) + 12 * 2 * (4 + 9)
    last = 2 * (16 + 24) + 2 * 5 * (16 + 24) + 2 * 16 + 2 * (24 + 30) + 2 * (24 + 30) + 12 * 2 * 5
    assert step_flops(config, 1, torch.tensor([2, 3])) == first + last + 6 * 2 * (2 * 2 + 2 * 2)  # type: ignore[arg-type]


def test_flops_are_those_that_the_engine_spends(world):
    """On sentences that fill their attention block, where nothing is padded."""
    here = course(world, 1e-3)
    fits = (here.table.lengths() == 8).nonzero()[:4, 0]
    ours = LaneCase(here)
    ours.train([fits])
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        ours.train([fits])
    assert counter.get_total_flops() == pytest.approx(here.flops([fits]), rel=0.01)


def test_the_floor_is_the_time_of_a_products_flops(world, monkeypatch):
    monkeypatch.setattr(Roofline, "_LEAST", 5e-3)
    here = course(world, 1e-3)
    floor = Roofline(here)
    once, twice = floor.train(here.batches[:1]), floor.train(here.batches[:1] * 2)
    assert 0 < once < twice
    n, k, m = floor.shape
    assert {n, k, m} & {16, 32, 768, 1536}
    a, b = floor._factors[floor.shape]
    assert a.shape == (n, k) and b.shape == (k, m)


# Measuring


def test_a_block_goes_forwards_and_backwards_from_a_place_that_moves_on():
    assert order_of(["a", "b", "c"], 0) == ["a", "b", "c", "c", "b", "a"]
    assert order_of(["a", "b", "c"], 1) == ["b", "c", "a", "a", "c", "b"]
    assert order_of(["a", "b", "c"], 3) == order_of(["a", "b", "c"], 0)


def test_a_machine_that_slows_down_evenly_changes_no_ratio():
    clock = iter(range(1, 1000))
    given: dict[str, list[list[int]]] = {"a": [], "b": [], "c": []}

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def train(self, batches) -> float:
            given[self.name].append(list(batches))
            return float(next(clock))

    times = measure({name: Fake(name) for name in given}, list(range(7)), 2, 0.0, least=5)  # type: ignore[arg-type]
    assert times["a"].shape == (5,)
    assert (times["a"] == times["b"]).all() and (times["b"] == times["c"]).all()
    assert times["a"][0] == (4 + 9) / 2, "the mean of the block's first and last, after the three that warm up"
    assert given["a"] == given["b"] == given["c"]
    assert given["a"][1:5] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_the_interval_is_the_bootstraps():
    values = np.random.default_rng(3).normal(1.0, 0.1, 200)
    center, low, high = interval([values], np.random.default_rng(0))
    assert center == np.median(values) and low < center < high
    half = 1.96 * 0.1 * np.sqrt(np.pi / 2 / 200)  # the normal median's
    assert (high - low) / 2 == pytest.approx(half, rel=0.3)
    few = interval([values[:20]], np.random.default_rng(0))
    assert few[2] - few[1] > 1.3 * (high - low)
    two = interval([values, 3 * values], np.random.default_rng(0))
    assert two[0] == pytest.approx(3 * center**2) and (two[2] - two[1]) / two[0] > (high - low) / center


def test_targets_bound_from_the_bad_side():
    assert judge("penalty_steady", 1.004, 1.0, 1.1).met and not judge("penalty_steady", 1.006, 1.0, 1.1).met
    assert judge("lanes_cost", 3.5, 0, 9).met and not judge("lanes_cost", 3.7, 0, 9).met
    assert judge("matmul_share", 0.61, 0, 1).met and not judge("matmul_share", 0.59, 0, 1).met
    assert judge("usual_over_ours_best", 12.0, 0, 99).met and not judge("usual_over_ours_best", 12.0, 0, 99, "cuda").met
    assert [judge("aa_control", r, r, r).met for r in (0.994, 0.996, 1.004, 1.006)] == [False, True, True, False]


# The command


def test_the_command_prints_one_object_a_line(world, monkeypatch, capsys):
    here = course(world, 1e-3)

    @contextlib.contextmanager
    def tiny(name: str):
        assert name == "minilm"
        yield here.cfg, here.backbone

    monkeypatch.setattr(workload, "backbone_of", tiny)
    monkeypatch.setattr(run, "_SECONDS", {True: 0.0})
    monkeypatch.setattr(Roofline, "_LEAST", 1e-3)
    cpu = torch.get_num_threads() == 1
    monkeypatch.setattr(cases, "PADDED", 64)
    assert run.bench("cola", "minilm", None, quick=True, cpu_time=cpu, as_json=True) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert list(row) == ["name", "ratio", "low", "high", "target", "met"]
        assert 0 < row["low"] <= row["ratio"] <= row["high"] and isinstance(row["met"], bool)
    assert all(name in err for name in NAMES)
    assert ("CPU time" in err) == cpu and "MiB a lane" in err and "best matrix product" in err
    if not rows[0]["met"]:
        assert "The control is off by" in err


def test_a_profile_says_what_a_step_is_made_of(world, monkeypatch, capsys):
    here = course(world, 1e-3, batches=12)
    ticks = itertools.count()  # a second from each look at the clock to the next
    milliseconds, shares = run.profile_step(replace(here, clock=lambda: float(next(ticks))), lanes=2, steps=3, most=200)
    assert milliseconds == pytest.approx(1000 / 3), "a second for three steps of two lanes"
    assert sum(share for _, share in shares) == pytest.approx(1) and shares == sorted(shares, key=lambda pair: -pair[1])
    assert {"aten::mm", "aten::addmm"} & {name for name, _ in shares}

    @contextlib.contextmanager
    def tiny(_: str):
        yield here.cfg, here.backbone

    monkeypatch.setattr(workload, "backbone_of", tiny)
    assert run.bench("cola", "minilm", None, profile=True) == 0
    out = capsys.readouterr().out
    assert "lanes: 4" in out and "aten::" in out and "target" not in out
    for other in ("quick", "as_json", "cpu_time"):
        with pytest.raises(UserError, match="--profile measures no ratios"):
            run.bench("cola", "minilm", None, profile=True, **{other: True})


def test_the_random_roberta_has_robertas_shape(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(
        workload, "RobertaConfig", lambda **more: bench_config(num_hidden_layers=1, **{**more, "vocab_size": 2000})
    )
    from transformers import RobertaConfig as bench_config

    with workload.backbone_of("roberta-base") as (cfg, backbone):
        config = backbone.config
        assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (768, 12, 3072)
        assert backbone.tokenizer.pad_token_id == 1 and backbone.max_tokens == 512
        assert cfg.training.batch_size == 32
        table = workload.token_table("sst2", config)
        assert table.types is None and int(table.tokens.min()) > 3


@pytest.mark.parametrize("word", ["0", "-2", "two", "1.5", "9999"])
def test_a_number_of_threads_that_cannot_be_ends_in_one_message(word, capsys):
    assert main(["bench", f"--threads={word}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "threads=" in err and "whole number" in err


def test_cpu_time_is_that_of_one_thread(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert main(["bench", "--cpu-time"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--threads 1" in err


def test_an_unknown_task_names_the_known_ones(capsys):
    assert main(["bench", "--task", "mnli"]) == 2
    err = capsys.readouterr().err
    assert "cola" in err and "sst2" in err and "usage: fwlora bench" in err
