"""TODO"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from fwlora_lab.config.checks import warnings_of
from fwlora_lab.config.fingerprint import in_fingerprint
from fwlora_lab.config.former_names import stored_key, with_stored_names
from fwlora_lab.config.keys import LEAVES, get_key
from fwlora_lab.config.schema import Dimension, OptunaConfig, RunConfig
from fwlora_lab.config.search_space import dimensions_of
from fwlora_lab.config.validation import with_values
from fwlora_lab.errors import UserError
from fwlora_lab.search.trials import SharedStudy, storage_url
from fwlora_lab.seeds import derive

_VALIDATION_FRACTION = 0.1  # where the config sets no part of the training data aside
_SHARE_OF_TRIALS = 4  # a quarter of the trials at once: the sampler is to learn from some before it draws the last
_STARTUP_TRIALS = 10  # drawn at random before TPE's model, but not more than a third of all
# These decide what is learnt and what is scored: trials that differ in them have scores that do not compare.
_NOT_SEARCHED = (
    "training.seed",
    "training.evaluate_on",
    "training.save_adapter",
    "model.lora.enabled",
    *(
        f"dataset.{key}"
        for key in (
            "name subset root revision split eval_split train_file eval_file text_column label_column "
            "train_examples validation_fraction seed"
        ).split()
    ),
)
_RANK_KEYS = ("model.lora.rank", "model.parameter_budget_percent", "adalora.init_rank_factor")


@dataclass(frozen=True)
class Search:
    """A run config as a search: `given` as it was written, `base` as its trials start from."""

    given: RunConfig
    base: RunConfig
    optuna: OptunaConfig
    dimensions: dict[str, Dimension]

    @classmethod
    def of(cls, cfg: RunConfig) -> Search:
        """Raises UserError where the config has no search space, or one that scores trials on different data."""
        if cfg.optuna is None:
            raise UserError(
                f"{cfg.run_id} has no search space: add a block `optuna` with n_trials and search_space, for example\n"
                "  '+optuna={n_trials: 12, search_space: {learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}}}'"
            )
        dimensions = dimensions_of(cfg.optuna)
        for key in dimensions:
            if key in _NOT_SEARCHED:
                raise UserError(f"optuna: {key} cannot be searched: trials would be scored on something else each")
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
        return Path(self.given.results_dir) / self.given.run_id / "search"

    @property
    def storage(self) -> str:
        return self.optuna.storage or f"sqlite:///{(self.folder / 'study.db').resolve()}"

    @property
    def seeds(self) -> list[int]:
        """The training seeds, the same for every trial."""
        first = self.given.training.seed
        return [(first + i) % 2**32 for i in range(self.optuna.seeds_per_trial)]

    @property
    def n_jobs(self) -> int:
        """Trials at once in one worker, as far as there are lanes."""
        return self.optuna.n_jobs or max(1, self.optuna.n_trials // _SHARE_OF_TRIALS)

    @property
    def notes(self) -> list[str]:
        """What a person should know before it begins."""
        cfg, notes = self.given, warnings_of(self.given)
        if not cfg.dataset.validation_fraction:
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
        return self._highest("training.epochs") or self.given.training.epochs

    def space(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by the names under which trials are stored."""
        return {stored_key(key): _distribution(dimension) for key, dimension in self.dimensions.items()}

    def trial_config(self, number: int, values: dict[str, Any]) -> RunConfig:
        """The run config of a trial; UserError where its values do not go together."""
        return with_values(self.base, values | {"run_id": _trial_id(number)})

    def largest(self) -> list[RunConfig]:
        """Configs with the highest rank that the space allows, for the lanes to have room for all."""
        most = {key: high for key in _RANK_KEYS if (high := self._highest(key)) is not None}
        first = {key: d.low if d.choices is None else d.choices[0] for key, d in self.dimensions.items()}
        found = []
        for values in (most, first | most):
            with contextlib.suppress(UserError):
                found.append(with_values(self.base, values))
        return found

    def _highest(self, key: str) -> Any:
        dimension = self.dimensions.get(key)
        if dimension is None:
            return None
        return max((v for v in dimension.choices or [dimension.high] if v is not None), default=None)

    def identity(self, data_fingerprint: str) -> dict[str, dict[str, Any]]:
        """What a study is a study of, by name: two with the same are one, and their trials compare."""
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

    def shared_study(self) -> SharedStudy:
        return SharedStudy(
            storage_url(self.storage), self.given.run_id, self.optuna.direction, self._sampler, self._pruner()
        )

    def _sampler(self, number: int) -> BaseSampler:
        seed = derive(self.given.training.seed, f"trial {number}") % 2**32
        if self.optuna.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        startup = max(1, min(_STARTUP_TRIALS, self.optuna.n_trials // 3))
        # constant_liar: running trials count as bad ones, so that two at once do not try the same.
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)

    def _pruner(self) -> BasePruner:
        if self.optuna.pruner == "median":
            return optuna.pruners.MedianPruner()
        if self.optuna.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.epochs, reduction_factor=3)
        return optuna.pruners.NopPruner()


def _trial_id(number: int) -> str:
    return f"trial-{number:04d}"


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.type == "categorical":
        return CategoricalDistribution(dimension.choices or [])
    low, high, step = dimension.low, dimension.high, dimension.step
    assert low is not None and high is not None
    if dimension.type == "int":
        return IntDistribution(int(low), int(high), step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.type == "loguniform", step=step)
