"""Numbers and data sets that a design names in its prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DesignMethod
from fwlora_lab.design.spaces import NUMBER, number
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

_PROSE = {
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


class ProseNumber(NamedTuple):
    """A number in prose: what it is, the key of the text it stands in, and the words around it."""

    value: Any
    place: str
    words: str


def texts(request: DesignRequest) -> Iterator[tuple[str, str]]:
    """The design's prose by its key, the most binding first."""
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
    return "…" + one_line(text[max(0, start - 25) : end + 25], 90) + "…"


def numbers_in_prose(request: DesignRequest) -> dict[str, list[ProseNumber]]:
    found: dict[str, list[ProseNumber]] = {}
    for place, text in texts(request):
        for key, pattern in _PROSE.items():
            for match in re.finditer(pattern, text):
                word = match[1]
                try:
                    value = word.lower() if key == "training.optimizer" else number(word)
                except UserError:
                    continue  # 1e999 says nothing
                found.setdefault(key, []).append(ProseNumber(value, place, around(text, *match.span())))
    return found


def budgets_in_prose(request: DesignRequest) -> list[ProseNumber]:
    for place, text in texts(request):
        match = _PERCENTAGES.search(text)
        if match:
            words = around(text, *match.span())
            return [
                ProseNumber(float(p), place, words) for p in re.findall(r"[\d.]+(?=\s?%)", match[1]) if float(p) > 0
            ]
    return []
