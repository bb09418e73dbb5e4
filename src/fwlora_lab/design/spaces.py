"""Ranges as people write them, such as `1e-4-3e-4` or `4,8,16`, as dimensions of a search."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from fwlora_lab.config.keys import search_key
from fwlora_lab.config.schema import Dimension
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

NUMBER = r"[-+]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][-+]?\d{1,4})?"
_LOG = {"training.learning_rate", "fw_lora.penalty_strength", "adalora.orth_reg_weight"}
_DISCRETE = {"training.batch_size", "model.lora.rank", "training.gradient_accumulation_steps", "model.lora.alpha"}
_WHOLE = {
    "training.batch_size", "model.lora.rank", "training.epochs", "training.gradient_accumulation_steps",
    "dataset.max_length", "fw_lora.fisher_interval", "fw_lora.sketch_columns", "fw_lora.fisher_start",
    "adalora.delta_t",
    "training.seed", "dataset.seed", "dataset.train_examples",
}  # fmt: skip
_DASHES = "‐‑‒–—−"
_RANGE = re.compile(rf"({NUMBER})\s*(?:-|to|and|\.\.\.?|…|~)\s*({NUMBER})")


@dataclass(frozen=True)
class ParsedSpace:
    """A range as a dimension of a search, or one fixed value.

    Args:
        key: the run config's key.
        dimension: as a run config writes it under `optuna.search_space`; None for a fixed value.
        value: the fixed value; None for a dimension.
        note: what was inferred.
        faults: what is wrong with the range as it is written.
    """

    key: str
    dimension: dict[str, Any] | None
    value: Any = None
    note: str = ""
    faults: tuple[str, ...] = ()

    def ends(self) -> list[Any]:
        """The choices, or the lowest and the highest value; empty for a fixed value."""
        if self.dimension is None:
            return []
        return self.dimension.get("choices") or [self.dimension["low"], self.dimension["high"]]

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the range; True for a value that cannot be compared with it."""
        dimension = self.dimension or {}
        try:
            choices = dimension.get("choices")
            return value in choices if choices is not None else dimension["low"] <= value <= dimension["high"]
        except TypeError:
            return True  # of another type: refused when the config is checked

    def middle(self) -> Any:
        """The middle one of the choices or steps, the mean, or the geometric mean of a log-uniform range."""
        dimension = self.dimension or {}
        if choices := dimension.get("choices"):
            return choices[len(choices) // 2]
        low, high = dimension["low"], dimension["high"]
        if dimension["type"] == "loguniform":
            return float(f"{math.sqrt(low * high):.3g}")
        if dimension["type"] == "int":
            step = dimension.get("step") or 1
            return low + (high - low) // (2 * step) * step
        return (low + high) / 2


def parse_space(name: str, given: Any) -> ParsedSpace:
    """A range in text, a list, one value or a typed dimension, as a dimension of the key that `name` means.

    `1e-4-3e-4`, `5e-5 to 5e-4`, `0.8–1.5` are ranges, `4,8,16` are choices, `300-800 step 100` has a step. The
    distribution follows the key: log-uniform for learning rates and regularisation, int with a step for counts,
    categorical for discrete choices, uniform for the rest.

    Raises:
        UserError: `name` means no key, or the text cannot be read as a range.
    """
    key = search_key(name)
    if isinstance(given, Dimension):
        return ParsedSpace(key, given.model_dump(exclude_none=True))
    if isinstance(given, list):
        return _choices(key, given, bracketed=True)
    if not isinstance(given, str):
        return ParsedSpace(key, None, given)
    text = "".join("-" if c in _DASHES else c for c in given).strip()
    if len(text) > 10_000:
        raise UserError(f"{len(text):,} characters are not a range: write low-high, or a,b,c")
    step = re.search(r"[\s,(]*\bstep\s*[=:]?\s*(\d{1,12})\)?$", text)
    if step:
        text = text[: step.start()]
    text = re.sub(r"^(?:between|from)\s+", "", text, flags=re.I)
    match = _RANGE.fullmatch(text)
    if match:
        return _between(key, number(match[1]), number(match[2]), int(step[1]) if step else None)
    bracketed = text[:1] + text[-1:] in ("[]", "()", "{}")
    listed = text[:1] != "{"
    if bracketed:
        text = text[1:-1]
    parts = [p.strip().strip("'\"") for p in re.split(r"[,;/]|\bor\b", text) if p.strip()]
    if not parts or not all(re.fullmatch(rf"{NUMBER}|[^\W\d][\w.+-]{{0,99}}", p) for p in parts):
        raise UserError(f"{one_line(given, 60)!r} cannot be read as a range: write low-high, or a,b,c")
    return _choices(key, [_scalar(p) for p in parts], bracketed=bracketed and listed)


def number(text: str) -> int | float:
    """The number that a text matching NUMBER writes; UserError for one that is too large for a float."""
    value = int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    if not math.isfinite(value):
        raise UserError(f"{text!r} is not a finite number")
    return value


def _scalar(text: str) -> Any:
    if re.fullmatch(NUMBER, text):
        return number(text)
    words = {"true": True, "false": False, "none": None, "null": None}
    return words.get(text.lower(), text)


def _fitting(key: str, value: Any) -> Any:
    """`3e2` becomes the int 300 for a key that counts."""
    counts = key in _WHOLE or (key == "fw_lora.warmup_steps" and abs(value) >= 1)
    return int(value) if counts and isinstance(value, float) and value.is_integer() else value


def _choices(key: str, values: list[Any], bracketed: bool) -> ParsedSpace:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        raise UserError("holds a value that is not a finite number")
    if not 1 <= len(values) <= 100:
        raise UserError(f"lists {len(values):,} values, 1 to 100 can be searched: write low-high, or a,b,c")
    distinct = list({(type(v), v): v for v in values}.values())
    if numbers:
        distinct = [_fitting(key, v) for v in distinct]
    if len(distinct) == 1:
        return ParsedSpace(key, None, distinct[0])
    if bracketed and numbers and len(distinct) == 2 and key not in _DISCRETE:
        return _between(key, distinct[0], distinct[1], None)
    steps = key == "fw_lora.warmup_steps" or key == "training.epochs"
    if steps and numbers and len(distinct) > 2 and all(isinstance(v, int) for v in distinct):
        low, high = min(distinct), max(distinct)
        step = math.gcd(*(v - low for v in distinct))
        note = f"a count: int from the least to the greatest of {', '.join(map(str, distinct))} in steps that meet all"
        return ParsedSpace(key, {"type": "int", "low": low, "high": high, "step": step}, note=note)
    return ParsedSpace(key, {"type": "categorical", "choices": distinct}, note="discrete choices")


def _between(key: str, low: int | float, high: int | float, step: int | None) -> ParsedSpace:
    low, high = _fitting(key, low), _fitting(key, high)
    faults = []
    if low > high:
        faults.append(f"the range runs backwards, from {low} to {high}; it is searched from {high} to {low}")
        low, high = high, low
    if low == high:
        return ParsedSpace(key, None, low, faults=tuple(faults))
    whole = isinstance(low, int) and isinstance(high, int)
    powers = [1 << n for n in range(24) if low <= 1 << n <= high]
    if key == "training.batch_size" and powers[:1] == [low] and powers[-1:] == [high]:
        dimension, note = {"type": "categorical", "choices": powers}, "powers of two in the range"
    elif whole and (key in _WHOLE or key == "fw_lora.warmup_steps"):
        rounded = next((s for s in (100, 10) if low % s == 0 and high % s == 0 and high - low > s), 1)
        stride = step or (rounded if key == "fw_lora.warmup_steps" else 1)
        dimension = {"type": "int", "low": low, "high": high, "step": stride}
        note = "a count" + ("" if step else f"; step {stride} inferred")
    elif key in _LOG and low > 0:
        dimension = {"type": "loguniform", "low": low, "high": high}
        note = "learning rates and regularisation are searched on a log scale"
    else:
        dimension, note = {"type": "uniform", "low": low, "high": high}, "a range of numbers"
        if key in _LOG:
            faults.append(f"a log scale cannot start at {low}; it is searched uniformly")
    return ParsedSpace(key, dimension, note=note, faults=tuple(faults))
