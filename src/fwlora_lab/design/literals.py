"""Reads values as Python prints them, such as `name='x' sizes=[1, 2]`, without evaluating anything."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from fwlora_lab.design.parse import MAX_DEPTH
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

# Possessive quantifiers (`*+`): a text that does not match is refused in linear time.
_TOKEN = re.compile(
    r"""\s*+(?:(?P<text>'[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+")"""
    r"|(?P<number>[-+]?+(?:\d++\.?+\d*+|\.\d++)(?:[eE][-+]?+\d++)?+)"
    r"|(?P<name>[A-Za-z_][\w.]*+)|(?P<sign>[()\[\]{},:=]))",
    re.S | re.A,
)
_EQUALS = re.compile(r"\s*+=")
_CONSTANTS = {"None": None, "True": True, "False": False}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_MAX_DIGITS = 300  # of a number


def read_fields(text: str, where: str) -> dict[str, Any]:
    """Read `name=value name=value …`, the form in which pydantic prints a model.

    Args:
        where: begins every message, e.g. the file and the section.

    Raises:
        UserError: the text cannot be read; the message names the character.
    """
    return LiteralReader(text, where).read_fields()


class LiteralReader:
    """A recursive-descent reader of printed Python values.

    Literals become values. A call such as `datetime.datetime(2022, 3, 2, tzinfo=UTC())` becomes a dict of its named
    arguments. Between two methods `kind` and `token` hold the next token that is not read yet.
    """

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.position = 0  # in characters, after the current token
        self.kind, self.token = "", ""
        self._advance()

    def read_fields(self) -> dict[str, Any]:
        """All fields up to the end of the text."""
        fields: dict[str, Any] = {}
        while self.kind != "end":
            if self.kind != "name":
                raise self._error("a name=value is expected")
            self._read_field(fields, depth=0)
        return fields

    def _advance(self) -> None:
        """Move to the next token."""
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            if self.text[self.position :].strip():
                raise self._error("cannot be read")
            self.kind, self.token = "end", ""
            return
        assert match.lastgroup is not None  # every token matches one of the groups
        self.kind, self.token, self.position = match.lastgroup, match[match.lastgroup], match.end()

    def _error(self, problem: str) -> UserError:
        excerpt = one_line(self.text[max(0, self.position - 20) : self.position + 30], 60)
        return UserError(f"{self.where}: character {self.position}: {problem}: …{excerpt!r}…")

    def _at_sign(self, sign: str) -> bool:
        return self.kind == "sign" and self.token == sign

    def _skip(self, sign: str) -> None:
        """Move past a sign that must come next."""
        if not self._at_sign(sign):
            raise self._error(f"{sign!r} is missing")
        self._advance()

    def _at_item(self, closing: str) -> bool:
        """Whether another item of a list comes next; moves past the closing sign if none does."""
        if self._at_sign(closing):
            self._advance()
            return False
        return True

    def _end_item(self, closing: str) -> None:
        """Move past the comma after an item; the last item needs none."""
        if not self._at_sign(closing):
            self._skip(",")

    def _read_field(self, fields: dict[str, Any], depth: int) -> None:
        """Read one `name=value` into `fields`."""
        name = self.token
        self._advance()
        self._skip("=")
        if name in fields:
            raise self._error(f"duplicate name {one_line(name)!r}")
        fields[name] = self._read_value(depth)

    def _read_value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self._error("is nested too deeply")
        kind, token = self.kind, self.token
        if kind in ("end", "sign") and token not in _CLOSING:
            raise self._error("a value is expected")
        self._advance()
        if kind == "text":
            return self._text(token)
        if kind == "number":
            return self._number(token)
        if kind == "name":
            if self._at_sign("("):
                return self._read_arguments(depth)
            if token not in _CONSTANTS:
                raise self._error(f"{one_line(token)!r} is not a value")
            return _CONSTANTS[token]
        return self._read_dict(depth) if token == "{" else self._read_list(_CLOSING[token], depth)

    def _text(self, token: str) -> str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of escapes such as '\d'
                value = ast.literal_eval(token.replace("\r", "\\r").replace("\n", "\\n"))
        except (SyntaxError, ValueError, MemoryError) as error:
            raise self._error(f"a text cannot be read ({one_line(error)})") from None
        assert isinstance(value, str)  # the token is a quoted text
        return value

    def _number(self, token: str) -> int | float:
        if len(token) > _MAX_DIGITS:
            raise self._error("a number has too many digits")
        return int(token) if re.fullmatch(r"[-+]?\d+", token, re.A) else float(token)

    def _read_list(self, closing: str, depth: int) -> list[Any]:
        items = []
        while self._at_item(closing):
            items.append(self._read_value(depth + 1))
            self._end_item(closing)
        return items

    def _read_dict(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while self._at_item("}"):
            key = self._read_value(depth + 1)
            if not isinstance(key, str):
                raise self._error(f"the key {one_line(key)!r} is not a text")
            if key in values:
                raise self._error(f"duplicate key {one_line(key)!r}")
            self._skip(":")
            values[key] = self._read_value(depth + 1)
            self._end_item("}")
        return values

    def _read_arguments(self, depth: int) -> dict[str, Any]:
        """The named arguments of `Name(key=value, …)`; others are read and dropped."""
        self._skip("(")
        arguments: dict[str, Any] = {}
        while self._at_item(")"):
            if self.kind == "name" and _EQUALS.match(self.text, self.position):
                self._read_field(arguments, depth + 1)
            elif self._at_bare_word():
                self._advance()
            else:
                self._read_value(depth + 1)
            self._end_item(")")
        return arguments

    def _at_bare_word(self) -> bool:
        """A name that is neither a constant nor a call, such as UTC in `TzInfo(UTC)`."""
        next_character = self.text[self.position : self.position + 1]
        return self.kind == "name" and self.token not in _CONSTANTS and next_character != "("
