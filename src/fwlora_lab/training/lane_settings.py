"""From a run config to what the lane engine needs to know of a run."""

from __future__ import annotations

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.lanes.settings import LaneSettings
from fwlora_lab.models.adapter_plan import AdapterPlan
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
        ada=schedule,
        dropout=cfg.model.lora.dropout,
        weight_decay=cfg.training.weight_decay,
        max_grad_norm=cfg.training.max_grad_norm,
        seed=derive(cfg.training.seed, "dropout"),
        fw=fw,
        warmup_steps=(fw.resolve_warmup_steps(total_steps) or 0) if fw else 0,
    )
