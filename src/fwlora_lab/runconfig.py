"""The schema of one run: the only place that knows a key's name, type and range.

pydantic checks a config against it; `compose` reads the files and puts configs together.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fwlora_lab.errors import UserError

Arm = Literal["lora", "adalora", "fw_lora", "svd_lora"]
METHODS: dict[str, Arm] = {
    "lora": "lora",
    "baseline_lora": "lora",
    "adalora": "adalora",
    "baseline_adalora": "adalora",
    "fw_lora": "fw_lora",
    "proposed_fw_lora": "fw_lora",
    "svd_lora": "svd_lora",
}
GLUE_SUBSETS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
GLUE_DEV_SPLITS = ("validation", "validation_matched", "validation_mismatched")


# ---------------------------------------------------------------------------------------------
# The schema
# ---------------------------------------------------------------------------------------------


class Issue(NamedTuple):
    """One fault: where (key path, "" for the whole file) and what, ending in the cure."""

    key: str
    text: str


class Faults(ValueError):
    """Several faults found by one validator."""

    def __init__(self, issues: list[Issue]) -> None:
        super().__init__("; ".join(f"{i.key}: {i.text}" for i in issues))
        self.issues = issues


def _plain_text(value: str) -> str:
    if "${" in value:
        raise ValueError("holds '${', which some loaders would replace: write the value itself")
    if value == "???":
        raise ValueError("is '???', Hydra's mark for a missing value: give a value")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise ValueError(f"holds a control character ({value!r}): remove it")
    return value


def _run_id(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,199}", value):
        raise ValueError(
            f"{value[:220]!r} cannot name a folder: use 1 to 200 letters, digits, '.', '_', '-' or "
            "'=', not starting with '.'"
        )
    return value


def _method(value: str) -> str:
    if value not in METHODS:
        raise ValueError(f"{value!r} is not a method{nearest(value, METHODS)}: use one of {', '.join(METHODS)}")
    return value


def _warmup_steps(value: int | float) -> int | float:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{value} is no length: use at least 1 step, or a fraction such as 0.25")
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(
            f"{value} is not a fraction of the run: use a whole number of steps such as 200, "
            "or a fraction strictly between 0 and 1"
        )
    return value


def _distinct(values: list[str]) -> list[str]:
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"names {', '.join(map(repr, twice))} more than once: name it once")
    return values


Text = Annotated[str, Field(min_length=1), AfterValidator(_plain_text)]
RunId = Annotated[str, AfterValidator(_run_id)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
# YAML 1.1 reads a bare `no` as False. Nobody who writes `mixed_precision: no` means anything else.
Precision = Annotated[Literal["bf16", "no"], BeforeValidator(lambda v: "no" if v is False else v)]
Number = int | float


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class LoraSettings(Block):
    """The adapters: rank r (None: the parameter budget decides), alpha, and where they sit."""

    enabled: bool = True
    rank: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[Text], Field(min_length=1), AfterValidator(_distinct)] = Field(
        default_factory=lambda: ["query", "key", "value", "intermediate", "output"]
    )

    @property
    def scale(self) -> float:
        """s = alpha/r, the same for every matrix; 2 where alpha or the rank is left open."""
        return 2.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


class ModelConfig(Block):
    """The backbone: `minilm`, a local folder or a hub id, and the budget in percent of its size."""

    name: Text
    pretrained_id: Text
    revision: Text | None = None
    parameter_budget_percent: Annotated[float, Field(gt=0, le=100)] | None = None
    lora: LoraSettings = Field(default_factory=LoraSettings)


class DatasetConfig(Block):
    """The data. `seed` carves and samples: all training seeds of a run see the same split."""

    name: Literal["glue", "offline", "csv", "jsonl"]
    subset: Text | None = None
    root: Text | None = None
    revision: Text | None = None
    split: Text = "train"
    eval_split: Text = "validation"
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] = 128
    padding: Literal["max_length", "longest", "grouped"] = "longest"
    truncation: bool = True
    train_file: Text | None = None
    eval_file: Text | None = None
    text_column: Text | list[Text] | None = None
    label_column: Text | None = None
    train_examples: Annotated[int, Field(ge=2)] | None = None
    selection_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Seed = 0


class TrainingConfig(Block):
    """The loop. `evaluate_on` is `selection` while tuning, `dev` for what is reported.

    `engine` trains a run in a lane of a shared backbone on packed batches, several runs at once (`lanes`), or with
    PEFT's layers, padded batches and one model a run (`peft`), as the public reference and where lanes do not know
    the architecture. `mixed_precision=bf16` computes the frozen encoder in bf16 where the device has instructions for
    it, and in fp32 elsewhere; what is trained stays in fp32.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 3
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    optimizer: Literal["adamw"] = "adamw"
    lr_scheduler: Literal["linear", "constant", "cosine"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.06
    gradient_accumulation_steps: Positive = 1
    mixed_precision: Precision = "bf16"
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Seed = 42
    evaluate_on: Literal["dev", "selection"] = "dev"
    save_adapter: bool = True
    engine: Literal["lanes", "peft"] = "lanes"


class FWLoraSettings(Block):
    """λ, K (steps, or a fraction of the run), the EMA factor, the rest as in `FWLoraConfig`."""

    lambda_fw: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: Annotated[int | float, AfterValidator(_warmup_steps)] = 500
    fisher_alpha: Annotated[float, Field(ge=0, lt=1)] = 0.98
    estimator: Literal["exact", "sketch", "adapter", "per_example"] = "exact"
    every: Positive = 1
    sketch_columns: Positive = 4
    averaging: Literal["raw", "share"] = "raw"
    weighting: Literal["share", "uniform", "rank", "power", "permuted"] = "share"
    gamma: Annotated[float, Field(ge=0)] = 0.5
    clip: Annotated[float, Field(ge=1)] = 4.0
    normalize_weights: bool = False
    coupling: Literal["loss", "decoupled"] = "loss"
    norm: Literal["update", "factors"] = "update"
    start: Annotated[int, Field(ge=0)] = 0


class AdaLoraSettings(Block):
    """PEFT's AdaLoRA; in shares of the run, it prunes from tinit on until tfinal before the end.

    Of these, svd_lora reads orth_reg_weight alone: it keeps the ranks that it begins with.
    """

    init_rank_factor: Annotated[float, Field(gt=1)] = 1.5
    tinit_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.12
    tfinal_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    delta_t: Positive = 1
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    orth_reg_weight: Annotated[float, Field(gt=0)] = 0.5

    @model_validator(mode="after")
    def _phases(self) -> AdaLoraSettings:
        if self.tinit_ratio + self.tfinal_ratio >= 1:
            raise ValueError(
                f"tinit_ratio {self.tinit_ratio} + tfinal_ratio {self.tfinal_ratio} leave no steps "
                "to prune in: their sum must stay below 1, for example 0.12 and 0.5"
            )
        return self


Distribution = Literal["loguniform", "uniform", "int", "categorical"]


def _check_dimension(
    kind: str, low: Number | None, high: Number | None, step: Number | None, choices: list | None
) -> None:
    if kind == "categorical":
        if not choices:
            raise ValueError("a categorical dimension needs choices, for example [16, 32]")
        if any(v is not None for v in (low, high, step)):
            raise ValueError("a categorical dimension has choices only: remove low, high and step")
        return
    if choices is not None:
        raise ValueError(f"choices do not go with type {kind}: use categorical, or low and high")
    if low is None or high is None:
        raise ValueError(f"a dimension of type {kind} needs low and high")
    if not low < high:
        raise ValueError(f"low {low} is not below high {high}: swap them")
    if kind == "loguniform" and (low <= 0 or step is not None):
        raise ValueError("loguniform needs low above 0 and no step")
    if kind == "int" and not all(isinstance(v, int) for v in (low, high, step or 1)):
        raise ValueError("an int dimension needs whole numbers for low, high and step")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"step {step} must be above 0 and at most high − low = {high - low}")


