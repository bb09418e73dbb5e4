"""pytest tests/fwlora_lab/records/test_records.py"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from fwlora_lab import files
from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.records import environment
from fwlora_lab.records.folder import RunFolder, differences, find_records, load_predictions, load_record, status_of
from fwlora_lab.records.record import Epoch, Failure, MatrixRow, Record, Times


def config(results: Path, **changes: object) -> RunConfig:
    tree = {
        "run_id": "demo",
        "method": "lora",
        "results_dir": str(results),
        "model": {"name": "tiny", "pretrained_id": "./tiny", "lora": {"rank": 2, "alpha": 4.0}},
        "dataset": {"name": "offline"},
    }
    return RunConfig.model_validate(tree | changes)


def record_of(cfg: RunConfig, seed: int = 0, **changes: object) -> Record:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    fields = {
        "run_id": cfg.run_id,
        "seed": seed,
        "method": cfg.method_name,
        "engine": "peft",
        "status": "complete",
        "started": now,
        "finished": now,
        "command": "fwlora train",
        "versions": environment.versions(),
        "git_commit": None,
        "machine": {"cpu": "some", "cores": 2, "threads": 1, "device": "cpu"},
        "config": cfg.model_dump(mode="json"),
        "config_fingerprint": fingerprint(cfg),
        "data_fingerprint": "d" * 64,
        "data_source": "made up",
        "evaluated_on": "dev",
        "primary_metric": "accuracy",
        "backbone": {"name": "tiny", "source": "a folder", "commit": None, "parameters": 1000},
        "epochs": [
            Epoch(
                epoch=1,
                step=5,
                learning_rate=0.1,
                train_loss=0.7,
                metrics={"accuracy": 0.5},
                loss=0.69,
            ),
            Epoch(
                epoch=2,
                step=10,
                learning_rate=0.0,
                train_loss=0.6,
                metrics={"accuracy": 0.75},
                loss=None,
            ),
        ],
        "times": Times(
            train_seconds=3.0,
            warmup_seconds=1.0,
            steady_seconds=2.0,
            eval_seconds=0.5,
            phases={"training": 3.0},
        ),
        "total_steps": 10,
        "matrices": [MatrixRow(name="a.b", rank=2, delta_norm=0.5)],
    }
    return Record.model_validate(fields | changes)


def write(cfg: RunConfig, record: Record, **more: object) -> RunFolder:
    folder = RunFolder(cfg.results_dir, cfg.run_id, record.seed)
    with folder.lock():
        folder.write(record, cfg, **more)  # type: ignore[arg-type]
    return folder


def visible(folder: Path) -> list[str]:
    """What is in a run's folder besides the lock."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    record = record_of(cfg, seed=3)
    logits = np.array([[0.1, 2.0], [3.0, -1.0]])
    folder = write(
        cfg,
        record,
        logits=logits,
        labels=np.array([1, 0]),
        save_adapter=lambda path: (path.mkdir(), (path / "weights").write_text("w"))[0],
    ).path
    assert folder == tmp_path / "demo" / "seed-3"
    assert visible(folder) == [
        "adapter",
        "config.yaml",
        "metrics.json",
        "predictions.npz",
        "record.json",
    ]
    back = load_record(folder)
    assert back == load_record(folder / "record.json") and back.sha256 is not None
    assert back.model_copy(update={"files": None, "sha256": None}) == record
    assert set(back.files or ()) == {"adapter/weights", "config.yaml", "metrics.json", "predictions.npz"}
    read, labels = load_predictions(folder)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, logits.astype(np.float32))
    np.testing.assert_array_equal(labels, [1, 0])
    assert load_run(str(folder / "config.yaml")) == cfg
    assert json.loads((folder / "metrics.json").read_text()) == {
        "accuracy": 0.75,
        "train_seconds": 3.0,
    }
    assert visible(folder.parent) == ["seed-3"]


