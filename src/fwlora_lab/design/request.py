"""A written request or a design file becomes an `ExperimentDesign`: what is to be compared, on what, searched how.

Three kinds of source are told apart by what they hold: a design file (YAML or JSON, the schema below), the prompt text
of a request (sections with Python-like values inside), and an AIRAS research history (JSON, both generations of it).
Nothing in a source is evaluated: string literals are decoded one by one, a call such as `datetime.datetime(...)`
becomes a mapping of its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fwlora_lab.design.schema import ExperimentDesign
from fwlora_lab.text import one_line


@dataclass(frozen=True)
class DesignRequest:
    """A design, where each of its keys stands in the source, and the source's own example configs by run id.

    `filled` holds what the language model `writer` answered where the source states nothing: key -> value.
    """

    source: str
    design: ExperimentDesign
    spelling: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)
    writer: str = ""
    filled: Mapping[str, Any] = field(default_factory=dict)

    def is_filled(self, key: str) -> bool:
        return any(k in self.filled for k in _upwards(key))

    def place(self, key: str, *said: object) -> str:
        """`file:line: key: what it says`, with the key as the source spells it."""
        words = "".join(f": {one_line(word)}" for word in said)
        if self.is_filled(key):
            return f"answer of {one_line(self.writer)}: {_indexed(key)}{words}"
        line = next((self.lines[k] for k in _upwards(key) if k in self.lines), None)
        known = next((k for k in _upwards(key) if k in self.spelling), None)
        shown = key if known is None else self.spelling[known] + key[len(known) :]
        return f"{self.source}{f':{line}' if line else ''}: {_indexed(shown)}{words}"


def _indexed(key: str) -> str:
    """`models.0.name` -> `models[0].name`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)


def _upwards(key: str) -> list[str]:
    """The key and the blocks around it, innermost first."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
