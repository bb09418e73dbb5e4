"""From a run config to what the lane engine needs to know of a run."""

from __future__ import annotations

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.lanes.settings import Allocation, LaneSettings
from fwlora_lab.models.adapter_plan import AdaLoraSchedule, AdapterPlan
from fwlora_lab.models.adapter_state import fw_config
from fwlora_lab.models.methods import svd_schedule
from fwlora_lab.seeds import derive


def lane_settings(cfg: RunConfig, plan: AdapterPlan, total_steps: int) -> LaneSettings:
    """The settings of a run's lane; `plan` holds its ranks."""
    fw = fw_config(cfg, cfg.training.seed) if cfg.method_name == "fw_lora" else None
    ranks = plan.initial_ranks()
    scale, schedule = plan.scale, plan.schedule
    if schedule is not None:
        scale *= schedule.initial / (schedule.initial + 1e-5)  # as PEFT divides by the rank
    elif cfg.method_name == "svd_lora":
        schedule = svd_schedule(cfg, sum(ranks.values()), total_steps)
    return LaneSettings(
        ranks=ranks,
        scale=scale,
        ada=_allocation(schedule),
        dropout=cfg.model.lora.dropout,
        weight_decay=cfg.training.weight_decay,
        max_grad_norm=cfg.training.max_grad_norm,
        seed=derive(cfg.training.seed, "dropout"),
        fw=fw,
        warmup_steps=fw.resolve_warmup_steps(total_steps) if fw else 0,
    )


def _allocation(schedule: AdaLoraSchedule | None) -> Allocation | None:
    if schedule is None:
        return None
    return Allocation(
        final=schedule.final,
        tinit=schedule.tinit,
        tfinal=schedule.tfinal,
        delta_t=schedule.delta_t,
        beta1=schedule.beta1,
        beta2=schedule.beta2,
        orth_reg_weight=schedule.orth_reg_weight,
        total_steps=schedule.total_steps,
    )
