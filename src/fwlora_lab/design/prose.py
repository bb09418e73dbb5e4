"""Numbers, budgets and tasks that a design names in its prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fwlora_lab.catalog.tasks import TASKS
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DesignMethod
from fwlora_lab.design.spaces import NUMBER, number
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

_PATTERNS = {
    "training.epochs": r"\b(\d{1,4})\s*epochs?\b",
    "training.batch_size": r"\bbatch(?:[ -]?size)?\s*(?:of|=|:)?\s*(\d{1,6})\b",
    "training.learning_rate": rf"\b(?:lr|learning[ -]rate)\s*(?:of|=|:|≈)?\s*({NUMBER})",
    "training.weight_decay": rf"\bweight[ -]decay\s*(?:of|=|:|≈)?\s*({NUMBER})",
    "training.warmup_ratio": rf"\bwarm-?up[ -]ratio\s*(?:of|=|:|≈)?\s*({NUMBER})",
    "training.optimizer": r"\b(AdamW)\b",
    "model.lora.dropout": rf"\bdropout\s*(?:of|=|:|≈)?\s*({NUMBER})",
    "dataset.max_length": r"\bmax(?:imum)?[ _-](?:sequence[ _-])?length\s*(?:of|=|:)?\s*(\d{1,6})\b",
    "fw_lora.penalty_strength": rf"(?:λ|\blambda(?:_fw)?)\s*(?:≈|=|~|:)\s*({NUMBER})",
    "fw_lora.warmup_steps": r"\bK\s*(?:≈|=|~)\s*(\d{1,7})\b",
    "fw_lora.fisher_ema_decay": rf"\bfisher_alpha\s*=\s*({NUMBER})",
}
_PERCENTAGES = re.compile(
    r"\bbudgets?\b[^.\n%]{0,60}?((?:\d{1,3}(?:\.\d{1,6})?\s?%[,;/\s]{0,3}(?:and\s)?){1,20})", re.I
)
# Texts that say what is to be run; a method's description or code may name tasks for other reasons.
_SETUPS = ("hypothesis", "hypothesis.experimental_setup", "summary")


@dataclass(frozen=True)
class ProseNumber:
    """A number in prose, the key of the text that holds it, and the words around it."""

    value: Any
    source_location: str
    quote: str


@dataclass(frozen=True)
class Quote:
    """Words of a text, and the key of that text."""

    source_location: str
    words: str


def texts(request: DesignRequest) -> Iterator[tuple[str, str]]:
    """Key and text of the design's prose; the text that binds most comes first."""
    design = request.design
    hypothesis = design.hypothesis
    if isinstance(hypothesis, str):
        yield "hypothesis", hypothesis
    elif hypothesis is not None:
        for name in ("experimental_setup", "method"):
            text = getattr(hypothesis, name)
            if text:
                yield f"hypothesis.{name}", text
    if design.summary:
        yield "summary", design.summary
    proposed = design.proposed_method
    text = proposed.description if isinstance(proposed, DesignMethod) else proposed
    if text:
        yield "proposed_method", text
    if hypothesis is not None and not isinstance(hypothesis, str) and hypothesis.experimental_code:
        yield "hypothesis.experimental_code", hypothesis.experimental_code


def around(text: str, start: int, end: int) -> str:
    """The characters from `start` to `end` with 25 more on either side, in one line."""
    return "…" + one_line(text[max(0, start - 25) : end + 25], 90) + "…"


def numbers_in_prose(request: DesignRequest) -> dict[str, list[ProseNumber]]:
    """The values that the prose gives to keys of a run config, in the order of the texts."""
    found: dict[str, list[ProseNumber]] = {}
    for source_location, text in texts(request):
        for key, pattern in _PATTERNS.items():
            for match in re.finditer(pattern, text):
                word = match[1]
                try:
                    value = word.lower() if key == "training.optimizer" else number(word)
                except UserError:
                    continue  # a number beyond the range of floats, such as 1e999
                found.setdefault(key, []).append(ProseNumber(value, source_location, around(text, *match.span())))
    return found


def budgets_in_prose(request: DesignRequest) -> list[ProseNumber]:
    """The parameter budgets, in percent, of the first text that lists some."""
    for source_location, text in texts(request):
        match = _PERCENTAGES.search(text)
        if match:
            quote = around(text, *match.span())
            percentages = map(float, re.findall(r"[\d.]+(?=\s?%)", match[1]))
            return [ProseNumber(percent, source_location, quote) for percent in percentages if percent > 0]
    return []


def tasks_in_prose(request: DesignRequest) -> dict[str, Quote]:
    """Tasks that the hypothesis, the experimental setup or the summary names -> where it does so first."""
    found: dict[str, Quote] = {}
    for source_location, text in texts(request):
        if source_location in _SETUPS:
            for name, task in TASKS.items():
                match = re.search(task.prose_pattern, text) if task.prose_pattern else None
                if match:
                    found.setdefault(name, Quote(source_location, around(text, *match.span())))
    return found
