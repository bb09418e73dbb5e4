"""Break training in many ways, many times, and print what survived: `make faults`, about half an hour on two cores.

    python scripts/faults.py [--times 0.1] [KIND ...]

Runs of a tiny model on sentences made up by the tests. «survived» means: in the end the same scores, predictions and
adapter as an undisturbed run, to the last bit; for what cannot end well, one message, the promised exit code, no
traceback and no half-written file. Exits with 1 where anything did not survive.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import World  # noqa: E402

from fwlora_lab.config.yaml_writer import to_yaml  # noqa: E402
from fwlora_lab.study.verify import verify  # noqa: E402

SEEDS = (0, 1)
SHELL = "import sys; from fwlora_lab.cli.main import main; sys.exit(main())"


class Bench:
    """A tiny world in a temporary folder, and the outcome of an undisturbed command."""

    def __init__(self, folder: Path) -> None:
        self.draw = random.Random(0)
        self.world = World(folder)
        cfg = self.world.config(
            "adalora", training__engine="lanes", training__epochs=4, training__checkpoint_minutes=1e-9
        )
        self.file = folder / "run.yaml"
        self.file.write_text(to_yaml(cfg), encoding="utf-8")
        self.folder = folder
        self.whole = self.fresh("undisturbed")
        assert self.finish(self.whole) == (0, True)
        self.expected = outcome(self.whole)

    def fresh(self, name: str) -> Path:
        results = self.folder / name
        shutil.rmtree(results, ignore_errors=True)
        return results

    def start(self, results: Path, **more: object) -> subprocess.Popen[str]:
        words = ["train", f"run={self.file}", f"results_dir={results}", f"seeds={SEEDS[0]}..{SEEDS[-1]}"]
        return subprocess.Popen(
            [sys.executable, "-c", SHELL, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
            **more,  # type: ignore[call-overload]
        )

    def finish(self, results: Path, **more: object) -> tuple[int, bool]:
        """The command to its end: its exit code, and whether it said no traceback."""
        process = self.start(results, **more)
        said = process.communicate(timeout=600)[0]
        return process.returncode, "Traceback" not in said

    def ends_alike(self, results: Path) -> bool:
        return self.finish(results) == (0, True) and outcome(results) == self.expected and not verify(results).faults

    def wait_for_training(self, process: subprocess.Popen[str], results: Path) -> None:
        """Until there is a checkpoint, and then some steps more."""
        deadline = time.monotonic() + 120
        while not list(results.rglob("step-*.pt")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(self.draw.uniform(0.0, 0.4))


def outcome(results: Path) -> dict[str, object]:
    """What must not depend on what happened on the way."""
    found: dict[str, object] = {}
    for file in sorted(results.glob("*/seed-*/record.json")):
        record = json.loads(file.read_text())
        kept = {key: record[key] for key in ("status", "epochs", "steps", "config_fingerprint")}
        found[str(file.parent.relative_to(results))] = [kept, record["files"]["predictions.npz"], _adapter(file.parent)]
    return found


def _adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def kill(bench: Bench) -> bool:
    """kill -9 at a random moment, up to three times, with a checkpoint at every step."""
    results = bench.fresh("killed")
    for _ in range(bench.draw.randint(1, 3)):
        process = bench.start(results)
        bench.wait_for_training(process, results)
        process.kill()
        process.communicate()
    return bench.ends_alike(results)


def kill_while_saving(bench: Bench) -> bool:
    """kill -9 while a file is being written under its temporary name."""
    results = bench.fresh("killed-saving")
    process = bench.start(results)
    skip, deadline = bench.draw.randint(0, 8), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(results.rglob(".*.tmp")):
            if skip == 0:
                break
            skip -= 1
    process.kill()
    process.communicate()
    return bench.ends_alike(results)


def stop_with(number: signal.Signals, code: int) -> Callable[[Bench], bool]:
    def stop(bench: Bench) -> bool:
        results = bench.fresh("stopped")
        process = bench.start(results, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        bench.wait_for_training(process, results)
        began = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
        on_time = time.monotonic() - began < 10
        ended = process.returncode == 0  # the run was over before the signal came
        stopped = process.returncode == code and "Traceback" not in said and on_time
        return (ended or stopped) and bench.ends_alike(results)

    stop.__doc__ = f"{number.name}: exit code {code} within 10 s, and the same command goes on."
    return stop


def full_disk(bench: Bench) -> bool:
    """No file can grow beyond a random size: one message, nothing half-written, and it goes on afterwards."""
    results = bench.fresh("full")
    size = bench.draw.randrange(200, 40_000)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    code, clean = bench.finish(results, preexec_fn=limit)
    torn = [fault for fault in verify(results).faults] if results.is_dir() else []
    return code in (0, 2) and clean and not torn and bench.ends_alike(results)


def low_memory(bench: Bench) -> bool:
    """An address space that is somewhat too small: no traceback, and it goes on afterwards."""
    results = bench.fresh("low")
    size = bench.draw.randrange(900, 3_000) * 2**20

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    process = bench.start(results, preexec_fn=limit)
    said = process.communicate(timeout=300)[0]
    # Below what Python needs to load torch nothing of this project runs yet.
    loaded = "seed" in said or "fwlora:" in said
    return (not loaded or "Traceback" not in said) and bench.ends_alike(results)


def several_processes(bench: Bench) -> bool:
    """Two to four processes train the same runs into one folder, and one of them may be killed.

    Which runs share lanes depends on who comes first, and the last bits on that: scores are compared, not bits.
    """
    results = bench.fresh("shared")
    processes = [bench.start(results) for _ in range(bench.draw.randint(2, 4))]
    if bench.draw.random() < 0.5:
        bench.wait_for_training(processes[0], results)
        processes[0].kill()
    for process in processes:
        process.communicate(timeout=600)
    alive = [process for process in processes if process.returncode != -signal.SIGKILL]
    if any(process.returncode != 0 for process in alive) or bench.finish(results) != (0, True):
        return False
    return scores(results) == scores(bench.whole) and not verify(results).faults


def scores(results: Path) -> dict[str, object]:
    """Each run's metrics after every epoch."""
    records = {file.parent: json.loads(file.read_text()) for file in sorted(results.glob("*/seed-*/record.json"))}
    return {folder.name: [epoch["metrics"] for epoch in record["epochs"]] for folder, record in records.items()}


