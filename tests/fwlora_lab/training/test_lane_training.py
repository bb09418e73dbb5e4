"""`train_runs` with engine=lanes: the same records as with one model a run, and nothing shared but the time.

pytest tests/fwlora_lab/training/test_lane_training.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import World
from transformers import (
    AutoModel,
    AutoTokenizer,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
)

from fwlora_lab.data.load import load_task
from fwlora_lab.data.tokens import collate, tokenize
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.models.classifier import build_classifier
from fwlora_lab.records.folder import load_predictions
from fwlora_lab.records.record import Record
from fwlora_lab.training import device, lane_trainer
from fwlora_lab.training.active_run import ActiveRun
from fwlora_lab.training.events import Note, RunFailed
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.resources import ResourceCache
from fwlora_lab.training.scheduler import train_runs

METHODS = ["lora", "fw_lora", "adalora", "svd_lora"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, dropout=0.0)


def lanes(world: World, method: str, **more):
    changes = {"training__engine": "lanes", "model__lora__dropout": 0.0, **more}
    return world.config(method, **changes)


def logits(world: World, run_id: str, seed: int) -> np.ndarray:
    return load_predictions(world.results / run_id / f"seed-{seed}")[0]


def test_lanes_train_what_peft_trains(world):
    """Without dropout, where both engines draw nothing: same metrics, F, parameters and predictions."""
    ours = train_runs([RunSpec(lanes(world, m, run_id=f"{m}-lanes"), s) for m in METHODS for s in (0, 1)])
    theirs = train_runs(
        [RunSpec(lanes(world, m, run_id=f"{m}-peft", training__engine="peft"), s) for m in METHODS for s in (0, 1)]
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.status == b.status == "complete", a.error
        one, other = logits(world, a.run_id, a.seed), logits(world, b.run_id, b.seed)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        assert a.parameters == b.parameters and a.steps == b.steps == 22
        assert [m.rank for m in a.matrices] == [m.rank for m in b.matrices]
        for mine, pefts in zip(a.matrices, b.matrices, strict=True):
            assert mine.delta_norm == pytest.approx(pefts.delta_norm, rel=1e-3, abs=1e-5)
            if a.method == "fw_lora":
                assert mine.importance == pytest.approx(pefts.importance, rel=1e-3)
                assert mine.weight == pytest.approx(pefts.weight, rel=1e-3)
        for mine, pefts in zip(a.epochs, b.epochs, strict=True):
            assert mine.train_loss == pytest.approx(pefts.train_loss, rel=1e-3)
            assert mine.learning_rate == pytest.approx(pefts.learning_rate)
        assert a.times is not None and b.times is not None
        assert set(a.times.phases) == set(b.times.phases)


@pytest.mark.parametrize("method", METHODS)
def test_a_lanes_adapter_is_read_by_vanilla_peft(world, method):
    cfg = lanes(world, method)
    (record,) = train_runs([RunSpec(cfg, 0)])
    backbone = load_backbone(cfg.model)
    data = load_task(cfg.dataset)
    model = build_classifier(backbone, data.spec, seed=99)
    model = PeftModel.from_pretrained(model, str(world.results / method / "seed-0" / "adapter")).eval()
    table = tokenize(data.dev, backbone.tokenizer, cfg.dataset.max_length, True)
    batch = collate(table, torch.arange(len(table)), 0, "longest", cfg.dataset.max_length)
    del batch["labels"]
    got = model(**batch).logits.detach().numpy()
    np.testing.assert_allclose(got, logits(world, method, 0), rtol=1e-3, atol=1e-5)
    assert record.status == "complete"


@pytest.mark.parametrize("engine", ["lanes", "peft"])
def test_where_the_cpu_has_bf16_the_encoder_computes_in_it(world, monkeypatch, engine):
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    for arm in METHODS:
        full, half = train_runs(
            [
                RunSpec(lanes(world, arm, run_id=f"{arm}-{p}", training__engine=engine, training__mixed_precision=p), 0)
                for p in ("no", "bf16")
            ]
        )
        assert full.status == half.status == "complete", half.error
        assert (full.machine.precision, half.machine.precision) == ("fp32", "bf16")
        assert not [w for w in half.warnings if "bf16" in w]
        one, other = logits(world, full.run_id, 0), logits(world, half.run_id, 0)
        assert 1e-5 < np.abs(one - other).max() < 0.3, "as precise as bf16, and no more"
        adapter = load_file(world.results / half.run_id / "seed-0" / "adapter" / "adapter_model.safetensors")
        assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_a_lane_in_company_gives_the_record_that_it_gives_alone(tmp_path):
    """With dropout everywhere, more runs than lanes, and runs of different length: lanes are refilled."""
    world = World(tmp_path, dropout=0.1)
    plans = [
        RunSpec(world.config(m, run_id=f"{m}-{e}", training__engine="lanes", training__epochs=e), s)
        for m, e in (("lora", 2), ("fw_lora", 3), ("lora", 1))
        for s in (0, 1)
    ]
    together = train_runs(plans)
    assert [r.status for r in together] == ["complete"] * 6
    kept = {(r.run_id, r.seed): logits(world, r.run_id, r.seed) for r in together}
    for plan in plans:
        (alone,) = train_runs([plan], overwrite=True)
        one = logits(world, alone.run_id, alone.seed)
        np.testing.assert_allclose(one, kept[alone.run_id, alone.seed], rtol=1e-4, atol=1e-5)


def test_a_run_that_diverges_fails_alone(world):
    events = []
    plans = [
        RunSpec(lanes(world, "lora"), 0),
        RunSpec(lanes(world, "lora", run_id="wild", training__learning_rate=1e30, training__max_grad_norm=None), 0),
        RunSpec(lanes(world, "fw_lora"), 0),
    ]
    records: list[Record] = train_runs(plans, events.append)
    assert [r.status for r in records] == ["complete", "failed", "complete"]
    assert records[1].error is not None and "diverged" in records[1].error.message
    assert sum(isinstance(e, RunFailed) for e in events) == 1
    (alone,) = train_runs([plans[0]], overwrite=True)
    assert alone.epochs[-1].train_loss == pytest.approx(records[0].epochs[-1].train_loss, rel=1e-5)


def test_an_evaluation_that_fails_is_the_runs_failure(world, monkeypatch):
    def full(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lane_trainer.LaneEngine, "predict", full)
    records = train_runs([RunSpec(lanes(world, "lora"), seed) for seed in (0, 1)])
    assert [r.status for r in records] == ["failed"] * 2
    assert {r.error.message for r in records} == {"out of memory"} and records[0].epochs == []


def test_what_is_there_is_not_trained_again(world, monkeypatch):
    plans = [RunSpec(lanes(world, "lora"), s) for s in (0, 1)]
    train_runs(plans)
    monkeypatch.setattr(lane_trainer, "make_lanes", lambda *_: pytest.fail("nothing is left to train"))
    assert [r.status for r in train_runs(plans)] == ["complete"] * 2


def test_ctrl_c_leaves_checkpoints_and_gives_the_locks_back(world):
    def interrupt(event) -> None:
        if not isinstance(event, Note) and "Evaluated" in type(event).__name__:
            raise KeyboardInterrupt

    plans = [RunSpec(lanes(world, "lora"), s) for s in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        train_runs(plans, interrupt)
    assert not list(world.results.glob("lora/seed-*/record.json"))
    assert len(list(world.results.glob("lora/seed-*/checkpoints/step-00000011.pt"))) == 2
    assert [r.status for r in train_runs(plans)] == ["complete"] * 2


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_one_shape_as_on_a_gpu_train_the_same(world, monkeypatch, method):
    ragged = train_runs([RunSpec(lanes(world, method, run_id="ragged"), s) for s in (0, 1)])
    monkeypatch.setattr(lane_trainer, "_SHAPED", {"cpu": True})
    shapes = []
    packed = lane_trainer.pack_shaped
    monkeypatch.setattr(lane_trainer, "pack_shaped", lambda *args: shapes.append(args[2]) or packed(*args))
    shaped = train_runs([RunSpec(lanes(world, method, run_id="shaped"), s) for s in (0, 1)])
    assert len(set(shapes)) == 1 and len(shapes) > 20, "one shape for the whole run"
    for a, b in zip(ragged, shaped, strict=True):
        assert a.status == b.status == "complete", b.error
        one, other = logits(world, a.run_id, a.seed), logits(world, b.run_id, b.seed)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


SIZE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZE |= {"max_position_embeddings": 64, "initializer_range": 0.2}
DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_dropout": 0.0}
DEBERTA |= {"share_att_key": True, "position_buckets": 8, "hidden_dropout_prob": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64}


def encoder_in_a_folder(world: World, folder: Path, kind: Callable[..., PretrainedConfig], **settings: Any) -> str:
    """With the world's tokenizer, which gives no token types."""
    tokenizer = AutoTokenizer.from_pretrained(world.backbone)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("pad", "cls", "sep")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(kind(vocab_size=len(tokenizer), **settings, **special)).save_pretrained(folder)  # type: ignore[call-arg]
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MPNetConfig, SIZE | NO_DROPOUT),
        (ElectraConfig, SIZE | NO_DROPOUT | {"embedding_size": 12}),
        (DebertaV2Config, SIZE | NO_DROPOUT | DEBERTA),
        (DistilBertConfig, SMALL_DISTILBERT | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}),
    ],
)
def test_the_default_targets_train_in_lanes_on_every_family(world, tmp_path, kind, settings):
    folder = encoder_in_a_folder(world, tmp_path / "encoder", kind, **settings)
    found = []
    for engine in ("lanes", "peft"):
        cfg = lanes(world, "fw_lora", model__pretrained_id=folder, run_id=engine, training__engine=engine)
        (record,) = train_runs([RunSpec(cfg, 0)])
        assert record.status == "complete" and not record.warnings, record.error
        assert record.engine == engine and len(record.matrices) == 10
        found.append(logits(world, engine, 0))
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "targets", "missing"),
    [
        (ModernBertConfig, SIZE, ["query"], "modernbert"),
        (DebertaV2Config, SIZE | DEBERTA | {"conv_kernel_size": 3}, ["query"], "deberta-v2 with a convolution"),
        (ElectraConfig, SIZE | {"embedding_size": 12}, ["all-linear"], "adapters on electra.embeddings_project"),
    ],
)
def test_what_has_no_lanes_trains_padded_and_says_so(world, tmp_path, kind, settings, targets, missing):
    folder = encoder_in_a_folder(world, tmp_path / "encoder", kind, **settings)
    events = []
    cfg = lanes(world, "fw_lora", model__pretrained_id=folder, model__lora__target_modules=targets)
    (record,) = train_runs([RunSpec(cfg, 0)], events.append)
    assert record.status == "complete", record.error
    said = [e.text for e in events if isinstance(e, Note)]
    assert any(f"lanes does not know {missing}" in text and "padded batches" in text for text in said)
    assert any(f"lanes does not know {missing}" in text for text in record.warnings)


