"""Train six fixed runs (three methods x two engines) at two revisions and compare what they leave, bit by bit.

    python scripts/same_results.py OLD_REVISION [NEW_REVISION]

Each revision is checked out into a temporary git worktree; without NEW_REVISION the working tree is used. Scores,
losses, predictions, adapters and the rows of the matrices must be equal. Exits with 1 where they are not. Both
revisions train on this machine, because floating-point sums differ between CPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The command line moved from a module into a folder.
COMMAND_LINE = """
import sys
try:
    from fwlora_lab.cli.main import main
except ModuleNotFoundError:
    from fwlora_lab.cli import main
sys.exit(main())
"""
METHODS, ENGINES = ("lora", "adalora", "fw_lora"), ("lanes", "peft")
SETTINGS = ("dataset.train_examples=320", "training.epochs=2", "model.lora.dropout=0.1", "seeds=0,1")


def train(source: Path, results: Path) -> None:
    """Train the six runs with the code in `source`, two seeds each."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
    for engine in ENGINES:
        runs = ",".join(f"demo-{method}" for method in METHODS)
        command = [sys.executable, "-c", COMMAND_LINE, "train"]
        words = [f"run={runs}", f"training.engine={engine}", f"results_dir={results / engine}", *SETTINGS]
        subprocess.run([*command, *words], env=environment, cwd=results.parent, check=True)


def left_behind(results: Path) -> dict[str, object]:
    """What the runs left, by engine, run and seed: numbers and hashes of files."""
    found: dict[str, object] = {}
    for path in sorted(results.rglob("record.json")):
        record = json.loads(path.read_text())
        name = str(path.parent.relative_to(results))
        # Seconds differ from one execution to the next; all else is the run's own.
        found[f"{name}: epochs"] = record["epochs"]
        found[f"{name}: matrices"] = record["matrices"]
        found[f"{name}: parameters"] = record["parameters"]
        for file in sorted(path.parent.rglob("*")):
            if file.suffix in (".safetensors", ".npz", ".npy"):
                found[f"{name}: {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="the git revision to compare with")
    parser.add_argument("new", nargs="?", help="the other one (default: the working tree)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found: list[dict[str, object]] = []
        for place, revision in (("old", options.old), ("new", options.new)):
            source = ROOT
            Path(folder, place).mkdir()
            if revision is not None:
                source = Path(folder, f"source-{place}")
                subprocess.run(["git", "worktree", "add", "--detach", source, revision], cwd=ROOT, check=True)
            try:
                train(source, Path(folder, place))
            finally:
                if source != ROOT:
                    subprocess.run(["git", "worktree", "remove", "--force", source], cwd=ROOT, check=True)
            found.append(left_behind(Path(folder, place)))
    old, new = found
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in differing:
        print(f"differs: {name}\n  {old.get(name)}\n  {new.get(name)}")
    print(f"{len(old)} things compared, {len(differing)} differ")
    return 1 if differing or not old else 0


if __name__ == "__main__":
    sys.exit(main())
