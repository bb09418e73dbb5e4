"""The schema of one run: the only place that knows a key's name, type and range.

A run config is a YAML file `run/<run_id>.yaml`. Hydra composes it with the defaults below and the
overrides of the command line, pydantic checks the result. Whatever is wrong ends in one `UserError`
that lists every fault with its file, line and key. Nothing a config says is ever executed: there
are no `_target_`s and no resolvers, only plain references such as `${training.seed}`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import threading
import types
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from hydra import compose, version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
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

CONF = Path(__file__).resolve().parent / "conf"
Arm = Literal["lora", "adalora", "fw_lora"]
METHODS: dict[str, Arm] = {
    "lora": "lora",
    "baseline_lora": "lora",
    "adalora": "adalora",
    "baseline_adalora": "adalora",
    "fw_lora": "fw_lora",
    "proposed_fw_lora": "fw_lora",
}
GLUE_SUBSETS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
GLUE_DEV_SPLITS = ("validation", "validation_matched", "validation_mismatched")
MAX_FILE_BYTES = 1_000_000
MAX_NODES = 10_000  # a run config has about 100 keys and values
MAX_SEEDS = 1_000
MAX_RUNS = 1_000


# ---------------------------------------------------------------------------------------------
# The schema
# ---------------------------------------------------------------------------------------------


class Issue(NamedTuple):
    """One fault: where (key path, "" for the whole file) and what, ending in the cure."""

    key: str
    text: str


class _Faults(ValueError):
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
        raise ValueError(f"{value!r} is not a method{_nearest(value, METHODS)}: use one of {', '.join(METHODS)}")
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


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class LoraSettings(_Block):
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


class ModelConfig(_Block):
    """The backbone: `minilm`, a local folder or a hub id, and the budget in percent of its size."""

    name: Text
    pretrained_id: Text
    revision: Text | None = None
    parameter_budget_percent: Annotated[float, Field(gt=0, le=100)] | None = None
    lora: LoraSettings = Field(default_factory=LoraSettings)


class DatasetConfig(_Block):
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


class TrainingConfig(_Block):
    """The loop. `evaluate_on` is `selection` while tuning, `dev` for what is reported.

    `engine` trains a run with PEFT's layers, padded batches and one model a run (`peft`), or in a lane
    of a shared backbone on packed batches (`lanes`), several runs at once.
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
    engine: Literal["peft", "lanes"] = "peft"


class FWLoraSettings(_Block):
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


class AdaLoraSettings(_Block):
    """PEFT's AdaLoRA; in shares of the run, it prunes from tinit on until tfinal before the end."""

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


class Dimension(_Block):
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


class NamedDimension(_Block):
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


class OptunaConfig(_Block):
    """The search around a run; `search_space` by name or `search_spaces` as a list, not both."""

    n_trials: Positive = 20
    direction: Literal["maximize", "minimize"] = "maximize"
    search_space: dict[Text, Dimension] | None = None
    search_spaces: list[NamedDimension] | None = None
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "median"] = "none"
    storage: Text | None = None
    seeds_per_trial: Positive = 1

    @model_validator(mode="after")
    def _one_dialect(self) -> OptunaConfig:
        if bool(self.search_space) == bool(self.search_spaces):
            raise ValueError("needs exactly one of search_space (by name) and search_spaces (a list), not empty")
        names = [d.param_name for d in self.search_spaces or ()]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"search_spaces names {', '.join(twice)} more than once")
        return self

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """Both dialects as one: dotted key of the run config -> its dimension."""
        named = self.search_space or {
            d.param_name: Dimension(type=d.distribution_type, low=d.low, high=d.high, step=d.step, choices=d.choices)
            for d in self.search_spaces or ()
        }
        return {search_key(name): dimension for name, dimension in named.items()}


class RunConfig(_Block):
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
            raise _Faults(issues)
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
                f"{data.subset!r} is no GLUE task{_nearest(data.subset, GLUE_SUBSETS)}: "
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
                    f"{_nearest(data.eval_split, known)}: use {' or '.join(known)}",
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
    if cfg.optuna is not None:
        issues += _unsearchable(cfg, cfg.optuna)
    return issues


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
        for value in dimension.choices or (dimension.low, dimension.high):
            trial = json.loads(json.dumps(plain))
            _set(trial, key, value)
            try:
                RunConfig.model_validate(trial)
            except ValidationError as error:
                reasons = [i.text for i in _issues_of(error, trial) if i.key == key]
                if reasons:  # other keys' faults are reported as their own
                    issues.append(Issue(where, f"{value!r} is refused by {key}: {reasons[0]}"))
    return issues


