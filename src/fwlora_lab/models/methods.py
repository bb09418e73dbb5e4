"""Methods: from a method's name to adapters in PEFT's layers, an optimizer, a schedule, and what it does at a step.

All methods of one seed share one initial head, one order of the data and one stream of dropout masks; LoRA and FW-LoRA
also share the initial A. The training loop never asks which method it runs: what a method does at a step hangs on the
optimizer's step hooks.

`register_method` adds a method; see CONTRIBUTING.md.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

import fwlora
from fwlora.budget import lora_kwargs
from fwlora_lab.catalog.methods import register_method_name
from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.models.adapter_plan import AdaLoraSchedule, AdapterPlan, plan_adapters
from fwlora_lab.models.adapter_state import (
    AdaLoraState,
    AdapterState,
    SpectralState,
    SvdLoraState,
    adapted_layers,
    fw_config,
)
from fwlora_lab.models.backbones import Backbone
from fwlora_lab.models.classifier import build_classifier, head_modules
from fwlora_lab.seeds import derive


@dataclass(frozen=True)
class AdapterRequest:
    """What a method is given to put its adapters on a classifier.

    model: the plain classifier, all frozen; common: arguments for every PEFT config (task type, dropout, head).
    """

    model: PreTrainedModel
    cfg: RunConfig
    plan: AdapterPlan
    total_steps: int
    common: Mapping[str, Any]


class Method:
    """One run of a method in PEFT's layers: model, optimizer, schedule. This class is plain LoRA."""

    def __init__(self, state: AdapterState, cfg: RunConfig, plan: AdapterPlan, total_steps: int) -> None:
        self.state, self.model = state, state.model
        self.optimizer = _optimizer(self.model, cfg)
        self.scheduler = _scheduler(self.optimizer, cfg, total_steps)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def phase(self) -> str:
        """The part of the run that the next step belongs to; training time is counted by it."""
        return "training"

    def fisher(self) -> dict[str, float] | None:
        """F by matrix; None for a method that observes none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the method itself carries from step to step, besides the model, the optimizer and the schedule."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


class FWLoraMethod(Method):
    """LoRA with one added line."""

    def __init__(self, state: AdapterState, cfg: RunConfig, plan: AdapterPlan, total_steps: int) -> None:
        super().__init__(state, cfg, plan, total_steps)
        config = fw_config(cfg, cfg.training.seed)
        self.handle = fwlora.attach(self.model, self.optimizer, config, total_steps=total_steps)

    def phase(self) -> str:
        return self.handle.phase

    def fisher(self) -> dict[str, float]:
        return self.handle.fisher()

    def state_dict(self) -> dict[str, Any]:
        return self.handle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.handle.load_state_dict(state)


class AdaLoraMethod(Method):
    """PEFT's AdaLoRA with its rank schedule scaled to the run.

    PEFT multiplies BΛA by lora_alpha / init_r throughout, so lora_alpha = s·init_r gives it LoRA's scale s.
    """

    _SMOOTHED = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # sensitivity, its average and its uncertainty, by parameter

    def __init__(self, state: AdapterState, cfg: RunConfig, plan: AdapterPlan, total_steps: int) -> None:
        super().__init__(state, cfg, plan, total_steps)
        assert plan.schedule is not None
        self._schedule = plan.schedule
        self._tuner = cast(AdaLoraModel, self.model.base_model)
        # `target_r` can only say whole ranks per matrix.
        self._tuner.rankallocator.target_bgt = plan.schedule.final
        self._step = 0
        self.optimizer.register_step_post_hook(self._allocate)

    def phase(self) -> str:
        return self._schedule.phase(self._step)

    def state_dict(self) -> dict[str, Any]:
        allocator = self._tuner.rankallocator
        scores = {name: {k: t.clone() for k, t in getattr(allocator, name).items()} for name in self._SMOOTHED}
        # After the last allocation PEFT keeps the ranks in its config, and masks by them from then on.
        return {"step": self._step, "rank_pattern": copy.deepcopy(self._config.rank_pattern), **scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step, self._config.rank_pattern = state["step"], copy.deepcopy(state["rank_pattern"])
        for name in self._SMOOTHED:
            setattr(self._tuner.rankallocator, name, {k: t.clone() for k, t in state[name].items()})

    @property
    def _config(self) -> AdaLoraConfig:
        return cast(AdaLoraConfig, self.model.peft_config["default"])

    def _allocate(self, *_: Any) -> None:
        # After the optimizer's step and before zero_grad, counted from 1, as in PEFT's own example.
        self._step += 1
        self._tuner.update_and_allocate(self._step)


@dataclass(frozen=True)
class MethodParts:
    """How a method is built: `adapt` puts its adapters on a classifier, `state` and `method` run it.

    lanes: the lane engine trains it too; other methods train in PEFT's layers.
    """

    adapt: Callable[[AdapterRequest], PeftModel]
    state: type[AdapterState]
    method: type[Method]
    lanes: bool

    @property
    def spectral(self) -> bool:
        """Whether there is a Λ between B and A."""
        return issubclass(self.state, SpectralState)


_METHODS: dict[str, MethodParts] = {}


def register_method(
    name: str,
    adapt: Callable[[AdapterRequest], PeftModel] | None = None,
    *,
    method: type[Method] = Method,
    state: type[AdapterState] = AdapterState,
    aliases: Sequence[str] = (),
) -> None:
    """Add a method under `name`, which run configs then accept as `method: name`.

    Args:
        name: letters, digits and underscores.
        adapt: puts the adapters on a frozen classifier; None for plain LoRA's, of the planned ranks and scale.
        method: the training in PEFT's layers, a subclass of `Method`.
        state: what a record says of the adapters and how they are written, a subclass of `AdapterState`.
        aliases: other names that mean the same in run configs.

    Raises:
        ValueError: the name or an alias means another method already.
    """
    register_method_name(name, aliases)
    _METHODS[name] = MethodParts(adapt or lora_adapters, state, method, lanes=False)


def parts_of(name: str) -> MethodParts:
    """How the method of that name is built."""
    return _METHODS[name]


def new_state(
    cfg: RunConfig, backbone: Backbone, model: PreTrainedModel, plan: AdapterPlan, total_steps: int
) -> AdapterState:
    """The initial adapters of the run on a plain classifier, whose frozen weights may be absent.

    Sets torch's global seed: the adapters depend on `training.seed` alone.
    """
    parts = parts_of(cfg.method_name)
    common = {
        "task_type": TaskType.SEQ_CLS,
        "lora_dropout": cfg.model.lora.dropout,
        "modules_to_save": list(head_modules(model)),
    }
    torch.manual_seed(derive(cfg.training.seed, "adapters"))
    adapted = parts.adapt(AdapterRequest(model, cfg, plan, total_steps, common))
    return parts.state(adapted, cfg, backbone)


def build_method(
    cfg: RunConfig,
    backbone: Backbone,
    spec: TaskSpec,
    total_steps: int,
    device: torch.device | str = "cpu",
) -> Method:
    """The model with its adapters on `device`, and optimizer and schedule for `total_steps` steps.

    Sets torch's global seed: the head and the adapters depend on `training.seed` alone.

    Raises:
        UserError: a combination of settings that cannot be trained.
    """
    plan = plan_adapters(cfg, backbone, total_steps)
    model = build_classifier(backbone, spec, derive(cfg.training.seed, "head"))
    state = new_state(cfg, backbone, model, plan, total_steps)
    state.model.to(device)  # type: ignore[arg-type]
    return parts_of(cfg.method_name).method(state, cfg, plan, total_steps)


def learning_rates(cfg: RunConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of the step after n others, as a function of n."""
    nothing = torch.optim.SGD([torch.zeros(1)], lr=cfg.training.learning_rate)
    schedule = cast(LambdaLR, _scheduler(nothing, cfg, total_steps))
    base, factor = float(schedule.base_lrs[0]), schedule.lr_lambdas[0]
    return lambda step: base * factor(step)


