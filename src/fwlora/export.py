"""Write a trained adapter as plain LoRA, cut to fewer ranks on request; PEFT loads it without this package.

By Eckart and Young (1936) the nearest matrix of rank k to `ΔW = Σ_i σ_i u_i v_iᵀ`, σ falling, is the sum of its first k
terms, at a distance of `(Σ_{i>k} σ_i²)^½`.
"""

# PEFT's layers and parts of torch are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fwlora.adapters import bare_name, named_modules, pair_of, refuse_splitting_inits
from fwlora.budget import lora_kwargs

# The settings of the adapter's own config that are copied: all but ranks, scales and how they were trained.
_KEPT = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "modules_to_save",
    "trainable_token_indices",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
)


def export_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    ranks: int | Mapping[str, int] | None = None,
    budget: int | None = None,
    scale: float | None = None,
    uniform: bool = False,
) -> dict[str, float]:
    """Write the active adapter of a PEFT model (LoRA or AdaLoRA) as a plain LoRA adapter, and the trained head with it.

    Each `ΔW = s·B·A` is written as it is, or as the nearest matrix of a lower rank. The file has one s = alpha/r for
    all matrices; a matrix whose own s differs gets the ratio into its B.

    Args:
        model: a PEFT model with one active adapter.
        path: the folder to write into.
        ranks: the highest rank of every matrix, or one by full module name. A matrix that is not named keeps its rank;
            0 leaves it out.
        budget: parameters of all adapters together, instead of `ranks`. They are spent on the largest
            σ_i²/(d_in + d_out) of all matrices; another choice of as many parameters is better by at most the last
            singular value.
        scale: s of the file; by default that of the first matrix.
        uniform: pad all matrices with zeros to the highest rank. Otherwise, ranks that differ are written to
            rank_pattern and alpha_pattern, which vLLM ignores. (vLLM does not load a trained head either.)

    Returns:
        ‖ΔW − ΔW_k‖_F, what was cut from each matrix, by name; 0 if nothing was.

    Raises:
        ValueError: not a PEFT model with one active adapter of Linear layers, or ranks that mean no adapter.
    """
    peft_model, adapter = _only_adapter(model)
    factors = _factors(peft_model, adapter)
    if ranks is not None and budget is not None:
        raise ValueError("ranks and budget both say how much to keep: give one of them")
    wanted = _ranks_within(factors, budget) if budget is not None else ranks
    if wanted is None:
        wanted = {}
    elif not isinstance(wanted, Mapping):
        wanted = dict.fromkeys(factors, wanted)
    if unknown := sorted(set(wanted) - set(factors)):
        raise ValueError(f"ranks: {unknown[0]!r} carries no adapter; these do: {', '.join(factors)}")
    kept = {name: f.at_most(wanted.get(name, f.rank)) for name, f in factors.items()}
    scale = next(iter(factors.values())).scale if scale is None else scale
    widest = max(kept.values())
    kwargs = lora_kwargs({n: widest if uniform and r else r for n, r in kept.items()}, scale)

    # "auto" would ask the hub whether the vocabulary was resized.
    saved = get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
    own = tuple(f"base_model.model.{name}.lora_" for name in factors)
    state = {key: value for key, value in saved.items() if not key.startswith(own)}
    for name, f in factors.items():
        if rank := kept[name]:
            a, b = f.cut(rank, scale)
            missing = widest - rank if uniform else 0
            state[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, missing))
            state[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(b, (0, missing))
    old = peft_model.peft_config[adapter]
    config = LoraConfig(**{key: getattr(old, key) for key in _KEPT}, **kwargs, inference_mode=True)
    # PEFT would write sets in the order of their hashes, which changes from process to process.
    config.target_modules = sorted(config.target_modules or ())
    config.modules_to_save = sorted(set(config.modules_to_save)) if config.modules_to_save else None
    _write(Path(path), config, state)
    return {name: f.lost(kept[name]) for name, f in factors.items()}


@dataclass(frozen=True)
class _Factors:
    """`ΔW = s·B·A` of one matrix: A [r, d_in], B [d_out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)

    def at_most(self, rank: int) -> int:
        """The rank that is kept if `rank` is the highest allowed."""
        return self.rank if rank >= self.rank else min(rank, len(self.b), self.a.shape[1])

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [d_out, k], σ [k], V [d_in, k] of ΔW in float64, k = min(r, d_in, d_out), by the SVD of an r × r one."""
        q_b, r_b = cast(tuple[Tensor, Tensor], torch.linalg.qr(self.b.double()))
        q_a, r_a = cast(tuple[Tensor, Tensor], torch.linalg.qr(self.a.double().T))
        thin = torch.linalg.svd(self.scale * r_b @ r_a.T, full_matrices=False)
        u, sigma, vt = cast(tuple[Tensor, Tensor, Tensor], thin)
        return q_b @ u, sigma, q_a @ vt.T

    def cut(self, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """A [rank, d_in] and B [d_out, rank] of the nearest matrix of that rank, to be multiplied by `scale`."""
        if rank == self.rank:
            return self.a, self.b if scale == self.scale else self.b * (self.scale / scale)
        u, sigma, v = (t[..., :rank] for t in self.svd)
        root = (sigma / scale).sqrt()
        return (v * root).T.to(self.a), (u * root).to(self.b)

    def lost(self, rank: int) -> float:
        return 0.0 if rank == self.rank else float(cast(Tensor, self.svd[1][rank:].norm()))


def _only_adapter(model: nn.Module) -> tuple[PeftModel, str]:
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is not a PEFT model: pass what peft.get_peft_model returned")
    refuse_splitting_inits(model)
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active ({', '.join(active)}): choose one with model.set_adapter")
    return model, active[0]


def _factors(model: PeftModel, adapter: str) -> dict[str, _Factors]:
    """The adapted matrices by their names in the plain model, in its order, without the ranks that AdaLoRA masked."""
    found: dict[str, _Factors] = {}
    for name, layer in named_modules(model):
        if not isinstance(layer, LoraLayer) or not (adapter in layer.lora_A or adapter in layer.lora_embedding_A):
            continue
        if isinstance(layer, AdaLoraLayer):
            spectrum = layer.lora_E[adapter].detach()[:, 0]
            own = spectrum.nonzero()[:, 0]
            a, b = layer.lora_A[adapter].detach()[own], (layer.lora_B[adapter].detach() * spectrum)[:, own]
            scaling: dict[str, float] = layer.scaling
            scale = scaling[adapter] / (float(layer.ranknum[adapter].detach()) + 1e-5)  # as PEFT divides
        else:
            pair = pair_of(name, layer, adapter)
            if getattr(layer.lora_B[adapter], "bias", None) is not None:
                raise ValueError(
                    f"{bare_name(name)} has a bias inside its adapter (lora_bias=True): ΔW is not all of it"
                )
            a, b, scale = pair.a.detach(), pair.b.detach(), pair.scale
        found[bare_name(name)] = _Factors(a, b, scale)
    if not found:
        raise ValueError("the model has no LoRA layer whose adapter is active")
    return found


def _ranks_within(factors: Mapping[str, _Factors], budget: int) -> dict[str, int]:
    """The ranks that buy the most Σ σ² for `budget` parameters, greedily by σ²/cost."""
    offers: list[tuple[float, int, str]] = []
    for name, f in factors.items():
        cost = len(f.b) + f.a.shape[1]
        spectrum: list[float] = f.svd[1].tolist()
        offers += [(sigma**2 / cost, cost, name) for sigma in spectrum]
    ranks = dict.fromkeys(factors, 0)
    left = budget
    for gain, cost, name in sorted(offers, key=lambda offer: -offer[0]):
        if gain > 0 and cost <= left:
            ranks[name] += 1
            left -= cost
    if not any(ranks.values()):
        raise ValueError(f"a budget of {budget} parameters buys no rank of an adapter that does something")
    return ranks


def _write(path: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Write both files, or none: into a temporary folder first, from which they are moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        config.save_pretrained(folder)
        tensors = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()
        }
        save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        path.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            os.replace(file, path / file.name)