# ---------------------------------------------------------------------------------------------
# The schema, seen as key paths
# ---------------------------------------------------------------------------------------------


def _block_of(annotation: Any) -> type[_Block] | None:
    """The block inside an annotation such as `OptunaConfig | None`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, _Block):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            block = _block_of(part)
            if block is not None:
                return block
    return None


def _walk_schema(block: type[_Block] = RunConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key path of the schema in its order, and whether it is a block."""
    for name, field in block.model_fields.items():
        inner = _block_of(field.annotation)
        yield prefix + name, inner is not None
        if inner is not None:
            yield from _walk_schema(inner, f"{prefix}{name}.")


KEYS: dict[str, bool] = dict(_walk_schema())
LEAVES = [key for key, is_block in KEYS.items() if not is_block]
_SEARCHED = [k for k in LEAVES if k.split(".")[0] in ("model", "dataset", "training", "fw_lora", "adalora")]


def _schema_defaults(block: type[_Block] = RunConfig) -> dict[str, Any]:
    """The schema as Hydra sees it: every key with its default, `???` where there is none."""
    defaults: dict[str, Any] = {}
    for name, field in block.model_fields.items():
        inner = _block_of(field.annotation)
        if inner is not None and (field.is_required() or field.default_factory is not None):
            defaults[name] = _schema_defaults(inner)
        elif field.is_required():
            defaults[name] = "???"
        else:
            defaults[name] = field.get_default(call_default_factory=True)
    return defaults