def test_the_file_is_plain_sorted_json(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    text = (write(cfg, record_of(cfg)).path / "record.json").read_text()

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    tree = json.loads(text, parse_constant=refuse)
    assert list(tree) == sorted(tree) and list(tree["times"]) == sorted(tree["times"])
    assert tree["started"] == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_never_enters_a_record(bad: float) -> None:
    with pytest.raises(ValidationError):
        MatrixRow(name="a", rank=1, delta_norm=bad)


def test_a_second_writing_replaces_the_first_whole(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    write(cfg, record_of(cfg), logits=np.zeros((1, 2)), labels=np.zeros(1))
    failed = record_of(cfg, status="failed", error=Failure(type="E", message="m", traceback="t"))
    folder = write(cfg, failed).path
    assert visible(folder) == ["config.yaml", "record.json"]
    assert visible(folder.parent) == ["seed-0"]


class SafetensorError(Exception):
    """As safetensors raises it: no OSError, the number only in the text."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_message_and_leaves_the_former_run(tmp_path: Path, error: Exception) -> None:
    cfg = config(tmp_path)
    first = load_record(write(cfg, record_of(cfg)).path)

    def full(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("x")
        raise error

    with pytest.raises(UserError, match=r"seed-0: cannot be written: the disk is full\. Free some"):
        write(cfg, record_of(cfg, steps=7), save_adapter=full)
    assert visible(tmp_path / "demo") == ["seed-0"]
    assert load_record(tmp_path / "demo" / "seed-0") == first


def test_a_rename_that_fails_brings_the_former_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path)
    first = load_record(write(cfg, record_of(cfg)).path)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as on systems that cannot
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="cannot be written: Permission denied. Choose a folder"):
        write(cfg, record_of(cfg, steps=7))
    assert visible(tmp_path / "demo") == ["seed-0"]
    assert load_record(tmp_path / "demo" / "seed-0") == first


def test_other_faults_of_a_writer_keep_their_name_and_leave_nothing(tmp_path: Path) -> None:
    cfg = config(tmp_path)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(cfg, record_of(cfg), save_adapter=stop)
    assert visible(tmp_path / "demo") == []


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory.*set results_dir=DIR"):
        with RunFolder(tmp_path / "file", "demo", 0).lock():
            pass


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "/etc"])
def test_a_run_id_cannot_leave_the_results(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(UserError, match="cannot name a folder"):
        RunFolder(tmp_path, run_id, 0)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_records import config, record_of, write

    cfg = config(Path({results!r}))

    def die(path):
        path.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    write(cfg, record_of(cfg, steps=7), save_adapter=die)
"""


def test_a_killed_writer_harms_nobody_and_is_cleared_away(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    first = load_record(write(cfg, record_of(cfg)).path)
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), results=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    leftovers = visible(tmp_path / "demo")
    assert len(leftovers) == 2 and leftovers[0].endswith(".tmp")
    assert find_records(tmp_path) == ([first], [])
    with RunFolder(tmp_path, "demo", 0).lock(wait=False) as held:
        assert held
        assert visible(tmp_path / "demo") == ["seed-0"]


def test_killed_between_two_renames_the_former_run_comes_back(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    folder = write(cfg, record_of(cfg))
    folder.path.rename(folder.path.parent / ".seed-0.123.old")
    (folder.path.parent / ".seed-0.123.tmp").mkdir()
    (folder.path.parent / ".seed-01.5.tmp").mkdir()
    assert status_of(cfg, 0, None) == "missing"
    with folder.lock():
        pass
    assert status_of(cfg, 0, None) == "complete"
    assert visible(folder.path.parent) == [".seed-01.5.tmp", "seed-0"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "demo", 0)
    script = textwrap.dedent(f"""
        import filelock, sys
        with filelock.FileLock({str(tmp_path / "demo" / ".seed-0.lock")!r}):
            print("held", flush=True)
            sys.stdin.readline()
    """)
    with folder.lock():
        pass
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "held\n"
    leftover = folder.path.parent / ".seed-0.77.tmp"
    leftover.mkdir()
    with folder.lock(wait=False) as held:
        assert not held
    assert leftover.exists(), "what a living writer writes must stay"
    with RunFolder(tmp_path, "demo", 1).lock(wait=False) as held:
        assert held, "another seed is another lock"
    other.communicate("\n")
    with folder.lock(wait=False) as held:
        assert held and not leftover.exists()


def test_records_are_found_in_order_and_broken_ones_told(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    for seed in (10, 2):
        write(cfg, record_of(cfg, seed=seed))
    failed = config(tmp_path, run_id="another")
    write(
        failed,
        record_of(failed, status="failed", error=Failure(type="E", message="m", traceback="t"), epochs=[]),
    )
    torn = tmp_path / "demo" / "seed-3"
    torn.mkdir()
    (torn / "record.json").write_text((tmp_path / "demo" / "seed-2" / "record.json").read_text()[:200])
    strange = tmp_path / "demo" / "seed-4"
    strange.mkdir()
    (strange / "record.json").write_text('{"schema_version": 99}')
    (tmp_path / "demo" / "seed-5").mkdir()
    found, broken = find_records(tmp_path)
    assert [(r.run_id, r.seed, r.status) for r in found] == [
        ("another", 0, "failed"),
        ("demo", 2, "complete"),
        ("demo", 10, "complete"),
    ]
    assert found[0].metrics == {} and found[1].metrics == {"accuracy": 0.75}
    assert [b.path for b in broken] == [torn / "record.json", strange / "record.json"]
    assert ["seed-3" in broken[0].message, "seed-4" in broken[1].message, len(broken)] == [True, True, 2]
    assert find_records(tmp_path / "nowhere") == ([], [])


def test_a_broken_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no record here"):
        load_record(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record\.json: not a record of this version"):
        load_record(tmp_path)
    (tmp_path / "predictions.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"predictions\.npz: the predictions cannot be read"):
        load_predictions(tmp_path)


def test_status(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    assert status_of(cfg, 0, "d" * 64) == "missing"
    folder = write(cfg, record_of(cfg)).path
    assert status_of(cfg, 0, "d" * 64) == "complete" == status_of(cfg, 0, None)
    assert status_of(cfg, 1, None) == "missing"
    assert status_of(cfg, 0, "e" * 64) == "different"
    assert status_of(config(tmp_path, training={"epochs": 5}), 0, None) == "different"
    write(cfg, record_of(cfg, status="failed", error=Failure(type="E", message="m", traceback="t")))
    assert status_of(cfg, 0, None) == "failed"
    (folder / "record.json").write_text("{")
    assert status_of(cfg, 0, None) == "failed"


def test_differences_name_the_keys_and_both_values(tmp_path: Path) -> None:
    record = record_of(config(tmp_path))
    asked = config(
        tmp_path / "elsewhere",
        run_id="renamed",
        model={"name": "tiny", "pretrained_id": "./tiny", "lora": {"rank": 4, "alpha": 4.0}},
        training={"epochs": 5, "seed": 9},
    )
    assert differences(asked, record, "e" * 64) == [
        "model.lora.rank: 2 there, 4 asked for",
        "training.epochs: 3 there, 5 asked for",
        "the data (its texts, labels or split)",
    ]
    unchanged = config(tmp_path / "elsewhere", run_id="renamed", training={"seed": 9})
    assert differences(unchanged, record, "d" * 64) == []
    assert "schema" in differences(unchanged, record.model_copy(update={"config_fingerprint": "0"}), None)[0]


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in [n for n in os.environ if n in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")]:
        monkeypatch.delenv(name)
    assert environment.git_commit() is None
    (tmp_path / "file").write_text("1")
    identity = [
        "-c",
        "user.name=n",
        "-c",
        "user.email=e@example.org",
        "-c",
        "core.hooksPath=/dev/null",
    ]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "m"]):
        subprocess.run(["git", *words], check=True)
    head = environment.git_commit()
    assert head is not None and len(head) == 40
    (tmp_path / "file").write_text("2")
    assert environment.git_commit() == head + "-dirty"