class Dimension(Block):
    """One hyper-parameter of `optuna.search_space`, under its name."""

    type: Distribution
    low: Number | None = None
    high: Number | None = None
    step: Number | None = None
    choices: list[bool | Number | Text | None] | None = None

    @model_validator(mode="after")
    def _range(self) -> Dimension:
        _check_dimension(self.type, self.low, self.high, self.step, self.choices)
        return self


class NamedDimension(Block):
    """One hyper-parameter of the list `optuna.search_spaces`, the second dialect."""

    param_name: Text
    distribution_type: Distribution
    low: Number | None = None
    high: Number | None = None
    step: Number | None = None
    choices: list[bool | Number | Text | None] | None = None

    @model_validator(mode="after")
    def _range(self) -> NamedDimension:
        _check_dimension(self.distribution_type, self.low, self.high, self.step, self.choices)
        return self


class OptunaConfig(Block):
    """The search around a run; `search_space` by name or `search_spaces` as a list, not both.

    `n_trials` is the study's total over all workers and restarts. A trial is scored by the mean over
    `seeds_per_trial` seeds, training.seed and those after it. `n_jobs` trials share a worker's lanes (None: as many
    as there are lanes, but at most a quarter of n_trials). `storage` is a sqlite:/// or postgresql:// URL (None: a
    SQLite file in the results folder).
    """

    n_trials: Positive = 20
    direction: Literal["maximize", "minimize"] = "maximize"
    search_space: dict[Text, Dimension] | None = None
    search_spaces: list[NamedDimension] | None = None
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = "none"
    storage: Text | None = None
    seeds_per_trial: Positive = 1
    n_jobs: Positive | None = None

    @model_validator(mode="after")
    def _one_dialect(self) -> OptunaConfig:
        if bool(self.search_space) == bool(self.search_spaces):
            raise ValueError("needs exactly one of search_space (by name) and search_spaces (a list), not empty")
        names = [d.param_name for d in self.search_spaces or ()]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"search_spaces names {', '.join(twice)} more than once")
        return self


