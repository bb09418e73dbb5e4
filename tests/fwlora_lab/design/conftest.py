"""Fixtures of the design tests: a chat server, and the command `fwlora generate --llm` against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from fake_chat_server import KEY, Server

from fwlora_lab.cli.main import main
from fwlora_lab.design import chat_server


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    pytest.importorskip("openai", reason="pip install 'fwlora[llm]'")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(chat_server, "SECONDS_OF_SILENCE", 5.0)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def run(server, tmp_path, capsys) -> Callable[..., tuple[int, str, list[dict[str, Any]]]]:
    """Runs the command on a source with the server's answers: exit code, standard error, configs."""

    def command(source: str | dict, *answers: Any) -> tuple[int, str, list[dict[str, Any]]]:
        path = tmp_path / ("request.txt" if isinstance(source, str) else "design.json")
        path.write_text(source if isinstance(source, str) else json.dumps(source), encoding="utf-8")
        server.answers = list(answers)
        out = tmp_path / "out"
        code = main(["generate", str(path), "-o", str(out), "--llm", "some/model", "--base-url", server.url])
        told = capsys.readouterr()
        assert KEY not in told.err + told.out and "Traceback" not in told.err and told.out == ""
        if code:
            assert not out.exists(), "nothing is written on failure"
            return code, told.err, []
        return code, told.err, [yaml.safe_load(p.read_text(encoding="utf-8")) for p in sorted(out.iterdir())]

    return command
