"""The command line as people use it: in its own process, read on its screen.

pytest tests/fwlora_lab/cli/test_cli.py
"""

from __future__ import annotations

import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import World

from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.records.folder import find_records

FWLORA = str(Path(sys.executable).parent / "fwlora")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run_file(world, tmp_path):
    def write(method: str = "lora", **changes) -> str:
        changes = {"results_dir": str(tmp_path / "results"), **changes}
        path = tmp_path / f"{method}.yaml"
        path.write_text(to_yaml(world.config(method, **changes)), encoding="utf-8")
        return str(path)

    return write


def fwlora(*words: str, code: int = 0, cwd=None, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([FWLORA, *words], capture_output=True, text=True, env=environment, cwd=cwd, **more)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_help_teaches():
    assert "fwlora demo" in fwlora("--help").stdout
    text = fwlora("train", "--help").stdout
    assert "seeds=0..2" in text and "minilm-cola-fw_lora" in text
    assert "proposed-roberta-base-110M--SST-2-GLUE" in text
    assert fwlora("--version").stdout.startswith("fwlora ")


def test_training_from_a_file(run_file, tmp_path):
    files = [run_file("lora"), run_file("fw_lora"), run_file("adalora")]
    out = fwlora("train", f"run={','.join(files)}", "seeds=0..1", "training.epochs=1").stdout
    assert "[6/6]" in out and "epoch 1: accuracy" in out
    table = [line.split() for line in out.splitlines()[-3:]]
    assert [row[:3] for row in table] == [
        ["lora", "2", "accuracy"],
        ["fw_lora", "2", "accuracy"],
        ["adalora", "2", "accuracy"],
    ]
    records = find_records(tmp_path / "results").records
    assert len(records) == 6 and {r.status for r in records} == {"complete"}
    again = fwlora("train", f"run={files[0]}", "seeds=0..1", "training.epochs=1").stdout
    assert again.count("is there already") == 2


def test_a_sweep(run_file, tmp_path):
    fwlora("train", "-m", f"run={run_file()}", "training.learning_rate=1e-3,2e-3", "training.epochs=1")
    assert sorted(r.run_id for r in find_records(tmp_path / "results").records) == [
        "lora--learning_rate=0.001",
        "lora--learning_rate=0.002",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which run: run=ID"),
        (["run=demo-fw_lroa"], "demo-fw_lora"),
        (["run=demo-lora", "training.learning_rat=1e-3"], "learning_rate"),
        (["run=demo-lora", "training.learning_rate=-1"], "training.learning_rate"),
        (["run=demo-lora", "seeds=3..1"], "runs backwards"),
        (["run=demo-lora", "run=demo-lora"], "given twice"),
        (["run=demo-lora", "again=perhaps"], "must be true or false"),
        (["run=demo-lora", "training.epochs=1,2"], "--multirun"),
        (["run=demo-lora", "method=lorra"], "lora"),
        (
            ["run=demo-lora", "dataset.root=/nowhere", "dataset.name=glue", "dataset.subset=cola"],
            "/nowhere",
        ),
        (["run=demo-lora", "model.pretrained_id=/nowhere"], "/nowhere"),
        (["run=demo-lora", "dataset={oops"], "dataset="),
        (["run=demo-fw_lora", "fw_lora.warmup_steps=5000"], "not smaller than"),
    ],
)
def test_what_is_wrong_is_one_message(words, said, tmp_path):
    done = fwlora("train", *words, code=2, cwd=tmp_path)
    assert done.stderr.startswith("fwlora: ") and said in done.stderr
    assert not (tmp_path / "results").exists(), "nothing is written"


def test_validate(run_file, tmp_path):
    good = run_file()
    assert f"{good}: valid" in fwlora("validate", good).stdout
    bad = tmp_path / "bad.yaml"
    bad.write_text(Path(good).read_text().replace("batch_size: 4", "batch_size: four"))
    done = fwlora("validate", good, str(bad), code=2)
    assert f"{good}: valid" in done.stdout and "training.batch_size" in done.stderr


def test_generate(tmp_path):
    design = tmp_path / "design.yaml"
    design.write_text(
        "hypothesis: Shrinking helps.\n"
        "proposed_method: Fisher-Weighted LoRA (FW-LoRA)\n"
        "comparative_methods: [AdaLoRA]\n"
        "models: [minilm]\n"
        "datasets: [CoLA (GLUE)]\n"
        "hyperparameters_to_search: {learning_rate: 1e-4-1e-3}\n"
    )
    out = tmp_path / "out"
    done = fwlora("generate", str(design), "-o", str(out))
    files = sorted(out.glob("*.yaml"))
    assert len(files) == 2, done.stderr
    assert fwlora("validate", *map(str, files)).stdout.count(": valid") == 2
    assert '"properties"' in fwlora("generate", "--schema").stdout
    assert "say what to read" in fwlora("generate", code=2).stderr


def test_a_warmup_that_fills_the_run_is_refused_with_the_cure(run_file):
    done = fwlora("train", f"run={run_file('fw_lora', fw_lora__warmup_steps=500)}", code=2)
    assert "500" in done.stderr and "22" in done.stderr and "0.25" in done.stderr


def test_ctrl_c_keeps_what_is_finished(run_file, tmp_path):
    file = run_file(training__epochs=400, training__engine="lanes")
    process = subprocess.Popen(
        [FWLORA, "train", f"run={file}", "seeds=0..1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Where the tests run in a shell's background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 2" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "the same command goes on" in err
    left = [p.name for p in (tmp_path / "results" / "lora").glob("seed-*/*")]
    assert left == ["checkpoints"] * 2


def test_a_full_disk_is_one_message(run_file, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk: writing the adapter fails."""
    # The measurement of coverage writes a file as well.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    done = fwlora(
        "train",
        f"run={run_file(training__epochs=1)}",
        code=2,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        ),
    )
    assert "cannot be written" in done.stderr
    left = [p.name for p in (tmp_path / "results" / "lora").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_doctor_says_what_there_is():
    out = fwlora("doctor").stdout
    for word in ("torch", "peft", "minilm", "cpu"):
        assert word in out.lower()


def test_on_a_terminal_progress_is_live(run_file):
    """On a pseudo-terminal the display is redrawn in place, with the phase and the loss on it."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [FWLORA, "train", f"run={run_file('fw_lora', training__epochs=60)}"],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "150"},
    )
    os.close(terminal)
    seen = b""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([screen], [], [], 0.2)[0]:
            try:
                seen += os.read(screen, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    assert process.wait(timeout=60) == 0, seen.decode()
    text = seen.decode(errors="replace")
    assert "\x1b[" in text and "penalty" in text and "loss" in text and "accuracy" in text
    assert "Traceback" not in text
