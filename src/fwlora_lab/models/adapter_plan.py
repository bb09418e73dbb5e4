"""Which matrices get an adapter of which rank, and AdaLoRA's schedule of ranks over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification

from fwlora.budget import matrices, parameters_of_percent, rank_pattern
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.models.backbones import Backbone
from fwlora_lab.models.targets import target_linears


@dataclass(frozen=True)
class AdaLoraSchedule:
    """AdaLoRA's ranks over the run, in optimizer steps counted from 1, under PEFT's names.

    AdaLoRA (arXiv 2303.10512) trains ΔW = s·B·diag(Λ)·A with A and B held near orthogonal, scores each (row of A,
    λ, column of B) by a smoothed |w·∇w| times its uncertainty, and sets the λ of the least important ones to zero on
    a budget that falls with the cube of the remaining time.

    initial: rank of each matrix at first; final: ranks left at the end over all matrices together; tinit: steps before
    the first allocation; tfinal: steps after the last one; delta_t: steps from one allocation to the next; beta1,
    beta2: smoothing of the sensitivity and of its uncertainty; orth_reg_weight: weight of the orthogonality term.
    With tinit = tfinal = total_steps nothing is ever scored or masked: that is SVD-LoRA.
    """

    initial: int
    final: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float
    orth_reg_weight: float
    total_steps: int

    def budget(self, step: int, initial: int) -> int | None:
        """Ranks to keep after this step, of `initial` at first over all matrices; None where nothing is masked."""
        if step <= self.tinit:
            return None
        if step >= self.total_steps - self.tfinal:  # PEFT forces the last allocation; afterwards nothing changes
            return self.final
        if step % self.delta_t:
            return None
        left = 1 - (step - self.tinit) / (self.total_steps - self.tfinal - self.tinit)
        return int((initial - self.final) * left**3 + self.final)

    def phase(self, step: int) -> str:
        """The part of the run that the step after `step` others belongs to, in AdaLoRA's terms."""
        if step < self.tinit:
            return "initial"
        return "allocating" if step < self.total_steps - self.tfinal else "final"


@dataclass(frozen=True)
class AdapterPlan:
    """Which matrices get an adapter of which rank, all at the scale s of `ΔW = s·B·A`.

    pattern: rank by the matrix's full name, 0 for no adapter; mean_rank: the average rank that spends the same
    parameters, which is AdaLoRA's budget; schedule: AdaLoRA's, None for the other methods.
    """

    pattern: Mapping[str, int]
    scale: float
    mean_rank: float
    warnings: tuple[str, ...]
    schedule: AdaLoraSchedule | None = None

    def initial_ranks(self) -> dict[str, int]:
        """The rank that each adapted matrix begins with; AdaLoRA begins with more than it keeps."""
        if self.schedule is not None:
            return dict.fromkeys(self.pattern, self.schedule.initial)
        return {name: rank for name, rank in self.pattern.items() if rank}


def plan_adapters(cfg: RunConfig, backbone: Backbone, total_steps: int) -> AdapterPlan:
    """Ranks from `model.lora.rank`, or where that is null from `model.parameter_budget_percent`.

    Loads no weights.

    Raises:
        UserError: target modules that do not exist, a budget too small for any adapter, or a run
            too short for AdaLoRA's schedule.
    """
    lora = cfg.model.lora
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(backbone.config)
    names = target_linears(skeleton, lora.target_modules)
    targets = matrices(skeleton, names)
    unit = sum(m.cost for m in targets)
    asked = cfg.model.parameter_budget_percent
    notes = []
    if lora.rank is not None:
        pattern = dict.fromkeys(names, lora.rank)
        used = lora.rank * unit
        percent = 100 * used / backbone.parameters
        if asked is not None and abs(percent - asked) > 0.0025 * asked:
            notes.append(
                f"model.lora.rank={lora.rank} wins over model.parameter_budget_percent={asked:g}: "
                f"the adapters hold {used:,} parameters, {percent:.3f} % of the backbone. "
                "Set model.lora.rank=null to let the budget decide."
            )
        mean_rank = float(lora.rank)
    else:
        assert asked is not None  # the run config asks for one of the two
        budget = parameters_of_percent(asked, backbone.parameters)
        try:
            pattern = rank_pattern(targets, budget)
        except ValueError as error:
            raise UserError(f"model.parameter_budget_percent={asked:g}: {error}") from error
        mean_rank = budget / unit
    schedule = None
    if cfg.method_name == "adalora":
        schedule = _adalora_schedule(cfg, mean_rank, len(pattern), total_steps)
    return AdapterPlan(pattern, lora.scale, mean_rank, tuple(notes), schedule)


def _adalora_schedule(cfg: RunConfig, mean_rank: float, matrices: int, total_steps: int) -> AdaLoraSchedule:
    """The run config's ratios as steps and ranks.

    The budget that is left at the end is counted in ranks, as AdaLoRA counts it: the average rank that LoRA's
    parameters would buy, times the number of matrices.
    """
    ada = cfg.adalora
    final = math.floor(mean_rank * matrices)
    if final < 1:
        raise UserError(
            f"model.parameter_budget_percent={cfg.model.parameter_budget_percent:g} leaves AdaLoRA "
            f"less than one rank for {matrices} matrices: raise the budget."
        )
    tinit, tfinal = round(ada.tinit_ratio * total_steps), round(ada.tfinal_ratio * total_steps)
    # PEFT looks at the gradients of every step before the last allocation, and needs one at least.
    if max(tinit, 1) >= total_steps - tfinal:
        raise UserError(
            f"adalora.tinit_ratio={ada.tinit_ratio:g} and adalora.tfinal_ratio="
            f"{ada.tfinal_ratio:g} leave none of the {total_steps} steps for allocating ranks: "
            "lower one of them, or train longer."
        )
    return AdaLoraSchedule(
        # PEFT refuses to begin with as few ranks as it keeps.
        initial=max(math.ceil(ada.init_rank_factor * mean_rank), math.floor(mean_rank) + 1),
        final=final,
        tinit=tinit,
        tfinal=tfinal,
        delta_t=ada.delta_t,
        beta1=ada.beta1,
        beta2=ada.beta2,
        orth_reg_weight=ada.orth_reg_weight,
        total_steps=total_steps,
    )
