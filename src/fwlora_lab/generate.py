"""From an experimental design to one run config each, and what in the design contradicts itself.

A value comes from the first that has it: what the design states, its prose, the request's own example output, the
method's default, the task's convention. All but the first are said in a comment beside the value. Where two of them
disagree, or cannot stand together, the contradiction is reported with both places; the configs are valid either way.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from fwlora_lab.errors import UserError
from fwlora_lab.request import Dataset, Method, Model, Request, Run, one_line, read_request
from fwlora_lab.runconfig import (
    GLUE_SUBSETS,
    KEYS,
    METHODS,
    Arm,
    Dimension,
    RunConfig,
    Writer,
    get_key,
    issues_of,
    listing,
    nearest,
    reads,
    schema_defaults,
    search_key,
)

MAX_RUNS = 1_000


class Contradiction(NamedTuple):
    """Two statements that cannot both hold: what kind, why, and the two places."""

    kind: str
    text: str
    places: tuple[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.kind}: {self.text}", *(f"    {place}" for place in self.places)])


class Generated(NamedTuple):
    """`configs` maps run ids to YAML texts, in the order of the design."""

    configs: dict[str, str]
    contradictions: list[Contradiction]


# ---------------------------------------------------------------------------------------------
# What is known of models and tasks
# ---------------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """An encoder's parameters as `AutoModel` builds it, and the sizes of its layers."""

    pretrained_id: str
    parameters: int
    layers: int
    width: int
    feed_forward: int

    def unit(self, targets: Iterable[str]) -> int | None:
        """Parameters of one rank on every target; None where a name means no Linear layer here."""
        prices = {
            **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), 2 * self.width),
            "attention.output.dense": 2 * self.width,
            "intermediate.dense": self.width + self.feed_forward,
            "output.dense": self.width + self.feed_forward,
        }
        hit: set[str] = set()
        for name in targets:
            means = {_ROLES[name]} if name in _ROLES else {p for p in prices if f".{p}".endswith(f".{name}")}
            means = set(prices) if name == "all-linear" else means
            if not means:
                return None
            hit |= means
        return self.layers * sum(prices[p] for p in hit)


_ROLES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
ENCODERS = {
    "roberta-base": Encoder("roberta-base", 124_645_632, 12, 768, 3072),
    "roberta-large": Encoder("FacebookAI/roberta-large", 355_359_744, 24, 1024, 4096),
    "bert-base-uncased": Encoder("google-bert/bert-base-uncased", 109_482_240, 12, 768, 3072),
    "bert-base-cased": Encoder("google-bert/bert-base-cased", 108_310_272, 12, 768, 3072),
    "bert-large-uncased": Encoder("google-bert/bert-large-uncased", 335_141_888, 24, 1024, 4096),
    "minilm": Encoder("minilm", 22_713_216, 6, 384, 1536),
}
GLUE_TRAIN = {
    "cola": 8_551, "sst2": 67_349, "mrpc": 3_668, "qqp": 363_846, "stsb": 5_749,
    "mnli": 392_702, "qnli": 104_743, "rte": 2_490, "wnli": 635,
}  # fmt: skip
_IN_PROSE = {
    "sst2": r"\bSST-?2\b", "cola": r"\bCoLA\b", "mrpc": r"\bMRPC\b", "qqp": r"\bQQP\b", "stsb": r"\bSTS-?B\b",
    "mnli": r"\bMNLI\b", "qnli": r"\bQNLI\b", "rte": r"\bRTE\b", "wnli": r"\bWNLI\b",
}  # fmt: skip

_NUMBER = r"[-+]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][-+]?\d{1,4})?"


def _arm_of(text: str) -> Arm | None:
    """The method that a name or the start of a description means; None for one that is not here."""
    name = re.sub(r"\(.*?\)", " ", text[:300]).strip().lower().replace("-", "_").replace(" ", "_").strip("_")
    plain = re.sub(r"^(the_|plain_|vanilla_|standard_|ordinary_|uniform_|baseline_|proposed_|ours_)+", "", name)
    for candidate in (name, plain):
        if candidate in METHODS:
            return METHODS[candidate]
    if plain in ("fwlora", "fisher_weighted_lora"):
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


def _arm(request: Request, text: str, key: str) -> Arm:
    arm = _arm_of(text)
    if arm is None:
        raise UserError(
            f"{request.place(key)}: {one_line(text, 80)!r} is not a method{nearest(text[:80], METHODS)}: "
            f"use one of {', '.join(METHODS)}"
        )
    return arm


class _Model(NamedTuple):
    name: str
    pretrained_id: str
    revision: str | None
    stated: int | None
    encoder: Encoder | None
    given_id: bool


def _model(request: Request, given: str | Model) -> _Model:
    label = given if isinstance(given, str) else given.name
    name = re.split(r"\s*\(", label, maxsplit=1)[0].strip() or label
    size = re.search(r"\(\s*~?\s*(\d{1,6}(?:\.\d{1,3})?)\s*([MB])\b", label, re.I)
    stated = round(float(size[1]) * (1e9 if size[2] in "Bb" else 1e6)) if size else None
    if isinstance(given, Model) and given.parameters is not None:
        stated = given.parameters
    known = "minilm" if "minilm-l6" in name.lower() or name.lower() == "minilm" else name.lower().rsplit("/", 1)[-1]
    encoder = ENCODERS.get(known)
    wanted = given.pretrained_id if isinstance(given, Model) else None
    pretrained_id = wanted or (encoder.pretrained_id if encoder and "/" not in name else name)
    if wanted is not None:
        encoder = ENCODERS.get(wanted.rsplit("/", 1)[-1].lower())
    revision = given.revision if isinstance(given, Model) else None
    if revision is None and pretrained_id not in ("minilm", "roberta-base", "FacebookAI/roberta-base"):
        revision = request.commits.get(pretrained_id)
    return _Model(name, pretrained_id, revision, stated, encoder, wanted is not None)


def _subset(label: str) -> str | None:
    """`SST-2 (GLUE)` -> `sst2`."""
    for part in (re.sub(r"\(.*?\)", "", label), *re.findall(r"\((.*?)\)", label), *label.split("/")):
        word = re.sub(r"[^a-z0-9]", "", part.lower()).removeprefix("glue")
        if word in GLUE_SUBSETS:
            return word
    return None


# ---------------------------------------------------------------------------------------------
# Ranges
# ---------------------------------------------------------------------------------------------

_LOG = {"training.learning_rate", "fw_lora.lambda_fw", "adalora.orth_reg_weight"}
_DISCRETE = {"training.batch_size", "model.lora.rank", "training.gradient_accumulation_steps", "model.lora.alpha"}
_WHOLE = {
    "training.batch_size", "model.lora.rank", "training.epochs", "training.gradient_accumulation_steps",
    "dataset.max_length", "fw_lora.every", "fw_lora.sketch_columns", "fw_lora.start", "adalora.delta_t",
    "training.seed", "dataset.seed", "dataset.train_examples",
}  # fmt: skip
_DASHES = "‐‑‒–—−"
_RANGE = re.compile(rf"({_NUMBER})\s*(?:-|to|and|\.\.\.?|…|~)\s*({_NUMBER})")