def _get(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *blocks, last = key.split(".")
    for part in blocks:
        data = data[part]
    data[last] = value


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
    raise UserError(f"{name!r} names no key that can be searched{_nearest(name, names)}")


def _nearest(word: str, words: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the most similar of `words`, or nothing."""
    by_lower = {w.lower(): w for w in words}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.55)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def _nearest_key(key: str) -> str:
    """The nearest valid key to one that is not: a sibling, or the same name in another block."""
    block, _, leaf = key.rpartition(".")
    elsewhere = [k for k in KEYS if k.rsplit(".", 1)[-1] == leaf]
    if elsewhere:
        return f" (did you mean {elsewhere[0]!r}?)"
    siblings = [k.removeprefix(f"{block}.") for k in KEYS if k.rpartition(".")[0] == block]
    close = difflib.get_close_matches(leaf.lower(), siblings, n=1, cutoff=0.55)
    if close:
        return f" (did you mean {(block + '.' if block else '') + close[0]!r}?)"
    return _nearest(key, KEYS) or (f"; {block or 'a run config'} has {', '.join(siblings)}" if siblings else "")


# ---------------------------------------------------------------------------------------------
# Reading one file
# ---------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_.]*\}")
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_PLAIN_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAGS = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "map", "seq")}


class _File(NamedTuple):
    """A checked file: its values, and the line of every key path in it."""

    values: dict[str, Any]
    header: str
    lines: dict[str, int]


def _interpolation_fault(text: str) -> str | None:
    """What is wrong with the `${…}` in a text: anything but a plain reference to another key."""
    if text.count("${") != len(_REFERENCE.findall(text)):
        return (
            f"{text!r} is an interpolation that would run or read something: only references to "
            "other keys such as ${training.seed} are allowed; write the value itself"
        )
    return None


def _read_file(path: Path) -> _File:
    """Read one YAML file of a config tree; the only way in which a config is ever read."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name the .yaml file inside it")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(
                f"{path}: is {size:,} bytes, a run config has at most {MAX_FILE_BYTES:,}: is it the right file?"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such file{_nearest(path.name, near)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    try:
        loader = get_yaml_loader()(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: is empty: a run config starts with run_id: <name>")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(
                f"{path}:{node.start_mark.line + 1}: must hold keys such as `run_id: <name>` at "
                f"its top, not a {'list' if node.id == 'sequence' else 'single value'}"
            )
        lines, faults = _inspect(node)
        if faults:
            raise UserError(_listing([f"{path}:{line}: {text}" for line, text in faults]))
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax_message(path, error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply: a run config has four levels") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: holds a value that cannot be read: {error}") from None
    return _File(values, text[:512], lines)


def _syntax_message(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    problem = error.problem or error.context or "cannot be read"
    cure = ""
    if r"'\t'" in problem:
        cure = ": indent with spaces, not tabs"
    elif "expected a single document" in (error.context or ""):
        problem, cure = (
            "a second document starts here",
            ": one file holds one run, remove the '---'",
        )
    elif "mapping values are not allowed" in problem:
        cure = ": check the indentation, and quote values that hold ': '"
    elif "%" in problem or "'@'" in problem or "'`'" in problem:
        cure = ": quote the value"
    return f"{where}: is not YAML: {problem}{cure}"


def _inspect(root: yaml.MappingNode) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Every key path's line, and all that is refused before any value is built."""
    lines: dict[str, int] = {}
    faults: list[tuple[int, str]] = []
    visited = 0

    def visit(node: yaml.Node, path: str, parents: tuple[int, ...]) -> None:
        nonlocal visited
        visited += 1
        line = node.start_mark.line + 1
        if id(node) in parents:
            raise yaml.MarkedYAMLError(problem="an alias refers to itself", problem_mark=node.start_mark)
        if visited > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES:,} values once its aliases are expanded",
                problem_mark=node.start_mark,
            )
        if node.tag not in _TAGS:
            faults.append(
                (
                    line,
                    f"{path or 'the file'}: the tag {_short_tag(node.tag)} is refused: write the plain value",
                )
            )
            return
        inside = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key_node, value in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                    shown = getattr(key_node, "value", "")
                    shown = f"`{shown}`" if isinstance(shown, str) else "a list or mapping"
                    faults.append(
                        (
                            key_line,
                            f"{path or 'top level'}: {shown} cannot be a key: keys are plain words",
                        )
                    )
                    continue
                key = key_node.value
                full = f"{path}.{key}" if path else key
                if key in keys:
                    faults.append((key_line, f"{full}: stands twice, first on line {keys[key]}: keep one"))
                keys[key] = key_line
                lines.setdefault(full, key_line)
                if key == "_target_":
                    faults.append((key_line, f"{full}: is refused: a config names values, it runs no code"))
                elif full == "hydra":
                    faults.append((key_line, "hydra: Hydra's own settings have no use here: remove the block"))
                elif "${" in key:
                    faults.append(
                        (
                            key_line,
                            f"{full}: an interpolation cannot be a key: write the key itself",
                        )
                    )
                else:
                    visit(value, full, inside)
        elif isinstance(node, yaml.SequenceNode):
            if KEYS.get(path):
                faults.append((line, f"{path}: must be a block of keys, not a list"))
            for index, item in enumerate(node.value):
                lines[f"{path}.{index}"] = item.start_mark.line + 1
                visit(item, f"{path}.{index}", inside)
        else:
            fault = _scalar_fault(node)
            if fault:
                faults.append((line, f"{path}: {fault}"))

    visit(root, "", ())
    return lines, faults


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _scalar_fault(node: yaml.Node) -> str | None:
    text = str(node.value)
    quoted = getattr(node, "style", None) is not None
    if node.tag.endswith(":str"):
        return _interpolation_fault(text)
    if quoted:  # `!!int "3"`: the tag and the quotes disagree
        return f"the tag {_short_tag(node.tag)} on a quoted text is refused: write the plain value"
    if node.tag.endswith(":int") and not _PLAIN_INT.fullmatch(text):
        return f"`{text}` is another number to other loaders: write plain digits, or quote it"
    if node.tag.endswith(":float") and not _PLAIN_FLOAT.fullmatch(text):
        return f"`{text}` is read as a number by some loaders only: write it like 1.0e-4, or quote it"
    return None


# ---------------------------------------------------------------------------------------------
# Composing with Hydra
# ---------------------------------------------------------------------------------------------

_GIVEN = "given_run"  # the one run a tree offers to Hydra, whatever its file is called


class RunTree(ConfigSource):
    """A config tree as Hydra sees it, read through `_read_file`; its path names the run's file.

    The root is the folder above `run/`, or the file's own folder if that is not called `run`.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.file = Path(urllib.parse.unquote(self.path))
        self.root = self.file.parent.parent if self.file.parent.name == "run" else self.file.parent

    @staticmethod
    def scheme() -> str:
        return "fwlora-run"

    @staticmethod
    def url(file: Path) -> str:
        return f"{RunTree.scheme()}://{urllib.parse.quote(str(file))}"

    def available(self) -> bool:
        return True

    def _locate(self, config_path: str) -> Path | None:
        name = config_path.removesuffix(".yaml").strip("/")
        if name == f"run/{_GIVEN}":
            return self.file
        if name == "config":
            return CONF / "config.yaml"  # never a stray config.yaml beside somebody's run
        beside = self.file.parent / f"{name.removeprefix('run/')}.yaml"
        for path in (self.root / f"{name}.yaml", beside):
            if path.is_file():
                return path
        return None

    def is_config(self, config_path: str) -> bool:
        return self._locate(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return config_path == "run" or (self.root / config_path).is_dir()

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._locate(config_path)
        assert path is not None
        file = _read_file(path)
        _check_defaults_list(path, file)
        try:
            header = self._get_header_dict(file.header)
        except ValueError as error:
            raise UserError(f"{path}:1: the header line `# @…` cannot be read: {error}") from None
        if header.get("package") is None:
            header["package"] = "_global_"  # a run's keys are the config's keys, wherever it lies
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(file.values),
            header=header,
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        folder = self.root / config_path
        if not folder.is_dir() or results_filter == ObjectType.GROUP:
            return []
        return sorted(p.stem for p in folder.glob("*.yaml"))


def _check_defaults_list(path: Path, file: _File) -> None:
    """Refuse a `defaults` list that Hydra cannot read, or that would beat the file's own keys."""
    if "defaults" not in file.values:
        return
    entries, where = file.values["defaults"], f"{path}:{file.lines['defaults']}: defaults: "
    if not isinstance(entries, list):
        raise UserError(f"{where}must be a list of config names, e.g. [/base/minilm, _self_]")
    for entry in entries:
        names = list(entry.items())[0] if isinstance(entry, dict) and len(entry) == 1 else (entry, "")
        if not all(isinstance(n, str) for n in names):
            raise UserError(f"{where}{entry!r} is no entry: write a config's name, e.g. /base/minilm")
        if "hydra" in names[0]:
            raise UserError(f"{where}{names[0]!r}: Hydra's own settings have no use here: remove it")
    if "_self_" not in entries and len(file.values) > 1:
        raise UserError(f"{where}must end in `- _self_`, so that this file's own keys win over the others'")


Plugins.instance().register(RunTree)
ConfigStore.instance().store(name="fwlora_schema", node=_schema_defaults(), package="_global_")
_hydra_lock = threading.Lock()  # Hydra keeps one global instance


def available_runs(config_dir: str | None = None) -> list[str]:
    """The ids of all runs in the packaged tree and, if given, in a tree of the user's own."""
    folders = [CONF / "run"]
    if config_dir is not None:
        folders += [Path(config_dir) / "run", Path(config_dir)]
    return sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob("*.yaml")})


