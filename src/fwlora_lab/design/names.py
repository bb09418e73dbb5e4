"""What the names in a design mean: methods, encoders and their sizes, data sets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fwlora_lab.catalog.encoders import ENCODERS, EncoderInfo, aliases, packaged_encoder, pinned_revisions
from fwlora_lab.catalog.methods import METHODS, MethodName
from fwlora_lab.catalog.tasks import TASKS
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DesignDataset, DesignModel
from fwlora_lab.text import one_line

# Words around a method's name that do not make it another method.
_BEFORE = re.compile(r"^(the_|plain_|vanilla_|standard_|ordinary_|uniform_|baseline_|proposed_|ours_|our_)+")
_AFTER = re.compile(r"(_(baseline|method|adapters?|fine_?tuning|ours))+$")
_ALIASES = {"fwlora": "fw_lora", "fisher_weighted_lora": "fw_lora"}
# A text that defines the method that it begins with: `Fisher-Weighted LoRA (FW-LoRA) is a replacement for ...`.
_DEFINED = re.compile(r"(.{1,80}?)(?:\s+is\s+(?:an?|our|the)\s|\s*:\s|\s+[—–]\s|\n)", re.S)
_PROPOSES = re.compile(r"\b(?:we|paper|work)\s+(?:propose|introduce|present)s?\s+(.{1,60})", re.I)
_NAME_LIKE = re.compile(r"[\w+-]*[a-z0-9-][A-Z][\w+-]*|[A-Z]{2,}[\w+-]*\d")  # LoRA, QLoRA, IA3; not PEFT, not rank
_MINILM = ("minilm", "minilm-l6-v2", "all-minilm-l6-v2", "sentence-transformers/all-minilm-l6-v2")
_PUBLISHED = ("lora", "adalora")  # texts on other methods begin with these too: `LoRA is a ..., we generalise it`


def method_in(text: str) -> MethodName | None:
    """The method that a name means; None for one that is not implemented, and for prose that only mentions one.

    Names are compared without regard to case, hyphens and words such as `plain` or `baseline`. What stands in brackets
    is left out, unless it names something else: `LoRA (rank 8)` is LoRA, `LoRA (DoRA)` is not known.
    """
    bare = re.sub(r"\(.*?\)", " ", text[:300])
    name = re.sub(r"[\s_-]+", "_", bare.strip().lower()).strip("_")
    short = _AFTER.sub("", _BEFORE.sub("", name))
    method = next((METHODS[n] for n in (name, short) if n in METHODS), None) or _ALIASES.get(short)
    if method is not None:
        for inner in re.findall(r"\((.*?)\)", text[:300]):
            if any(method_in(word) != method for word in _NAME_LIKE.findall(inner)):
                return None
    return method


def method_defined_in(text: str) -> MethodName | None:
    """The method that a proposed method's text names or defines with its first words; never one further on."""
    if (method := method_in(text)) is not None and len(text) <= 300:
        return method
    defined = _DEFINED.match(text.lstrip())
    method = method_in(defined[1]) if defined else None
    if method in _PUBLISHED:
        return None
    for proposed in _PROPOSES.findall(text):
        if any(method_in(word) != method for word in _NAME_LIKE.findall(proposed)):
            return None
    return method


def unknown_text(name: str) -> str:
    """What is said of a method that is not known here; it names the nearest known ones, at most three, or else all."""
    shorts = list(dict.fromkeys(METHODS.values()))
    near = difflib.get_close_matches(re.sub(r"[\s_-]+", "_", name[:80].lower()), shorts, n=3, cutoff=0.4)
    known = f"the nearest known: {', '.join(near)}" if near else f"known: {', '.join(shorts)}"
    return (
        f"{one_line(name, 80)!r} is not a method that is known here; {known}. Its runs are left out, and not written "
        "as another method's"
    )


@dataclass(frozen=True)
class ResolvedModel:
    """A model of the design.

    Args:
        name: as the design writes it, without a size in brackets.
        pretrained_id: what the run config loads.
        revision: full commit hash, where the design or its list of resources names one.
        stated_size: number of parameters that the design gives.
        encoder: the entry of the catalog; None for a model that it does not hold.
        is_listed: whether `pretrained_id` comes from the request's list of resources.
        states_id: whether the design gives `pretrained_id` itself.
        source_location: where the design names the model.
    """

    name: str
    pretrained_id: str
    revision: str | None
    stated_size: int | None
    encoder: EncoderInfo | None
    is_listed: bool
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
    resource = _resource(request, stated_id or name)
    if stated_id is not None:
        pretrained_id = stated_id
        encoder = ENCODERS.get(stated_id.rsplit("/", 1)[-1].lower())
    else:
        encoder = ENCODERS.get("minilm" if name.lower() in _MINILM else name.lower().rsplit("/", 1)[-1])
        pretrained_id = encoder.pretrained_id if encoder and "/" not in name else resource or name
    revision = given.revision if isinstance(given, DesignModel) else None
    if revision is None and packaged_encoder(pretrained_id) is None:
        commit = request.commits.get(resource or "")
        pinned = pinned_revisions().get(aliases().get(pretrained_id, pretrained_id))
        revision = commit if commit != pinned else None  # a run config need not repeat a pinned commit
    return ResolvedModel(
        name,
        pretrained_id,
        revision,
        stated_size,
        encoder,
        pretrained_id == resource,
        stated_id is not None,
        source_location,
    )


def _resource(request: DesignRequest, name: str) -> str | None:
    """The id, among the request's model resources, that a model's name means; None if none or several have it."""
    if name in request.model_ids:
        return name
    part = name.rsplit("/", 1)[-1]
    found = {i for i in request.model_ids if _letters_and_digits(i.rsplit("/", 1)[-1]) == _letters_and_digits(part)}
    found = {i for i in found if "/" not in name or i.lower() == name.lower()}
    return found.pop() if len(found) == 1 else None


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
    """Letters, digits, underscores, + and * only, in lower case: what two spellings of one name have in common."""
    return re.sub(r"[^\w+*]", "", text.lower())


def slug(parts: Iterable[str]) -> str:
    """`proposed`, `roberta-base (110M)`, `SST-2 (GLUE)` -> `proposed-roberta-base-110M--SST-2-GLUE`."""
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts).strip("-")
