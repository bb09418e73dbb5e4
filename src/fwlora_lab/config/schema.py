"""The schema of one run: the only place that knows a key's name, type and range.

pydantic checks a config against it; `config.load` reads the files and composes configs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fwlora.choices import Averaging, Extensible, PenaltyMode, PenaltyNorm, choices_of
from fwlora_lab.catalog.extensions import load_extensions
from fwlora_lab.catalog.methods import METHODS, MethodName
from fwlora_lab.catalog.tasks import SOURCES, TASKS, source_of, tasks_of
from fwlora_lab.config.block import Block
from fwlora_lab.config.faults import InvalidRun, Issue
from fwlora_lab.config.former_names import with_present_names
from fwlora_lab.text import did_you_mean


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
        raise ValueError(f"{value!r} is not a method{did_you_mean(value, METHODS)}: use one of {', '.join(METHODS)}")
    return value


def _source_name(value: str) -> str:
    if source_of(value) is None:
        raise ValueError(
            f"the text {value!r} is not allowed{did_you_mean(value, SOURCES)}: use one of {', '.join(SOURCES)}"
        )
    return value


def _registered(setting: Extensible) -> AfterValidator:
    """A setting of the method whose choices `fwlora.register_weighting` and `fwlora.register_estimator` add to."""

    def check(value: str) -> str:
        if value not in choices_of(setting):
            load_extensions()
        if value not in (names := choices_of(setting)):
            raise ValueError(
                f"the text {value!r} is not allowed{did_you_mean(value, names)}: use one of {', '.join(names)}"
            )
        return value

    return AfterValidator(check)


def _warmup_steps(value: int | float) -> int | float:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{value} is too short: use at least 1 step, or a fraction such as 0.25")
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
    """The backbone: `minilm`, `mpnet`, a local folder or a hub id, and the budget in percent of its size."""

    name: Text
    pretrained_id: Text
    revision: Text | None = None
    parameter_budget_percent: Annotated[float, Field(gt=0, le=100)] | None = None
    lora: LoraSettings = Field(default_factory=LoraSettings)


class DatasetConfig(Block):
    """The data. `seed` carves and samples: all training seeds of a run see the same split."""

    name: Annotated[str, AfterValidator(_source_name)]
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
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Seed = 0


class TrainingConfig(Block):
    """The loop. `evaluate_on` is `validation` while tuning, `dev` for what is reported.

    `engine` trains a run in a lane of a shared backbone on packed batches, several runs at once (`lanes`), or with
    PEFT's layers, padded batches and one model a run (`peft`), as the public reference and where lanes do not know
    the architecture. `mixed_precision=bf16` computes the frozen encoder in bf16 where the device has instructions for
    it, and in fp32 elsewhere; what is trained stays in fp32. `checkpoint_minutes` is the longest time between two
    checkpoints, of which there is one after every epoch as well.
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
    evaluate_on: Literal["dev", "validation"] = "dev"
    save_adapter: bool = True
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    engine: Literal["lanes", "peft"] = "lanes"


