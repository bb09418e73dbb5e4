"""TODO"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from fwlora_lab.design.parse import MAX_DEPTH
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

_TOKEN = re.compile(
    r"""\s*+(?:(?P<text>'[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+")"""
    r"|(?P<number>[-+]?+(?:\d++\.?+\d*+|\.\d++)(?:[eE][-+]?+\d++)?+)"
    r"|(?P<name>[A-Za-z_][\w.]*+)|(?P<sign>[()\[\]{},:=]))",
    re.S | re.A,
)
_EQUALS = re.compile(r"\s*+=")
_CONSTANTS = {"None": None, "True": True, "False": False}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def read_fields(text: str, where: str) -> dict[str, Any]:
    """`name=value name=value …`, as pydantic prints a model."""
    return LiteralReader(text, where).fields()


class LiteralReader:
    """A reader of printed Python values that evaluates nothing."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.at = 0
        self.kind, self.token = "", ""
        self.step()

    def step(self) -> None:
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            if self.text[self.at :].strip():
                raise self.fault("cannot be read")
            self.kind, self.token = "end", ""
            return
        assert match.lastgroup is not None
        self.kind, self.token, self.at = match.lastgroup, match[match.lastgroup], match.end()

    def fault(self, problem: str) -> UserError:
        shown = one_line(self.text[max(0, self.at - 20) : self.at + 30], 60)
        return UserError(f"{self.where}: character {self.at}: {problem}: …{shown!r}…")

    def expect(self, sign: str) -> None:
        if self.token != sign or self.kind != "sign":
            raise self.fault(f"{sign!r} is missing")
        self.step()

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.kind != "end":
            if self.kind != "name":
                raise self.fault("a name=value is expected")
            self.named(found, 0)
        return found

    def named(self, into: dict[str, Any], depth: int) -> None:
        name = self.token
        self.step()
        self.expect("=")
        if name in into:
            raise self.fault(f"{one_line(name)!r} stands twice")
        into[name] = self.value(depth)

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.fault("is nested too deeply")
        kind, token = self.kind, self.token
        if kind == "text":
            self.step()
            return self.literal(token)
        if kind == "number":
            self.step()
            if len(token) > 300:
                raise self.fault("a number has too many digits")
            return int(token) if re.fullmatch(r"[-+]?\d+", token, re.A) else float(token)
        if kind == "name":
            self.step()
            if self.kind == "sign" and self.token == "(":
                return self.arguments(depth)
            if token not in _CONSTANTS:
                raise self.fault(f"{one_line(token)!r} is no value")
            return _CONSTANTS[token]
        if kind == "sign" and token in _CLOSING:
            self.step()
            return self.braced(depth) if token == "{" else self.items(_CLOSING[token], depth)
        raise self.fault("a value is expected")

    def literal(self, token: str) -> str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = ast.literal_eval(token.replace("\r", "\\r").replace("\n", "\\n"))
        except (SyntaxError, ValueError, MemoryError) as error:
            raise self.fault(f"a text cannot be read ({one_line(error)})") from None
        assert isinstance(value, str)
        return value

    def until(self, closing: str) -> bool:
        """Steps over the closing sign or, before every further item, over the comma."""
        if self.kind == "sign" and self.token == closing:
            self.step()
            return True
        return False

    def items(self, closing: str, depth: int) -> list[Any]:
        found = []
        while not self.until(closing):
            found.append(self.value(depth + 1))
            if not (self.kind == "sign" and self.token == closing):
                self.expect(",")
        return found

    def braced(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.until("}"):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise self.fault(f"the key {one_line(key)!r} is no text or stands twice")
            self.expect(":")
            found[key] = self.value(depth + 1)
            if not (self.kind == "sign" and self.token == "}"):
                self.expect(",")
        return found

    def arguments(self, depth: int) -> dict[str, Any]:
        """`Name(key=value, …)`: the named arguments; nothing is called."""
        self.expect("(")
        found: dict[str, Any] = {}
        while not self.until(")"):
            if self.kind == "name" and _EQUALS.match(self.text, self.at):
                self.named(found, depth + 1)
            elif self.kind == "name" and self.token not in _CONSTANTS and self.text[self.at : self.at + 1] != "(":
                self.step()  # a bare word such as UTC in TzInfo(UTC)
            else:
                self.value(depth + 1)
            if not (self.kind == "sign" and self.token == ")"):
                self.expect(",")
        return found
