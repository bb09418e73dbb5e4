"""What FWLoraCallback logs is in the files of TensorBoard, MLflow, Trackio and offline W&B, once a step and right.

One Trainer reports to all four in a process of its own, since each keeps global state, threads or helper processes.
The files are read as their formats are documented, without the writers.

pytest tests/fwlora/test_trackers.py
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_runs import CONFIG, STEPS

TRACKERS = ["tensorboard", "mlflow", "trackio", "wandb"]
SCRIPT = """
import json, sys
from pathlib import Path
from transformers import TrainerCallback
from trainer_runs import CONFIG, bert, trainer_of
from fwlora import FWLoraCallback

model, callback = bert(), FWLoraCallback(CONFIG)
penalties, layers = {}, dict(model.base_model.model.named_modules())

class Oracle(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if callback.handle.phase == "penalty":
            total = 0.0
            for name, w in callback.handle.weights().items():
                layer = layers[name]
                b, a = (f["default"].weight.detach().double() for f in (layer.lora_B, layer.lora_A))
                total += w * float((layer.scaling["default"] * b @ a).square().sum())
            penalties[state.global_step] = CONFIG.penalty_strength * total

trainer = trainer_of(Path("out"), model, callback, report_to=sys.argv[1:], project="project", run_name="run")
trainer.add_callback(Oracle())
trainer.train()
history = [[e["step"], e["fw_lora_penalty"]] for e in trainer.state.log_history if "fw_lora_penalty" in e]
Path("said.json").write_text(json.dumps({"penalties": penalties, "history": history}))
"""


class Run:
    """The folder of a finished run; `penalties` are λ Σ w ‖s·B·A‖² by step, computed from the layers in float64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        said = json.loads((folder / "said.json").read_text())
        self.penalties = {int(step): value for step, value in said["penalties"].items()}
        self.history: list[tuple[int, float]] = [tuple(entry) for entry in said["history"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    for package in ("tensorboard", "mlflow", "trackio", "wandb"):
        pytest.importorskip(package, reason=f"{package} is in the extra dev; its log cannot be tested without it")
    folder = tmp_path_factory.mktemp("trackers")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "HOME": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_ERROR_REPORTING": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *TRACKERS], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder)


def tensorboard(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return [(e.step, e.value) for e in accumulator.Scalars("train/fw_lora_penalty")]


def mlflow(folder: Path) -> list[tuple[int, float]]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as db:
        return db.execute("SELECT step, value FROM metrics WHERE key = 'fw_lora_penalty' ORDER BY step").fetchall()


def trackio(folder: Path) -> list[tuple[int, float]]:
    with contextlib.closing(sqlite3.connect(folder / "trackio" / "project.db")) as db:
        entries = [json.loads(metrics) for (metrics,) in db.execute("SELECT metrics FROM metrics ORDER BY id")]
    found = [e for e in entries if "train/fw_lora_penalty" in e]
    return [(e["train/global_step"], e["train/fw_lora_penalty"]) for e in found]


def wandb(folder: Path) -> list[tuple[int, float]]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    found = []
    for data in leveldb_log(path.read_bytes()[7:], before=7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        entry = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        if "train/fw_lora_penalty" in entry:
            found.append((entry["train/global_step"], entry["train/fw_lora_penalty"]))
    return found


def leveldb_log(data: bytes, before: int) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB with chunks of CRC (4 bytes), length (2), type (1) and data.

    `before` is how much of the first block a header takes. A record is one chunk of type 1, or types 2, 3, …, 4.
    """
    at, record = 0, b""
    while at + 7 <= len(data):
        if (left := 32768 - (at + before) % 32768) < 7:  # too little for a chunk: the rest of the block is zeros
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.parametrize("read", [tensorboard, mlflow, trackio, wandb])
def test_the_penalty_is_in_the_trackers_files(run, read):
    logged = read(run.folder)
    # Once a step from the end of the warm-up, and once more with the summary of the run.
    assert [step for step, _ in logged] == [*range(CONFIG.warmup_steps, STEPS + 1), STEPS]
    for step, value in logged:
        assert value == pytest.approx(run.penalties[step], rel=1e-5)


def test_the_penalty_is_in_the_history_once_a_step(run):
    assert [step for step, _ in run.history] == [*range(CONFIG.warmup_steps, STEPS + 1), STEPS]
    for step, value in run.history:
        assert value == pytest.approx(run.penalties[step], rel=1e-5)