class Space(NamedTuple):
    """A search dimension, or one fixed value; what was inferred, and what is wrong with the range."""

    key: str
    dimension: dict[str, Any] | None
    value: Any
    note: str
    faults: tuple[str, ...]


def parse_space(name: str, given: Any) -> Space:
    """A range in text, a list, one value or a typed dimension, as a dimension of the key that `name` means.

    `1e-4-3e-4`, `5e-5 to 5e-4`, `0.8–1.5` are ranges, `4,8,16` are choices, `300-800 step 100` has a step. The
    distribution follows the key: log-uniform for learning rates and regularisation, int with a step for counts,
    categorical for discrete choices, uniform for the rest. Raises UserError for what cannot be read.
    """
    key = search_key(name)
    if isinstance(given, Dimension):
        return Space(key, given.model_dump(exclude_none=True), None, "", ())
    if isinstance(given, list):
        return _choices(key, given, bracketed=True)
    if not isinstance(given, str):
        return Space(key, None, given, "", ())
    text = "".join("-" if c in _DASHES else c for c in given).strip()
    if len(text) > 10_000:
        raise UserError(f"{len(text):,} characters are no range: write low-high, or a,b,c")
    step = re.search(r"[\s,(]*\bstep\s*[=:]?\s*(\d{1,12})\)?$", text)
    if step:
        text = text[: step.start()]
    text = re.sub(r"^(?:between|from)\s+", "", text, flags=re.I)
    match = _RANGE.fullmatch(text)
    if match:
        return _between(key, _number(match[1]), _number(match[2]), int(step[1]) if step else None)
    bracketed = text[:1] + text[-1:] in ("[]", "()", "{}")
    listed = text[:1] != "{"
    if bracketed:
        text = text[1:-1]
    parts = [p.strip().strip("'\"") for p in re.split(r"[,;/]|\bor\b", text) if p.strip()]
    if not parts or not all(re.fullmatch(rf"{_NUMBER}|[^\W\d][\w.+-]{{0,99}}", p) for p in parts):
        raise UserError(f"{one_line(given, 60)!r} cannot be read as a range: write low-high, or a,b,c")
    return _choices(key, [_scalar(p) for p in parts], bracketed=bracketed and listed)


def _number(text: str) -> int | float:
    value = int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    if not math.isfinite(value):
        raise UserError(f"{text!r} is not a finite number")
    return value


def _scalar(text: str) -> Any:
    if re.fullmatch(_NUMBER, text):
        return _number(text)
    words = {"true": True, "false": False, "none": None, "null": None}
    return words.get(text.lower(), text)


def _fitting(key: str, value: Any) -> Any:
    """`3e2` is the whole number 300 where the key counts."""
    counts = key in _WHOLE or (key == "fw_lora.warmup_steps" and abs(value) >= 1)
    return int(value) if counts and isinstance(value, float) and value.is_integer() else value


def _choices(key: str, values: list[Any], bracketed: bool) -> Space:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        raise UserError("holds a value that is not a finite number")
    if not 1 <= len(values) <= 100:
        raise UserError(f"lists {len(values):,} values, 1 to 100 can be searched: write low-high, or a,b,c")
    distinct = list({(type(v), v): v for v in values}.values())
    if numbers:
        distinct = [_fitting(key, v) for v in distinct]
    if len(distinct) == 1:
        return Space(key, None, distinct[0], "", ())
    if bracketed and numbers and len(distinct) == 2 and key not in _DISCRETE:
        return _between(key, distinct[0], distinct[1], None)
    steps = key == "fw_lora.warmup_steps" or key == "training.epochs"
    if steps and numbers and len(distinct) > 2 and all(isinstance(v, int) for v in distinct):
        low, high = min(distinct), max(distinct)
        step = math.gcd(*(v - low for v in distinct))
        note = f"a count: int from the least to the greatest of {', '.join(map(str, distinct))} in steps that meet all"
        return Space(key, {"type": "int", "low": low, "high": high, "step": step}, None, note, ())
    return Space(key, {"type": "categorical", "choices": distinct}, None, "discrete choices", ())


def _between(key: str, low: int | float, high: int | float, step: int | None) -> Space:
    low, high = _fitting(key, low), _fitting(key, high)
    faults = []
    if low > high:
        faults.append(f"the range runs backwards, from {low} to {high}; it is searched from {high} to {low}")
        low, high = high, low
    if low == high:
        return Space(key, None, low, "", tuple(faults))
    whole = isinstance(low, int) and isinstance(high, int)
    powers = [1 << n for n in range(24) if low <= 1 << n <= high]
    if key == "training.batch_size" and powers[:1] == [low] and powers[-1:] == [high]:
        return Space(key, {"type": "categorical", "choices": powers}, None, "powers of two in the range", tuple(faults))
    if whole and (key in _WHOLE or key == "fw_lora.warmup_steps"):
        rounded = next((s for s in (100, 10) if low % s == 0 and high % s == 0 and high - low > s), 1)
        stride = step or (rounded if key == "fw_lora.warmup_steps" else 1)
        dimension = {"type": "int", "low": low, "high": high, "step": stride}
        return Space(key, dimension, None, "a count" + ("" if step else f"; step {stride} inferred"), tuple(faults))
    if key in _LOG and low > 0:
        note = "learning rates and regularisation are searched on a log scale"
        return Space(key, {"type": "loguniform", "low": low, "high": high}, None, note, tuple(faults))
    if key in _LOG:
        faults.append(f"a log scale cannot start at {low}; it is searched uniformly")
    return Space(key, {"type": "uniform", "low": low, "high": high}, None, "a range of numbers", tuple(faults))


# ---------------------------------------------------------------------------------------------
# Numbers in prose
# ---------------------------------------------------------------------------------------------

