"""Runs that are stopped or killed go on from their checkpoints, bit by bit as if nothing had happened.

pytest tests/fwlora_lab/training/test_resume.py
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import World

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.lanes.adamw import LaneAdamW
from fwlora_lab.records.folder import load_predictions, load_record
from fwlora_lab.records.record import Record
from fwlora_lab.training import checkpoints, scheduler
from fwlora_lab.training.events import Evaluated, Event, Note, StopRun
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.lane_trainer import LaneTrainer
from fwlora_lab.training.peft_engine import PeftEngine
from fwlora_lab.training.scheduler import train_runs
from fwlora_lab.training.stop_signals import StopSignals, Terminated

ENGINES = {"peft": PeftEngine, "lanes": LaneTrainer}
PROCESSES = multiprocessing.get_context("spawn")


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
    """The shared backbone and data, with results of its own; dropout is on."""
    monkeypatch.setattr(shared, "results", tmp_path / "results")
    return shared


def folder(cfg: RunConfig, seed: int = 0) -> Path:
    return Path(cfg.results_dir) / cfg.run_id / f"seed-{seed}"


def files(cfg: RunConfig, seed: int = 0) -> list[str]:
    return sorted(file.name for file in (folder(cfg, seed) / "checkpoints").glob("*"))


def outcome(cfg: RunConfig, seed: int = 0) -> dict[str, Any]:
    """What must be the same to the last bit."""
    record = load_record(folder(cfg, seed))
    assert record.status == "complete", record.error
    logits, labels = load_predictions(folder(cfg, seed))
    adapter = load_file(folder(cfg, seed) / "adapter" / "adapter_model.safetensors")
    return {
        "epochs": [epoch.model_dump() for epoch in record.epochs],
        "matrices": [row.model_dump() for row in record.matrices],
        "steps": record.steps,
        "logits": logits.tobytes(),
        "labels": labels.tobytes(),
        "adapter": {name: value.numpy().tobytes() for name, value in adapter.items()},
    }


def at_step(number: int, act: Any, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Let `act` happen in the engine's step of that number, counted from 1 over the whole test."""
    kind, count = ENGINES[engine], [0]
    step = kind.step

    def stepping(self: Any, runs: Any) -> None:
        count[0] += 1
        if count[0] == number:
            act()
        step(self, runs)

    monkeypatch.setattr(kind, "step", stepping)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """Where the tests run in a shell's background, SIGINT is ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


# Steps of 22: FW-LoRA's warm-up ends at 6, AdaLoRA allocates from 3 to 11; 11 is the end of the first epoch.
@pytest.mark.parametrize(
    ("method", "stop"),
    [("lora", 17), ("fw_lora", 4), ("fw_lora", 9), ("adalora", 2), ("adalora", 9), ("adalora", 17), ("svd_lora", 11)],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_ends_like_an_undisturbed_one(
    world: World, monkeypatch: pytest.MonkeyPatch, engine: str, method: str, stop: int
) -> None:
    whole, cfg = (world.config(method, run_id=name, training__engine=engine) for name in ("whole", "stopped"))
    train_runs([RunSpec(whole, 0)])
    at_step(stop, press_ctrl_c, monkeypatch, engine)
    with pytest.raises(KeyboardInterrupt):
        train_runs([RunSpec(cfg, 0)])
    assert files(cfg)[-1] == f"step-{stop:08}.pt", "the step in which the signal came is finished"
    torch.manual_seed(1)
    (record,) = train_runs([RunSpec(cfg, 0)])
    assert outcome(cfg) == outcome(whole)
    assert [p.name for p in folder(cfg).iterdir() if "checkpoint" in p.name] == []
    assert [(a.first_step, a.steps) for a in record.attempts] == [(0, stop), (stop, 22 - stop)]


@pytest.mark.parametrize("method", ["fw_lora", "adalora"])
def test_lanes_at_different_places_go_on_from_there(world: World, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Five runs of different lengths in four lanes: the fifth begins when the first one is over."""

    def runs(name: str) -> list[RunSpec]:
        return [
            RunSpec(world.config(method, run_id=f"{name}-{i}", training__engine="lanes", training__epochs=epochs), i)
            for i, epochs in enumerate((1, 2, 3, 2, 2))
        ]

    train_runs(runs("whole"))
    at_step(15, press_ctrl_c, monkeypatch, "lanes")
    with pytest.raises(KeyboardInterrupt):
        train_runs(runs("stopped"))
    newest = [files(run.cfg, run.seed)[-1:] for run in runs("stopped")]
    assert newest == [[]] + [["step-00000015.pt"]] * 3 + [["step-00000004.pt"]]
    train_runs(runs("stopped"))
    for one, other in zip(runs("whole"), runs("stopped"), strict=True):
        assert outcome(one.cfg, one.seed) == outcome(other.cfg, other.seed)
        assert files(other.cfg, other.seed) == []


