"""Run configs as YAML text that every loader reads alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import yaml

from fwlora_lab.config.schema import RunConfig


class Writer(yaml.SafeDumper):
    """YAML that PyYAML, ruamel and OmegaConf read alike."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_float(dumper: Writer, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text or 0 < abs(value) < 1e-3:
        # PyYAML reads a float only with a point in the mantissa and a signed exponent.
        sign, digits, exponent = Decimal(text).normalize().as_tuple()
        assert isinstance(exponent, int)
        tail = "".join(map(str, digits[1:])) or "0"
        text = f"{'-' if sign else ''}{digits[0]}.{tail}e{exponent + len(digits) - 1:+d}"
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}


def _write_text(dumper: Writer, value: str) -> yaml.ScalarNode:
    bare = _BARE_WORD.fullmatch(value) and value.lower() not in _YAML_WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if bare else '"')


Writer.add_representer(float, _write_float)
Writer.add_representer(str, _write_text)


def plain_values(cfg: RunConfig) -> dict[str, Any]:
    """The complete config as nested dicts and lists, every key written out, as a run's file would hold it."""
    data = cfg.model_dump()
    if cfg.optuna is not None and cfg.optuna.search_space:
        for name, dimension in cfg.optuna.search_space.items():
            data["optuna"]["search_space"][name] = dimension.model_dump(exclude_none=True)
    return data


def to_yaml(cfg: RunConfig) -> str:
    """The complete config as YAML; reading it back gives an equal config."""
    return yaml.dump(plain_values(cfg), Dumper=Writer, sort_keys=False, allow_unicode=True, width=1_000_000)


def yaml_scalar(value: Any) -> str:
    """One value, or a list of values, in one line of YAML."""
    text = yaml.dump(value, Dumper=Writer, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")


def yaml_with_comments(values: Mapping[str, Any], comments: Mapping[str, str], align: bool = False) -> str:
    """Nested dicts as YAML, with a comment behind each value that has one.

    Args:
        comments: dotted key -> comment.
        align: put the comments in one column where they fit.
    """
    lines = [*_lines(values, comments)]
    column = min(max((len(line) for line, comment in lines if comment), default=0), 44) if align else 0
    return "".join(f"{line:<{column}}  # {comment}\n" if comment else f"{line}\n" for line, comment in lines)


def _lines(
    values: Mapping[str, Any], comments: Mapping[str, str], prefix: str = "", indent: str = ""
) -> Iterator[tuple[str, str]]:
    """Each line and its comment."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{yaml_scalar(name)}:", ""
            yield from _lines(value, comments, f"{prefix}{name}.", f"{indent}  ")
        else:
            yield f"{indent}{yaml_scalar(name)}: {yaml_scalar(value)}", comments.get(prefix + name, "")
