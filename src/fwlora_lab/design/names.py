"""What the names in a design mean: methods, encoders and their sizes, data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fwlora_lab.catalog.encoders import ENCODERS, EncoderInfo, aliases, packaged_encoder, pinned_revisions
from fwlora_lab.catalog.methods import METHODS, MethodName
from fwlora_lab.catalog.tasks import TASKS
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DesignDataset, DesignModel
from fwlora_lab.text import did_you_mean, one_line

# Words around a method's name that do not make it another method.
_QUALIFIERS = re.compile(r"^(the_|plain_|vanilla_|standard_|ordinary_|uniform_|baseline_|proposed_|ours_)+")
_MAX_NAME = 60  # characters; a longer text is a description, which may compare the method with others
# The first pattern found in a description decides: descriptions of FW-LoRA and AdaLoRA mention LoRA too.
_IN_DESCRIPTIONS = (
    (re.compile(r"FW-?LoRA|Fisher-?\s?[Ww]eighted\s+LoRA"), "fw_lora"),
    (re.compile(r"\bAdaLoRA\b"), "adalora"),
    (re.compile(r"(?<![\w-])LoRA(?![\w+-])"), "lora"),
)


def method_in(text: str) -> MethodName | None:
    """The method that a name or the start of a description means; None for one that is not implemented."""
    name = re.sub(r"\(.*?\)", " ", text[:300]).strip().lower().replace("-", "_").replace(" ", "_").strip("_")
    bare = _QUALIFIERS.sub("", name)
    for candidate in (name, bare):
        if candidate in METHODS:
            return METHODS[candidate]
    if bare in ("fwlora", "fisher_weighted_lora"):
        return "fw_lora"
    if len(text) <= _MAX_NAME and "\n" not in text:
        return None
    return next((method for pattern, method in _IN_DESCRIPTIONS if pattern.search(text[:2000])), None)


def method_named(request: DesignRequest, text: str, source_location: str) -> MethodName:
    """The method that a name means.

    Raises:
        UserError: it is not implemented.
    """
    method = method_in(text)
    if method is None:
        raise request.error(
            source_location,
            f"{one_line(text, 80)!r} is not a method{did_you_mean(text[:80], METHODS)}: "
            f"use one of {', '.join(METHODS)}",
        )
    return method


@dataclass(frozen=True)
class ResolvedModel:
    """A model of the design.

    Args:
        name: as the design writes it, without a size in brackets.
        pretrained_id: what the run config loads.
        revision: full commit hash, where the design or its list of resources names one.
        stated_size: number of parameters that the design gives.
        encoder: the entry of the catalog; None for a model that it does not hold.
        states_id: whether the design gives `pretrained_id` itself.
        source_location: where the design names the model.
    """

    name: str
    pretrained_id: str
    revision: str | None
    stated_size: int | None
    encoder: EncoderInfo | None
    states_id: bool
    source_location: str


def resolve_model(request: DesignRequest, given: str | DesignModel, source_location: str) -> ResolvedModel:
    """`roberta-base (110M)` -> the encoder of that name, with the commit that the request's resources name."""
    written = label(given)
    name = re.split(r"\s*\(", written, maxsplit=1)[0].strip() or written
    size = re.search(r"\(\s*~?\s*(\d{1,6}(?:\.\d{1,3})?)\s*([MB])\b", written, re.I)
    stated_size = round(float(size[1]) * (1e9 if size[2] in "Bb" else 1e6)) if size else None
    if isinstance(given, DesignModel) and given.parameters is not None:
        stated_size = given.parameters
    stated_id = given.pretrained_id if isinstance(given, DesignModel) else None
    if stated_id is not None:
        pretrained_id = stated_id
        encoder = ENCODERS.get(stated_id.rsplit("/", 1)[-1].lower())
    else:
        is_minilm = "minilm-l6" in name.lower() or name.lower() == "minilm"
        encoder = ENCODERS.get("minilm" if is_minilm else name.lower().rsplit("/", 1)[-1])
        pretrained_id = encoder.pretrained_id if encoder and "/" not in name else name
    revision = given.revision if isinstance(given, DesignModel) else None
    if revision is None and not _is_pinned(pretrained_id):
        revision = request.commits.get(pretrained_id)
    return ResolvedModel(name, pretrained_id, revision, stated_size, encoder, stated_id is not None, source_location)


def _is_pinned(pretrained_id: str) -> bool:
    """Whether the catalog fixes which weights an id means, so that a run config needs no revision."""
    if packaged_encoder(pretrained_id):
        return True
    return aliases().get(pretrained_id, pretrained_id) in pinned_revisions()


def subset_of(text: str) -> str | None:
    """`SST-2 (GLUE)` -> `sst2`; None for a text that names no task of a source of several tasks."""
    names: dict[str, str] = {}
    for task in TASKS.values():
        if "subset" in task.source.keys:
            word = _letters_and_digits(task.name)
            names |= {word: task.name, _letters_and_digits(task.source.name) + word: task.name}
    parts = (re.sub(r"\(.*?\)", "", text), *re.findall(r"\((.*?)\)", text), *text.split("/"))
    return next((names[word] for word in map(_letters_and_digits, parts) if word in names), None)


def _letters_and_digits(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def label(part: str | DesignModel | DesignDataset) -> str:
    """The name of a model or a data set, however the design writes it."""
    return part if isinstance(part, str) else part.name


def plain(text: str) -> str:
    """Letters, digits and underscores only, in lower case: what two spellings of one name have in common."""
    return re.sub(r"\W", "", text.lower())


def slug(parts: Iterable[str]) -> str:
    """`proposed`, `roberta-base (110M)`, `SST-2 (GLUE)` -> `proposed-roberta-base-110M--SST-2-GLUE`."""
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts).strip("-")