def test_there_is_a_checkpoint_of_every_epoch_and_the_last_two_are_kept(world: World) -> None:
    cfg, seen = world.config(training__epochs=4), []
    train_runs([RunSpec(cfg, 0)], on_event=lambda event: seen.append(files(cfg)) if isinstance(event, Evaluated) else 0)
    first, second, third = ([f"step-{11 * epoch:08}.pt" for epoch in epochs] for epochs in ((1,), (1, 2), (2, 3)))
    assert seen == [[], first, second, third]


def test_between_the_epochs_time_decides(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = world.config(training__checkpoint_minutes=2.0)
    now, written = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def tick() -> None:
        now[0] += 50
        written.append(files(cfg)[-1:])

    step = PeftEngine.step
    monkeypatch.setattr(PeftEngine, "step", lambda self, runs: (tick(), step(self, runs))[1])
    train_runs([RunSpec(cfg, 0)])
    # 50 s a step: every third one. The end of an epoch at 11 begins the count anew.
    names = [int(name[0][5:-3]) if name else 0 for name in written]
    assert names == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 11, 11, 11, 14, 14, 14, 17, 17, 17, 20, 20]


def stopped_at(world: World, monkeypatch: pytest.MonkeyPatch, stop: int, **changes: Any) -> RunConfig:
    """A run with two checkpoints that was stopped."""
    cfg = world.config("fw_lora", **changes)
    with pytest.MonkeyPatch.context() as patch:
        at_step(stop, press_ctrl_c, patch, cfg.training.engine)
        with pytest.raises(KeyboardInterrupt):
            train_runs([RunSpec(cfg, 0)])
    return cfg


def trained(cfg: RunConfig) -> tuple[Record, list[str]]:
    notes: list[str] = []
    (record,) = train_runs([RunSpec(cfg, 0)], lambda e: notes.append(e.text) if isinstance(e, Note) else None)
    return record, notes


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    world: World, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    whole = world.config("fw_lora", run_id="whole")
    train_runs([RunSpec(whole, 0)])
    cfg = stopped_at(world, monkeypatch, 17)
    newest = folder(cfg) / "checkpoints" / files(cfg)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    record, notes = trained(cfg)
    assert notes == ["fw_lora seed 0 goes on from step 11 of 22 (step-00000017.pt: it is damaged)"]
    assert record.attempts[1].first_step == 11 and outcome(cfg) == outcome(whole)


def test_a_damaged_last_checkpoint_goes_with_the_next_one_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = stopped_at(world, monkeypatch, 17)
    (folder(cfg) / "checkpoints" / "step-00000017.pt").write_bytes(b"torn")
    stopped_at(world, monkeypatch, 2)  # the second step from step 11 on
    assert files(cfg) == ["step-00000011.pt", "step-00000013.pt"]


