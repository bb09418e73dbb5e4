"""pytest tests/fwlora_lab/training/test_train.py"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import World

from fwlora_lab.catalog.methods import METHODS as METHOD_NAMES
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.data.load import load_task
from fwlora_lab.data.tokens import collate, epoch_batches, tokenize
from fwlora_lab.errors import UserError
from fwlora_lab.models import methods
from fwlora_lab.models.adapter_state import adapted_layers
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.models.methods import AdapterRequest, build_method, lora_adapters, register_method
from fwlora_lab.records.folder import find_records, load_predictions, load_record
from fwlora_lab.records.record import Record
from fwlora_lab.seeds import derive
from fwlora_lab.training import active_run, device, jobs, peft_engine, resources, scheduler
from fwlora_lab.training.active_run import Clock
from fwlora_lab.training.events import Evaluated, Event, Note, RunFailed, RunFinished, RunStarted, StepDone
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_runs

METHODS = ["lora", "fw_lora", "adalora"]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "pick_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(shared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The shared backbone and data, with results of its own."""
    monkeypatch.setattr(shared, "results", tmp_path / "results")
    return shared


def run(cfg: RunConfig, seed: int = 0, **more: Any) -> Record:
    (record,) = train_runs([RunSpec(cfg, seed)], **more)
    return record


def folder(cfg: RunConfig, seed: int = 0) -> Path:
    return Path(cfg.results_dir) / cfg.run_id / f"seed-{seed}"


def logits(cfg: RunConfig, seed: int = 0) -> np.ndarray:
    return load_predictions(folder(cfg, seed))[0]


# --- the same again -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_with_one_seed_are_bitwise_equal(world: World, method: str) -> None:
    first, second = (world.config(method, run_id=f"{method}-{n}") for n in "ab")
    records = [run(first)]
    torch.manual_seed(12345)  # whatever was drawn in between
    torch.rand(3)
    records.append(run(second))
    np.testing.assert_array_equal(logits(first), logits(second))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (folder(cfg) / "adapter" / name for cfg in (first, second))
        assert one.read_bytes() == two.read_bytes()
    assert records[0].epochs == records[1].epochs and records[0].matrices == records[1].matrices
    assert records[0].status == "complete"
    other = run(first, seed=1)
    assert other.status == "complete" and not np.array_equal(logits(first, 1), logits(first))


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter", "per_example"])
def test_without_a_penalty_fw_lora_is_lora(world: World, estimator: str) -> None:
    lora = world.config("lora")
    plain = run(lora)
    without = world.config("fw_lora", fw_lora__penalty_strength=0.0, fw_lora__estimator=estimator)
    record = run(without)
    assert record.error is None
    np.testing.assert_array_equal(logits(lora), logits(without))
    assert record.epochs == plain.epochs
    if estimator == "exact":
        penalised = world.config("fw_lora", run_id="penalised")
        sizes = [sum(m.delta_norm or 0.0 for m in r.matrices) for r in (plain, run(penalised))]
        assert sizes[1] < 0.99 * sizes[0]


