"""The settings of the run in a lane, and its progress apart from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch

import fwlora
from fwlora.choices import Estimator
from fwlora_lab.models.adapter_plan import AdaLoraSchedule


@dataclass
class LaneSettings:
    """The hyper-parameters of one run.

    Args:
        ranks: rank by target, 0 or absent for a target without an adapter.
        scale: s of ΔW = s·B·A.
        dropout: rate for the adapters' input.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: the gradient is clipped to this norm; None: it is not clipped.
        seed: of the dropout masks.
        fw: settings of Fisher-Weighted LoRA; None for other methods.
        warmup_steps: K, the steps before its penalty begins.
        ada: the schedule of AdaLoRA and SVD-LoRA; None for other methods.
    """

    ranks: Mapping[str, int]
    scale: float
    dropout: float
    weight_decay: float
    max_grad_norm: float | None
    seed: int
    fw: fwlora.FWLoraConfig | None = None
    warmup_steps: int = 0
    ada: AdaLoraSchedule | None = None


@dataclass
class Lane:
    """One run in the engine: its settings, its random generator and the number of steps it has made."""

    settings: LaneSettings
    generator: torch.Generator
    step: int = 0

    @property
    def phase(self) -> str:
        """The part of the run that its next step belongs to, by the names that the methods use."""
        settings = self.settings
        if settings.ada is not None and settings.ada.tinit < settings.ada.total_steps:
            return settings.ada.phase(self.step)
        if settings.fw is None:
            return "training"
        return "warmup" if self.step < settings.warmup_steps else "penalty"

    @property
    def is_observed(self) -> bool:
        """Whether the next step's gradient goes into the Fisher average."""
        fw = self.settings.fw
        if fw is None or self.step >= self.settings.warmup_steps:
            return False
        since_start = self.step - fw.fisher_start
        return since_start >= 0 and since_start % fw.fisher_interval == 0

    @property
    def is_penalized(self) -> bool:
        """Whether the next step applies Fisher-Weighted LoRA's penalty."""
        return self.settings.fw is not None and self.step >= self.settings.warmup_steps

    @property
    def is_scored(self) -> bool:
        """Whether the next step updates AdaLoRA's importance scores."""
        ada = self.settings.ada
        return ada is not None and self.step + 1 < ada.total_steps - ada.tfinal


def supports_estimator(name: str) -> bool:
    """Whether the engine measures this estimator's f; registered estimators hook PEFT's layers."""
    return name in get_args(Estimator)