class RunConfig(Block):
    """One run, complete: everything that decides its result, and where the result goes."""

    run_id: RunId
    method: Annotated[str, AfterValidator(_method)]
    model: ModelConfig
    dataset: DatasetConfig
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    fw_lora: FWLoraSettings = Field(default_factory=FWLoraSettings)
    adalora: AdaLoraSettings = Field(default_factory=AdaLoraSettings)
    optuna: OptunaConfig | None = None
    results_dir: Text = "results"

    @property
    def arm(self) -> Arm:
        """The method under its one short name."""
        return METHODS[self.method]

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        issues = _impossible(self)
        if issues:
            raise Faults(issues)
        return self


def _impossible(cfg: RunConfig) -> list[Issue]:
    """Settings that are each legal and cannot stand together."""
    issues: list[Issue] = []

    def fault(key: str, text: str) -> None:
        issues.append(Issue(key, text))

    lora, data = cfg.model.lora, cfg.dataset
    if not lora.enabled:
        fault("model.lora.enabled", "every method here trains LoRA adapters: set it to true")
    if lora.rank is None and cfg.model.parameter_budget_percent is None:
        fault(
            "model.lora.rank",
            "neither it nor model.parameter_budget_percent is given: set one, e.g. rank: 4",
        )
    if data.name == "glue":
        if data.subset is None:
            fault("dataset.subset", f"glue needs it: one of {', '.join(GLUE_SUBSETS)}")
        elif data.subset not in GLUE_SUBSETS:
            fault(
                "dataset.subset",
                f"{data.subset!r} is no GLUE task{nearest(data.subset, GLUE_SUBSETS)}: "
                f"use one of {', '.join(GLUE_SUBSETS)}",
            )
    if data.name in ("glue", "offline"):
        if data.split == data.eval_split:
            fault(
                "dataset.eval_split",
                f"{data.eval_split!r} is also dataset.split: a run must not be scored on what it "
                "trains on; use split: train, eval_split: validation",
            )
        else:
            if data.split != "train":
                fault("dataset.split", f"{data.split!r}: {data.name} is trained on its split train")
            known = GLUE_DEV_SPLITS if data.subset == "mnli" else GLUE_DEV_SPLITS[:1]
            if data.eval_split not in known:
                fault(
                    "dataset.eval_split",
                    f"{data.eval_split!r} has no public labels or does not exist"
                    f"{nearest(data.eval_split, known)}: use {' or '.join(known)}",
                )
    if data.name in ("csv", "jsonl"):
        for key in ("train_file", "eval_file", "text_column", "label_column"):
            if getattr(data, key) is None:
                fault(f"dataset.{key}", f"dataset.name {data.name} needs it: add it")
        if data.train_file is not None and data.train_file == data.eval_file:
            fault(
                "dataset.eval_file",
                "is the train_file: a run must not be scored on what it trains on; name another",
            )
        texts = [data.text_column] if isinstance(data.text_column, str) else data.text_column or []
        if data.text_column is not None and (len(texts) not in (1, 2) or len(set(texts)) < len(texts)):
            fault("dataset.text_column", "name one column, or a list of two different ones")
        if data.label_column is not None and data.label_column in texts:
            fault("dataset.label_column", f"{data.label_column!r} is a text column: name another")
    if cfg.training.evaluate_on == "selection" and data.selection_fraction == 0:
        fault(
            "training.evaluate_on",
            "selection needs a part of train to score on: set dataset.selection_fraction=0.1",
        )
    fw = cfg.fw_lora
    if cfg.arm == "fw_lora" and isinstance(fw.warmup_steps, int) and fw.start >= fw.warmup_steps:
        fault(
            "fw_lora.start",
            f"{fw.start} leaves no step to watch before fw_lora.warmup_steps = {fw.warmup_steps}: "
            "lower it, or watch longer",
        )
    return issues


