"""Servers that misbehave, and what `--llm` needs: one message each.

pytest tests/fwlora_lab/design/test_chat_server.py
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
from fake_chat_server import KEY, completion

from fwlora_lab.cli.main import main
from fwlora_lab.design import chat_server

DESIGN = {
    "hypothesis": "3 epochs at a modest rate.",
    "proposed_method": "FW-LoRA",
    "comparative_methods": ["LoRA"],
    "models": ["roberta-base"],
    "datasets": ["SST-2"],
    "settings": {"batch_size": 16},
}


def test_a_cut_answer_is_fed_back(run, server):
    code, told, _ = run(DESIGN, lambda h: h.send(completion('{"settings": {"weight', "length")))
    assert code == 2 and len(server.seen) == 3 and "cut off at the server's limit of tokens" in told


def _half(handler) -> None:
    body = completion(DESIGN)
    handler.send(body[: len(body) // 2], length=len(body))
    handler.wfile.flush()
    handler.connection.close()


def _huge(handler) -> None:
    handler.send(b'{"choices": "', length=10**12)
    while True:
        handler.wfile.write(b"x" * 100_000)


def _drip(handler) -> None:
    handler.send(b"{", length=10**6)
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def _silent(handler) -> None:
    time.sleep(30)


def _headers(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (401, "401"),
        (404, "404"),
        (lambda h: h.send(b"<html>hello</html>"), "no chat completion"),
        (lambda h: h.send(b'{"choices": []}'), "no chat completion"),
        (lambda h: h.send(b"[" * 100_000), "no chat completion"),
        (lambda h: h.send(b"\xff\xfe"), "no chat completion"),
        (_half, "did not answer"),
        (_huge, "more than 1,000,000 bytes"),
        (_drip, "no whole answer within 2 s"),
        (_silent, "no whole answer within 2 s"),
        (_headers, "no whole answer within 2 s"),
    ],
)
def test_servers_that_misbehave_end_in_one_message(run, server, monkeypatch, answer, words):
    monkeypatch.setattr(chat_server, "SECONDS_FOR_AN_ANSWER", 2.0)
    start = time.monotonic()
    code, told, _ = run(DESIGN, answer)
    assert code == 2 and words in told and len(told.splitlines()) == 1
    assert time.monotonic() - start < 10


def test_a_server_that_is_not_there(run, server, monkeypatch):
    server.http.server_close()
    monkeypatch.setattr(chat_server, "SECONDS_FOR_AN_ANSWER", 20.0)
    code, told, _ = run(DESIGN, {})
    assert code == 2 and "did not answer" in told


def _refused(tmp_path: Path, capsys, *words: str) -> str:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(DESIGN))
    assert main(["generate", str(path), "-o", str(tmp_path / "out"), *words]) == 2
    assert not (tmp_path / "out").exists()
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    return told


def test_a_missing_key_package_or_model_ends_in_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "--llm MODEL" in _refused(tmp_path, capsys, "--base-url", "http://127.0.0.1:1/v1")
    if importlib.util.find_spec("openai"):
        assert "OPENAI_API_KEY" in _refused(tmp_path, capsys, "--llm", "m")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert "must begin with http" in _refused(tmp_path, capsys, "--llm", "m", "--base-url", "file:///etc")
        assert "http://:no" in _refused(tmp_path, capsys, "--llm", "m", "--base-url", "http://:no")
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install 'fwlora[llm]'" in _refused(tmp_path, capsys, "--llm", "m")
