"""Method name -> adapters, optimizer, hooks. The training loop never asks which arm it runs.

All arms share one initial head, one order of the data and one stream of dropout masks per seed;
LoRA and FW-LoRA also share the initial A. What a method does at a step hangs on the optimizer's
step hooks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, get_scheduler

import fwlora
from fwlora.budget import count, lora_kwargs, matrices, parameters_of_percent, rank_pattern
from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.config.schema import FWLoraSettings, RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.models.backbones import Backbone
from fwlora_lab.models.classifier import build_classifier, head_modules
from fwlora_lab.models.targets import target_linears
from fwlora_lab.records.record import MatrixRow, Parameters
from fwlora_lab.seeds import derive

SPECTRAL = ("adalora", "svd_lora")  # arms with a Λ between B and A


@dataclass(frozen=True)
class AdapterPlan:
    """Which matrices get an adapter of which rank, all at the scale s of `ΔW = s·B·A`."""

    pattern: Mapping[str, int]
    scale: float
    mean_rank: float
    warnings: tuple[str, ...]


def plan_adapters(cfg: RunConfig, backbone: Backbone, total_steps: int) -> AdapterPlan:
    """Ranks from `model.lora.rank`, or where that is null from `model.parameter_budget_percent`.

    Loads no weights. `mean_rank` is the average rank that spends the same parameters, which is
    AdaLoRA's budget.

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
    plan = AdapterPlan(pattern, lora.scale, mean_rank, tuple(notes))
    if cfg.method_name == "adalora":
        _allocation(cfg, plan, total_steps)
    return plan