def dimensions_of(optuna: OptunaConfig) -> dict[str, Dimension]:
    """Both dialects as one: dotted key of the run config -> its dimension."""
    named = optuna.search_space or {
        d.param_name: Dimension(type=d.distribution_type, low=d.low, high=d.high, step=d.step, choices=d.choices)
        for d in optuna.search_spaces or ()
    }
    return {search_key(name): dimension for name, dimension in named.items()}


class InvalidRun(ValueError):
    """A run config with faults; `issues` lists them all."""

    def __init__(self, issues: list[Issue]) -> None:
        super().__init__("; ".join(f"{i.key}: {i.text}" for i in issues))
        self.issues = issues


def validate_run(data: Mapping[str, Any]) -> RunConfig:
    """The run config in plain values, its search space checked too.

    Raises:
        InvalidRun: with every fault found.
    """
    try:
        cfg = RunConfig.model_validate(data)
    except ValidationError as error:
        raise InvalidRun(issues_of(error, data)) from None
    if cfg.optuna is not None and (issues := _unsearchable(cfg, cfg.optuna)):
        raise InvalidRun(issues)
    return cfg


def _unsearchable(cfg: RunConfig, optuna: OptunaConfig) -> list[Issue]:
    """Dimensions that name no key, or whose ends and choices the key would refuse."""
    issues: list[Issue] = []
    named = optuna.search_space or {d.param_name: d for d in optuna.search_spaces or ()}
    plain = cfg.model_dump() | {"optuna": None}
    seen: dict[str, str] = {}
    for name, dimension in named.items():
        where = f"optuna.{'search_space' if optuna.search_space else 'search_spaces'}.{name}"
        try:
            key = search_key(name)
        except UserError as error:
            issues.append(Issue(where, str(error)))
            continue
        if key in seen:
            issues.append(Issue(where, f"means {key}, as {seen[key]} does: keep one of them"))
            continue
        seen[key] = name
        ends = [dimension.low, dimension.high]
        kind = dimension.type if isinstance(dimension, Dimension) else dimension.distribution_type
        if kind in ("uniform", "loguniform"):
            ends = [float(end) for end in ends if end is not None]  # what a trial would draw between them
        for value in dimension.choices or ends:
            trial = json.loads(json.dumps(plain))
            set_key(trial, key, value)
            try:
                RunConfig.model_validate(trial)
            except ValidationError as error:
                reasons = [i.text for i in issues_of(error, trial) if i.key == key]
                if reasons:  # other keys' faults are reported as their own
                    issues.append(Issue(where, f"{value!r} is refused by {key}: {reasons[0]}"))
    return issues


# ---------------------------------------------------------------------------------------------
# The schema, seen as key paths
# ---------------------------------------------------------------------------------------------