def find_run(run: str, config_dir: str | None = None) -> Path:
    """The file of a run: a path to a .yaml file, or an id in `config_dir` or the packaged tree."""
    if not run:
        raise UserError("run= is empty: name a run id or a .yaml file")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"{config_dir}: there is no such folder of run configs")
    try:
        if run.endswith((".yaml", ".yml")) or "/" in run:
            return Path(run).expanduser().resolve()  # whatever is wrong with it, reading it says so
        folders = [CONF / "run"]
        if config_dir is not None:
            folders = [Path(config_dir).resolve() / "run", Path(config_dir).resolve(), *folders]
        for folder in folders:
            if (folder / f"{run}.yaml").is_file():
                return folder / f"{run}.yaml"
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"run={run[:100]!r} cannot name a file: {error}") from None
    known = available_runs(config_dir)
    raise UserError(
        f"there is no run {run!r}{_nearest(run, known)}; known runs: {', '.join(known)}, or the path of a .yaml file"
    )


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except (HydraException, RecursionError) as error:
            reason = next((x for x in str(error).splitlines() if x.strip()), "").split(": ", 1)[-1]
            raise UserError(
                f"override `{text}` cannot be read ({reason}): write key=value, and quote values "
                "with spaces or special characters, e.g. \"dataset.root='/my data'\""
            ) from None
        _refuse_override(text, override)
        parsed.append(override)
    return parsed