_PROSE = {
    "training.epochs": r"\b(\d{1,4})\s*epochs?\b",
    "training.batch_size": r"\bbatch(?:[ -]?size)?\s*(?:of|=|:)?\s*(\d{1,6})\b",
    "training.learning_rate": rf"\b(?:lr|learning[ -]rate)\s*(?:of|=|:|≈)?\s*({_NUMBER})",
    "training.weight_decay": rf"\bweight[ -]decay\s*(?:of|=|:|≈)?\s*({_NUMBER})",
    "training.warmup_ratio": rf"\bwarm-?up[ -]ratio\s*(?:of|=|:|≈)?\s*({_NUMBER})",
    "training.optimizer": r"\b(AdamW)\b",
    "model.lora.dropout": rf"\bdropout\s*(?:of|=|:|≈)?\s*({_NUMBER})",
    "dataset.max_length": r"\bmax(?:imum)?[ _-](?:sequence[ _-])?length\s*(?:of|=|:)?\s*(\d{1,6})\b",
    "fw_lora.lambda_fw": rf"(?:λ|\blambda(?:_fw)?)\s*(?:≈|=|~|:)\s*({_NUMBER})",
    "fw_lora.warmup_steps": r"\bK\s*(?:≈|=|~)\s*(\d{1,7})\b",
    "fw_lora.fisher_alpha": rf"\bfisher_alpha\s*=\s*({_NUMBER})",
}
_PERCENTAGES = re.compile(
    r"\bbudgets?\b[^.\n%]{0,60}?((?:\d{1,3}(?:\.\d{1,6})?\s?%[,;/\s]{0,3}(?:and\s)?){1,20})", re.I
)


class _Said(NamedTuple):
    """A number in prose: what it is, the key of the text it stands in, and the words around it."""

    value: Any
    place: str
    words: str


def _texts(request: Request) -> Iterator[tuple[str, str]]:
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
    text = proposed if isinstance(proposed, str) else proposed.description
    if text:
        yield "proposed_method", text
    if hypothesis is not None and not isinstance(hypothesis, str) and hypothesis.experimental_code:
        yield "hypothesis.experimental_code", hypothesis.experimental_code


def _around(text: str, start: int, end: int) -> str:
    return "…" + one_line(text[max(0, start - 25) : end + 25], 90) + "…"


def _said_numbers(request: Request) -> dict[str, list[_Said]]:
    found: dict[str, list[_Said]] = {}
    for place, text in _texts(request):
        for key, pattern in _PROSE.items():
            for match in re.finditer(pattern, text):
                word = match[1]
                try:
                    value = word.lower() if key == "training.optimizer" else _number(word)
                except UserError:
                    continue  # 1e999 says nothing
                found.setdefault(key, []).append(_Said(value, place, _around(text, *match.span())))
    return found


def _said_budgets(request: Request) -> list[_Said]:
    for place, text in _texts(request):
        match = _PERCENTAGES.search(text)
        if match:
            words = _around(text, *match.span())
            return [_Said(float(p), place, words) for p in re.findall(r"[\d.]+(?=\s?%)", match[1]) if float(p) > 0]
    return []


# ---------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------


class _Value(NamedTuple):
    value: Any
    note: str  # "" where the design states the value
    place: str  # the design's key, or "" for a default


@dataclass
class _Draft:
    """A run on its way to a config: the values of its keys, the first to come stays."""

    run_id: str
    label: str
    arm: Arm
    method: str
    model: _Model
    model_key: str
    dataset_key: str
    method_key: str
    values: dict[str, _Value] = field(default_factory=dict)
    search: dict[str, tuple[Space, str, str]] = field(default_factory=dict)  # key -> space, name, place
    n_trials: _Value = _Value(20, "", "")
    budget: float | None = None

    def put(self, key: str, value: Any, note: str = "", place: str = "") -> None:
        self.values.setdefault(key, _Value(value, one_line(note), place))

    def get(self, key: str) -> Any:
        return self.values[key].value if key in self.values else get_key(_DEFAULTS, key)

    def applies(self, key: str) -> bool:
        return reads(self.arm, key)


_DEFAULTS = schema_defaults()
_ALWAYS = (
    *(f"dataset.{k}" for k in ("max_length", "padding", "truncation")),
    *(
        f"training.{k}"
        for k in (
            "epochs batch_size learning_rate weight_decay optimizer lr_scheduler warmup_ratio "
            "gradient_accumulation_steps mixed_precision seed"
        ).split()
    ),
    *(f"fw_lora.{k}" for k in ("lambda_fw", "warmup_steps", "fisher_alpha")),
    *(f"adalora.{k}" for k in ("init_rank_factor", "tinit_ratio", "tfinal_ratio")),
)
_BLOCK_NOTE = {
    "fw_lora": "default of FW-LoRA",
    "adalora": "AdaLoRA's own schedule, as shares of this run's length",
    "training": "default of run configs",
    "dataset": "convention of the task",
    "model": "default of run configs",
}


def _setting(request: Request, place: str, name: str) -> str:
    try:
        return "training.seed" if name == "seed" else search_key(name)  # dataset.seed only by its whole name
    except UserError as error:
        raise UserError(f"{request.place(one_line(place))}: {one_line(error, 400)}") from None