class FWLoraSettings(Block):
    """λ, K (steps, or a fraction of the run), the EMA factor, the rest as in `FWLoraConfig`."""

    penalty_strength: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: Annotated[int | float, AfterValidator(_warmup_steps)] = 500
    fisher_ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    estimator: Annotated[str, _registered("estimator")] = "exact"
    fisher_interval: Positive = 1
    sketch_columns: Positive = 4
    averaging: Averaging = "raw"
    weighting: Annotated[str, _registered("weighting")] = "importance"
    gamma: Annotated[float, Field(ge=0)] = 0.5
    max_weight_ratio: Annotated[float, Field(ge=1)] = 4.0
    normalize_weights: bool = False
    penalty_mode: PenaltyMode = "loss"
    penalty_norm: PenaltyNorm = "update"
    fisher_start: Annotated[int, Field(ge=0)] = 0


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
    def method_name(self) -> MethodName:
        """The method under its one short name."""
        return METHODS[self.method]

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, data: Any) -> Any:
        load_extensions()  # first of all validators: a method or a data set may be an extension's
        return with_present_names(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        issues = _impossible(self)
        if issues:
            raise InvalidRun(issues)
        return self


def _impossible(cfg: RunConfig) -> list[Issue]:
    """Settings that are each legal and cannot be combined."""
    issues: list[Issue] = []

    def fault(key: str, text: str, *related: str) -> None:
        issues.append(Issue(key, text, related=related))

    lora, data = cfg.model.lora, cfg.dataset
    if not lora.enabled:
        fault("model.lora.enabled", "every method here trains LoRA adapters: set it to true")
    if lora.rank is None and cfg.model.parameter_budget_percent is None:
        fault(
            "model.lora.rank",
            "neither it nor model.parameter_budget_percent is given: set one, e.g. rank: 4",
            "model.parameter_budget_percent",
        )
    issues += dataset_issues(data)
    if cfg.training.evaluate_on == "validation" and data.validation_fraction == 0:
        fault(
            "training.evaluate_on",
            "validation needs a part of train to score on: set dataset.validation_fraction=0.1",
            "dataset.validation_fraction",
        )
    fw = cfg.fw_lora
    if cfg.method_name == "fw_lora" and isinstance(fw.warmup_steps, int) and fw.fisher_start >= fw.warmup_steps:
        fault(
            "fw_lora.fisher_start",
            f"{fw.fisher_start} leaves no step to watch before fw_lora.warmup_steps = {fw.warmup_steps}: "
            "lower it, or watch longer",
            "fw_lora.warmup_steps",
        )
    return issues


def dataset_issues(data: DatasetConfig) -> list[Issue]:
    """What is wrong with the data's settings, as far as it can be known without reading the data."""
    issues: list[Issue] = []

    def fault(key: str, text: str, *related: str) -> None:
        issues.append(Issue(f"dataset.{key}", text, related=tuple(f"dataset.{name}" for name in related)))

    source = SOURCES[data.name]
    tasks = tasks_of(source)
    task = TASKS.get(data.name)
    if "subset" in source.keys:
        task = tasks.get(data.subset or "")
        if data.subset is None:
            fault("subset", f"{source.name} needs it: one of {', '.join(tasks)}", "name")
        elif task is None:
            fault(
                "subset",
                f"{data.subset!r} is not a task of {source.name}{did_you_mean(data.subset, tasks)}: "
                f"use one of {', '.join(tasks)}",
            )
    if "split" in source.keys:
        if data.split == data.eval_split:
            fault(
                "eval_split",
                f"{data.eval_split!r} is also dataset.split: a run must not be scored on what it "
                "trains on; use split: train, eval_split: validation",
                "split",
            )
        else:
            if data.split != "train":
                fault("split", f"{data.split!r}: {data.name} is trained on its split train")
            known = task.eval_splits if task is not None else ("validation",)
            if data.eval_split not in known:
                fault(
                    "eval_split",
                    f"{data.eval_split!r} has no public labels or does not exist"
                    f"{did_you_mean(data.eval_split, known)}: use {' or '.join(known)}",
                )
    if "train_file" in source.keys:
        for key in ("train_file", "eval_file", "text_column", "label_column"):
            if getattr(data, key) is None:
                fault(key, f"dataset.name {data.name} needs it: add it", "name")
        if data.train_file is not None and data.train_file == data.eval_file:
            fault(
                "eval_file",
                "is the train_file: a run must not be scored on what it trains on; name another",
            )
        texts = [data.text_column] if isinstance(data.text_column, str) else data.text_column or []
        if data.text_column is not None and (len(texts) not in (1, 2) or len(set(texts)) < len(texts)):
            fault("text_column", "name one column, or a list of two different ones")
        if data.label_column is not None and data.label_column in texts:
            fault("label_column", f"{data.label_column!r} is a text column: name another")
    return issues