def _refuse_override(text: str, override: Override) -> None:
    key = override.key_or_group
    if key == "run" or key.startswith("run@"):
        raise UserError(f"override `{text}`: the run is named once, as run=<run_id>")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise UserError(f"override `{text}`: Hydra's own settings have no use here; results go to results_dir=")
    if "_target_" in text:
        raise UserError(f"override `{text}`: _target_ is refused: a config names values, it runs no code")
    fault = _interpolation_fault(text)
    if fault:
        raise UserError(f"override `{text}`: {fault}")
    free = key.startswith("optuna.search_space") or override.is_delete() or "/" in key or key == "base"
    if key not in KEYS and not free:
        raise UserError(f"override `{text}`: {key!r} is no key of a run config{_nearest_key(key)}")


def _compose(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed config as plain values; missing keys are left out."""
    # The run's own tree comes first, so that a copied and changed tree wins over the packaged one.
    searchpath = f"hydra.searchpath=['{RunTree.url(CONF / 'run' / file.name)}']"
    with _hydra_lock:
        hydra = GlobalHydra.instance()
        before, hydra.hydra = hydra.hydra, None
        try:
            version.setbase("1.3")
            # What initialize_config_dir does, for a source that is not a plain folder.
            Hydra.create_main_hydra2("fwlora", create_config_search_path(RunTree.url(file)))
            cfg = compose("config", overrides=[searchpath, f"run={_GIVEN}", *overrides])
            # Files and overrides hold plain references only, so resolving runs no resolver.
            composed = OmegaConf.to_container(cfg, resolve=True)
        except (HydraException, OmegaConfBaseException, RecursionError, AssertionError) as error:
            raise UserError(_compose_message(file, error)) from None
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(_compose_message(file, error)) from None
        finally:
            GlobalHydra.instance().hydra = before
    return _without_missing(composed)


def _without_missing(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_missing(v) for k, v in data.items() if not (isinstance(v, str) and v == "???")}
    return data


def _compose_message(file: Path, error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return f"{file}: its references or its defaults go in a circle: write one of them out"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = next((x.strip() for x in str(cause).splitlines() if x.strip()), type(cause).__name__)
    text = text.replace(f"run/{_GIVEN}", file.name)
    key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
    if key and str(key) not in text:
        text = f"{key}: {text}"
    if str(key).startswith("optuna."):
        text += "; this run has no optuna block: give a whole one, +optuna={…}"
    return f"{file}: cannot be composed: {text}"


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


def _listing(faults: Sequence[str]) -> str:
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
        return f"is no key of a run config{_nearest_key(key)}"
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "literal_error":
        allowed = ctx["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        near = _nearest(str(value), allowed)
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


def _issues_of(error: ValidationError, data: Any) -> list[Issue]:
    """pydantic's errors as issues under the keys that people wrote, one for each key."""
    issues: dict[str, Issue] = {}
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, _Faults):
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
# What the rest of the package calls
# ---------------------------------------------------------------------------------------------


def load_run(run: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> RunConfig:
    """Compose and check one run.

    `run` is an id of the packaged tree or of `config_dir` (`run/` below it, or flat), or the path
    of a .yaml file. `overrides` are Hydra's (`a.b=c`, `+a.b=c`, `~a.b`), without sweeps. Raises
    UserError with every fault found.
    """
    file = find_run(run, config_dir)
    parsed = _parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"override `{override.input_line}` is a sweep, which needs --multirun; a list goes in brackets, a=[b,c]"
            )
    source = _read_file(file)  # first, so that its faults come with their lines
    # Every key of the schema is there from the start, so that `+key=` can only mean its value.
    lines = [
        f"+{text}" if o.is_add() and o.key_or_group in KEYS else text for text, o in zip(overrides, parsed, strict=True)
    ]
    data = _compose(file, lines)
    given = {o.key_or_group: o.input_line for o in parsed}
    issues = _faults_of(data)
    if issues:
        raise UserError(_listing([f"{_place(file, source.lines, given, i.key)}{i.text}" for i in issues]))
    return RunConfig.model_validate(data)


def _faults_of(data: dict[str, Any]) -> list[Issue]:
    """Every fault of a composed config: of single keys first, then of their combinations.

    Combinations are judged with the faulty keys left out, so that one reading lists everything.
    """
    try:
        RunConfig.model_validate(data)
        return []
    except ValidationError as error:
        issues = _issues_of(error, data)
    rest = json.loads(json.dumps(data))
    for issue in issues:
        try:
            *blocks, last = issue.key.split(".")
            block = _get(rest, ".".join(blocks)) if blocks else rest
            block.pop(last, None)
            if issue.key in _PLACEHOLDERS:
                block[last] = _PLACEHOLDERS[issue.key]
        except (KeyError, TypeError, AttributeError):
            return issues  # a whole block is amiss: say that first
    try:
        RunConfig.model_validate(rest)
    except ValidationError as error:
        faulty = [i.key for i in issues]
        issues += [
            i
            for i in _issues_of(error, rest)
            if not any(f"{i.key}.".startswith(f"{key}.") or key in i.text for key in faulty)
        ]
    return issues


