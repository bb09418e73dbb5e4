"""What Optuna draws a trial's values with: distributions, samplers and pruners for a search."""

from __future__ import annotations

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from fwlora_lab.config.former_names import stored_key
from fwlora_lab.config.schema import Dimension
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.seeds import derive

_STARTUP_TRIALS = 10  # drawn at random before TPE's model, but not more than a third of all


def distributions(spec: SearchSpec) -> dict[str, BaseDistribution]:
    """The search space, by the names under which the storage keeps a trial's values."""
    return {stored_key(key): _distribution(dimension) for key, dimension in spec.dimensions.items()}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.type == "categorical":
        return CategoricalDistribution(dimension.choices or [])
    low, high, step = dimension.low, dimension.high, dimension.step
    assert low is not None and high is not None
    if dimension.type == "int":
        return IntDistribution(int(low), int(high), step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.type == "loguniform", step=step)


def make_sampler(spec: SearchSpec, trial_number: int) -> BaseSampler:
    """The sampler of one trial, with a seed of its own."""
    seed = derive(spec.cfg.training.seed, f"trial {trial_number}") % 2**32
    if spec.optuna.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(1, min(_STARTUP_TRIALS, spec.optuna.n_trials // 3))
    # constant_liar: running trials count as bad ones, so that two trials that run at once do not try the same values.
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def make_pruner(spec: SearchSpec) -> BasePruner:
    """The pruner that `optuna.pruner` names."""
    if spec.optuna.pruner == "median":
        return optuna.pruners.MedianPruner()
    if spec.optuna.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=spec.epochs, reduction_factor=3)
    return optuna.pruners.NopPruner()