def svd_schedule(cfg: RunConfig, ranks: int, total_steps: int) -> AdaLoraSchedule:
    """SVD-LoRA as an AdaLoRA that never scores and never masks."""
    return AdaLoraSchedule(
        initial=0,
        final=ranks,
        tinit=total_steps,
        tfinal=total_steps,
        delta_t=1,
        beta1=0.0,
        beta2=0.0,
        orth_reg_weight=cfg.adalora.orth_reg_weight,
        total_steps=total_steps,
    )


def lora_adapters(request: AdapterRequest) -> PeftModel:
    """LoRA's A and B of the planned ranks, at the planned scale."""
    plan = request.plan
    return _wrap(request.model, LoraConfig(**request.common, **lora_kwargs(plan.pattern, plan.scale)))


def _adalora_adapters(request: AdapterRequest) -> PeftModel:
    plan, schedule = request.plan, request.plan.schedule
    assert schedule is not None
    config = AdaLoraConfig(
        **request.common,
        target_modules=list(plan.pattern),
        lora_alpha=plan.scale * schedule.initial,  # type: ignore[arg-type]
        init_r=schedule.initial,
        target_r=max(1, round(plan.mean_rank)),
        total_step=schedule.total_steps,
        tinit=schedule.tinit,
        tfinal=schedule.tfinal,
        deltaT=schedule.delta_t,
        beta1=schedule.beta1,
        beta2=schedule.beta2,
        orth_reg_weight=schedule.orth_reg_weight,
    )
    model = _wrap(request.model, config)
    _freeze_ranknum(model)
    return model


