"""TODO"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.config.checks import check_warmup, warnings_of
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.data.load import load_task
from fwlora_lab.data.task import TaskData
from fwlora_lab.data.tokens import TokenTable, collate, length_groups, tokenize
from fwlora_lab.errors import UserError
from fwlora_lab.lanes.settings import supports
from fwlora_lab.models.backbones import Backbone, load_backbone
from fwlora_lab.models.methods import plan_adapters
from fwlora_lab.records.folder import RunDir, differences, load_record, status_of
from fwlora_lab.training.device import in_bf16


@dataclass(frozen=True)
class RunSpec:
    """A run to train: `seed` takes the place of `training.seed`."""

    cfg: RunConfig
    seed: int


@dataclass(frozen=True)
class Job:
    """A run with all that it needs and does not change."""

    cfg: RunConfig
    seed: int
    data: TaskData
    backbone: Backbone
    train: TokenTable
    evaluation: TokenTable
    total_steps: int
    folder: RunDir
    warnings: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.cfg.run_id, self.seed

    @property
    def spec(self) -> TaskSpec:
        return self.data.spec

    def micro_batches(self, group: Tensor) -> list[Tensor]:
        """One step's examples in the parts that go through the model one after another."""
        parts = list(group.split(self.cfg.training.batch_size))
        if self.cfg.dataset.padding == "grouped":
            lengths = self.train.lengths()
            parts = [part[g] for part in parts for g in length_groups(lengths[part])]
        return parts

    def batch(self, table: TokenTable, index: Tensor) -> dict[str, Tensor]:
        data, pad = self.cfg.dataset, self.backbone.tokenizer.pad_token_id
        return collate(table, index, cast(int, pad or 0), data.padding, data.max_length)


@dataclass
class ResourceCache:
    """Data, tokens and backbones, each loaded once."""

    device: torch.device
    tasks: dict[str, TaskData] = field(default_factory=dict)
    backbones: dict[str, Backbone] = field(default_factory=dict)
    tables: dict[tuple[str, str, str], TokenTable] = field(default_factory=dict)

    def job(self, run: RunSpec) -> Job:
        """The run with all that it needs; refuses what cannot be trained."""
        tasks, backbones, tables = self.tasks, self.backbones, self.tables
        training = run.cfg.training.model_copy(update={"seed": run.seed})
        cfg = run.cfg.model_copy(update={"training": training})
        data_key = cfg.dataset.model_dump_json()
        if data_key not in tasks:
            tasks[data_key] = load_task(cfg.dataset)
        backbone_key = f"{cfg.model.pretrained_id}@{cfg.model.revision}"
        if backbone_key not in backbones:
            backbones[backbone_key] = load_backbone(cfg.model)
        data, backbone = tasks[data_key], backbones[backbone_key]
        if cfg.dataset.max_length > backbone.max_tokens:
            raise UserError(
                f"dataset.max_length={cfg.dataset.max_length} is more than the "
                f"{backbone.max_tokens} tokens that {backbone.name} can read. "
                f"Set dataset.max_length={backbone.max_tokens} or less."
            )
        for split in ("train", cfg.training.evaluate_on):
            examples = getattr(data, split)
            if not len(examples):
                raise UserError(
                    f"training.evaluate_on={split} needs a {split} split, and it is empty. "
                    "Set dataset.validation_fraction above 0, or training.evaluate_on=dev."
                    if split == "validation"
                    else f"the {split} split of {data.source} is empty."
                )
            if (data_key, backbone_key, split) not in tables:
                tables[data_key, backbone_key, split] = tokenize(
                    examples, backbone.tokenizer, cfg.dataset.max_length, cfg.dataset.truncation
                )
        total_steps = cfg.training.epochs * steps_per_epoch(cfg, len(data.train))
        check_warmup(cfg, total_steps, len(data.train))
        notes = [*warnings_of(cfg), *plan_adapters(cfg, backbone, total_steps).warnings]
        if cfg.training.mixed_precision == "bf16" and not in_bf16(cfg, self.device):
            notes.append("training.mixed_precision=bf16: this CPU has no instructions for it; the run trains in fp32.")
        if cfg.training.engine == "lanes" and supports(backbone.config):
            if cfg.dataset.padding == "max_length":
                notes.append(
                    "dataset.padding=max_length changes nothing here: lanes compute true tokens only. "
                    "Set training.engine=peft to pad."
                )
        elif cfg.training.engine == "lanes":
            notes.append(
                f"training.engine=lanes does not know {backbone.config.model_type}: the run trains with PEFT's layers "
                "and padded batches, one model a run."
            )
        return Job(
            cfg=cfg,
            seed=run.seed,
            data=data,
            backbone=backbone,
            train=tables[data_key, backbone_key, "train"],
            evaluation=tables[data_key, backbone_key, cfg.training.evaluate_on],
            total_steps=total_steps,
            folder=RunDir(cfg.results_dir, cfg.run_id, run.seed),
            warnings=tuple(notes),
        )


def steps_per_epoch(cfg: RunConfig, examples: int) -> int:
    """Optimiser steps in an epoch; the last one may see fewer examples."""
    return math.ceil(examples / examples_per_step(cfg))


def examples_per_step(cfg: RunConfig) -> int:
    return cfg.training.batch_size * cfg.training.gradient_accumulation_steps


def refuse_collisions(jobs: Sequence[Job], again: bool) -> None:
    seen: dict[Path, Job] = {}
    for job in jobs:
        path = job.folder.path.resolve()
        if path in seen:
            raise UserError(
                f"run_id={job.cfg.run_id!r} with seed {job.seed} is asked for twice. "
                "Give each variant a run_id of its own, for example run_id=NAME."
            )
        seen[path] = job
        if not again:
            is_complete(job)


def is_complete(job: Job) -> bool:
    status = status_of(job.cfg, job.seed, job.data.fingerprint)
    if status == "different":
        reasons = differences(job.cfg, load_record(job.folder.path), job.data.fingerprint)
        raise UserError(
            f"{job.folder.path} holds a finished run of another kind: {'; '.join(reasons)}. "
            "Set another run_id or results_dir, or train it anew with again=true."
        )
    return status == "complete"