class _Plan:
    """A design, taken apart once for all of its runs."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.design = request.design
        self.numbers = _said_numbers(request)
        self.said_budgets = _said_budgets(request)
        self.found: list[Contradiction] = []
        design = request.design
        proposed = design.proposed_method
        self.methods: list[tuple[str, str, Method, Arm]] = []
        name = "proposed_method" if isinstance(proposed, str) else "proposed_method.name"
        method = Method.model_construct(name=proposed) if isinstance(proposed, str) else proposed
        arm = _arm_of(method.name) or _arm_of(method.description or "")
        arm = arm or _arm(request, method.name, name)
        self.methods.append(("proposed", "proposed_method", method, arm))
        for index, given in enumerate(design.comparative_methods):
            key = f"comparative_methods.{index}"
            method = Method(name=given) if isinstance(given, str) else given
            self.methods.append((f"comparative-{index + 1}", key, method, _arm(request, method.name, key)))
        self.models = [_model(request, m) for m in design.models]
        self.spaces = self._spaces("hyperparameters_to_search", design.hyperparameters_to_search)
        self.own_spaces = [
            self._spaces(f"{key}.hyperparameters_to_search", m.hyperparameters_to_search)
            for _, key, m, _ in self.methods
        ]
        self.drafts = self._drafts()

    def contradict(self, kind: str, text: str, first: str, second: str) -> None:
        item = Contradiction(kind, text, (first, second))
        if not any(c.kind == kind and c.text == text for c in self.found):
            self.found.append(item)

    def _spaces(self, block: str, given: Mapping[str, Any]) -> dict[str, tuple[Space, str, str]]:
        spaces: dict[str, tuple[Space, str, str]] = {}
        for name, value in given.items():
            place = f"{block}.{name}"
            try:
                space = parse_space(name, value)
            except UserError as error:
                raise UserError(f"{self.request.place(one_line(place))}: {one_line(error, 400)}") from None
            if space.key in spaces:
                raise UserError(
                    f"{self.request.place(one_line(place))}: means {space.key}, as {spaces[space.key][1]!r} does: "
                    "keep one of them"
                )
            spaces[space.key] = (space, name, place)
            for fault in space.faults:
                here = self.request.place(one_line(place), value)
                self.contradict("range", f"{name}: {fault}", here, f"distribution of {space.key}")
        return spaces

    def _drafts(self) -> list[_Draft]:
        design, request = self.design, self.request
        drafts: list[_Draft] = []
        if design.runs:
            for index, run in enumerate(design.runs):
                drafts.append(self._given(index, run))
        else:
            budgets: list[tuple[float | None, str]] = [(b, f"budgets.{n}") for n, b in enumerate(design.budgets)]
            budgets = budgets or [(s.value, s.place) for s in self.said_budgets] or [(None, "")]
            if len(self.methods) * len(design.models) * len(design.datasets) * len(budgets) > MAX_RUNS:
                raise UserError(f"{request.source}: the design has more than {MAX_RUNS:,} runs: shorten its lists")
            for m in range(len(self.methods)):
                for b in range(len(design.models)):
                    for d in range(len(design.datasets)):
                        for budget, place in budgets:
                            suffix = f"-{budget:g}pct" if len(budgets) > 1 else ""
                            run_id = _slug([self.methods[m][0], _label(design.models[b]), _label(design.datasets[d])])
                            drafts.append(self._draft(run_id[: 200 - len(suffix)] + suffix, m, b, d, budget, place))
        seen: dict[str, str] = {}
        for draft in drafts:
            name = draft.run_id.lower()  # some file systems know no capitals
            if name in seen:
                raise UserError(
                    f"{request.source}: two runs are called {draft.run_id!r} ({seen[name]} and "
                    f"{one_line(draft.label)}): give each a run_id of its own under runs"
                )
            seen[name] = one_line(draft.label)
        return drafts

    def _given(self, index: int, run: Run) -> _Draft:
        request, key = self.request, f"runs.{index}"

        def find(what: str, name: str, labels: Sequence[str]) -> int:
            same = [n for n, label in enumerate(labels) if label == name]
            same = same or [n for n, label in enumerate(labels) if _plain(label) == _plain(name)]
            if not same:
                raise UserError(
                    f"{request.place(f'{key}.{what}')}: {one_line(name, 80)!r} is not in the design's list"
                    f"{nearest(name[:80], labels)}: it has {one_line(', '.join(labels), 300)}"
                )
            return same[0]

        models, datasets = [_label(m) for m in self.design.models], [_label(d) for d in self.design.datasets]
        model, data = find("model", run.model, models), find("dataset", run.dataset, datasets)
        roles = [role for role, _, _, _ in self.methods]
        names = [role if m.name == self.design.proposed_method else m.name for role, _, m, _ in self.methods]
        if run.method in roles:
            which = roles.index(run.method)
        elif run.method in names:
            which = names.index(run.method)
        else:
            arm = _arm_of(run.method)
            arms = [a for _, _, _, a in self.methods]
            which = arms.index(arm) if arm in arms else find("method", run.method, [*roles, *names]) % len(roles)
        run_id = run.run_id or _slug([roles[which], models[model], datasets[data]])[:200]
        said = re.match(r"(proposed|comparative-\d+)(?=-|$)", run_id)
        if said and said[1] != roles[which]:
            self.contradict(
                "method",
                f"the id {run_id} says {said[1]}, the run is {roles[which]} ({self.methods[which][3]})",
                request.place(f"{key}.run_id"),
                request.place(f"{key}.method", run.method),
            )
        draft = self._draft(run_id, which, model, data, run.budget, f"{key}.budget" if run.budget else "", run, key)
        return draft

    def _draft(
        self,
        run_id: str,
        which: int,
        model_at: int,
        data_at: int,
        budget: float | None,
        budget_place: str,
        run: Run | None = None,
        run_key: str = "",
    ) -> _Draft:
        role, method_key, method, arm = self.methods[which]
        model = self.models[model_at]
        name = {"lora": "baseline_lora", "adalora": "baseline_adalora", "fw_lora": "proposed_fw_lora"}.get(arm, arm)
        if role == "proposed" and arm != "fw_lora" or role != "proposed" and arm == "fw_lora":
            name = arm
        label = f"{role} on {model.name} and {_label(self.design.datasets[data_at])}"
        model_key, data_key = f"models.{model_at}", f"datasets.{data_at}"
        draft = _Draft(run_id, label, arm, name, model, model_key, data_key, method_key)
        stated: list[tuple[str, Mapping[str, Any]]] = [
            (f"{run_key}.settings", run.settings if run else {}),
            (f"{method_key}.settings", method.settings),
            ("settings", self.design.settings),
        ]
        for block, settings in stated:
            for given, value in settings.items():
                place = f"{block}.{given}"
                if given == "training.warmup_steps":
                    self.contradict(
                        "unsupported",
                        "the learning rate warms up over a share of the run, warmup_ratio, not over steps: left out",
                        self.request.place(place, value),
                        "run config: training.warmup_ratio",
                    )
                    continue
                key = _setting(self.request, place, given)
                if draft.applies(key) or block != "settings":
                    draft.put(key, value, place=place)
        self._model_and_data(draft, self.design.datasets[data_at])
        self._search(draft, which)
        self._budget(draft, budget, budget_place)
        self._fill(draft)
        return draft

    def _model_and_data(self, draft: _Draft, given: str | Dataset) -> None:
        model = draft.model
        draft.put("model.name", model.name, place=draft.model_key)
        note = "" if model.given_id or model.pretrained_id == model.name else f"where {model.name} comes from"
        draft.put("model.pretrained_id", model.pretrained_id, note, draft.model_key)
        if model.revision is not None:
            draft.put("model.revision", model.revision, "commit of the request's external resources", draft.model_key)
        settings = {} if isinstance(given, str) else given.settings
        for name, value in settings.items():
            place = f"{draft.dataset_key}.settings.{name}"
            key = f"dataset.{name.removeprefix('dataset.')}"
            if key not in KEYS:
                raise UserError(
                    f"{self.request.place(one_line(place))}: {one_line(name, 60)!r} is no key of a run config's "
                    f"dataset block{nearest(key, [k for k in KEYS if k.startswith('dataset.')])}"
                )
            draft.put(key, value, place=place)
        label = _label(given)
        subset = _subset(label)
        kind = settings.get("name")
        if kind is None:
            kind = "glue" if subset is not None else "offline" if label.lower() == "offline" else None
        if kind is None:
            raise UserError(
                f"{self.request.place(draft.dataset_key)}: {one_line(label, 80)!r} is no data set known here"
                f"{nearest(label[:80], GLUE_SUBSETS)}: name a GLUE task or offline, or give a block of name and "
                "settings (name: csv, train_file, eval_file, text_column, label_column)"
            )
        draft.put("dataset.name", kind, place=draft.dataset_key)
        if kind == "glue" and subset is not None:
            draft.put("dataset.subset", subset, place=draft.dataset_key)

    def _search(self, draft: _Draft, which: int) -> None:
        for key, (space, name, place) in (self.spaces | self.own_spaces[which]).items():
            if not draft.applies(key):
                continue
            if space.dimension is None:
                draft.put(key, space.value, place=place)
            else:
                draft.search[key] = (space, name, place)
        for run_id, example in self.request.examples.items():
            for name, dimension in _example_space(example).items():
                key = _setting(self.request, f"example:{run_id}.optuna.search_space", name)
                try:
                    Dimension.model_validate(dimension)
                except ValidationError as error:
                    place = self.request.place(one_line(f"example:{run_id}.optuna.search_space.{name}"))
                    text = "; ".join(i.text for i in issues_of(error, dimension))
                    raise UserError(f"{place}: {one_line(text, 400)}") from None
                if draft.applies(key) and key not in draft.search and key not in self.spaces:
                    note = "the request's example output searches it in one run; here every method is tuned alike"
                    place = f"example:{run_id}.optuna.search_space.{name}"
                    draft.search[key] = (Space(key, dimension, None, note, ()), name, place)
        trials = [
            (e.get("optuna", {}).get("n_trials"), run_id)
            for run_id, e in self.request.examples.items()
            if isinstance(e.get("optuna"), dict)
        ]
        numbers = [(n, run_id) for n, run_id in trials if isinstance(n, int) and n > 0]
        own = self.methods[which][2].n_trials
        if own is not None:
            draft.n_trials = _Value(own, "", f"{draft.method_key}.n_trials")
        elif self.design.n_trials is not None:
            draft.n_trials = _Value(self.design.n_trials, "", "n_trials")
        elif numbers:
            most, run_id = max(numbers)
            note = "example output of the request"
            if len({n for n, _ in numbers}) > 1:
                note += f", the larger of {' and '.join(str(n) for n, _ in numbers)}: every method is tuned alike"
            draft.n_trials = _Value(most, note, f"example:{run_id}.optuna.n_trials")
        else:
            draft.n_trials = _Value(20, "default of run configs", "")

    def _budget(self, draft: _Draft, budget: float | None, place: str) -> None:
        key, stated = "model.parameter_budget_percent", [s.value for s in self.said_budgets]
        example = _example_value(self.request, draft.run_id, key)
        choices = self.design.budgets or stated
        if budget is not None:
            note = "" if place.startswith(("budgets", "runs")) else f"{place.replace('_', ' ')}, in prose"
            draft.put(key, budget, note, place)
        elif isinstance(example, float | int) and not isinstance(example, bool) and (not choices or example in choices):
            draft.put(key, float(example), "example output of the request", f"example:{draft.run_id}.{key}")
        elif choices:
            shown = ", ".join(f"{c:g}" for c in choices)
            middle = sorted(choices)[len(choices) // 2]
            where = "budgets" if self.design.budgets else self.said_budgets[0].place
            draft.put(key, middle, f"the middle of {shown}; the run names none", where)
        value = draft.get(key)
        draft.budget = value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def _fill(self, draft: _Draft) -> None:
        """Prose, then the example output, then defaults."""
        for key, said in self.numbers.items():
            if draft.applies(key):
                draft.put(key, said[0].value, f"{self._where(said[0].place)}, in prose", said[0].place)
        for key in KEYS:
            block = key.split(".")[0]
            if KEYS[key] or block not in ("model", "dataset", "training", "fw_lora", "adalora"):
                continue
            value = _example_value(self.request, draft.run_id, key)
            if value is not None and draft.applies(key):
                draft.put(key, value, "example output of the request", f"example:{draft.run_id}.{key}")
        note = _BLOCK_NOTE["model"]
        draft.put("model.lora.enabled", True, "every method here trains LoRA adapters")
        if "model.lora.rank" not in draft.values:
            searched = draft.search.get("model.lora.rank")
            if draft.budget is not None:
                draft.put("model.lora.rank", None, "the parameter budget decides")
            elif searched is not None and searched[0].dimension is not None:
                ends = searched[0].dimension.get("choices") or [searched[0].dimension["low"]]
                draft.put("model.lora.rank", ends[len(ends) // 2], "one of the searched ranks", searched[2])
            else:
                draft.put("model.lora.rank", 8, "LoRA's custom; neither a rank nor a budget is given")
        if draft.get("model.lora.rank") is not None:
            rank = draft.get("model.lora.rank")
            draft.put("model.lora.alpha", 2 * rank if isinstance(rank, int) else 16, "twice the rank, LoRA's custom")
        draft.put("model.lora.dropout", get_key(_DEFAULTS, "model.lora.dropout"), note)
        draft.put("model.lora.target_modules", get_key(_DEFAULTS, "model.lora.target_modules"), note)
        kind = draft.get("dataset.name")
        if kind in ("glue", "offline"):
            draft.put("dataset.split", "train", _BLOCK_NOTE["dataset"])
            dev = "validation_matched" if draft.get("dataset.subset") == "mnli" else "validation"
            draft.put("dataset.eval_split", dev, _BLOCK_NOTE["dataset"])
        if draft.search:
            note = "the search is scored on this part of train, never on the split that is reported"
            draft.put("dataset.selection_fraction", 0.1, note)
        for key in _ALWAYS:
            if draft.applies(key):
                draft.put(key, get_key(_DEFAULTS, key), _BLOCK_NOTE[key.split(".")[0]])

    def _where(self, key: str) -> str:
        spelled = self.request.spelling.get(key.split(".")[0])
        return key if spelled is None else spelled.split(": ")[-1] + key[len(key.split(".")[0]) :]

    # -- the config ------------------------------------------------------------------------------

    def config(self, draft: _Draft) -> tuple[dict[str, Any], dict[str, str]]:
        """Values and comments of one run, checked against the schema."""
        data: dict[str, Any] = {"run_id": draft.run_id, "method": draft.method}
        notes: dict[str, str] = {}
        for key in KEYS:
            if key in draft.values:
                block = data
                *blocks, leaf = key.split(".")
                for name in blocks:
                    block = block.setdefault(name, {})
                block[leaf] = draft.values[key].value
                notes[key] = draft.values[key].note
        if draft.search:
            notes["optuna.n_trials"] = draft.n_trials.note
            notes["optuna.direction"] = "every metric here is better when it is larger"
            space = {}
            for found, name, _ in draft.search.values():
                space[name] = found.dimension
                notes[f"optuna.search_space.{name}.type"] = one_line(found.note)
            data["optuna"] = {"n_trials": draft.n_trials.value, "direction": "maximize", "search_space": space}
        try:
            RunConfig.model_validate(data)
        except ValidationError as error:
            messages = []
            for key, text in issues_of(error, data):
                value = draft.values.get(key)
                origin = value.place if value is not None else ""
                for _, name, place in draft.search.values():
                    if key.startswith(f"optuna.search_space.{name}"):
                        origin = place
                where = f"{self.request.place(one_line(origin))}: " if origin else f"{self.request.source}: "
                messages.append(f"{where}run {draft.run_id}: {one_line(key)}: {one_line(text, 400)}")
            raise UserError(listing(messages)) from None
        return data, notes


def _label(part: str | Model | Dataset) -> str:
    return part if isinstance(part, str) else part.name


def _plain(text: str) -> str:
    return re.sub(r"\W", "", text.lower())


def _slug(parts: Iterable[str]) -> str:
    """`proposed`, `roberta-base (110M)`, `SST-2 (GLUE)` -> `proposed-roberta-base-110M--SST-2-GLUE`."""
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts).strip("-")


def _example_space(example: Mapping[str, Any]) -> dict[str, Any]:
    optuna = example.get("optuna")
    space = optuna.get("search_space") if isinstance(optuna, dict) else None
    return {str(k): v for k, v in space.items() if isinstance(v, dict)} if isinstance(space, dict) else {}


def _example_value(request: Request, run_id: str, key: str) -> Any:
    try:
        return get_key(request.examples[run_id], key)
    except (KeyError, TypeError, IndexError):
        return None


# ---------------------------------------------------------------------------------------------
# Contradictions
# ---------------------------------------------------------------------------------------------


def _find_contradictions(plan: _Plan) -> None:
    for check in (_budgets, _sizes, _examples, _tuning, _steps, _splits, _targets, _left_out, _disagreements, _outside):
        check(plan)


def _origin(plan: _Plan, draft: _Draft, key: str) -> str:
    value = draft.values[key]
    if not value.place:
        return f"{plan.request.source}: run {draft.run_id}: {key} = {value.value} ({value.note})"
    return plan.request.place(value.place, value.value)


def _budgets(plan: _Plan) -> None:
    """Ranks, fixed or searched, against the budget: the percentage that they really spend."""
    for draft in plan.drafts:
        encoder = draft.model.encoder
        unit = encoder.unit(draft.get("model.lora.target_modules")) if encoder else None
        if draft.budget is None or encoder is None or not unit:
            continue
        said = next((s for s in plan.said_budgets if s.value == draft.budget), None)
        budget = _origin(plan, draft, "model.parameter_budget_percent")
        if said is not None:
            budget = plan.request.place(said.place, said.words)

        def spent(rank: int, unit: int = unit, encoder: Encoder = encoder) -> str:
            return f"rank {rank} is {100 * rank * unit / encoder.parameters:.3f} %"

        rank = draft.get("model.lora.rank")
        target = draft.budget / 100 * encoder.parameters
        of = f"of {draft.model.name}'s {encoder.parameters:,} parameters"
        if isinstance(rank, int) and abs(rank * unit - target) > 0.01 * target:
            plan.contradict(
                "rank against budget",
                f"{spent(rank)} {of} ({rank * unit:,}), not {draft.budget:g} % ({int(target):,})",
                _origin(plan, draft, "model.lora.rank"),
                budget,
            )
        searched = draft.search.get("model.lora.rank")
        if searched is not None and searched[0].dimension is not None:
            d = searched[0].dimension
            ranks = [r for r in d.get("choices") or (d["low"], d["high"]) if isinstance(r, int)]
            off = [r for r in ranks if abs(r * unit - target) > 0.01 * target]
            if off:
                plan.contradict(
                    "rank against budget",
                    f"a search over ranks leaves the budget of {draft.budget:g} %: {', '.join(map(spent, off))} {of}",
                    plan.request.place(searched[2], ranks),
                    budget,
                )


def _sizes(plan: _Plan) -> None:
    for index, model in enumerate(plan.models):
        if model.encoder and model.stated and abs(model.stated / model.encoder.parameters - 1) > 0.05:
            plan.contradict(
                "model size",
                f"{model.name} has {model.encoder.parameters:,} parameters, not {model.stated / 1e6:g} M",
                plan.request.place(f"models.{index}", _label(plan.design.models[index])),
                f"the encoder as {model.encoder.pretrained_id}'s own config builds it",
            )


def _examples(plan: _Plan) -> None:
    """The request's own example output against its design: methods and ranges."""
    for draft in plan.drafts:
        example = plan.request.examples.get(draft.run_id)
        if example is None:
            continue
        here = f"example:{draft.run_id}"
        method = example.get("method")
        arm = METHODS.get(str(method)) or _arm_of(str(method))
        if arm != draft.arm:
            plan.contradict(
                "method",
                f"{draft.run_id} is {draft.method} by the design, the example output makes it {one_line(method, 60)}",
                plan.request.place(f"{here}.method", method),
                plan.request.place(draft.method_key, one_line(_method_name(plan, draft), 60)),
            )
        for name, dimension in _example_space(example).items():
            try:
                key = search_key(name)
            except UserError:
                continue
            ours = plan.spaces.get(key)
            if ours is None:
                plan.contradict(
                    "search space",
                    f"{name} is searched in the example output of {draft.run_id}, the design does not name it",
                    plan.request.place(f"{here}.optuna.search_space.{name}", _shown(dimension)),
                    plan.request.place("hyperparameters_to_search", ", ".join(n for _, n, _ in plan.spaces.values())),
                )
            elif ours[0].dimension is not None and _ends(ours[0].dimension) != _ends(dimension):
                plan.contradict(
                    "search space",
                    f"{name} of {draft.run_id} is another range in the example output than in the design",
                    plan.request.place(f"{here}.optuna.search_space.{name}", _shown(dimension)),
                    plan.request.place(ours[2], _shown(ours[0].dimension)),
                )