def _block_of(annotation: Any) -> type[Block] | None:
    """The block inside an annotation such as `OptunaConfig | None`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            block = _block_of(part)
            if block is not None:
                return block
    return None


def _walk_schema(block: type[Block] = RunConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key path of the schema in its order, and whether it is a block."""
    for name, field in block.model_fields.items():
        inner = _block_of(field.annotation)
        yield prefix + name, inner is not None
        if inner is not None:
            yield from _walk_schema(inner, f"{prefix}{name}.")


KEYS: dict[str, bool] = dict(_walk_schema())
LEAVES = [key for key, is_block in KEYS.items() if not is_block]
_SEARCHED = [k for k in LEAVES if k.split(".")[0] in ("model", "dataset", "training", "fw_lora", "adalora")]


def schema_defaults(block: type[Block] = RunConfig) -> dict[str, Any]:
    """The schema as Hydra sees it: every key with its default, `???` where there is none."""
    defaults: dict[str, Any] = {}
    for name, field in block.model_fields.items():
        inner = _block_of(field.annotation)
        if inner is not None and (field.is_required() or field.default_factory is not None):
            defaults[name] = schema_defaults(inner)
        elif field.is_required():
            defaults[name] = "???"
        else:
            defaults[name] = field.get_default(call_default_factory=True)
    return defaults


def get_key(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    *blocks, last = key.split(".")
    for part in blocks:
        data = data[part]
    data[last] = value


def with_values(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with other values under some of its keys; a UserError that names every one that does not go."""
    data = json.loads(json.dumps(cfg.model_dump()))
    for key, value in values.items():
        set_key(data, key, value)
    try:
        return validate_run(data)
    except InvalidRun as error:
        raise UserError(listing([f"{i.key}: {i.text}" for i in error.issues])) from None


def search_key(name: str) -> str:
    """The key that a search dimension means.

    `batch_size` is `training.batch_size`, `lora_rank` is `model.lora.rank`; dotted keys stand
    for themselves. Raises UserError for names that mean no key or several.
    """
    if name in _SEARCHED:
        return name
    if name.startswith("lora_") and f"model.lora.{name[5:]}" in _SEARCHED:
        return f"model.lora.{name[5:]}"
    found = [key for key in _SEARCHED if key.rsplit(".", 1)[-1] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name!r} could mean {' or '.join(found)}: write the whole key")
    names = [
        *(key.rsplit(".", 1)[-1] for key in _SEARCHED),
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
    ]
    raise UserError(f"{name!r} names no key that can be searched{nearest(name, names)}")


def nearest(word: str, words: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the most similar of `words`, or nothing."""
    by_lower = {w.lower(): w for w in words}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.55)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def nearest_key(key: str) -> str:
    """The nearest valid key to one that is not: a sibling, or the same name in another block."""
    block, _, leaf = key.rpartition(".")
    elsewhere = [k for k in KEYS if k.rsplit(".", 1)[-1] == leaf]
    if elsewhere:
        return f" (did you mean {elsewhere[0]!r}?)"
    siblings = [k.removeprefix(f"{block}.") for k in KEYS if k.rpartition(".")[0] == block]
    close = difflib.get_close_matches(leaf.lower(), siblings, n=1, cutoff=0.55)
    if close:
        return f" (did you mean {(block + '.' if block else '') + close[0]!r}?)"
    return nearest(key, KEYS) or (f"; {block or 'a run config'} has {', '.join(siblings)}" if siblings else "")


# ---------------------------------------------------------------------------------------------
# Saying what is wrong
# ---------------------------------------------------------------------------------------------

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list, e.g. [a, b]",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
}