def naive(world: World, cfg: RunConfig, seed: int) -> tuple[np.ndarray, list[float]]:
    """The loop written down plainly, with one example at a time in evaluation."""
    backbone, data = load_backbone(cfg.model), load_task(cfg.dataset)
    train, dev = (tokenize(e, backbone.tokenizer, 32, True) for e in (data.train, data.dev))
    cfg = cfg.model_copy(update={"training": cfg.training.model_copy(update={"seed": seed})})
    arm = build_method(cfg, backbone, data.spec, 2 * math.ceil(len(train) / 4))
    torch.manual_seed(derive(seed, "dropout"))
    losses = []
    arm.model.train()
    for epoch in range(2):
        for index in epoch_batches(len(train), 4, derive(seed, "order"), epoch):
            loss = arm.model(**collate(train, index, 0, "longest", 32)).loss
            losses.append(float(loss))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(arm.model.parameters(), 1.0)
            arm.optimizer.step()
            arm.scheduler.step()
            arm.optimizer.zero_grad()
    arm.model.eval()
    with torch.no_grad():
        rows = [arm.model(**collate(dev, torch.tensor([i]), 0, "longest", 32)).logits[0] for i in range(len(dev))]
    return torch.stack(rows).numpy(), losses


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_does_what_a_plain_one_does(world: World, method: str) -> None:
    cfg = world.config(method)
    record = run(cfg, seed=3)
    expected, losses = naive(world, cfg, 3)
    np.testing.assert_allclose(logits(cfg, 3), expected, atol=2e-5)
    assert [e.train_loss for e in record.epochs] == pytest.approx(
        [np.mean(losses[:11]), np.mean(losses[11:])], rel=1e-5
    )
    labels = load_predictions(folder(cfg, 3))[1]
    assert record.metrics["accuracy"] == pytest.approx(np.mean(expected.argmax(1) == labels))
    shifted = expected - expected.max(1, keepdims=True)
    surprise = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    assert record.epochs[-1].loss == pytest.approx(surprise.mean(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_two_halves_of_a_batch_are_the_batch(tmp_path_factory: pytest.TempPathFactory, method: str) -> None:
    """Also in the last step, whose 8 of the 44 examples are parts of 6 and 2."""
    calm = World(tmp_path_factory.mktemp("calm"), dropout=0.0)
    whole = world_config(calm, method, "whole", batch_size=12)
    halves = world_config(calm, method, "halves", batch_size=6, gradient_accumulation_steps=2)
    records = [run(whole), run(halves)]
    assert [r.steps for r in records] == [8, 8]
    np.testing.assert_allclose(logits(whole), logits(halves), atol=2e-5)
    for a, b in zip(records[0].epochs, records[1].epochs, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-5)
    for one, two in zip(records[0].matrices, records[1].matrices, strict=True):
        assert (one.fisher or 0.0) == pytest.approx(two.fisher or 0.0, rel=1e-4)


def world_config(world: World, method: str, run_id: str, **training: Any) -> RunConfig:
    changes = {f"training__{k}": v for k, v in training.items()}
    return world.config(
        method,
        run_id=run_id,
        model__lora__dropout=0.0,
        fw_lora__warmup_steps=4,
        training__epochs=2,
        **changes,
    )


@pytest.mark.parametrize("padding", ["max_length", "grouped"])
def test_padding_does_not_change_the_result(tmp_path_factory: pytest.TempPathFactory, padding: str) -> None:
    calm = World(tmp_path_factory.mktemp("calm"), dropout=0.0)
    plain = calm.config(model__lora__dropout=0.0)
    padded = calm.config(model__lora__dropout=0.0, run_id="padded", dataset__padding=padding)
    a, b = run(plain), run(padded)
    np.testing.assert_allclose(logits(plain), logits(padded), atol=2e-5)
    assert a.times is not None and b.times is not None
    assert (a.tokens_per_second or 0) * a.times.train_seconds == pytest.approx(
        (b.tokens_per_second or 0) * b.times.train_seconds
    ), "padding does not count as tokens"


# --- what a run leaves --------------------------------------------------------------------------


def test_texts_that_are_cut_or_repeated_are_counted_in_the_record(world: World, tmp_path: Path) -> None:
    files = {
        "train": ["the dog sees a cat well"] * 3 + ["the tree finds a boat " + "badly " * 20, "a house"],
        "dev": ["the dog sees a cat well", "the bird eats " + "gladly " * 10, "a tree"],
    }
    for name, texts in files.items():
        rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    cfg = world.config(
        "lora",
        results_dir=str(tmp_path / "r"),
        dataset__train_file=str(tmp_path / "train.csv"),
        dataset__eval_file=str(tmp_path / "dev.csv"),
        dataset__max_length=12,
        training__epochs=1,
    )
    # With [CLS] and [SEP]: 3 of 8 tokens, one of 27 cut to 12, one of 4; and one of 8, one of 15 cut to 12, one of 4.
    assert [text for text in run(cfg).warnings if "ignored" not in text] == [
        "dataset.max_length=12 cuts 1 of 5 train texts (20.0%): 27.3% of all tokens are not read.",
        "dataset.max_length=12 cuts 1 of 3 dev texts (33.3%): 11.1% of all tokens are not read.",
        "2 of 5 training texts repeat an earlier one.",
        "1 of 3 dev texts are training texts too: the scores on them say nothing about new texts.",
    ]
    longer = with_values(cfg, {"dataset.max_length": 32, "run_id": "longer"})
    assert [text for text in run(longer).warnings if "cuts" in text] == []


def test_the_record_tells_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    cfg = world.config("fw_lora", training__mixed_precision="bf16")
    events: list[Event] = []
    record = run(cfg, seed=5, on_event=events.append)
    assert record == load_record(folder(cfg, 5))
    assert (record.run_id, record.seed, record.method) == ("fw_lora", 5, "fw_lora")
    assert (record.steps, record.total_steps, record.status) == (22, 22, "complete")
    assert record.config["training"]["seed"] == 5
    assert [(e.epoch, e.step) for e in record.epochs] == [(1, 11), (2, 22)]
    assert record.epochs[-1].learning_rate == 0.0
    assert record.warnings[0] == (
        "training.mixed_precision=bf16: this CPU has no instructions for it; the run trains in fp32."
    )
    assert record.machine.precision == "fp32"
    times = record.times
    assert times is not None and set(times.phases) == {"warmup", "penalty"}
    assert times.warmup_seconds == times.phases["warmup"] > 0
    assert times.warmup_seconds + times.steady_seconds == pytest.approx(times.train_seconds)
    data = load_task(cfg.dataset)
    table = tokenize(data.train, load_backbone(cfg.model).tokenizer, 32, True)
    assert (record.examples_per_second or 0) * times.train_seconds == pytest.approx(88)
    assert (record.tokens_per_second or 0) * times.train_seconds == pytest.approx(2 * int(table.lengths().sum()))
    assert (record.peak_memory_bytes or 0) > 10**7
    assert len(record.matrices) == 10 and sum(m.importance or 0 for m in record.matrices) > 0.999
    metrics = json.loads((folder(cfg, 5) / "metrics.json").read_text())
    assert metrics["accuracy"] == record.metrics["accuracy"]
    np.testing.assert_array_equal(load_predictions(folder(cfg, 5))[1], data.dev.labels)

    kinds = [type(e) for e in events if not isinstance(e, StepDone)]
    assert kinds == [Note, RunStarted, Evaluated, Evaluated, RunFinished]
    steps = [e for e in events if isinstance(e, StepDone)]
    assert [s.step for s in steps] == sorted({s.step for s in steps}) and steps[-1].step == 22
    assert steps[-1].phase == "penalty" and all(e.seed == 5 for e in events)


def test_without_save_adapter_there_is_none(world: World) -> None:
    cfg = world.config(training__save_adapter=False, training__epochs=1)
    run(cfg)
    assert sorted(p.name for p in folder(cfg).iterdir()) == [
        "config.yaml",
        "metrics.json",
        "predictions.npz",
        "record.json",
    ]


def test_selection_is_another_split_than_dev(world: World) -> None:
    cfg = world.config(training__evaluate_on="selection", dataset__validation_fraction=0.25, training__epochs=1)
    record = run(cfg)
    assert record.evaluated_on == "validation"
    labels = load_predictions(folder(cfg))[1]
    np.testing.assert_array_equal(labels, load_task(cfg.dataset).validation.labels)
    assert len(labels) == 11 and record.steps == math.ceil(33 / 4)


def test_evaluation_is_not_training_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(active_run.time, "perf_counter", lambda: now[0])
    real = {"predict": peft_engine.predict, "collate": jobs.collate}

    def predict(*args: Any) -> np.ndarray:
        before = now[0]
        out = real["predict"](*args)
        now[0] = before + 1000.0
        return out

    def batch(*args: Any) -> Any:
        now[0] += 1.0  # each batch "takes a second"
        return real["collate"](*args)

    monkeypatch.setattr(peft_engine, "predict", predict)
    monkeypatch.setattr(jobs, "collate", batch)
    times = run(world.config("fw_lora")).times
    assert times is not None
    assert (times.warmup_seconds, times.steady_seconds) == (6.0, 16.0)
    assert (times.train_seconds, times.eval_seconds) == (22.0, 2000.0)


def test_the_clock_counts_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(active_run.time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    for phase, until in [("a", 103.0), ("a", 104.0), ("b", 110.0), (None, 150.0), ("a", 151.0)]:
        clock.enter(phase)
        now[0] = until
    assert clock.seconds == {"a": 4.0, "b": 6.0} and clock.total() == 11.0
    clock.enter(None)
    assert clock.seconds == {"a": 5.0, "b": 6.0}


# --- cohorts ------------------------------------------------------------------------------------


def test_what_is_there_is_not_done_again(world: World) -> None:
    cfg = world.config(training__epochs=1)
    first = run(cfg)
    events: list[Event] = []
    assert run(cfg, on_event=events.append) == first
    assert [type(e) for e in events] == [RunFinished] and not events[0].trained  # type: ignore[attr-defined]
    second = run(cfg, overwrite=True, on_event=events.append)
    assert second.started > first.started and second.epochs == first.epochs
    assert load_record(folder(cfg)) == second
    renamed = cfg.model_copy(update={"method": "baseline_lora"})
    assert run(renamed) == second, "the same run under its other name"


def test_a_record_of_something_else_is_not_overwritten(world: World) -> None:
    cfg = world.config(training__epochs=1)
    run(cfg)
    other = world.config(training__epochs=1, training__learning_rate=1e-3)
    fresh = world.config("adalora")
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.005 there, 0\.001 asked for"):
        train_runs([RunSpec(fresh, 0), RunSpec(other, 0)])
    assert not folder(fresh).exists(), "refused before anything was trained"
    assert run(other, overwrite=True).config["training"]["learning_rate"] == 1e-3


def test_runs_share_data_tokens_and_backbone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"load_task": 0, "tokenize": 0, "load_backbone": 0}

    def counted(name: str) -> Any:
        real = getattr(resources, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return real(*args)

        return call

    for name in calls:
        monkeypatch.setattr(resources, name, counted(name))
    runs = [RunSpec(world.config(m, training__epochs=1), s) for m in ("lora", "adalora") for s in (1, 0)]
    records = train_runs(runs)
    assert calls == {"load_task": 1, "tokenize": 2, "load_backbone": 1}
    assert [(r.method, r.seed) for r in records] == [
        ("lora", 1),
        ("lora", 0),
        ("adalora", 1),
        ("adalora", 0),
    ]
    assert len(find_records(world.results).records) == 4


def test_a_run_alone_is_the_run_in_a_cohort(world: World) -> None:
    short = {"training__epochs": 1, "fw_lora__warmup_steps": 3}
    runs = [RunSpec(world.config(m, **short), 0) for m in METHODS]
    train_runs(runs)
    alone = world.config("adalora", run_id="alone", training__epochs=1)
    run(alone)
    np.testing.assert_array_equal(logits(alone), logits(runs[2].cfg))


def test_a_failed_run_is_recorded_and_the_others_go_on(world: World) -> None:
    wild = world.config(
        run_id="wild",
        training__learning_rate=1e38,
        training__max_grad_norm=None,
        training__epochs=1,
    )
    calm = world.config(training__epochs=1)
    events: list[Event] = []
    failed, complete = train_runs([RunSpec(wild, 0), RunSpec(calm, 0)], on_event=events.append)
    assert (failed.status, complete.status) == ("failed", "complete")
    assert failed.error is not None and failed.error.type == "Diverged"
    assert "training diverged. Lower training.learning_rate" in failed.error.message
    assert "Traceback" in failed.error.traceback and "active_run.py" in failed.error.traceback
    assert failed.metrics == {} and failed.matrices == [] and failed.times is not None
    assert load_record(folder(wild)) == failed
    assert sorted(p.name for p in folder(wild).iterdir()) == ["config.yaml", "record.json"]
    assert [type(e) for e in events if isinstance(e, RunFailed | RunFinished)] == [
        RunFailed,
        RunFinished,
    ]
    again: list[Event] = []
    train_runs([RunSpec(wild, 0)], on_event=again.append)
    assert any(isinstance(e, RunStarted) for e in again), "a failed run is tried again"


def test_the_step_of_a_divergence_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jobs.Job.batch
    seen = [0]

    def batch(self: Any, table: Any, index: Any) -> Any:
        out = real(self, table, index)
        seen[0] += 1
        if seen[0] == 4:
            with torch.no_grad():
                state[0].model.get_parameter(bias).fill_(math.nan)
        return out

    state: list[Any] = []
    bias = "base_model.model.classifier.modules_to_save.default.bias"
    real_build = peft_engine.build_method
    monkeypatch.setattr(peft_engine, "build_method", lambda *a: state.append(real_build(*a)) or state[0])
    monkeypatch.setattr(jobs.Job, "batch", batch)
    record = run(world.config())
    assert record.error is not None
    assert record.error.message.startswith("the training loss is nan at step 4: training diverged")


def test_stopping_leaves_nothing_half_done(world: World) -> None:
    cfg = world.config("fw_lora")
    done = world.config(training__epochs=1)

    def stop(event: Event) -> None:
        if isinstance(event, Evaluated) and event.run_id == "fw_lora":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_runs([RunSpec(done, 0), RunSpec(cfg, 0)], on_event=stop)
    assert [r.run_id for r in find_records(world.results).records] == ["lora"]
    assert [p.name for p in folder(cfg).iterdir()] == ["checkpoints"]
    assert run(cfg).status == "complete", "and its lock is free"


def test_a_run_of_another_process_is_waited_for_at_the_end(world: World) -> None:
    busy, free = world.config(run_id="busy", training__epochs=1), world.config(training__epochs=1)
    held, let_go = threading.Event(), threading.Event()

    def other_process() -> None:
        folder(busy).parent.mkdir(parents=True)
        with filelock.FileLock(folder(busy).parent / ".seed-0.lock"):
            held.set()
            let_go.wait(20)

    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, RunFinished) and event.run_id == "lora":
            let_go.set()

    other = threading.Thread(target=other_process)
    other.start()
    held.wait(20)
    records = train_runs([RunSpec(busy, 0), RunSpec(free, 0)], on_event=listen)
    other.join()
    assert [r.run_id for r in records] == ["busy", "lora"]
    notes = [e for e in events if isinstance(e, Note) and "another process" in e.text]
    assert [n.run_id for n in notes] == ["busy"] and events[0] == notes[0]
    finished = [e for e in events if isinstance(e, RunFinished)]
    assert [(e.run_id, e.trained) for e in finished] == [("lora", True), ("busy", True)]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fw_lora__warmup_steps": 22}, r"fw_lora\.warmup_steps = 22 is not smaller than the 22"),
        (
            {"fw_lora__warmup_steps": 500},
            r"fw_lora\.warmup_steps = 500 .* use fw_lora\.warmup_steps=5",
        ),
        ({"dataset__max_length": 65}, r"max_length=65 is more than the 64 tokens"),
        ({"dataset__train_examples": 4}, r"fw_lora\.warmup_steps = 6 is not smaller"),
        ({"model__lora__target_modules": ["kwery"]}, r"kwery"),
        ({"model__pretrained_id": "./nowhere"}, r"nowhere"),
        ({"dataset__train_file": "nowhere.csv"}, r"nowhere\.csv"),
        (
            {"arm": "adalora", "training__epochs": 1, "training__batch_size": 44},
            r"leave none of the 1 steps",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_done(
    world: World, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_engine, "build_method", lambda *_: pytest.fail("loaded the weights"))
    bad = world.config(changes.pop("arm", "fw_lora"), **changes)
    with pytest.raises(UserError, match=message):
        train_runs([RunSpec(world.config(), 0), RunSpec(bad, 0)])
    assert not world.results.exists()


def test_a_run_asked_for_twice_is_refused(world: World) -> None:
    one = world.config()
    two = world.config(training__learning_rate=1e-4)
    with pytest.raises(UserError, match="'lora' with seed 0 is asked for twice.*run_id=NAME"):
        train_runs([RunSpec(one, 0), RunSpec(two, 0)])
    assert not world.results.exists()


def test_results_that_cannot_be_written_are_told_before_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_engine, "build_method", lambda *_: pytest.fail("loaded the weights"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run(world.config(results_dir=str(tmp_path / "file")))


# --- a run's whole state ------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "svd_lora"])
def test_a_run_goes_on_from_its_state_bit_by_bit(world: World, method: str) -> None:
    """Stopped in its second epoch and continued in another engine, after other draws; dropout is on."""
    cache = resources.ResourceCache(torch.device("cpu"))
    job = cache.job(RunSpec(world.config(method), 3))

    def train(engine: peft_engine.PeftEngine, run: active_run.ActiveRun, steps: int) -> None:
        for _ in range(steps):
            engine.step([run])
            if run.at_epoch_end:
                run.report_progress(lambda _: None, now=True)
                run.close_epoch(engine.evaluate([run])[0])

    def started() -> tuple[peft_engine.PeftEngine, active_run.ActiveRun]:
        engine = peft_engine.PeftEngine(cache.device)
        run = active_run.ActiveRun(0, job, cache.device, contextlib.ExitStack())
        engine.start(run)
        return engine, run

    undisturbed, whole = started()
    train(undisturbed, whole, 22)
    engine, first = started()
    train(engine, first, 15)
    saved = engine.state_dict(first)
    train(engine, first, 2)  # what was saved must not move with the run
    torch.rand(5)
    engine, second = started()
    engine.load_state_dict(second, saved)
    assert (second.epoch, second.position, second.step) == (1, 4, 15)
    train(engine, second, 7)
    assert second.epochs == whole.epochs and second.is_over and second.state and whole.state
    np.testing.assert_array_equal(second.logits, whole.logits)
    for name, factors in whole.state.adapters().items():
        for one, two in zip(factors, second.state.adapters()[name], strict=True):
            assert torch.equal(one, two)
    assert engine.finish(second) == undisturbed.finish(whole)


def test_a_state_counts_the_seconds_of_the_phase_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(active_run.time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    clock.enter("warmup")
    now[0] = 5.0
    assert clock.state_dict() == {"warmup": 5.0}
    now[0] = 7.0
    clock.enter(None)
    assert clock.seconds == {"warmup": 7.0}


def test_a_state_of_a_run_that_is_over_keeps_its_predictions_and_its_start(world: World) -> None:
    cache = resources.ResourceCache(torch.device("cpu"))
    job = cache.job(RunSpec(world.config(training__epochs=1), 0))
    runs = []
    for _ in range(2):
        engine = peft_engine.PeftEngine(cache.device)
        runs.append(active_run.ActiveRun(0, job, cache.device, contextlib.ExitStack()))
        engine.start(runs[-1])
        if len(runs) == 1:
            while not runs[0].at_epoch_end:
                engine.step(runs)
            runs[0].report_progress(lambda _: None, now=True)
            runs[0].close_epoch(engine.evaluate(runs)[0])
            saved = engine.state_dict(runs[0])
    engine.load_state_dict(runs[1], saved)
    assert runs[1].is_over and runs[1].started == runs[0].started
    np.testing.assert_array_equal(runs[1].logits, runs[0].logits)


def test_a_method_of_ones_own_is_one_call_of_register_method(world: World) -> None:
    """LoRA whose B is frozen in every second matrix, by the public extension point."""

    def adapt(request: AdapterRequest) -> PeftModel:
        model = lora_adapters(request)
        for number, (_, layer) in enumerate(adapted_layers(model)):
            layer.lora_B["default"].weight.requires_grad_(number % 2 == 0)
        return model

    register_method("half_lora", adapt, aliases=["proposed_half_lora"])
    try:
        notes: list[Event] = []
        cfg = world.config("proposed_half_lora", training__engine="lanes", training__epochs=1)
        record = run(cfg, on_event=notes.append)
        assert (record.status, record.method, record.engine) == ("complete", "half_lora", "peft")
        assert [row.delta_norm == 0.0 for row in record.matrices] == [False, True] * 5
        assert any("does not know the method half_lora" in n.text for n in notes if isinstance(n, Note))
        with pytest.raises(ValueError, match="already means the method lora"):
            register_method("half_lora", adapt, aliases=["lora"])
    finally:
        for name in ("half_lora", "proposed_half_lora"):
            METHOD_NAMES.pop(name, None)
        methods._METHODS.pop("half_lora", None)