@pytest.mark.parametrize("other", ["settings", "data", "encoder", "code", "seed"])
def test_a_checkpoint_of_something_else_is_never_read(
    world: World, monkeypatch: pytest.MonkeyPatch, other: str, tmp_path: Path
) -> None:
    cfg = stopped_at(world, monkeypatch, 17)
    state_read = []
    monkeypatch.setattr(PeftEngine, "load_state_dict", lambda *_: state_read.append(1))
    if other == "settings":
        cfg = world.config("fw_lora", training__learning_rate=1e-3)
    elif other == "data":
        rows = Path(world.train_file).read_text().splitlines()
        (tmp_path / "data.csv").write_text("\n".join(rows[:-4]) + "\n")
        cfg = world.config("fw_lora", dataset__train_file=str(tmp_path / "data.csv"))
    elif other == "encoder":
        copy = World(tmp_path / "copy")
        cfg = world.config("fw_lora", model__pretrained_id=copy.backbone)
    elif other == "code":
        monkeypatch.setattr(checkpoints, "_code_fingerprint", lambda: "another")
    else:
        (folder(cfg) / "checkpoints").rename(tmp_path / "moved")
        folder(cfg, 1).mkdir()
        (tmp_path / "moved").rename(folder(cfg, 1) / "checkpoints")
    seed = 1 if other == "seed" else 0
    notes: list[str] = []
    (record,) = train_runs([RunSpec(cfg, seed)], lambda e: notes.append(e.text) if isinstance(e, Note) else None)
    assert record.status == "complete" and len(record.attempts) == 1 and record.steps == 22 - 2 * (other == "data")
    assert not state_read and len(notes) == 1
    assert f"fw_lora seed {seed} begins anew" in notes[0] and ("settings" if other == "seed" else other) in notes[0]


def test_seconds_are_kept_apart_by_attempt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = stopped_at(world, monkeypatch, 17)
    time.sleep(0.3)
    record, _ = trained(cfg)
    first, second = record.attempts
    assert record.times is not None and record.started == first.started
    assert first.train_seconds + second.train_seconds == pytest.approx(record.times.train_seconds)
    assert first.eval_seconds + second.eval_seconds == pytest.approx(record.times.eval_seconds)
    assert min(first.train_seconds, second.train_seconds, first.eval_seconds, second.eval_seconds) > 0
    assert (second.started - first.started).total_seconds() > first.train_seconds + 0.3
    assert record.times.train_seconds < (record.finished - record.started).total_seconds() - 0.3


def test_a_pruned_run_leaves_no_checkpoint(world: World) -> None:
    cfg = world.config()

    def stop(event: Event) -> None:
        if isinstance(event, Evaluated):
            raise StopRun

    assert train_runs([RunSpec(cfg, 0)], stop) == []
    assert not folder(cfg).exists()


