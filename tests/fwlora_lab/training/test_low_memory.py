"""Too little memory: fewer runs at once, then one message with figures, and never a traceback.

pytest tests/fwlora_lab/training/test_low_memory.py
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import World

from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.errors import is_out_of_memory
from fwlora_lab.records.folder import find_records
from fwlora_lab.training import device, lane_trainer, peft_engine
from fwlora_lab.training.events import Note
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_runs

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 80 bytes"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_it_is_known_by_its_kinds(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Room:
    """An allocator with room for so many lanes: a step or an evaluation of more of them fails."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, lanes: int, error: Exception, what: str, after: int = 0
    ) -> None:
        self.most = self.calls = 0
        whole = getattr(lane_trainer.LaneTrainer, what)

        def limited(trainer, runs):
            self.calls += 1
            # The step changes randomness and statistics before it fails, as a real one does.
            result = whole(trainer, runs)
            if self.calls > after:
                if len(trainer._runs) > lanes:
                    raise error
                self.most = max(self.most, len(trainer._runs))
            return result

        monkeypatch.setattr(lane_trainer.LaneTrainer, what, limited)


@pytest.mark.parametrize("what", ["step", "evaluate"])
@pytest.mark.parametrize("error", ERRORS[:3], ids=lambda e: type(e).__name__)
def test_fewer_lanes_are_used_and_the_results_are_the_same(world, monkeypatch, error, what):
    runs = [RunSpec(world.config("adalora", training__engine="lanes"), seed) for seed in range(4)]
    monkeypatch.setattr(lane_trainer, "max_lanes", lambda *_: 1)
    alone = train_runs(runs)
    monkeypatch.undo()
    room, events = Room(monkeypatch, 1, error, what, after=0 if what == "step" else 1), []
    # The first epoch's evaluation fits and leaves checkpoints; the second one's does not.
    records = train_runs(runs, events.append, overwrite=True)
    assert [r.status for r in records] == ["complete"] * 4 and room.most == 1
    notes = [e.text for e in events if isinstance(e, Note) and "too little memory" in e.text]
    assert notes == [
        "too little memory for 4 runs at once: from their last checkpoints on, 2 at once",
        "too little memory for 2 runs at once: from their last checkpoints on, 1 at once",
    ]
    for mine, other in zip(records, alone, strict=True):
        assert mine.metrics == other.metrics
        losses = [[epoch.train_loss for epoch in r.epochs] for r in (mine, other)]
        assert losses[0] == (losses[1] if what == "step" else pytest.approx(losses[1], abs=1e-5))


@pytest.mark.parametrize("engine", ["lanes", "peft"])
def test_a_run_that_does_not_fit_alone_fails_with_the_figures(world, monkeypatch, engine, capsys):
    def full(*_):
        raise ERRORS[2]

    owner = lane_trainer.LaneTrainer if engine == "lanes" else peft_engine.PeftEngine
    monkeypatch.setattr(owner, "step", full)
    records = train_runs([RunSpec(world.config("lora", training__engine=engine), seed) for seed in (0, 1)])
    for record in records:
        assert record.status == "failed" and record.error is not None and record.error.type == "TooLittleMemory"
        assert record.error.message.startswith("too little memory: ")
        assert "can't allocate memory" in record.error.message and "training.batch_size" in record.error.message
        assert ("one step of this run alone takes about" in record.error.message) == (engine == "lanes")
        assert "MiB are free now" in record.error.message
    monkeypatch.undo()
    assert [r.status for r in train_runs([RunSpec(world.config("lora", training__engine=engine), 0)])] == ["complete"]


def test_what_is_free_is_the_least_of_all_limits(monkeypatch):
    before = device.free_memory(torch.device("cpu"))
    used = device._kilobytes("/proc/self/status", "VmSize")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (int(used + 5 * 2**20), -1))
    assert before > 2**24 and 0 < device.free_memory(torch.device("cpu")) < 2**23


def train_with(world: World, limit: int | None) -> tuple[int, str, int]:
    """The command with so many bytes of address space: exit code, what it says, and the most that it took."""
    code = (
        "import sys, resource, torch, transformers, peft\n"
        "import fwlora_lab.cli.main as m, fwlora_lab.lanes.engine, fwlora_lab.training.scheduler\n"
        "limit = int(sys.argv.pop(1))\n"
        "if limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "code = m.main(sys.argv[1:])\n"
        "peak = next(l for l in open('/proc/self/status') if l.startswith('VmPeak')).split()[1]\n"
        "print('peak', peak)\n"
        "sys.exit(code)\n"
    )
    file = world.results.parent / "run.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code, str(limit or 0), "train", f"run={file}", "seeds=0..1", "again=true"],
        capture_output=True,
        text=True,
        # Without the measurement of coverage, which needs memory at the end as well.
        env={k: v for k, v in os.environ.items() if k != "COVERAGE_PROCESS_CONFIG"} | {"OMP_NUM_THREADS": "1"},
    )
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    return done.returncode, done.stdout + done.stderr, 1024 * peaks[0] if peaks else 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_process_with_too_little_memory_ends_with_one_message(world):
    """A vocabulary and a batch that take some hundred MiB, so that limits below the peak meet every stage."""
    cfg = world.config("lora", training__engine="lanes", training__epochs=1, training__batch_size=32)
    (world.results.parent / "run.yaml").write_text(to_yaml(cfg))
    code, _, peak = train_with(world, None)
    assert code == 0 and peak > 0
    for missing in (5, 60):
        code, said, _ = train_with(world, peak - missing * 2**20)
        assert "Traceback" not in said, said
        records = find_records(world.results)
        assert records.broken == []
        if code > 0:  # below 0: the C++ library gave up, before any code of ours could say so
            errors = [r.error.message for r in records.records if r.error is not None]
            assert any("too little memory" in text for text in [said, *errors]), (said, errors)