def _method_name(plan: _Plan, draft: _Draft) -> str:
    return next(m.name for _, key, m, _ in plan.methods if key == draft.method_key)


def _ends(dimension: Mapping[str, Any]) -> list[Any]:
    choices = dimension.get("choices")
    return sorted(map(str, choices)) if isinstance(choices, list) else [dimension.get("low"), dimension.get("high")]


def _shown(dimension: Mapping[str, Any]) -> str:
    return one_line(json.dumps(dimension, ensure_ascii=False, default=str), 120)


def _tuning(plan: _Plan) -> None:
    """More trials or a wider space for one arm, in the example output or in the design itself."""
    examples = [(i, e) for i, e in plan.request.examples.items() if isinstance(e.get("optuna"), dict)]
    for (one, first), (two, second) in zip(examples, examples[1:], strict=False):
        n, m = first["optuna"].get("n_trials"), second["optuna"].get("n_trials")
        if n != m:
            plan.contradict(
                "unequal tuning",
                f"{n} trials for {one}, {m} for {two}",
                plan.request.place(f"example:{one}.optuna.n_trials", n),
                plan.request.place(f"example:{two}.optuna.n_trials", m),
            )
        a, b = _example_space(first), _example_space(second)
        own = {k.rsplit(".", 1)[-1] for k in KEYS if k.startswith(("fw_lora.", "adalora."))}
        for name in dict.fromkeys([*a, *b]):
            x, y = a.get(name), b.get(name)
            if name in own or (x is not None and y is not None and _ends(x) == _ends(y)):
                continue
            plan.contradict(
                "unequal tuning",
                f"{name} is "
                + ("searched in one run only" if x is None or y is None else "searched more widely in one"),
                plan.request.place(f"example:{one}.optuna.search_space.{name}", _shown(x) if x else "not searched"),
                plan.request.place(f"example:{two}.optuna.search_space.{name}", _shown(y) if y else "not searched"),
            )
    base = plan.drafts[0]
    for draft in plan.drafts[1:]:
        if not (base.search or draft.search):
            continue
        if draft.n_trials.value != base.n_trials.value:
            plan.contradict(
                "unequal tuning",
                f"{base.n_trials.value} trials for {base.arm}, {draft.n_trials.value} for {draft.arm}",
                plan.request.place(base.n_trials.place or "n_trials"),
                plan.request.place(draft.n_trials.place or "n_trials"),
            )
        for key in dict.fromkeys([*base.search, *draft.search]):
            if key.startswith(("fw_lora.", "adalora.")):
                continue
            x, y = base.search.get(key), draft.search.get(key)
            if x and y and x[0].dimension == y[0].dimension:
                continue
            places = [
                plan.request.place(s[2], _shown(s[0].dimension or {}))
                if s
                else f"{plan.request.place(d.method_key)}: {key} is not searched"
                for s, d in ((x, base), (y, draft))
            ]
            plan.contradict(
                "unequal tuning", f"{key} is searched differently by {base.arm} and {draft.arm}", places[0], places[1]
            )


