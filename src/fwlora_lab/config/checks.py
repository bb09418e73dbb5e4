"""What a valid run config leaves open: keys without effect, and checks that need the data's size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from fwlora.choices import Estimator
from fwlora.config import warmup_in_steps
from fwlora_lab.catalog.encoders import packaged_encoder
from fwlora_lab.catalog.methods import MethodName
from fwlora_lab.catalog.tasks import SOURCES
from fwlora_lab.config.keys import LEAVES, get_key, schema_defaults
from fwlora_lab.config.schema import DatasetConfig, RunConfig, dataset_issues
from fwlora_lab.config.search_space import dimensions_of
from fwlora_lab.errors import UserError
from fwlora_lab.text import listing


def reads(method: MethodName, key: str) -> bool:
    """Whether this method reads the key; every method reads all keys but those of another method's block."""
    block = key.split(".")[0]
    if method == "svd_lora" and block == "adalora":
        return key == "adalora.orth_reg_weight"
    return block not in ("fw_lora", "adalora") or block == method


def ignored_keys(cfg: RunConfig) -> list[tuple[str, str]]:
    """Every key that has no effect in this run, and why."""
    found: list[tuple[str, str]] = []

    def ignore(keys: Iterable[str], why: str) -> None:
        found.extend((key, why) for key in keys)

    fw, data = cfg.fw_lora, cfg.dataset
    ignore((k for k in LEAVES if not reads(cfg.method_name, k)), f"method is {cfg.method}")
    if cfg.method_name == "fw_lora":
        if fw.weighting != "power":
            ignore(["fw_lora.gamma", "fw_lora.max_weight_ratio"], f"fw_lora.weighting is {fw.weighting}, not power")
        if fw.estimator != "sketch" and fw.estimator in get_args(Estimator):  # a registered estimator may read it
            ignore(["fw_lora.sketch_columns"], f"fw_lora.estimator is {fw.estimator}, not sketch")
        if fw.estimator == "adapter":
            ignore(["fw_lora.fisher_interval"], "fw_lora.estimator is adapter, which is free at every step")
    if cfg.model.lora.rank is None:
        ignore(["model.lora.alpha"], "without a rank there is no alpha/rank; the scale is 2")
    if packaged_encoder(cfg.model.pretrained_id):
        ignore(["model.revision"], f"{cfg.model.pretrained_id} comes in packages")
    source = SOURCES[data.name]
    for key in sorted({key for other in SOURCES.values() for key in other.keys} - set(source.keys)):
        readers = " or ".join(other.name for other in SOURCES.values() if key in other.keys)
        ignore([f"dataset.{key}"], f"dataset.name is {data.name}, not {readers}")
    if "root" in source.keys and "revision" in source.keys and data.root is not None:
        ignore(["dataset.revision"], "the data come from dataset.root")
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


def check_dataset(data: DatasetConfig) -> None:
    """Refuse settings of the data that cannot be combined; a `RunConfig` has been checked when it was built.

    Raises:
        UserError: with every fault.
    """
    issues = dataset_issues(data)
    if issues:
        raise UserError(listing([str(issue) for issue in issues]))


def check_warmup(cfg: RunConfig, total_steps: int, train_examples: int | None = None) -> None:
    """Refuse a warm-up that does not end before the run does (K ≥ total optimiser steps).

    Args:
        total_steps: optimiser steps of the run.
        train_examples: for the message.

    Raises:
        UserError: with the length of the run and a value that fits it.
    """
    k = cfg.fw_lora.warmup_steps
    if cfg.method_name != "fw_lora":
        return
    t = cfg.training
    examples = f"{train_examples} examples / " if train_examples is not None else ""
    accumulated = f" x {t.gradient_accumulation_steps}" if t.gradient_accumulation_steps > 1 else ""
    run = (
        f"the {total_steps} optimiser steps of this run ({examples}batch {t.batch_size}"
        f"{accumulated}, {t.epochs} epoch{'s' if t.epochs > 1 else ''})"
    )
    if total_steps < 2:
        raise UserError(f"fw_lora.warmup_steps: {run} are too few for a warm-up: train longer")
    steps = warmup_in_steps(k, total_steps)
    if steps >= total_steps:
        raise UserError(
            f"fw_lora.warmup_steps = {k} is not smaller than {run}: use "
            f"fw_lora.warmup_steps={max(1, total_steps // 4)} or a fraction such as 0.25"
        )
    if cfg.fw_lora.fisher_start >= steps:
        raise UserError(
            f"fw_lora.fisher_start = {cfg.fw_lora.fisher_start} leaves no step in which F is estimated: "
            f"fw_lora.warmup_steps = {k} ends the warm-up after {steps} of {run}; lower fisher_start"
        )