def listing(faults: Sequence[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n" + "\n".join(f"  {f}" for f in faults)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a block of keys"
    return f"the list {str(value)[:80]}" if isinstance(value, list) else str(value)[:80]


def _explain(error: Any, key: str) -> str:
    kind, value, ctx = error["type"], error.get("input"), error.get("ctx", {})
    if kind == "missing":
        return "is missing: add it"
    if kind == "extra_forbidden":
        return f"is no key of a run config{nearest_key(key)}"
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "literal_error":
        allowed = ctx["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        near = nearest(str(value), allowed)
        return f"{_shown(value)} is not allowed{near}: use one of {', '.join(allowed)}"
    if kind == "finite_number":
        return f"must be a finite number, not {value}: a text such as a commit goes in quotes"
    if kind in _WANTED:
        cure = ""
        if kind == "string_type" and not isinstance(value, dict | list):
            cure = ": put it in quotes"
        elif kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
            cure = ": remove the quotes" if re.fullmatch(r"[-+.\deE]+|true|false", value) else ""
        return f"must be {_WANTED[kind]}, not {_shown(value)}{cure}"
    return f"{re.sub('^(Input|List|String) should', 'must', error['msg'])}, not {_shown(value)}"


def issues_of(error: ValidationError, data: Any) -> list[Issue]:
    """pydantic's errors as issues under the keys that people wrote, one for each key."""
    issues: dict[str, Issue] = {}
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, Faults):
            for issue in inner.issues:
                issues.setdefault(issue.key, issue)
            continue
        key, at = "", data
        for part in item["loc"]:  # the branches of a union (`int`, `list[str]`) are no part of the key
            last = part == item["loc"][-1]
            if isinstance(at, Mapping) and (part in at or (last and item["type"] == "missing")):
                at = at.get(part)
            elif isinstance(at, list) and isinstance(part, int) and part < len(at):
                at = at[part]
            else:
                continue
            key = f"{key}.{part}" if key else str(part)
        item["input"] = at if item["type"] != "value_error" else None
        text = _explain(item, key)
        if key in issues:  # every branch of a union complains once
            if text not in issues[key].text and item["type"] in _WANTED:
                issues[key] = Issue(key, _either(issues[key].text, text))
            continue
        issues[key] = Issue(key, text)
    return list(issues.values())


def _either(first: str, second: str) -> str:
    """`must be a whole number or a number, not …` from two branches of a union."""
    if not (first.startswith("must be ") and second.startswith("must be ")):
        return first
    wanted = second.removeprefix("must be ").split(", not ")[0]
    head, sep, tail = first.partition(", not ")
    return f"{head} or {wanted}{sep}{tail}" if sep else first


# ---------------------------------------------------------------------------------------------
# Writing, comparing, checking
# ---------------------------------------------------------------------------------------------


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


def to_yaml(cfg: RunConfig) -> str:
    """The complete config as YAML, every key written out; reading it back gives an equal config."""
    data = cfg.model_dump()
    if cfg.optuna is not None and cfg.optuna.search_space:
        for name, dimension in cfg.optuna.search_space.items():
            data["optuna"]["search_space"][name] = dimension.model_dump(exclude_none=True)
    return yaml.dump(data, Dumper=Writer, sort_keys=False, allow_unicode=True, width=1_000_000)


# Names and places, which change no result. Whether the files of two places hold the same data, the data's own
# fingerprint tells.
_NOT_IN_FINGERPRINT = (
    "run_id",
    "results_dir",
    "optuna",
    "model.name",
    "dataset.root",
    "dataset.train_file",
    "dataset.eval_file",
    "training.seed",
    "training.save_adapter",
)


def in_fingerprint(key: str) -> bool:
    """Whether the leaf `key`, with dots, can change a run's result, unless the run ignores it."""
    return not f"{key}.".startswith(tuple(f"{name}." for name in _NOT_IN_FINGERPRINT))


def fingerprint(cfg: RunConfig) -> str:
    """sha256 (hex) of everything in the config that changes a run's result.

    Left out: names and places (run_id, model.name, results_dir, the data's files), optuna, training.seed (a run is
    known by its fingerprints, of config and data, and its seed), save_adapter, and every setting that this run ignores.
    """
    data = cfg.model_dump()
    data["method"] = cfg.arm
    data["model"]["lora"]["alpha"] = cfg.model.lora.scale
    dropped = [*_NOT_IN_FINGERPRINT, *(key for key, _ in ignored_keys(cfg))]
    if cfg.model.lora.rank is not None:
        dropped.append("model.parameter_budget_percent")
    for key in dropped:
        if key != "model.lora.alpha":
            set_key(data, key, None)
    if cfg.training.engine == "peft":
        del data["training"]["engine"]  # records from before there was a choice stay what they are
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def reads(arm: Arm, key: str) -> bool:
    """Whether this method looks at the key; only the methods' own blocks are not for all of them."""
    block = key.split(".")[0]
    if arm == "svd_lora" and block == "adalora":
        return key == "adalora.orth_reg_weight"
    return block not in ("fw_lora", "adalora") or block == arm


def ignored_keys(cfg: RunConfig) -> list[tuple[str, str]]:
    """Every key that has no effect in this run, and why."""
    found: list[tuple[str, str]] = []

    def ignore(keys: Iterable[str], why: str) -> None:
        found.extend((key, why) for key in keys)

    fw, data = cfg.fw_lora, cfg.dataset
    ignore((k for k in LEAVES if not reads(cfg.arm, k)), f"method is {cfg.method}")
    if cfg.arm == "fw_lora":
        if fw.weighting != "power":
            ignore(["fw_lora.gamma", "fw_lora.clip"], f"fw_lora.weighting is {fw.weighting}, not power")
        if fw.estimator != "sketch":
            ignore(["fw_lora.sketch_columns"], f"fw_lora.estimator is {fw.estimator}, not sketch")
        if fw.estimator == "adapter":
            ignore(["fw_lora.every"], "fw_lora.estimator is adapter, which is free at every step")
    if cfg.model.lora.rank is None:
        ignore(["model.lora.alpha"], "without a rank there is no alpha/rank; the scale is 2")
    if cfg.model.pretrained_id == "minilm":
        ignore(["model.revision"], "minilm comes with its package")
    if data.name != "glue":
        ignore(
            [f"dataset.{k}" for k in ("subset", "root", "revision")],
            f"dataset.name is {data.name}, not glue",
        )
    elif data.root is not None:
        ignore(["dataset.revision"], "the data come from dataset.root")
    if data.name in ("csv", "jsonl"):
        ignore(["dataset.split", "dataset.eval_split"], "train_file and eval_file are the splits")
    else:
        ignore(
            [f"dataset.{k}" for k in ("train_file", "eval_file", "text_column", "label_column")],
            f"dataset.name is {data.name}, not csv or jsonl",
        )
    return found


def warnings_of(cfg: RunConfig) -> list[str]:
    """One sentence for every setting that was changed and has no effect in this run."""
    data, defaults = cfg.model_dump(), schema_defaults()
    ignored = ignored_keys(cfg)
    warnings = [
        f"{key} = {get_key(data, key)} is ignored: {why}"
        for key, why in ignored
        if get_key(data, key) != get_key(defaults, key)
    ]
    reasons = dict(ignored)
    searched = dimensions_of(cfg.optuna) if cfg.optuna is not None else {}
    warnings += [f"optuna searches {key}, which is ignored: {reasons[key]}" for key in searched if key in reasons]
    return warnings


def check_warmup(cfg: RunConfig, total_steps: int, train_examples: int | None = None) -> None:
    """Refuse a Fisher phase that would not end before the run does (K ≥ total optimiser steps)."""
    k = cfg.fw_lora.warmup_steps
    if cfg.arm != "fw_lora":
        return
    t = cfg.training
    examples = f"{train_examples} examples / " if train_examples is not None else ""
    accumulated = f" x {t.gradient_accumulation_steps}" if t.gradient_accumulation_steps > 1 else ""
    run = (
        f"the {total_steps} optimiser steps of this run ({examples}batch {t.batch_size}"
        f"{accumulated}, {t.epochs} epoch{'s' if t.epochs > 1 else ''})"
    )
    if total_steps < 2:
        raise UserError(f"fw_lora.warmup_steps: {run} leave no room for a Fisher phase: train longer")
    steps = k if isinstance(k, int) else max(1, round(k * total_steps))
    if steps >= total_steps:
        raise UserError(
            f"fw_lora.warmup_steps = {k} is not smaller than {run}: use "
            f"fw_lora.warmup_steps={max(1, total_steps // 4)} or a fraction such as 0.25"
        )
    if cfg.fw_lora.start >= steps:
        raise UserError(
            f"fw_lora.start = {cfg.fw_lora.start} leaves no step to watch: "
            f"fw_lora.warmup_steps = {k} ends the Fisher phase after {steps} of {run}; lower start"
        )