def _steps(plan: _Plan) -> None:
    """K against the number of optimiser steps, also on data sets that only the prose names."""
    for draft in plan.drafts:
        if draft.arm != "fw_lora":
            continue
        subset = draft.get("dataset.subset")
        others = [s for s, pattern in _IN_PROSE.items() if s != subset and _prose_datasets(plan).get(s)]
        for name in [subset, *others] if subset in GLUE_TRAIN else []:
            examples = GLUE_TRAIN[name]
            limit, carved = draft.get("dataset.train_examples"), draft.get("dataset.selection_fraction")
            if isinstance(carved, int | float):
                examples = round(examples * (1 - carved))
            if isinstance(limit, int):
                examples = min(examples, limit)
            ks = _extremes(draft, "fw_lora.warmup_steps")
            batches = _extremes(draft, "training.batch_size")
            epochs = _extremes(draft, "training.epochs")
            over = draft.get("training.gradient_accumulation_steps")
            numbers = [*ks, *batches, *epochs, over]
            if not all(isinstance(v, int) and v > 0 for v in numbers):
                continue
            usual = draft.get("fw_lora.warmup_steps"), draft.get("training.batch_size"), draft.get("training.epochs")
            worst = max(ks), max(batches), min(epochs)
            for k, batch, e in dict.fromkeys([usual, worst]):
                steps = e * math.ceil(examples / (batch * over))
                if 2 * k < steps:
                    continue
                left = "no step" if k >= steps else f"{steps - k:,} steps"
                searched = (draft.search.get("fw_lora.warmup_steps"), draft.search.get("training.batch_size"))
                first = _origin(plan, draft, "fw_lora.warmup_steps")
                second = _origin(plan, draft, "training.batch_size")
                if (k, batch, e) == worst and (k, batch, e) != usual:
                    first = plan.request.place(searched[0][2], k) if searched[0] else first
                    second = plan.request.place(searched[1][2], batch) if searched[1] else second
                plan.contradict(
                    "K against steps",
                    f"K = {k} leaves {left} of the {steps:,} of {name} ({examples:,} examples, batch {batch}, "
                    f"{e} epoch{'s' if e > 1 else ''})",
                    first,
                    second if name == subset else plan.request.place(*_prose_datasets(plan)[name]),
                )