def test_epochs_from_before_are_told_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = stopped_at(world, monkeypatch, 17)
    told: list[tuple[int, dict[str, float]]] = []
    (record,) = train_runs(
        [RunSpec(cfg, 0)], lambda e: told.append((e.epoch, e.metrics)) if isinstance(e, Evaluated) else None
    )
    assert told == [(e.epoch, e.metrics) for e in record.epochs] and len(told) == 2


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slow_step_is_broken_off_and_done_again(world: World, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """As `test_a_stopped_run…`, with a step that takes longer than a signal may wait: it leaves the step before."""
    whole, cfg = (world.config("fw_lora", run_id=name, training__engine=engine) for name in ("whole", "stopped"))
    train_runs([RunSpec(whole, 0)])
    monkeypatch.setattr(scheduler, "_SLOW_STEP_SECONDS", -1.0)
    # In the middle of the step: after the backward pass, after F was observed.
    place, name = (LaneAdamW, "step") if engine == "lanes" else (torch.nn.utils, "clip_grad_norm_")
    count, original = [0], getattr(place, name)

    def updating(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(place, name, updating)
    with pytest.raises(Terminated):
        train_runs([RunSpec(cfg, 0)])
    assert files(cfg) == ["step-00000004.pt"]
    train_runs([RunSpec(cfg, 0)])
    assert outcome(cfg) == outcome(whole)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_is_broken_off_and_done_again(world: World, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    whole, cfg = (world.config("adalora", run_id=name, training__engine=engine) for name in ("whole", "stopped"))
    train_runs([RunSpec(whole, 0)])
    kind, count = ENGINES[engine], [0]
    evaluate = kind.evaluate

    def evaluating(self: Any, runs: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("a signal in an evaluation does not wait")
        return evaluate(self, runs)

    monkeypatch.setattr(kind, "evaluate", evaluating)
    with pytest.raises(Terminated):
        train_runs([RunSpec(cfg, 0)])
    assert files(cfg)[-1] == "step-00000022.pt"
    train_runs([RunSpec(cfg, 0)])
    assert count[0] == 3 and outcome(cfg) == outcome(whole)


def test_the_second_ctrl_c_ends_at_once_and_writes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, after = world.config(), []
    at_step(5, lambda: (press_ctrl_c(), press_ctrl_c(), after.append(1)), monkeypatch, "peft")
    with pytest.raises(KeyboardInterrupt):
        train_runs([RunSpec(cfg, 0)])
    assert after == [] and files(cfg) == []


def test_a_second_sigterm_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = world.config()
    term = lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]  # noqa: E731
    at_step(5, term, monkeypatch, "peft")
    with pytest.raises(Terminated):
        train_runs([RunSpec(cfg, 0)])
    assert files(cfg) == ["step-00000005.pt"]


def test_handlers_are_put_back_and_ones_own_is_asked_first() -> None:
    asked: list[int] = []
    mine = lambda number, _: asked.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    term = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals, signals.held():
        press_ctrl_c()
        signals.check()
    assert asked == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is mine
    assert signal.getsignal(signal.SIGTERM) == term
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals():
        press_ctrl_c()
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with StopSignals() as signals, signals.held():
                signals.check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failures == []


# --- processes ----------------------------------------------------------------------------------


def command(tmp_path: Path, cfg: RunConfig, *words: str) -> list[str]:
    file = tmp_path / f"{cfg.run_id}.yaml"
    file.write_text(to_yaml(cfg))
    return [sys.executable, "-m", "fwlora_lab.cli", "train", f"run={file}", *words]


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["sigterm", "ctrl-c"])
def test_a_signal_ends_the_command_within_ten_seconds_with_its_checkpoints(
    world: World, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    cfg = world.config("fw_lora", training__engine="lanes", training__epochs=2000)
    process = start(command(tmp_path, cfg, "seeds=0..1"))
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 3" in line:
            break
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - began < 10
    assert err.strip() == "fwlora: stopped. What is done is kept; the same command goes on from there."
    newest = [files(cfg, seed)[-1] for seed in (0, 1)]
    assert newest[0] == newest[1] and int(newest[0][5:-3]) >= 33


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_at_random_moments_it_ends_like_an_undisturbed_run(world: World, tmp_path: Path, engine: str) -> None:
    """kill -9, with a checkpoint after every step, so that many a kill meets one that is being written."""
    whole = world.config("adalora", run_id="whole", training__engine=engine)
    often = {"training__engine": engine, "training__checkpoint_minutes": 1e-9}
    cfg = world.config("adalora", run_id="killed", **often)
    train_runs([RunSpec(whole, seed) for seed in (0, 1)])
    draw, attempts = random.Random(5), 0

    def written() -> int:
        """The steps of both runs up to their newest checkpoint."""
        done = 0
        for seed in (0, 1):
            steps = [int(name[5:-3]) for name in files(cfg, seed) if name.startswith("step-")]
            done += 22 if (folder(cfg, seed) / "record.json").exists() else max(steps, default=0)
        return done

    while True:
        process = start(command(tmp_path, cfg, "seeds=0..1"))
        assert process.stdout is not None
        process.stdout.readline()
        attempts += 1
        if attempts == 4:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            break
        before, deadline = written(), time.monotonic() + 60
        while written() <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.2))
        process.kill()
        process.communicate()
    for seed in (0, 1):
        assert outcome(cfg, seed) == outcome(whole, seed)
    assert "goes on from step" in out or "is there already" in out
    left = [p.name for p in folder(cfg).parent.iterdir() if not p.name.endswith(".lock")]
    assert sorted(left) == ["seed-0", "seed-1"] and files(cfg) == []
    assert not np.isnan(load_predictions(folder(cfg))[0]).any()
