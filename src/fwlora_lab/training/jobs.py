"""A run to train, and a run with all that it needs: checked config, data, tokens, encoder, adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from torch import Tensor

from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.data.task import TaskData
from fwlora_lab.data.tokens import TokenTable, collate, epoch_batches, length_groups
from fwlora_lab.errors import UserError
from fwlora_lab.models.adapter_plan import AdapterPlan
from fwlora_lab.models.backbones import Backbone
from fwlora_lab.records.folder import RunFolder, differences, load_record, status_of
from fwlora_lab.seeds import derive


@dataclass(frozen=True)
class RunSpec:
    """A run to train: `seed` takes the place of `training.seed`."""

    cfg: RunConfig
    seed: int


@dataclass(frozen=True)
class Job:
    """A run with all that it needs and does not change; `cfg.training.seed` is its seed.

    `weights` is the sha256 of the encoder's files, as `models.weights` has it.
    """

    cfg: RunConfig
    data: TaskData
    backbone: Backbone
    weights: str | None
    train: TokenTable
    evaluation: TokenTable
    plan: AdapterPlan
    total_steps: int
    engine: Literal["lanes", "peft"]
    folder: RunFolder
    warnings: tuple[str, ...]

    @property
    def seed(self) -> int:
        return self.cfg.training.seed

    @property
    def key(self) -> tuple[str, int]:
        return self.cfg.run_id, self.seed

    @property
    def spec(self) -> TaskSpec:
        return self.data.spec

    def epoch_batches(self, epoch: int) -> list[Tensor]:
        """The examples of each optimizer step of an epoch, in this run's own order."""
        return epoch_batches(len(self.train), examples_per_step(self.cfg), derive(self.seed, "order"), epoch)

    def micro_batches(self, group: Tensor) -> list[Tensor]:
        """One step's examples in the parts that go through the model one after another."""
        parts = list(group.split(self.cfg.training.batch_size))
        if self.cfg.dataset.padding == "grouped":
            lengths = self.train.lengths()
            parts = [part[g] for part in parts for g in length_groups(lengths[part])]
        return parts

    def batch(self, table: TokenTable, index: Tensor) -> dict[str, Tensor]:
        """Examples of a table, padded as the config says."""
        data, pad = self.cfg.dataset, self.backbone.tokenizer.pad_token_id
        return collate(table, index, cast(int, pad or 0), data.padding, data.max_length)

    def is_complete(self) -> bool:
        """Whether the run is trained already.

        Raises:
            UserError: a run with another config or other data is in its place.
        """
        status = status_of(self.cfg, self.seed, self.data.fingerprint, self.weights)
        if status == "different":
            reasons = differences(self.cfg, load_record(self.folder.path), self.data.fingerprint, self.weights)
            raise UserError(
                f"{self.folder.path} holds a finished run of another kind: {'; '.join(reasons)}. "
                "Set another run_id or results_dir, or train it anew with again=true."
            )
        return status == "complete"


def steps_per_epoch(cfg: RunConfig, examples: int) -> int:
    """Optimizer steps in an epoch; the last one may see fewer examples."""
    return math.ceil(examples / examples_per_step(cfg))


def examples_per_step(cfg: RunConfig) -> int:
    """Examples that one optimizer step sees."""
    return cfg.training.batch_size * cfg.training.gradient_accumulation_steps


def refuse_collisions(jobs: Sequence[Job], overwrite: bool) -> None:
    """Refuse two jobs with one folder and, unless they may be overwritten, runs of another kind in their folders."""
    seen: dict[Path, Job] = {}
    for job in jobs:
        path = job.folder.path.resolve()
        if path in seen:
            raise UserError(
                f"run_id={job.cfg.run_id!r} with seed {job.seed} is asked for twice. "
                "Give each variant a run_id of its own, for example run_id=NAME."
            )
        seen[path] = job
        if not overwrite:
            job.is_complete()