def _extremes(draft: _Draft, key: str) -> list[Any]:
    found = draft.search.get(key)
    values = [draft.get(key)]
    if found is not None and found[0].dimension is not None:
        d = found[0].dimension
        values += d.get("choices") or [d["low"], d["high"]]
    return values


def _splits(plan: _Plan) -> None:
    """Tuning and reporting on one split."""
    dev = next(
        ((key, _around(text, *m.span())) for key, text in _texts(plan.request) if (m := re.search(r"\bdev\b", text))),
        None,
    )
    for run_id, example in plan.request.examples.items():
        data = example.get("dataset")
        if _example_space(example) and isinstance(data, dict) and not data.get("selection_fraction"):
            second = plan.request.place(*dev) if dev else plan.request.place(f"example:{run_id}.optuna")
            plan.contradict(
                "one split",
                "the search and the result would both be scored on the dev split, so the result is the best of its "
                "trials; here a tenth of train is kept for the search",
                plan.request.place(f"example:{run_id}.dataset.eval_split", data.get("eval_split")),
                second,
            )
    for draft in plan.drafts:
        fraction = draft.values.get("dataset.selection_fraction")
        if draft.search and fraction is not None and fraction.value == 0:
            plan.contradict(
                "one split",
                "a search without a selection split would be scored on what is reported",
                plan.request.place(fraction.place, fraction.value),
                plan.request.place(next(iter(draft.search.values()))[2]),
            )


def _targets(plan: _Plan) -> None:
    """Targets that mean no Linear layer: in the model at all, or under PEFT's own reading of the names."""
    for draft in plan.drafts:
        names, encoder = draft.get("model.lora.target_modules"), draft.model.encoder
        if encoder is None or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            continue
        model = plan.request.place(draft.model_key, draft.model.name)
        wrong = [n for n in names if encoder.unit([n]) is None]
        if wrong:
            plan.contradict(
                "target modules",
                f"{', '.join(map(repr, wrong))} match no Linear layer of {draft.model.name}"
                f"{nearest(wrong[0], [*_ROLES, 'all-linear'])}",
                _origin(plan, draft, "model.lora.target_modules"),
                model,
            )
        blocks = [n for n in names if n in ("intermediate", "output")]
        if blocks and draft.values["model.lora.target_modules"].place:
            plan.contradict(
                "target modules",
                f"taken literally (as PEFT does) {' and '.join(blocks)} are blocks and no Linear layers, and "
                "output.dense would also match attention.output.dense; here they mean the feed-forward matrices",
                _origin(plan, draft, "model.lora.target_modules"),
                model,
            )


def _prose_datasets(plan: _Plan) -> dict[str, tuple[str, str]]:
    """Data sets that the setup or the summary names: subset -> place and words."""
    found: dict[str, tuple[str, str]] = {}
    for key, text in _texts(plan.request):
        if key in ("hypothesis", "hypothesis.experimental_setup", "summary"):
            for subset, pattern in _IN_PROSE.items():
                match = re.search(pattern, text)
                if match:
                    found.setdefault(subset, (key, _around(text, *match.span())))
    return found


