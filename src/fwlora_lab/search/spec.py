"""What a search tries: a run config, the keys that its trials vary, and the config of each trial."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwlora_lab.config.checks import warnings_of
from fwlora_lab.config.fingerprint import in_fingerprint
from fwlora_lab.config.former_names import stored_key, with_stored_names
from fwlora_lab.config.keys import LEAVES, get_key
from fwlora_lab.config.schema import DatasetConfig, Dimension, OptunaConfig, RunConfig
from fwlora_lab.config.search_space import dimensions_of
from fwlora_lab.config.validation import with_values
from fwlora_lab.errors import UserError

_VALIDATION_FRACTION = 0.1  # if the config sets no part of the training data aside
_CONCURRENT_PART = 4  # at most 1/4 of the trials run at once: the sampler learns from some before it draws the last
# Scores of trials that differ in these cannot be compared: they decide what is learnt, and what is scored.
_NOT_SEARCHED = (
    "training.seed",
    "training.evaluate_on",
    "training.save_adapter",
    "training.checkpoint_minutes",
    "model.lora.enabled",
    *(f"dataset.{key}" for key in DatasetConfig.model_fields if key not in ("max_length", "padding", "truncation")),
)
_RANK_KEYS = ("model.lora.rank", "model.parameter_budget_percent", "adalora.init_rank_factor")


def trial_run_id(number: int) -> str:
    """The name of a trial's runs, which is that of their folder in the search's `trials/`."""
    return f"trial-{number:04d}"


@dataclass(frozen=True)
class SearchSpec:
    """A run config with a search space.

    Attributes:
        cfg: the run config as it was written.
        base: what the trials' configs start from: scored on a validation split, results below the search's folder.
        dimensions: the searched keys, with dots, and the values that each may take.
    """

    cfg: RunConfig
    base: RunConfig
    optuna: OptunaConfig
    dimensions: dict[str, Dimension]

    @classmethod
    def of(cls, cfg: RunConfig) -> SearchSpec:
        """The search of a run config; UserError if it has no search space, or one that varies what is scored."""
        if cfg.optuna is None:
            raise UserError(
                f"{cfg.run_id} has no search space: add a block `optuna` with n_trials and search_space, for example\n"
                "  '+optuna={n_trials: 12, search_space: {learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}}}'"
            )
        dimensions = dimensions_of(cfg.optuna)
        for key in dimensions:
            if key in _NOT_SEARCHED:
                raise UserError(f"optuna: {key} cannot be searched: the scores of its trials could not be compared")
        fraction = cfg.dataset.validation_fraction or _VALIDATION_FRACTION
        changes = {
            "dataset.validation_fraction": fraction,
            "training.evaluate_on": "validation",
            "training.save_adapter": False,
            "optuna": None,  # the storage's password stays out of the records
            "results_dir": str(Path(cfg.results_dir) / cfg.run_id / "search" / "trials"),
        }
        return cls(cfg, with_values(cfg, changes), cfg.optuna, dimensions)

    @property
    def folder(self) -> Path:
        """Where the search writes its results."""
        return Path(self.cfg.results_dir) / self.cfg.run_id / "search"

    @property
    def seeds(self) -> list[int]:
        """The training seeds, the same for every trial."""
        first = self.cfg.training.seed
        return [(first + i) % 2**32 for i in range(self.optuna.seeds_per_trial)]

    @property
    def max_concurrent(self) -> int:
        """The most trials that one worker trains at once; the number of lanes may be lower."""
        return self.optuna.n_jobs or max(1, self.optuna.n_trials // _CONCURRENT_PART)

    @property
    def notes(self) -> list[str]:
        """What the user should know before the search starts."""
        notes = warnings_of(self.cfg)
        if not self.cfg.dataset.validation_fraction:
            notes.append(
                f"dataset.validation_fraction is 0: {_VALIDATION_FRACTION:g} of the training data is set aside to "
                "score the trials on; best.yaml trains on all of it"
            )
        if self.optuna.pruner != "none" and self.epochs < 2:
            notes.append(f"optuna.pruner={self.optuna.pruner} has nothing to prune: there is one epoch")
        return notes

    @property
    def epochs(self) -> int:
        """The most epochs that a trial trains."""
        return self._highest("training.epochs") or self.cfg.training.epochs

    def trial_config(self, number: int, values: dict[str, Any]) -> RunConfig:
        """The run config of a trial; UserError if its values contradict each other."""
        return with_values(self.base, values | {"run_id": trial_run_id(number)})

    def largest_configs(self) -> list[RunConfig]:
        """Configs with the highest rank that the space allows: lanes sized for them can hold every trial."""
        highest = {key: high for key in _RANK_KEYS if (high := self._highest(key)) is not None}
        first = {key: d.low if d.choices is None else d.choices[0] for key, d in self.dimensions.items()}
        found = []
        for values in (highest, first | highest):
            with contextlib.suppress(UserError):
                found.append(with_values(self.base, values))
        return found

    def _highest(self, key: str) -> Any:
        dimension = self.dimensions.get(key)
        if dimension is None:
            return None
        return max((v for v in dimension.choices or [dimension.high] if v is not None), default=None)

    def identity(self, data_fingerprint: str) -> dict[str, dict[str, Any]]:
        """What decides the scores of all trials, by name: two searches with the same identity share one study."""
        cfg = with_stored_names(self.base.model_dump(mode="json")) | {"method": self.base.method_name}
        keys = [key for key in LEAVES if in_fingerprint(key) and key not in self.dimensions]
        return {
            "config": {stored_key(key): get_key(cfg, stored_key(key)) for key in keys},
            "space": {
                stored_key(key): d.model_dump(mode="json", exclude_none=True) for key, d in self.dimensions.items()
            },
            "optuna": {"direction": self.optuna.direction, "seeds": self.seeds},
            "data": {"texts, labels or splits": data_fingerprint},
        }
