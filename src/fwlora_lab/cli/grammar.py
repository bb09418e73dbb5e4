"""One grammar for every command: declared arguments, parsed the same way and shown by the same help.

An argument is written `name=value` or `--name value`, anywhere on the line; a switch is `--name` or `name=true`. All
other `KEY=VALUE` words are overrides of the run config, for the commands that take them.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean


class UsageError(UserError):
    """A command line that cannot be read; shown with the command's usage."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True)
class Argument:
    """A named argument of a command.

    value: what stands for its value in the help, "" for a switch; choices: the values allowed, () for any; also: other
    names that mean the same; short: a one-letter flag.
    """

    name: str
    help: str
    value: str = ""
    choices: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    short: str = ""

    @property
    def is_switch(self) -> bool:
        return not self.value

    @property
    def shown(self) -> str:
        """How the help writes it."""
        flag = f"--{self.name.replace('_', '-')}"
        if self.is_switch:
            return f"-{self.short}, {flag}" if self.short else flag
        return f"{self.name}={self.value}"


@dataclass
class Arguments:
    """What was written after a command: values by argument, positional words, overrides of the run config."""

    usage: str
    values: dict[str, str] = field(default_factory=dict)
    positional: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        return self.values.get(name)

    def switch(self, name: str) -> bool:
        return self.values.get(name) == "true"

    def whole_number(self, name: str, default: int, most: int | None = None) -> int:
        """The argument as a whole number from 1 on."""
        given = self.values.get(name)
        if given is None:
            return default
        if not (given.isascii() and given.isdecimal()) or int(given) < 1 or (most is not None and int(given) > most):
            bound = "from 1 on" if most is None else f"from 1 to {most}"
            raise UserError(f"{name}={given}: must be a whole number {bound}.")
        return int(given)


@dataclass(frozen=True)
class Command:
    """A command: what it is for, what can be written after it, and the function that runs it.

    positional: what stands for positional words in the usage, "" where there are none; overrides: whether KEY=VALUE
    words override the run config; examples: command lines and what they do; more: text at the end of the help, made
    when it is shown; flags: leading words that Hydra's launchers read, passed on as overrides.
    """

    name: str
    summary: str
    description: str
    run: Callable[[Arguments], int]
    arguments: tuple[Argument, ...] = ()
    positional: str = ""
    overrides: bool = False
    examples: tuple[tuple[str, str], ...] = ()
    more: Callable[[], str] | None = None

    @property
    def usage(self) -> str:
        parts = [f"fwlora {self.name}"]
        parts += [self.positional] if self.positional else []
        parts += [f"[{a.shown.split(', ')[-1]}]" for a in self.arguments]
        parts += ["[KEY=VALUE ...]"] if self.overrides else []
        indent = " " * len(f"usage: fwlora {self.name} ")
        return textwrap.fill(f"usage: {' '.join(parts)}", _width(), subsequent_indent=indent, break_on_hyphens=False)

    def help(self) -> str:
        """The whole help, in at most 80 columns where the terminal is not narrower."""
        text = [self.usage, "", *(_wrapped(part) for part in self.description.split("\n\n"))]
        if self.examples:
            text += ["", "examples:"]
            for line, what in self.examples:
                text += [f"  fwlora {line}", *([textwrap.indent(_wrapped(what, 6), " " * 6)] if what else [])]
        if self.arguments:
            title = "arguments (every other KEY=VALUE overrides the run config):" if self.overrides else "arguments:"
            text += ["", title, *two_columns([(a.shown, _explained(a)) for a in self.arguments])]
        if self.more is not None:
            text += ["", self.more()]
        return "\n".join(text)

    def parse(self, words: Sequence[str]) -> Arguments:
        """The words after the command's name.

        Raises:
            UsageError: an unknown argument, an argument given twice or without a value, or a word too many.
        """
        parsed = Arguments(self.usage)
        known = {name: a for a in self.arguments for name in (a.name, *a.also)}
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                parsed.positional += rest
                break
            name, sign, value = word.partition("=")
            if word.startswith("-") and word != "-":
                argument = self._flag(name, known)
                if argument.is_switch:
                    value = value if sign else "true"
                elif not sign:
                    if not rest:
                        raise UsageError(f"{name} needs a value: {name} {argument.value}", self.usage)
                    value = rest.pop(0)
                self._set(parsed, argument, value)
            elif sign and name in known:
                self._set(parsed, known[name], value)
            elif self.overrides and (sign or word.startswith(("+", "~")) or not self.positional):
                parsed.overrides.append(word)
            elif self.positional:
                parsed.positional.append(word)
            else:
                raise UsageError(
                    f"{word!r} is not an argument of fwlora {self.name}{did_you_mean(name, known)}", self.usage
                )
        return parsed

    def _flag(self, written: str, known: dict[str, Argument]) -> Argument:
        """The argument that `--name` or a one-letter flag means."""
        name = written.lstrip("-").replace("-", "_")
        if written.startswith("--") and name in known:
            return known[name]
        for argument in self.arguments:
            if written == f"-{argument.short}":
                return argument
        flags = [f"--{n.replace('_', '-')}" for n in known]
        raise UsageError(
            f"{written} is not an argument of fwlora {self.name}{did_you_mean(written, flags)}", self.usage
        )

    def _set(self, parsed: Arguments, argument: Argument, value: str) -> None:
        name = argument.name
        if name in parsed.values:
            raise UsageError(f"{name}= is given twice: give it once", self.usage)
        if argument.is_switch:
            value = value.lower()
            if value not in ("true", "false"):
                raise UsageError(f"{name}={value}: must be true or false.", self.usage)
        elif not value:
            raise UsageError(f"{name}= is empty: give a value, or leave it out.", self.usage)
        if argument.choices and value not in argument.choices:
            raise UsageError(
                f"{name}={value}: must be one of {', '.join(argument.choices)}{did_you_mean(value, argument.choices)}",
                self.usage,
            )
        parsed.values[name] = value


WORKERS = Argument("workers", "processes that work at once (default: 1)", "N", also=("jobs",))
CONFIG_DIR = Argument("config_dir", "a folder with run configs of your own", "DIR")


def _explained(argument: Argument) -> str:
    words = [argument.help]
    if argument.also:
        others = ", ".join(f"{name}=" if not argument.is_switch else f"--{name}" for name in argument.also)
        words.append(f"also written {others}")
    if argument.choices:
        words.append(f"one of {', '.join(argument.choices)}")
    return "; ".join(words)


def two_columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Names and what they mean, side by side in lines that fit the terminal."""
    left = min(max(len(name) for name, _ in rows), 24)
    lines = []
    for name, text in rows:
        body = textwrap.wrap(text, _width() - left - 4, break_on_hyphens=False) or [""]
        if len(name) > left:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{left}}  {body.pop(0)}")
        lines += [f"  {'':<{left}}  {line}" for line in body]
    return lines


def _wrapped(text: str, indent: int = 0) -> str:
    """A paragraph in lines that fit; one that begins with a space is kept as it is."""
    return (
        text if text.startswith(" ") else textwrap.fill(" ".join(text.split()), _width() - indent) + "\n" * (not indent)
    )


def _width() -> int:
    return max(40, min(80, shutil.get_terminal_size((80, 24)).columns))


def cpu_cores() -> int:
    """How many cores this machine has."""
    return os.cpu_count() or 1