def _svd_adapters(request: AdapterRequest) -> PeftModel:
    """PEFT's AdaLoRA layers, each with its matrix's own rank at scale s; nobody steps the rank allocator.

    The control that tells AdaLoRA's allocation from its parametrization (SVD-LoRA in arXiv 2303.10512).
    """
    plan = request.plan
    lora = lora_kwargs(plan.pattern, plan.scale)

    def alpha(rank: int) -> float:
        return plan.scale * (rank + 1e-5)  # PEFT divides by this

    config = AdaLoraConfig(
        **request.common,
        target_modules=lora["target_modules"],
        exclude_modules=lora.get("exclude_modules"),
        init_r=lora["r"],
        lora_alpha=alpha(lora["r"]),  # type: ignore[arg-type]
        total_step=1,  # demanded, and read by the allocator only
        orth_reg_weight=request.cfg.adalora.orth_reg_weight,
    )
    model = _wrap(request.model, config)
    for name, layer in adapted_layers(model):
        rank = plan.pattern[name]
        if rank != layer.r["default"]:
            layer.update_layer("default", rank, lora_alpha=alpha(rank), config=config)  # type: ignore[arg-type]
    _freeze_ranknum(model)
    return model


def _wrap(model: nn.Module, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT's use of transformers, which nobody who reads this can change.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated")
        return cast(PeftModel, get_peft_model(model, config))  # type: ignore[arg-type]


def _freeze_ranknum(model: PeftModel) -> None:
    """Keep AdaLoRA's divisor what it is said to be: the constant r.

    PEFT 0.21.2 declares it deterministic and does not save it, yet activating an adapter of a classifier makes it
    trainable: AdamW would move it, and a reloaded adapter would predict something else.
    """
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def _optimizer(model: nn.Module, cfg: RunConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices decay, biases and other vectors do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2]
    vectors = [p for p in trainable if p.ndim < 2]
    groups: list[dict[str, list[Tensor] | float]] = [
        {"params": cast(list[Tensor], matrices), "weight_decay": cfg.training.weight_decay},
        {"params": cast(list[Tensor], vectors), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.training.learning_rate, fused=True)


def _scheduler(optimizer: torch.optim.Optimizer, cfg: RunConfig, total_steps: int) -> Any:
    return get_scheduler(
        cfg.training.lr_scheduler,
        optimizer,
        num_warmup_steps=math.ceil(cfg.training.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )


_METHODS |= {
    "lora": MethodParts(lora_adapters, AdapterState, Method, lanes=True),
    "fw_lora": MethodParts(lora_adapters, AdapterState, FWLoraMethod, lanes=True),
    "adalora": MethodParts(_adalora_adapters, AdaLoraState, AdaLoraMethod, lanes=True),
    "svd_lora": MethodParts(_svd_adapters, SvdLoraState, Method, lanes=True),
}
