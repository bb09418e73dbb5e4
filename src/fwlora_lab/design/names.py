"""What the names in a design mean: methods, encoders and their sizes, data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fwlora_lab.catalog.encoders import ENCODERS, EncoderInfo
from fwlora_lab.catalog.methods import METHODS, MethodName
from fwlora_lab.catalog.tasks import GLUE
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DesignDataset, DesignModel
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, one_line


def arm_of(text: str) -> MethodName | None:
    """The method that a name or the start of a description means; None for one that is not here."""
    name = re.sub(r"\(.*?\)", " ", text[:300]).strip().lower().replace("-", "_").replace(" ", "_").strip("_")
    bare = re.sub(r"^(the_|plain_|vanilla_|standard_|ordinary_|uniform_|baseline_|proposed_|ours_)+", "", name)
    for candidate in (name, bare):
        if candidate in METHODS:
            return METHODS[candidate]
    if bare in ("fwlora", "fisher_weighted_lora"):
        return "fw_lora"
    if len(text) <= 60 and "\n" not in text:
        return None
    for pattern, arm in (
        (r"FW-?LoRA|Fisher-?\s?[Ww]eighted\s+LoRA", "fw_lora"),
        (r"\bAdaLoRA\b", "adalora"),
        (r"(?<![\w-])LoRA(?![\w+-])", "lora"),
    ):
        if re.search(pattern, text[:2000]):
            return METHODS[arm]
    return None


def arm_named(request: DesignRequest, text: str, key: str) -> MethodName:
    """The method that a name means; a UserError with the place `key` for one that is not here."""
    arm = arm_of(text)
    if arm is None:
        raise UserError(
            f"{request.place(key)}: {one_line(text, 80)!r} is not a method{did_you_mean(text[:80], METHODS)}: "
            f"use one of {', '.join(METHODS)}"
        )
    return arm


class ResolvedModel(NamedTuple):
    """A model of the design; `stated` is the size that the design believes it has."""

    name: str
    pretrained_id: str
    revision: str | None
    stated: int | None
    encoder: EncoderInfo | None
    given_id: bool


def model_of(request: DesignRequest, given: str | DesignModel) -> ResolvedModel:
    """`roberta-base (110M)` -> the encoder of that name, with the commit that the request's resources name."""
    written = label(given)
    name = re.split(r"\s*\(", written, maxsplit=1)[0].strip() or written
    size = re.search(r"\(\s*~?\s*(\d{1,6}(?:\.\d{1,3})?)\s*([MB])\b", written, re.I)
    stated = round(float(size[1]) * (1e9 if size[2] in "Bb" else 1e6)) if size else None
    if isinstance(given, DesignModel) and given.parameters is not None:
        stated = given.parameters
    known = "minilm" if "minilm-l6" in name.lower() or name.lower() == "minilm" else name.lower().rsplit("/", 1)[-1]
    encoder = ENCODERS.get(known)
    wanted = given.pretrained_id if isinstance(given, DesignModel) else None
    pretrained_id = wanted or (encoder.pretrained_id if encoder and "/" not in name else name)
    if wanted is not None:
        encoder = ENCODERS.get(wanted.rsplit("/", 1)[-1].lower())
    revision = given.revision if isinstance(given, DesignModel) else None
    if revision is None and pretrained_id not in ("minilm", "roberta-base", "FacebookAI/roberta-base"):
        revision = request.commits.get(pretrained_id)
    return ResolvedModel(name, pretrained_id, revision, stated, encoder, wanted is not None)


def subset_of(text: str) -> str | None:
    """`SST-2 (GLUE)` -> `sst2`."""
    for part in (re.sub(r"\(.*?\)", "", text), *re.findall(r"\((.*?)\)", text), *text.split("/")):
        word = re.sub(r"[^a-z0-9]", "", part.lower()).removeprefix("glue")
        if word in GLUE:
            return word
    return None


def label(part: str | DesignModel | DesignDataset) -> str:
    return part if isinstance(part, str) else part.name


def plain(text: str) -> str:
    return re.sub(r"\W", "", text.lower())


def slug(parts: Iterable[str]) -> str:
    """`proposed`, `roberta-base (110M)`, `SST-2 (GLUE)` -> `proposed-roberta-base-110M--SST-2-GLUE`."""
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts).strip("-")
