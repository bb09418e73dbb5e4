"""Data, tokens and encoders that runs share, each loaded once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.config.checks import check_warmup, warnings_of
from fwlora_lab.config.schema import DatasetConfig, ModelConfig, RunConfig
from fwlora_lab.data.load import load_task, split_task, whole_dataset
from fwlora_lab.data.task import TaskData, repetitions
from fwlora_lab.data.tokens import TokenTable, tokenize
from fwlora_lab.errors import UserError
from fwlora_lab.lanes.architectures import missing_in_lanes
from fwlora_lab.lanes.settings import supports_estimator
from fwlora_lab.models.adapter_plan import AdapterPlan, plan_adapters
from fwlora_lab.models.backbones import Backbone, load_backbone
from fwlora_lab.models.classifier import ClassifierSkeleton
from fwlora_lab.models.methods import parts_of
from fwlora_lab.models.weights import local_weights
from fwlora_lab.records.folder import RunFolder
from fwlora_lab.training.device import in_bf16
from fwlora_lab.training.jobs import Job, RunSpec, steps_per_epoch


@dataclass
class ResourceCache:
    """What runs share. Make one and pass it to every call that trains: nothing is then read twice.

    device: where the runs train.
    """

    device: torch.device
    _whole_tasks: dict[str, TaskData] = field(default_factory=dict)  # before they are split
    _tasks: dict[str, TaskData] = field(default_factory=dict)
    _backbones: dict[str, Backbone] = field(default_factory=dict)
    _tables: dict[tuple[str, str, str], TokenTable] = field(default_factory=dict)
    _repetitions: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    _skeletons: dict[tuple[str, TaskSpec], ClassifierSkeleton] = field(default_factory=dict)

    def task(self, dataset: DatasetConfig) -> TaskData:
        """The data set, read at its first use, however many configs split the same examples in different ways."""
        key = dataset.model_dump_json()
        if key not in self._tasks:
            whole = whole_dataset(dataset)
            whole_key = whole.model_dump_json()
            if whole_key not in self._whole_tasks:
                self._whole_tasks[whole_key] = load_task(whole)
            self._tasks[key] = split_task(self._whole_tasks[whole_key], dataset)
        return self._tasks[key]

    def backbone(self, model: ModelConfig) -> Backbone:
        """The encoder's config and tokenizer, read at their first use."""
        key = _backbone_key(model)
        if key not in self._backbones:
            self._backbones[key] = load_backbone(model)
        return self._backbones[key]

    def skeleton(self, job: Job) -> ClassifierSkeleton:
        """The job's classifier without its frozen weights."""
        key = (_backbone_key(job.cfg.model), job.spec)
        if key not in self._skeletons:
            self._skeletons[key] = ClassifierSkeleton(job.backbone, job.spec)
        return self._skeletons[key]

    def tokens(self, cfg: RunConfig, split: str) -> TokenTable:
        """The split's examples as tokens of the config's encoder.

        Raises:
            UserError: the encoder reads fewer tokens than dataset.max_length, or the split is empty.
        """
        data, backbone = self.task(cfg.dataset), self.backbone(cfg.model)
        if cfg.dataset.max_length > backbone.max_tokens:
            raise UserError(
                f"dataset.max_length={cfg.dataset.max_length} is more than the "
                f"{backbone.max_tokens} tokens that {backbone.name} can read. "
                f"Set dataset.max_length={backbone.max_tokens} or less."
            )
        examples = getattr(data, split)
        if not len(examples):
            raise UserError(
                f"training.evaluate_on={split} needs a {split} split, and it is empty. "
                "Set dataset.validation_fraction above 0, or training.evaluate_on=dev."
                if split == "validation"
                else f"the {split} split of {data.source} is empty."
            )
        key = (cfg.dataset.model_dump_json(), _backbone_key(cfg.model), split)
        if key not in self._tables:
            settings = cfg.dataset
            self._tables[key] = tokenize(examples, backbone.tokenizer, settings.max_length, settings.truncation)
        return self._tables[key]

    def job(self, run: RunSpec) -> Job:
        """The run with all that it needs.

        Raises:
            UserError: it cannot be trained as it is configured.
        """
        training = run.cfg.training.model_copy(update={"seed": run.seed})
        cfg = run.cfg.model_copy(update={"training": training})
        data, backbone = self.task(cfg.dataset), self.backbone(cfg.model)
        train, evaluation = (self.tokens(cfg, split) for split in ("train", cfg.training.evaluate_on))
        total_steps = cfg.training.epochs * steps_per_epoch(cfg, len(data.train))
        check_warmup(cfg, total_steps, len(data.train))
        plan = plan_adapters(cfg, backbone, total_steps)
        notes = [*warnings_of(cfg), *plan.warnings]
        if cfg.training.mixed_precision == "bf16" and not in_bf16(cfg, self.device):
            notes.append("training.mixed_precision=bf16: this CPU has no instructions for it; the run trains in fp32.")
        notes += self._notes_on_data(cfg)
        missing = _missing_in_lanes(cfg, backbone, plan)
        lanes = cfg.training.engine == "lanes" and missing is None
        if lanes and cfg.dataset.padding == "max_length":
            notes.append(
                "dataset.padding=max_length changes nothing here: lanes compute true tokens only. "
                "Set training.engine=peft to pad."
            )
        if cfg.training.engine == "lanes" and not lanes:
            notes.append(
                f"training.engine=lanes does not know {missing}: the run trains with PEFT's layers "
                "and padded batches, one model a run."
            )
        return Job(
            cfg=cfg,
            data=data,
            backbone=backbone,
            weights=local_weights(cfg.model),
            train=train,
            evaluation=evaluation,
            plan=plan,
            total_steps=total_steps,
            engine="lanes" if lanes else "peft",
            folder=RunFolder(cfg.results_dir, cfg.run_id, run.seed),
            warnings=tuple(notes),
        )

    def _notes_on_data(self, cfg: RunConfig) -> list[str]:
        """What of the data is not read, or is read twice."""
        data, evaluated_on = self.task(cfg.dataset), cfg.training.evaluate_on
        notes = []
        for split in ("train", evaluated_on):
            table = self.tokens(cfg, split)
            if table.cut_examples:
                lost = table.cut_tokens / (table.cut_tokens + len(table.tokens))
                notes.append(
                    f"dataset.max_length={cfg.dataset.max_length} cuts {table.cut_examples} of {len(table)} {split} "
                    f"texts ({table.cut_examples / len(table):.1%}): {lost:.1%} of all tokens are not read."
                )
        key = (cfg.dataset.model_dump_json(), evaluated_on)
        if key not in self._repetitions:
            self._repetitions[key] = repetitions(data.train, getattr(data, evaluated_on))
        in_train, in_evaluation = self._repetitions[key]
        if in_train:
            notes.append(f"{in_train} of {len(data.train)} training texts repeat an earlier one.")
        if in_evaluation:
            notes.append(
                f"{in_evaluation} of {len(getattr(data, evaluated_on))} {evaluated_on} texts are training texts too: "
                "the scores on them say nothing about new texts."
            )
        return notes


def _backbone_key(model: ModelConfig) -> str:
    return f"{model.pretrained_id}@{model.revision}"


def _missing_in_lanes(cfg: RunConfig, backbone: Backbone, plan: AdapterPlan) -> str | None:
    """What of the run the lane engine does not know; None where it can train the run."""
    if missing := missing_in_lanes(backbone.config, plan.initial_ranks()):
        return missing
    if not parts_of(cfg.method_name).lanes:
        return f"the method {cfg.method_name}"
    if cfg.method_name == "fw_lora" and not supports_estimator(cfg.fw_lora.estimator):
        return f"the estimator {cfg.fw_lora.estimator}"
    return None
