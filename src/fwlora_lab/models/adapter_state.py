"""What a run trains, its adapters and its head: initial values, what a record says of them, and the files they leave.

Both training engines begin from an `AdapterState` and end in one. PEFT's own layers hold the values, so PEFT draws the
initial A and writes the files; the frozen weights may be absent (`ClassifierSkeleton`), because nothing here runs the
model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import fwlora
from fwlora.budget import count
from fwlora.weighting import importance, penalty_weights
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.models.backbones import Backbone
from fwlora_lab.records.record import MatrixRow, Parameters


class AdapterState:
    """A [r, d_in] and B [d_out, r] of every adapted matrix, and the parameters of the head."""

    def __init__(self, model: PeftModel, cfg: RunConfig, backbone: Backbone) -> None:
        self.model = model
        self._cfg = cfg
        self._backbone_parameters = backbone.parameters
        self._trained = count(model).adapters

    def adapters(self) -> dict[str, tuple[Tensor, ...]]:
        """A and B by matrix, to be read or written in place."""
        return {
            name: tuple(layer.get_submodule(f"{f}.default").weight.data for f in ("lora_A", "lora_B"))  # type: ignore
            for name, layer in adapted_layers(self.model)
        }

    def head(self) -> dict[str, Tensor]:
        """The head's parameters under their names in the plain classifier, to be read or written in place."""
        return {
            name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p.data
            for name, p in self.model.named_parameters()
            if p.requires_grad and "lora_" not in name
        }

    def load(self, adapters: Mapping[str, Sequence[Tensor]], head: Mapping[str, Tensor]) -> None:
        """Take trained values, in the shapes of `adapters()` and `head()`."""
        own_adapters, own_head = self.adapters(), self.head()
        for name, factors in adapters.items():
            for own, trained in zip(own_adapters[name], factors, strict=True):
                own.copy_(trained)
        for name, value in head.items():
            own_head[name].copy_(value)

    def parameters(self) -> Parameters:
        """Parameters asked for and used."""
        now = count(self.model)
        kept = self._kept(now.adapters)
        return Parameters(
            asked_percent=self._cfg.model.parameter_budget_percent,
            backbone=self._backbone_parameters,
            adapters=kept,
            adapters_trained=self._trained,
            head=now.head,
            percent=100 * kept / self._backbone_parameters,
        )

    def matrix_rows(self, fisher: Mapping[str, float] | None = None) -> list[MatrixRow]:
        """A row for each adapted matrix, in the model's order, with F, I and w where `fisher` holds F by matrix.

        Waits for the device.
        """
        weighted = {} if fisher is None else self._weighted(fisher)
        return [
            MatrixRow(name=name, rank=self._rank(layer), delta_norm=_delta_norm(layer), **weighted.get(name, {}))
            for name, layer in adapted_layers(self.model)
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

    def _weighted(self, fisher: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """F_m, I_m and w_m by matrix, as the method computes them."""
        settings = fw_config(self._cfg, seed=self._cfg.training.seed)
        values = torch.tensor(list(fisher.values()))
        weights = penalty_weights(
            values,
            settings.weighting,
            gamma=settings.gamma,
            max_weight_ratio=settings.max_weight_ratio,
            normalize=settings.normalize_weights,
            seed=settings.seed,
        )
        columns = (fisher.values(), importance(values).tolist(), weights.tolist())
        return {
            name: {"fisher": f, "importance": i, "weight": w} for name, f, i, w in zip(fisher, *columns, strict=True)
        }

    def _rank(self, layer: LoraLayer) -> int:
        return layer.r["default"]

    def _kept(self, adapters: int) -> int:
        return adapters


class SpectralState(AdapterState):
    """A [r, d_in], B [d_out, r] and Λ [r] of `ΔW = s·B·diag(Λ)·A`, on PEFT's AdaLoRA layers."""

    def adapters(self) -> dict[str, tuple[Tensor, ...]]:
        """A, B and Λ by matrix, to be read or written in place."""
        found = {}
        for name, layer in adapted_layers(self.model):
            factors = (cast(nn.ParameterDict, getattr(layer, f"lora_{letter}")) for letter in "ABE")
            a, b, spectrum = (factor["default"].data for factor in factors)
            found[name] = (a, b, spectrum.squeeze(-1))
        return found


class SvdLoraState(SpectralState):
    """AdaLoRA's parametrization on plain LoRA's ranks, which stay as they are.

    A rank has d_in + d_out + 1 parameters, so the run holds one parameter a rank more than plain LoRA of the budget.
    """

    def export(self, path: Path) -> None:
        """Write adapter and head as a plain LoRA adapter with `B' = B·diag(Λ)`."""
        fwlora.export_adapter(self.model, path, scale=self._cfg.model.lora.scale)


class AdaLoraState(SpectralState):
    """AdaLoRA's triplets; a rank whose λ is zero was given up."""

    def _rank(self, layer: LoraLayer) -> int:
        return int(cast(Tensor, layer.lora_E["default"]).count_nonzero())  # type: ignore[attr-defined]

    def _kept(self, adapters: int) -> int:
        # Each rank that is left is a row of A, a column of B and one singular value.
        layers: list[Any] = [layer for _, layer in adapted_layers(self.model)]
        return sum(self._rank(m) * (m.in_features + m.out_features + 1) for m in layers)


def fw_config(cfg: RunConfig, seed: int) -> fwlora.FWLoraConfig:
    """The method's own settings; a run config has them under the same names."""
    return fwlora.FWLoraConfig(seed=seed, **cfg.fw_lora.model_dump())


def adapted_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """PEFT's layers with an adapter, under the names of their matrices in the plain classifier."""
    return [
        (name.removeprefix("base_model.model."), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, (LoraLayer, AdaLoraLayer))
    ]


def _delta_norm(layer: LoraLayer) -> float | None:
    norm = float(torch.linalg.matrix_norm(layer.get_delta_weight("default").detach().float()))  # type: ignore[operator]
    return norm if math.isfinite(norm) else None