def _left_out(plan: _Plan) -> None:
    """Data sets, budgets, methods and metrics that the prose demands and the lists leave out."""
    request = plan.request
    lists = "runs" if plan.design.runs else "datasets"
    used = {d.get("dataset.subset") for d in plan.drafts}
    for subset, place in _prose_datasets(plan).items():
        if subset not in used:
            listed = ", ".join(_label(d) for d in plan.design.datasets)
            text = f"data set {subset} is demanded by the prose, no run has it"
            plan.contradict("left out", text, request.place(*place), request.place("datasets", listed))
    budgets = {d.budget for d in plan.drafts}
    for said in plan.said_budgets:
        if said.value not in budgets:
            shown = ", ".join(f"{b:g} %" for b in budgets if b is not None) or "no budget"
            plan.contradict(
                "left out",
                f"the budget {said.value:g} % is demanded by the prose, the runs have {shown}",
                request.place(said.place, said.words),
                request.place(lists),
            )
    arms = {d.arm for d in plan.drafts}
    for key, text in _texts(request):
        match = re.search(r"\b[Bb]aselines?\b", text)
        after = text[match.start() : match.start() + 300] if match else ""
        plain = re.search(r"\b(?:[Pp]lain|[Vv]anilla|[Ss]tandard) LoRA\b", after)
        for arm, found in (("lora", plain), ("adalora", re.search(r"\bAdaLoRA\b", after))):
            if found and arm not in arms:
                names = ", ".join(m if isinstance(m, str) else m.name for m in plan.design.comparative_methods)
                plan.contradict(
                    "left out",
                    f"the baseline {found[0].replace('Plain', 'plain')} is demanded by the prose, no run trains it",
                    request.place(key, _around(after, *found.span())),
                    request.place("comparative_methods", names or "none"),
                )
    for index, metric in enumerate(plan.design.metrics):
        if "matthews" in metric.lower() and "cola" not in used:
            plan.contradict(
                "left out",
                f"the metric {one_line(metric, 40)} belongs to CoLA, no run has it",
                request.place(f"metrics.{index}", metric),
                request.place("datasets", ", ".join(_label(d) for d in plan.design.datasets)),
            )


def _disagreements(plan: _Plan) -> None:
    """One key, two values: in the prose, against what is stated, or against the example output."""
    for key, said in plan.numbers.items():
        first = said[0]
        others = [(_said_place(plan, s), s.value) for s in said[1:]]
        for draft in plan.drafts:
            value = draft.values.get(key)
            if value is not None and value.place and value.place != first.place:
                others.append((_origin(plan, draft, key), value.value))
            example = _example_value(plan.request, draft.run_id, key)
            if example is not None:
                others.append((plan.request.place(f"example:{draft.run_id}.{key}", example), example))
        for place, value in others:
            if value != first.value:
                plan.contradict("two values", f"{key} is {first.value} and {value}", _said_place(plan, first), place)


def _said_place(plan: _Plan, said: _Said) -> str:
    return plan.request.place(said.place, said.words)


def _outside(plan: _Plan) -> None:
    """A value outside its own search range."""
    for draft in plan.drafts:
        for key, (space, name, place) in draft.search.items():
            value, d = draft.get(key), space.dimension or {}
            if value is None or isinstance(value, list):
                continue
            choices = d.get("choices")
            try:
                inside = value in choices if choices is not None else d["low"] <= value <= d["high"]
            except TypeError:
                continue  # of another type: refused where the config is checked
            if not inside and key in draft.values:
                plan.contradict(
                    "range",
                    f"{name} = {value} lies outside of its own search space",
                    _origin(plan, draft, key),
                    plan.request.place(place, _shown(d)),
                )


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


class _FlowWriter(Writer):
    """The writer of run configs, for one value in one line."""


@functools.lru_cache(maxsize=4096)
def _cached(kind: str, shown: str, value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(value, Dumper=_FlowWriter, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _in_line(value: Any) -> str:
    value = tuple(value) if isinstance(value, list) else value
    return _cached(type(value).__name__, repr(value), value)  # 1, 1.0 and True are equal, their YAML is not


def _emit(data: Mapping[str, Any], notes: Mapping[str, str], prefix: str = "", pad: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield f"{pad}{_in_line(name)}:"
            yield from _emit(value, notes, f"{prefix}{name}.", pad + "  ")
        else:
            note = notes.get(prefix + name, "")
            yield f"{pad}{_in_line(name)}: {_in_line(value)}" + (f"  # {note}" if note else "")


def generate_configs(request: Request) -> Generated:
    """One YAML text for every run, and every contradiction; UserError for what cannot become a run."""
    plan = _Plan(request)
    source = one_line(Path(request.source).name)
    configs = {}
    for draft in plan.drafts:
        data, notes = plan.config(draft)
        head = f"# Generated from {source}. A value without a comment is stated there."
        configs[draft.run_id] = "\n".join([head, *_emit(data, notes)]) + "\n"
    _find_contradictions(plan)
    return Generated(configs, plan.found)


def _write(folder: Path, configs: Mapping[str, str]) -> None:
    """All files or none that would replace something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = {folder / f"{run_id}.yaml": text.encode() for run_id, text in configs.items()}
        for path, content in paths.items():
            if path.exists() and path.read_bytes() != content:
                raise UserError(f"{path}: exists with other content: remove it, or choose another folder")
        for path, content in paths.items():
            handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.chmod(name, 0o644)
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{one_line(folder)}: cannot be written: {reason}") from None


def generate(source: str, out: str | None, as_json: bool, check: bool) -> int:
    """The command `fwlora generate`; 0, or 1 with `check` where the design contradicts itself.

    Configs go to the folder `out`, as one JSON object to stdout, or as YAML documents to stdout; contradictions go to
    stderr. With `check` nothing is written while there are any, and without `out` and `as_json` nothing at all.
    """
    generated = generate_configs(read_request(source))
    for item in generated.contradictions:
        print(f"{'error' if check else 'warning'}: {item}", file=sys.stderr)
    if generated.contradictions and check:
        count = len(generated.contradictions)
        print(f"{count} contradiction{'s' if count > 1 else ''}; nothing was written", file=sys.stderr)
        return 1
    if out is not None:
        _write(Path(out), generated.configs)
        print(f"{len(generated.configs)} run configs in {out}", file=sys.stderr)
    if as_json:
        configs = [{"run_id": i, "run_config_yaml": text} for i, text in generated.configs.items()]
        print(json.dumps({"run_configs": configs}, indent=2))
    elif out is None and not check:
        print("---\n".join(generated.configs.values()), end="")
    return 0
