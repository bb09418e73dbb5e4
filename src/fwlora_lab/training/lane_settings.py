"""TODO"""

from __future__ import annotations

from typing import cast

from peft import AdaLoraConfig

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.lanes.settings import Allocation, LaneSettings
from fwlora_lab.models.methods import AdaLoraMethod, LoraMethod, SvdLoraMethod, fw_config
from fwlora_lab.seeds import derive


def lane_settings(cfg: RunConfig, arm: LoraMethod, seed: int, total_steps: int) -> LaneSettings:
    """What the lane engine needs to know of a run; `arm` holds its adapters as they begin."""
    fw = fw_config(cfg.fw_lora, seed) if cfg.method_name == "fw_lora" else None
    ranks = {name: factors[0].shape[0] for name, factors in arm.adapters().items()}
    scale, ada = cfg.model.lora.scale, None
    if isinstance(arm, AdaLoraMethod):
        config = cast(AdaLoraConfig, arm.model.peft_config["default"])
        scale *= config.init_r / (config.init_r + 1e-5)  # as PEFT divides by the rank
        ada = Allocation(
            final=arm.final_ranks,
            tinit=config.tinit,
            tfinal=config.tfinal,
            delta_t=config.deltaT,
            beta1=config.beta1,
            beta2=config.beta2,
            orth_reg_weight=config.orth_reg_weight,
            total_steps=total_steps,
        )
    elif isinstance(arm, SvdLoraMethod):
        ada = Allocation(
            final=sum(ranks.values()),
            tinit=total_steps,
            tfinal=total_steps,
            delta_t=1,
            beta1=0.0,
            beta2=0.0,
            orth_reg_weight=cfg.adalora.orth_reg_weight,
            total_steps=total_steps,
        )
    return LaneSettings(
        ranks=ranks,
        scale=scale,
        ada=ada,
        dropout=cfg.model.lora.dropout,
        weight_decay=cfg.training.weight_decay,
        max_grad_norm=cfg.training.max_grad_norm,
        seed=derive(seed, "dropout"),
        fw=fw,
        warmup_steps=fw.resolve_warmup_steps(total_steps) if fw else 0,
    )