def flipped(bench: Bench) -> bool:
    """A byte of any file flipped, or the file cut: `fwlora verify` names it."""
    results = bench.fresh("flipped")
    shutil.copytree(bench.whole, results)
    files = [f for f in sorted(results.rglob("*")) if f.is_file() and f.name != "README.md" and f.suffix != ".lock"]
    file = bench.draw.choice([f for f in files if not f.name.endswith(".lock")])
    content = bytearray(file.read_bytes())
    place = bench.draw.randrange(len(content))
    if bench.draw.random() < 2 / 3:
        content[place] ^= 1 << bench.draw.randrange(8)
    else:
        del content[place:]
    file.write_bytes(bytes(content))
    named = [fault.path for fault in verify(results).faults]
    return file in named or file.parent in named


KINDS: dict[str, tuple[int, Callable[[Bench], bool]]] = {
    "kill": (100, kill),
    "kill_while_saving": (100, kill_while_saving),
    "sigterm": (30, stop_with(signal.SIGTERM, 143)),
    "ctrl_c": (30, stop_with(signal.SIGINT, 130)),
    "full_disk": (20, full_disk),
    "low_memory": (20, low_memory),
    "several_processes": (30, several_processes),
    "flipped": (600, flipped),
}


@contextlib.contextmanager
def _bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield Bench(Path(folder))


def main() -> int:
    """Try every kind, print a row for each, and return 1 if anything did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of {', '.join(KINDS)}; all if none is named")
    parser.add_argument("--times", type=float, default=1.0, help="this part of the usual numbers of tries")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - KINDS.keys():
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    failed = False
    print(f"{'kind':<20}{'tried':>7}{'survived':>10}{'seconds':>9}")
    with _bench() as bench:
        for name, (times, attempt) in KINDS.items():
            if arguments.kinds and name not in arguments.kinds:
                continue
            tries, began = max(1, round(times * arguments.times)), time.monotonic()
            survived = sum(attempt(bench) for _ in range(tries))
            failed = failed or survived < tries
            print(f"{name:<20}{tries:>7}{survived:>10}{time.monotonic() - began:>9.0f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
