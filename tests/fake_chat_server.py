"""A server on loopback that speaks the chat protocol and answers well, badly or not at all."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-the-key-of-this-test"


class Server:
    """Speaks the chat protocol on a free port: `answers` in their order, the last again and again."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.keys.append(self.headers["Authorization"])
                outer.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = outer.answers[min(len(outer.seen), len(outer.answers)) - 1]
                if isinstance(answer, int):
                    self.send(json.dumps({"error": {"message": f"no, {KEY}"}}).encode(), answer)
                elif callable(answer):
                    answer(self)
                else:
                    self.send(completion(answer))

            def send(self, body: bytes, status: int = 200, length: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # the client hung up, as it should

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def completion(answer: Any, finish: str = "stop") -> bytes:
    text = answer if isinstance(answer, str | None) else json.dumps(answer)
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}]}).encode()
