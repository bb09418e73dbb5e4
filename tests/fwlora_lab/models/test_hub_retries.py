"""A hub that is busy for a moment: the download waits and succeeds; one that stays busy is given up on.

pytest tests/fwlora_lab/models/test_hub_retries.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}
LIST, HEAD, GET = "GET /api/models/lab/busy", "HEAD /lab/busy/resolve", "GET /lab/busy/resolve"
# The client is another process: huggingface_hub reads HF_ENDPOINT when it is imported.
CLIENT = f"""
from fwlora_lab.errors import UserError
from fwlora_lab.models.hub import download
try:
    folder = download("lab/busy", "{COMMIT}", {list(FILES)})
    print({{p.name: p.read_bytes() for p in sorted(folder.iterdir())}})
except UserError as error:
    print("refused:", error)
"""


def _download(home: Path, refusals: list[tuple[str, int, dict[str, str]]]) -> tuple[str, HubServer]:
    with HubServer(refusals=refusals) as hub:
        hub.add("lab/busy", COMMIT, FILES)
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            env={**os.environ, **hub.environment(home)},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), hub


@pytest.mark.parametrize("request_", [LIST, HEAD, GET])
@pytest.mark.parametrize(("status", "headers"), [(503, {}), (429, {"Retry-After": "1"})])
def test_two_refusals_are_waited_for(tmp_path, request_, status, headers):
    said, hub = _download(tmp_path, [(request_, status, headers)] * 2)
    assert said == str(FILES)
    assert hub.refusals == [], "the hub did refuse"


def test_a_hub_that_stays_busy_is_given_up_on(tmp_path):
    said, hub = _download(tmp_path, [(GET + f"/{COMMIT}/model", 503, {})] * 9)
    assert said.startswith("refused: model.pretrained_id=") and "503" in said
    assert len(hub.refusals) == 9 - 4, "four tries"