class LoraMethod:
    """One run's model, optimizer and scheduler, and what its method can tell about itself.

    This class is plain LoRA; the other methods say where they differ.
    """

    def __init__(self, cfg: RunConfig, backbone: Backbone, model: PeftModel, total_steps: int) -> None:
        self.model = model
        self.optimizer = _optimizer(model, cfg)
        self.scheduler = get_scheduler(
            cfg.training.lr_scheduler,
            self.optimizer,
            num_warmup_steps=math.ceil(cfg.training.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        )
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._asked = cfg.model.parameter_budget_percent
        self._backbone = backbone.parameters
        self._trained = count(model).adapters

    def phase(self) -> str:
        """The part of the run that the next step belongs to; training time is counted by it."""
        return "training"

    def learning_rate(self, step: int) -> float:
        """The learning rate of the step after `step` others."""
        schedule = cast(LambdaLR, self.scheduler)
        return float(schedule.base_lrs[0]) * schedule.lr_lambdas[0](step)

    def adapters(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """A [r, d_in] and B [d_out, r] by matrix, to be read or written in place."""
        return {
            name: tuple(layer.get_submodule(f"{f}.default").weight.data for f in ("lora_A", "lora_B"))  # type: ignore
            for name, layer in _layers(self.model)
        }

    def head(self) -> dict[str, torch.Tensor]:
        """The head's parameters under their names in the plain classifier, to be read or written in place."""
        return {
            name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p.data
            for name, p in self.model.named_parameters()
            if p.requires_grad and "lora_" not in name
        }

    def take_fisher(self, fisher: Mapping[str, float], step: int) -> None:
        """Take over what a lane observed; plain LoRA observes nothing."""

    def parameters(self) -> Parameters:
        """Parameters asked for and used so far."""
        now = count(self.model)
        kept = self._kept(now.adapters)
        return Parameters(
            asked_percent=self._asked,
            backbone=self._backbone,
            adapters=kept,
            adapters_trained=self._trained,
            head=now.head,
            percent=100 * kept / self._backbone,
        )

    def report(self) -> list[MatrixRow]:
        """A row for each adapted matrix, in the model's order. Waits for the device."""
        return [
            MatrixRow(name=name, rank=self._rank(layer), delta_norm=_delta_norm(layer))
            for name, layer in _layers(self.model)
        ]

    def export(self, path: Path) -> None:
        """Write adapter and head as vanilla PEFT reads them; equal weights give equal bytes."""
        config = cast(LoraConfig, self.model.peft_config["default"])
        # PEFT writes sets in the order of their hashes, which changes from process to process.
        config.target_modules = sorted(config.target_modules or ())
        config.modules_to_save = sorted(set(config.modules_to_save or ()))
        with warnings.catch_warnings():
            # AdaLoRA leaves some matrices without a rank: PEFT takes them for a torn checkpoint.
            warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
            # "auto" would ask the hub whether the vocabulary was resized.
            self.model.save_pretrained(str(path), save_embedding_layers=False)

    def _rank(self, layer: LoraLayer) -> int:
        return layer.r["default"]

    def _kept(self, adapters: int) -> int:
        return adapters


class FWLoraMethod(LoraMethod):
    """LoRA with one added line."""

    def __init__(self, cfg: RunConfig, backbone: Backbone, model: PeftModel, total_steps: int, seed: int) -> None:
        super().__init__(cfg, backbone, model, total_steps)
        config = fw_config(cfg.fw_lora, seed)
        self.handle = fwlora.attach(model, self.optimizer, config, total_steps=total_steps)

    def take_fisher(self, fisher: Mapping[str, float], step: int) -> None:
        state = self.handle.state_dict()
        values = torch.tensor([fisher[name] for name in self.handle.names])
        self.handle.load_state_dict({**state, "step": step, "fisher": values})

    def phase(self) -> str:
        return self.handle.phase

    def report(self) -> list[MatrixRow]:
        fisher, share = self.handle.fisher(), self.handle.importance()
        weight = self.handle.weights()
        return [
            row.model_copy(
                update={
                    "fisher": fisher[row.name],
                    "importance": share[row.name],
                    "weight": weight[row.name],
                }
            )
            for row in super().report()
        ]


class SpectralMethod(LoraMethod):
    """`ΔW = s·B·diag(Λ)·A` on PEFT's AdaLoRA layers, with a pull towards orthogonal A and B in the loss."""

    def adapters(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """A [r, d_in], B [d_out, r] and Λ [r] by matrix, to be read or written in place."""
        return {
            name: tuple(
                cast(nn.ParameterDict, f)["default"].data.squeeze(-1)
                if f is layer.lora_E  # type: ignore
                else cast(nn.ParameterDict, f)["default"].data
                for f in (layer.lora_A, layer.lora_B, layer.lora_E)  # type: ignore
            )
            for name, layer in _layers(self.model)
        }


class SvdLoraMethod(SpectralMethod):
    """AdaLoRA's parametrisation and regulariser on plain LoRA's ranks, which stay as they are.

    The control that tells AdaLoRA's allocation from its parametrisation (SVD-LoRA in arXiv 2303.10512).
    A rank has d_in + d_out + 1 parameters, so the run holds one parameter a rank more than plain LoRA of the budget.
    """

    def __init__(self, cfg: RunConfig, backbone: Backbone, model: PeftModel, total_steps: int) -> None:
        super().__init__(cfg, backbone, model, total_steps)
        self._scale = cfg.model.lora.scale

    def export(self, path: Path) -> None:
        """Write adapter and head as a plain LoRA adapter with `B' = B·diag(Λ)`."""
        fwlora.export_adapter(self.model, path, scale=self._scale)


class AdaLoraMethod(SpectralMethod):
    """PEFT's AdaLoRA with its rank schedule scaled to the run.

    The budget that is left at the end is counted in ranks, as AdaLoRA counts it: the average rank
    that LoRA's parameters would buy, times the number of matrices. PEFT multiplies BΛA by
    lora_alpha / init_r throughout, so lora_alpha = s·init_r gives it LoRA's scale s.
    """

    def __init__(self, cfg: RunConfig, backbone: Backbone, model: PeftModel, total_steps: int, ranks: int) -> None:
        super().__init__(cfg, backbone, model, total_steps)
        self._tuner = cast(AdaLoraModel, model.base_model)
        # `target_r` can only say whole ranks per matrix.
        self._tuner.rankallocator.target_bgt = self.final_ranks = ranks
        self._step = 0
        self.optimizer.register_step_post_hook(self._allocate)

    def phase(self) -> str:
        config = cast(AdaLoraConfig, self.model.peft_config["default"])
        if self._step < config.tinit:
            return "initial"
        last = cast(int, config.total_step) - config.tfinal
        return "allocating" if self._step < last else "final"

    def _allocate(self, *_: Any) -> None:
        # After the optimizer's step and before zero_grad, counted from 1, as in PEFT's own example.
        self._step += 1
        self._tuner.update_and_allocate(self._step)

    def _rank(self, layer: LoraLayer) -> int:
        return int(cast(torch.Tensor, layer.lora_E["default"]).count_nonzero())  # type: ignore[attr-defined]

    def _kept(self, adapters: int) -> int:
        # Each rank that is left is a row of A, a column of B and one singular value.
        layers: list[Any] = [layer for _, layer in _layers(self.model)]
        return sum(self._rank(m) * (m.in_features + m.out_features + 1) for m in layers)


def build_method(
    cfg: RunConfig,
    backbone: Backbone,
    spec: TaskSpec,
    seed: int,
    total_steps: int,
    device: torch.device | str = "cpu",
) -> LoraMethod:
    """The model with its adapters on `device`, and optimizer and scheduler for `total_steps` steps.

    Sets torch's global seed: the head and the adapters depend on `seed` alone.

    Raises:
        UserError: a combination of settings that cannot be trained.
    """
    plan = plan_adapters(cfg, backbone, total_steps)
    model = build_classifier(backbone, spec, derive(seed, "head"))
    common = {
        "task_type": TaskType.SEQ_CLS,
        "lora_dropout": cfg.model.lora.dropout,
        "modules_to_save": list(head_modules(model)),
    }
    torch.manual_seed(derive(seed, "adapters"))
    if cfg.method_name == "svd_lora":
        return SvdLoraMethod(cfg, backbone, _svd_model(model, cfg, plan, common, device), total_steps)
    if cfg.method_name == "adalora":
        allocation = _allocation(cfg, plan, total_steps)
        peft_model = _wrap(model, _adalora_config(cfg, plan, allocation, total_steps, common), device)
        _freeze_ranknum(peft_model)
        return AdaLoraMethod(cfg, backbone, peft_model, total_steps, allocation.final)
    peft_model = _wrap(model, LoraConfig(**common, **lora_kwargs(plan.pattern, plan.scale)), device)
    if cfg.method_name == "fw_lora":
        return FWLoraMethod(cfg, backbone, peft_model, total_steps, seed)
    return LoraMethod(cfg, backbone, peft_model, total_steps)


def fw_config(settings: FWLoraSettings, seed: int) -> fwlora.FWLoraConfig:
    """The method's own settings; a run config has them under the same names."""
    return fwlora.FWLoraConfig(seed=seed, **settings.model_dump())


def initial_ranks(cfg: RunConfig, backbone: Backbone, total_steps: int) -> dict[str, int]:
    """The rank that each adapted matrix begins with; AdaLoRA begins with more than it keeps."""
    plan = plan_adapters(cfg, backbone, total_steps)
    if cfg.method_name == "adalora":
        return dict.fromkeys(plan.pattern, _allocation(cfg, plan, total_steps).initial)
    return {name: rank for name, rank in plan.pattern.items() if rank}


@dataclass(frozen=True)
class _Allocation:
    """AdaLoRA's schedule: ranks of each matrix at first, of all together at last, and steps."""

    initial: int
    final: int
    tinit: int
    tfinal: int


def _allocation(cfg: RunConfig, plan: AdapterPlan, total_steps: int) -> _Allocation:
    ada = cfg.adalora
    final = math.floor(plan.mean_rank * len(plan.pattern))
    if final < 1:
        raise UserError(
            f"model.parameter_budget_percent={cfg.model.parameter_budget_percent:g} leaves AdaLoRA "
            f"less than one rank for {len(plan.pattern)} matrices: raise the budget."
        )
    tinit, tfinal = round(ada.tinit_ratio * total_steps), round(ada.tfinal_ratio * total_steps)
    # PEFT looks at the gradients of every step before the last allocation, and needs one at least.
    if max(tinit, 1) >= total_steps - tfinal:
        raise UserError(
            f"adalora.tinit_ratio={ada.tinit_ratio:g} and adalora.tfinal_ratio="
            f"{ada.tfinal_ratio:g} leave none of the {total_steps} steps for allocating ranks: "
            "lower one of them, or train longer."
        )
    # It must begin with more than it keeps.
    initial = max(math.ceil(ada.init_rank_factor * plan.mean_rank), math.floor(plan.mean_rank) + 1)
    return _Allocation(initial, final, tinit, tfinal)


def _adalora_config(
    cfg: RunConfig,
    plan: AdapterPlan,
    allocation: _Allocation,
    total_steps: int,
    common: Mapping[str, Any],
) -> AdaLoraConfig:
    return AdaLoraConfig(
        **common,
        target_modules=list(plan.pattern),
        lora_alpha=plan.scale * allocation.initial,  # type: ignore[arg-type]
        init_r=allocation.initial,
        target_r=max(1, round(plan.mean_rank)),
        total_step=total_steps,
        tinit=allocation.tinit,
        tfinal=allocation.tfinal,
        deltaT=cfg.adalora.delta_t,
        beta1=cfg.adalora.beta1,
        beta2=cfg.adalora.beta2,
        orth_reg_weight=cfg.adalora.orth_reg_weight,
    )


def _svd_model(
    model: nn.Module, cfg: RunConfig, plan: AdapterPlan, common: Mapping[str, Any], device: torch.device | str
) -> PeftModel:
    """PEFT's AdaLoRA layers, each with its matrix's own rank at scale s; nobody steps the rank allocator."""
    lora = lora_kwargs(plan.pattern, plan.scale)

    def alpha(rank: int) -> float:
        return plan.scale * (rank + 1e-5)  # PEFT divides by this

    config = AdaLoraConfig(
        **common,
        target_modules=lora["target_modules"],
        exclude_modules=lora.get("exclude_modules"),
        init_r=lora["r"],
        lora_alpha=alpha(lora["r"]),  # type: ignore[arg-type]
        total_step=1,  # demanded, and read by the allocator only
        orth_reg_weight=cfg.adalora.orth_reg_weight,
    )
    peft_model = _wrap(model, config, device)
    for name, layer in _layers(peft_model):
        rank = plan.pattern[name]
        if rank != layer.r["default"]:
            layer.update_layer("default", rank, lora_alpha=alpha(rank), config=config)  # type: ignore[arg-type]
    _freeze_ranknum(peft_model)
    return peft_model


def _wrap(model: nn.Module, config: LoraConfig, device: torch.device | str) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT's use of transformers, which nobody who reads this can change.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated")
        return cast(PeftModel, get_peft_model(model, config)).to(device)  # type: ignore[arg-type]


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
    groups = [
        {"params": matrices, "weight_decay": cfg.training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.training.learning_rate, fused=True)


def _layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [
        (name.removeprefix("base_model.model."), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, (LoraLayer, AdaLoraLayer))
    ]


def _delta_norm(layer: LoraLayer) -> float | None:
    norm = float(torch.linalg.matrix_norm(layer.get_delta_weight("default").detach().float()))  # type: ignore[operator]
    return norm if math.isfinite(norm) else None