# Stand-ins for faulty keys that have no default, while the combinations of the others are judged.
_PLACEHOLDERS = {
    "run_id": "x",
    "method": "lora",
    "model.name": "x",
    "model.pretrained_id": "x",
    "dataset.name": "offline",
}


def _place(file: Path, lines: Mapping[str, int], overrides: Mapping[str, str | None], key: str) -> str:
    """`file:line: key: `, or the override that set the key."""
    for path in (key, *(key[: m.start()] for m in re.finditer(r"\.", key))):
        if path in overrides:
            return f"override `{overrides[path]}`: {key}: "
    line = lines.get(key)
    return f"{file}{f':{line}' if line else ''}: {key + ': ' if key else ''}"


def validate_file(path: str) -> list[str]:
    """Check one file and return its warnings; raises UserError with every fault found."""
    cfg = load_run(str(Path(path).expanduser().resolve()))
    return warnings_of(cfg)


def expand_runs(
    run_argument: str,
    overrides: Sequence[str] = (),
    multirun: bool = False,
    config_dir: str | None = None,
) -> list[RunConfig]:
    """All runs meant by `run=a,b` (or `glob(…)`) and, with `multirun`, by sweeps over other keys.

    The runs of a sweep get their run_id from the swept keys: `<run_id>--learning_rate=0.0005`.
    """
    parsed = _parse_overrides(overrides)
    swept = [o.key_or_group for o in parsed if o.is_sweep_override()]
    if swept and not multirun:
        raise UserError(
            f"{swept[0]} has several values, which is a sweep: add --multirun to train all of "
            f"them, or put a list in brackets, {swept[0]}=[a,b]"
        )
    if any(o.is_sweep_override() and isinstance(o.value(), Glob) for o in parsed):
        raise UserError("glob(…) matches run ids: it can only stand in run=")
    try:
        batches = BasicSweeper.split_arguments(parsed, None)[0] if swept else [list(overrides)]
    except HydraException as error:
        raise UserError(f"this sweep cannot be expanded: {str(error).splitlines()[0]}") from None
    runs = _split_runs(run_argument, config_dir)
    if len(runs) * len(batches) > MAX_RUNS:
        raise UserError(f"the sweep has {len(runs) * len(batches):,} runs; {MAX_RUNS:,} is the limit")

    configs: list[RunConfig] = []
    origin: dict[str, str] = {}
    for run in runs:
        for batch in batches:
            cfg = load_run(run, batch, config_dir)
            if len(batches) > 1 and "run_id" not in swept:
                changed = {k: v for k, v in (b.split("=", 1) for b in batch) if k.lstrip("+") in swept}
                cfg = RunConfig.model_validate(cfg.model_dump() | {"run_id": _swept_id(cfg.run_id, changed)})
            here = " ".join([f"run={run}", *batch])
            if cfg.run_id in origin:
                raise UserError(
                    f"two runs would write to one folder, both are called {cfg.run_id!r} "
                    f"({origin[cfg.run_id]} and {here}): give them distinct run_ids"
                )
            origin[cfg.run_id] = here
            configs.append(cfg)
    return configs


def _split_runs(run_argument: str, config_dir: str | None) -> list[str]:
    known = available_runs(config_dir)
    if run_argument in known:
        return [run_argument]
    try:
        if Path(run_argument).exists():
            return [run_argument]  # a path may hold what Hydra's grammar would not read
    except (OSError, ValueError):
        pass  # too long for a path, or a NUL byte: it may still be a list of runs
    try:
        (override,) = OverridesParser.create().parse_overrides([f"run={run_argument}"])
    except (HydraException, ValueError):
        return [run_argument]
    value = override.value()
    if isinstance(value, Glob):
        runs = value.filter(known)
        if not runs:
            raise UserError(f"run={run_argument} matches none of {', '.join(known)}")
        return runs
    if override.is_discrete_sweep():
        return [v.strip("'\"") for v in override.sweep_string_iterator()]
    return [run_argument]


