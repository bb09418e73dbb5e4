"""A language model behind a server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

SECONDS_OF_SILENCE = 60.0
SECONDS_FOR_AN_ANSWER = 300.0
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class ChatAnswer:
    """An answer; `is_cut` if it ended at the server's limit of tokens."""

    text: str
    is_cut: bool


class ChatServer:
    """Asks one model of one server. The key comes from the environment variable OPENAI_API_KEY and is never shown.

    Args:
        model: the model's name at the server.
        base_url: the address before `/chat/completions`; None for OpenAI's own.

    Raises:
        UserError: the package or the key is missing, or the address cannot be used.
    """

    def __init__(self, model: str, base_url: str | None) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError(f"--llm needs the package {error.name}: pip install 'fwlora[llm]'") from error
        self.model = model
        self.key = os.environ.get("OPENAI_API_KEY", "")
        self.connection_error = openai.APIConnectionError
        if not self.key:
            raise UserError(
                "--llm needs a key in the environment: set OPENAI_API_KEY (any word, if the server wants none)"
            )
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise UserError(f"--base-url {one_line(base_url)}: must begin with http:// or https://")
        try:
            self.client = openai.OpenAI(api_key=self.key, base_url=base_url, timeout=SECONDS_OF_SILENCE)
        except Exception as error:  # the client raises many kinds for an address or a key that it cannot use
            raise UserError(f"--base-url {one_line(base_url)}: cannot be used: {one_line(error)}") from None

    def ask(self, messages: list[Any]) -> ChatAnswer:
        """Send messages and wait for the answer.

        Raises:
            UserError: no whole answer came in time, or what came is not an answer.
        """
        try:
            body = _within(SECONDS_FOR_AN_ANSWER, lambda: self._read(messages))
        except Exception as error:
            is_wrapped = isinstance(error, self.connection_error) and error.__cause__
            cause = error.__cause__ if is_wrapped else error
            reason = one_line(str(cause) or type(cause).__name__).replace(self.key, "***")
            raise UserError(f"{one_line(self.model)} at {self.client.base_url} did not answer: {reason}") from None
        try:
            choice = json.loads(body)["choices"][0]
            text, end = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{self.client.base_url} sent no chat completion: --base-url is the address before "
                "/chat/completions, it often ends in /v1"
            ) from None
        return ChatAnswer(text if isinstance(text, str) else "", end == "length")

    def _read(self, messages: list[Any]) -> bytes:
        body = bytearray()
        chat = self.client.chat.completions.with_streaming_response
        with chat.create(model=self.model, messages=messages) as response:
            for part in response.iter_bytes():
                body += part
                if len(body) > MAX_BYTES:
                    raise UserError(f"the answer has more than {MAX_BYTES:,} bytes")
        return bytes(body)


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """What `work` returns or raises.

    Raises:
        TimeoutError: it takes longer, also if the server keeps sending a little; the client's own limit is on silence.
    """
    results: queue.SimpleQueue[tuple[bytes, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except Exception as error:
            results.put((b"", error))

    threading.Thread(target=run, daemon=True).start()
    try:
        body, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return body