@pytest.mark.parametrize(("free", "expected"), [(1.0, 1), (float("inf"), 4)])
def test_memory_decides_how_many_lanes_there_are(world, monkeypatch, free, expected):
    """However little there is, one lane trains; with more than enough it is the most that serves a CPU."""
    seen = []
    step = lane_trainer.LaneEngine.step
    monkeypatch.setattr(lane_trainer, "free_memory", lambda _: free)
    monkeypatch.setattr(
        lane_trainer.LaneEngine, "step", lambda self, *args: seen.append(len(self.lanes)) or step(self, *args)
    )
    records = train_runs([RunSpec(lanes(world, "lora"), s) for s in range(5)])
    assert [r.status for r in records] == ["complete"] * 5
    assert max(seen) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_state_in_another_company_bit_by_bit(tmp_path, method):
    """Saved in its second epoch beside one neighbour, continued beside none; dropout is on."""
    world = World(tmp_path, dropout=0.1)
    cache = ResourceCache(torch.device("cpu"))
    jobs = [cache.job(RunSpec(world.config(method, training__engine="lanes"), seed)) for seed in (3, 4)]

    def started(*numbers: int) -> tuple[lane_trainer.LaneTrainer, list[ActiveRun]]:
        engine = lane_trainer.LaneTrainer(jobs, 2, cache)
        runs = [ActiveRun(i, jobs[i], cache.device, contextlib.ExitStack()) for i in numbers]
        for run in runs:
            engine.start(run)
        return engine, runs

    def train(engine: lane_trainer.LaneTrainer, runs: list[ActiveRun], steps: int) -> None:
        for _ in range(steps):
            engine.step(runs)
            ended = [run for run in runs if run.at_epoch_end]
            for run in ended:
                run.report_progress(lambda _: None, now=True)
            for run, logits in zip(ended, engine.evaluate(ended) if ended else [], strict=True):
                run.close_epoch(logits)

    undisturbed, whole = started(0)
    train(undisturbed, whole, 22)
    engine, runs = started(1, 0)
    train(engine, runs, 15)
    saved = engine.state_dict(runs[1])
    train(engine, runs, 2)  # what was saved must not move with the run
    alone, (second,) = started(0)
    alone.load_state_dict(second, saved)
    train(alone, [second], 7)
    first = whole[0]
    assert second.is_over and [e.step for e in second.epochs] == [11, 22]
    assert second.logits is not None and first.logits is not None
    np.testing.assert_allclose(second.logits, first.logits, rtol=1e-5, atol=1e-6)
    other, (third,) = started(0)
    train(other, [third], 15)
    kept = other.state_dict(third)
    train(other, [third], 2)
    again, (fourth,) = started(0)
    again.load_state_dict(fourth, kept)
    train(again, [fourth], 7)
    assert fourth.epochs == first.epochs
    np.testing.assert_array_equal(fourth.logits, first.logits)
    assert again.finish(fourth) == undisturbed.finish(first)
    assert fourth.state is not None and first.state is not None
    for name, factors in first.state.adapters().items():
        for one, two in zip(factors, fourth.state.adapters()[name], strict=True):
            assert torch.equal(one, two)
