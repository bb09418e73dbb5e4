"""A design together with where each of its keys is written, so that every message can name the file and the line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fwlora_lab.design.schema import ExperimentDesign
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line


@dataclass(frozen=True)
class Place:
    """A place in a request as messages name it; `is_filled` if a language model wrote what is there."""

    text: str
    is_filled: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class DesignRequest:
    """What was read from one source.

    A `source_location` below is the dotted path of a key of the design, such as `models.0.name`, or of a key of an
    example config, such as `example:RUN_ID.optuna.n_trials`.

    Args:
        source: path of the file.
        design: what is to be compared, on what, searched how.
        spelling: source location -> what the source calls that key, where it differs from the design's name.
        lines: source location -> line in the file, from 1.
        examples: run id -> the config that the source itself gives as an example of its output.
        commits: model id -> full commit hash, from the source's list of resources.
        model_ids: the ids of the models in that list.
        writer: the language model that filled gaps; "" without one.
        filled: source location -> what that language model answered; the source itself states nothing there.
    """

    source: str
    design: ExperimentDesign
    spelling: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)
    model_ids: tuple[str, ...] = ()
    writer: str = ""
    filled: Mapping[str, Any] = field(default_factory=dict)

    def is_filled(self, source_location: str) -> bool:
        """Whether the value at this location is the language model's, not the source's."""
        return any(key in self.filled for key in _with_parents(source_location))

    def locate(self, source_location: str, *quoted: object) -> Place:
        """`file:line: key: quoted text`, with the key as the source spells it."""
        ending = "".join(f": {one_line(text)}" for text in quoted)
        if self.is_filled(source_location):
            return Place(
                f"answer of {one_line(self.writer)}: {_with_brackets(source_location)}{ending}", is_filled=True
            )
        keys = _with_parents(source_location)
        line = next((self.lines[key] for key in keys if key in self.lines), None)
        known = next((key for key in keys if key in self.spelling), None)
        spelled = source_location if known is None else self.spelling[known] + source_location[len(known) :]
        return Place(f"{self.source}{f':{line}' if line else ''}: {_with_brackets(spelled)}{ending}")

    def error(self, source_location: str, message: object) -> UserError:
        """A UserError that begins with the location; both parts are cut to one line."""
        return UserError(f"{self.locate(one_line(source_location))}: {one_line(message, 600)}")


def _with_brackets(source_location: str) -> str:
    """`models.0.name` -> `models[0].name`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", source_location)


def _with_parents(source_location: str) -> list[str]:
    """The key and the blocks that hold it, innermost first."""
    parts = source_location.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
