"""A run on its way to a config: its values, its search space, and where each of them comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fwlora_lab.catalog.methods import MethodName
from fwlora_lab.catalog.tasks import TASKS
from fwlora_lab.config.checks import reads
from fwlora_lab.config.former_names import present_leaf
from fwlora_lab.config.keys import KEYS, get_key, schema_defaults
from fwlora_lab.design.names import ResolvedModel
from fwlora_lab.design.schema import DesignMethod, DesignRun
from fwlora_lab.design.spaces import ParsedSpace

T = TypeVar("T")
DEFAULTS = schema_defaults()
BUDGET = "model.parameter_budget_percent"
N_TRIALS = "optuna.n_trials"
# The keys that a design, its prose or its example output can set.
SETTABLE_KEYS = [
    key
    for key, is_block in KEYS.items()
    if not is_block and key.split(".")[0] in ("model", "dataset", "training", "fw_lora", "adalora")
]
# The names that run configs have used for these methods in these roles from the beginning.
_ROLE_NAMES = {
    ("proposed", "fw_lora"): "proposed_fw_lora",
    ("comparative", "lora"): "baseline_lora",
    ("comparative", "adalora"): "baseline_adalora",
}


@dataclass(frozen=True)
class Sourced(Generic[T]):
    """A value and where it comes from.

    Args:
        note: the comment of the value in the run config; "" for a value that the design states.
        source_location: the design's key; "" for a default.
    """

    value: T
    note: str = ""
    source_location: str = ""


@dataclass(frozen=True)
class SearchEntry:
    """A range that the design, an example config or a language model gives.

    Args:
        space: what the range means.
        name: the searched key as it is written there.
        source_location: the design's key.
        written: the range as it is written there.
    """

    space: ParsedSpace
    name: str
    source_location: str
    written: Any = None

    @property
    def present_name(self) -> str:
        """The searched key as run configs name it today."""
        return present_leaf(self.name)


@dataclass(frozen=True)
class MethodEntry:
    """A method of the design.

    Args:
        role: "proposed", or "comparative-1" and so on, as run ids begin.
        source_location: the design's key.
        method: what the design says of it.
        method_name: the method that is meant.
        spaces: key -> the ranges of this method alone.
    """

    role: str
    source_location: str
    method: DesignMethod
    method_name: MethodName
    spaces: Mapping[str, SearchEntry]

    @property
    def config_name(self) -> str:
        """What a run config's `method` says."""
        role = "proposed" if self.role == "proposed" else "comparative"
        return _ROLE_NAMES.get((role, self.method_name), self.method_name)


@dataclass(frozen=True)
class UnknownMethod:
    """A method of the design that no name known here means; its runs are left out.

    Args:
        role, source_location: as of a MethodEntry.
        name: as the design writes it; a description's first words.
    """

    role: str
    source_location: str
    name: str


@dataclass
class RunDraft:
    """The parts of one run, and the values that its keys have so far.

    Args:
        id_note: the comment of `run_id`.
        run: the run as the design lists it, under the key `run_location`; None where the design lists no runs.
        dataset_name: as the design writes it; `dataset_location` is its key.
        listed_budget: the budget, in percent, that this run was planned for.
        settings: what the run, its method and the design set, and what follows from the data set.
        values: the values found so far, with those of `settings`.
        search: key -> the range that the run searches.
    """

    run_id: str
    id_note: str
    run: DesignRun | None
    run_location: str
    method: MethodEntry
    model: ResolvedModel
    dataset_name: str
    dataset_location: str
    listed_budget: Sourced[float] | None
    settings: dict[str, Sourced[Any]] = field(default_factory=dict)
    values: dict[str, Sourced[Any]] = field(default_factory=dict)
    search: dict[str, SearchEntry] = field(default_factory=dict)

    @property
    def method_name(self) -> MethodName:
        return self.method.method_name

    @property
    def title(self) -> str:
        return f"{self.method.role} on {self.model.name} and {self.dataset_name}"

    @property
    def budget(self) -> float | None:
        """The parameter budget in percent of the model's parameters; None without one."""
        value = self.get(BUDGET)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def n_trials(self) -> Sourced[int]:
        return self.values[N_TRIALS]

    def get(self, key: str) -> Any:
        """The value of a key, or the default of run configs."""
        return self.values[key].value if key in self.values else get_key(DEFAULTS, key)

    def searched_ends(self, key: str) -> list[Any]:
        """The lowest and the highest searched value of a key, or its choices; [] if it is not searched."""
        return self.search[key].space.ends() if key in self.search else []

    def trained_examples(self, examples: int) -> int:
        """How many of a task's training examples the run trains on."""
        limit, carved = self.get("dataset.train_examples"), self.get("dataset.validation_fraction")
        if isinstance(carved, int | float):
            examples = round(examples * (1 - carved))
        return min(examples, limit) if isinstance(limit, int) else examples

    def fewest_steps(self) -> int | None:
        """Optimiser steps of the run, or of the shortest that its search tries; None where they are not known."""
        task = TASKS.get(str(self.get("dataset.subset") or self.get("dataset.name")))
        keys = "training.batch_size", "training.epochs", "training.gradient_accumulation_steps"
        batches, epochs, accumulated = ([self.get(key), *self.searched_ends(key)] for key in keys)
        if task is None or not task.train_examples:
            return None
        if not all(isinstance(v, int) and v > 0 for v in (*batches, *epochs, *accumulated)):
            return None
        examples = self.trained_examples(task.train_examples)
        return min(epochs) * math.ceil(examples / (max(batches) * max(accumulated)))

    def applies(self, key: str) -> bool:
        """Whether this run's method reads the key."""
        return reads(self.method_name, key)

    @property
    def own_settings(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The settings of this run and of its method with the keys that hold them; the first win."""
        return [
            (f"{self.run_location}.settings", self.run.settings if self.run is not None else {}),
            (f"{self.method.source_location}.settings", self.method.method.settings),
        ]