def _swept_id(run_id: str, changed: Mapping[str, str]) -> str:
    """`<run_id>--<leaf>=<value>` for every swept key, made safe for a folder's name."""
    parts = [f"{k.lstrip('+').rsplit('.', 1)[-1]}={v}" for k, v in changed.items()]
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", f"{run_id}--{'--'.join(parts)}")
    if len(name) > 200 or re.sub(r"[^A-Za-z0-9._=,-]", "", "".join(parts)) != "".join(parts):
        # What was cut or replaced might have told two runs apart.
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
        name = f"{name[:190]}-{digest}"
    return name


def parse_seeds(text: str) -> list[int]:
    """`0..2` -> [0, 1, 2]; `1,5,7`; `0..9,42`. UserError on anything else, and on repeats."""
    cure = "write seeds=0..4, seeds=1,5,7 or seeds=0..9,42"
    seeds: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})\s*(?:\.\.\s*([0-9]{1,10})\s*)?", part, re.ASCII)
        if match is None:
            raise UserError(f"seeds={text}: {part.strip()!r} is neither a seed nor a range: {cure}")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise UserError(f"seeds={text}: {part.strip()} runs backwards: write {last}..{first}")
        if last >= 2**32:
            raise UserError(f"seeds={text}: seeds are below 2**32")
        if len(seeds) + last - first + 1 > MAX_SEEDS:
            raise UserError(f"seeds={text}: more than {MAX_SEEDS:,} seeds: {cure}")
        seeds += range(first, last + 1)
    twice = sorted({s for s in seeds if seeds.count(s) > 1})
    if twice:
        raise UserError(f"seeds={text}: seed {twice[0]} stands twice: name each seed once")
    return seeds


class _Writer(yaml.SafeDumper):
    """YAML that PyYAML, ruamel and OmegaConf read alike."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_float(dumper: _Writer, value: float) -> yaml.ScalarNode:
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


def _write_text(dumper: _Writer, value: str) -> yaml.ScalarNode:
    bare = _BARE_WORD.fullmatch(value) and value.lower() not in _YAML_WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if bare else '"')


_Writer.add_representer(float, _write_float)
_Writer.add_representer(str, _write_text)


def to_yaml(cfg: RunConfig) -> str:
    """The complete config as YAML, every key written out; reading it back gives an equal config."""
    data = cfg.model_dump()
    if cfg.optuna is not None and cfg.optuna.search_space:
        for name, dimension in cfg.optuna.search_space.items():
            data["optuna"]["search_space"][name] = dimension.model_dump(exclude_none=True)
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=1_000_000)


def fingerprint(cfg: RunConfig) -> str:
    """sha256 (hex) of everything that changes a run's result.

    Left out: names and places (run_id, model.name, results_dir), optuna, training.seed (a run is
    known by its fingerprint and seed), save_adapter, and every setting that this run ignores.
    """
    data = cfg.model_dump()
    data["method"] = cfg.arm
    data["model"]["lora"]["alpha"] = cfg.model.lora.scale
    dropped = [
        "run_id",
        "results_dir",
        "optuna",
        "model.name",
        "training.seed",
        "training.save_adapter",
    ]
    dropped += [key for key, _ in _ignored(cfg)]
    if cfg.model.lora.rank is not None:
        dropped.append("model.parameter_budget_percent")
    for key in dropped:
        if key != "model.lora.alpha":
            _set(data, key, None)
    if cfg.training.engine == "peft":
        del data["training"]["engine"]  # records from before there was a choice stay what they are
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _ignored(cfg: RunConfig) -> list[tuple[str, str]]:
    """Every key that has no effect in this run, and why."""
    found: list[tuple[str, str]] = []

    def ignore(keys: Iterable[str], why: str) -> None:
        found.extend((key, why) for key in keys)

    fw, data = cfg.fw_lora, cfg.dataset
    for block in ("fw_lora", "adalora"):
        if cfg.arm != block:
            ignore((k for k in LEAVES if k.startswith(f"{block}.")), f"method is {cfg.method}")
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
    data, defaults = cfg.model_dump(), _schema_defaults()
    ignored = _ignored(cfg)
    warnings = [
        f"{key} = {_get(data, key)} is ignored: {why}" for key, why in ignored if _get(data, key) != _get(defaults, key)
    ]
    reasons = dict(ignored)
    searched = cfg.optuna.dimensions if cfg.optuna is not None else {}
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
