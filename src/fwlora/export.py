"""Write a trained adapter as plain LoRA, cut to fewer ranks on request, for PEFT, vLLM or llama.cpp to load."""

# PEFT's layers and parts of torch are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import EMBEDDING_LAYER_NAMES
from safetensors.torch import save_file
from torch import Tensor, nn

from fwlora.adapters import refuse_splitting_inits
from fwlora.budget import lora_kwargs
from fwlora.consumers import Consumer, check_consumer, ranks_in_file, refuse_unloadable, scales
from fwlora.factors import Factors, factors_of, ranks_within, replacing
from fwlora.output_change import OutputChange, output_change

# The settings of the adapter's own config that are not copied: those that the file states anew for every matrix, and
# how A and B were initialized, which is nothing to whoever loads them.
_NOT_COPIED = frozenset(
    "peft_type r lora_alpha rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform "
    "layers_pattern inference_mode init_lora_weights loftq_config eva_config corda_config lora_ga_config".split()
)


@dataclass(frozen=True, eq=False)
class ExportReport(Mapping[str, float]):
    """What an export lost. As a mapping: ‖ΔW − ΔW_k‖_F of each matrix by its name, 0 where nothing was cut.

    Attributes:
        lost: that mapping.
        norms: ‖ΔW‖_F of each matrix before the cut.
        ranks: the rank of each matrix that was kept.
        outputs: the change of the model's outputs over `batches`, if they were given.
    """

    lost: dict[str, float]
    norms: dict[str, float]
    ranks: dict[str, int]
    outputs: OutputChange | None = None

    @property
    def relative(self) -> float:
        """(Σ ‖ΔW − ΔW_k‖² / Σ ‖ΔW‖²)^½ over all matrices, 0 to 1."""
        lost, whole = math.hypot(*self.lost.values()), math.hypot(*self.norms.values())
        return lost / whole if whole else 0.0

    def __getitem__(self, name: str) -> float:
        return self.lost[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lost)

    def __len__(self) -> int:
        return len(self.lost)


def export_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    for_: Consumer = "peft",
    ranks: int | Mapping[str, int] | None = None,
    budget: int | None = None,
    scale: float | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    batches: Iterable[Any] | None = None,
    uniform: bool | None = None,
) -> ExportReport:
    """Write the active adapter of a PEFT model (LoRA or AdaLoRA) as plain LoRA, with all that PEFT's own save keeps.

    Each `ΔW = s·B·A` is written as it is, or as the nearest matrix of a lower rank. A trained head, trained tokens,
    resized embeddings and the config's other settings are copied. Both files are written, or neither.

    Args:
        model: a PEFT model with one active adapter.
        path: the folder to write into.
        for_: who will load the file. All three can be loaded by PEFT as well; what `vllm` or `llama.cpp` cannot hold
            (a trained head, for example) is refused. llama.cpp's convert_lora_to_gguf.py reads the folder.
        ranks: the highest rank of every matrix, or one by full module name. A matrix that is not named keeps its rank;
            0 leaves it out.
        budget: parameters of all adapters together, instead of `ranks`. They are spent on the largest
            σ_i²/(d_in + d_out) of all matrices; another choice of as many parameters is better by at most the last
            singular value.
        scale: s in the file (for `llama.cpp`, of the widest matrix). By default each matrix keeps its own (`peft`), or
            all get the first one's. Where s changes, B takes the ratio.
        save_embedding_layers: write the whole embedding and output layers. "auto" does so where the vocabulary was
            resized or PEFT would.
        batches: what to call the model with to measure the change of its outputs: dicts of keyword arguments, tuples,
            or tensors. Each is run twice, in evaluation mode.
        uniform: former spelling of `for_`: True is "vllm", False is "peft".

    Returns:
        What was lost, by matrix, relative to ‖ΔW‖, and in the outputs.

    Raises:
        ValueError: not a PEFT model with one active adapter of Linear layers, ranks that mean no adapter, or an
            adapter that the consumer could not load.
    """
    if uniform is not None:
        warnings.warn('uniform is now for_: write for_="vllm" for uniform=True', FutureWarning, stacklevel=2)
        for_ = "vllm" if uniform else "peft"
    check_consumer(for_)
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: pass the folder to write into")
    peft_model, adapter = _only_adapter(model)
    factors = factors_of(peft_model, adapter)
    kept = _kept_ranks(factors, ranks, budget)
    in_file = ranks_in_file(for_, kept)
    lora_kwargs(in_file, 1.0 if scale is None else scale)  # refuses ranks and scales that mean no adapter
    s = scales(for_, factors, in_file, scale)
    config = _config(peft_model, adapter, in_file, s, for_)
    others = _other_tensors(peft_model, adapter, factors, save_embedding_layers)
    refuse_unloadable(for_, peft_model, config, factors, in_file, others)
    if for_ != "peft":
        others = {}
        config.modules_to_save, config.trainable_token_indices, config.bias = None, None, "none"

    written = {name: f.cut(kept[name], s[name]) for name, f in factors.items()}
    changed = None
    if batches is not None:
        changed = output_change(peft_model, _replaced(factors, written, s, adapter), batches)
    state = dict(others)
    for name, rank in in_file.items():
        if rank:
            a, b = written[name]
            missing = rank - kept[name]
            state[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, missing))
            state[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(b, (0, missing))
    _write(target, config, state)
    lost = {name: f.lost(kept[name]) for name, f in factors.items()}
    return ExportReport(lost, {name: f.norm for name, f in factors.items()}, kept, changed)


def _only_adapter(model: nn.Module) -> tuple[PeftModel, str]:
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is not a PEFT model: pass what peft.get_peft_model returned")
    refuse_splitting_inits(model)
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active ({', '.join(active)}): choose one with model.set_adapter")
    return model, active[0]


def _kept_ranks(
    factors: Mapping[str, Factors], ranks: int | Mapping[str, int] | None, budget: int | None
) -> dict[str, int]:
    if ranks is not None and budget is not None:
        raise ValueError("ranks and budget both say how much to keep: give one of them")
    wanted = ranks_within(factors, budget) if budget is not None else ranks
    if wanted is None:
        wanted = {}
    elif not isinstance(wanted, Mapping):
        wanted = dict.fromkeys(factors, wanted)
    if unknown := sorted(set(wanted) - set(factors)):
        raise ValueError(f"ranks: {unknown[0]!r} carries no adapter; these do: {', '.join(factors)}")
    return {name: f.at_most(wanted.get(name, f.rank)) for name, f in factors.items()}


def _config(
    model: PeftModel, adapter: str, ranks: Mapping[str, int], s: Mapping[str, float], consumer: Consumer
) -> LoraConfig:
    """The adapter's own config, with the ranks and scales of the file."""
    old = cast(LoraConfig, model.peft_config[adapter])
    kwargs = lora_kwargs(ranks, 1.0)  # for the names and ranks: every matrix has an alpha of its own below
    rslora = consumer == "peft" and old.use_rslora
    alphas: dict[str, int | float] = {}
    for name, rank in ranks.items():
        if rank:
            # 14 digits: alpha / r · r is not always alpha in floating point.
            exact = float(f"{s[name] * (math.sqrt(rank) if rslora else rank):.14g}")
            alphas[name] = int(exact) if exact.is_integer() else exact  # PEFT's own type is int
    common = next(alphas[name] for name in alphas if ranks[name] == kwargs["r"])
    kwargs["lora_alpha"] = common
    kwargs["alpha_pattern"] = {"^" + re.escape(name): alpha for name, alpha in alphas.items() if alpha != common}
    copied = {f.name: getattr(old, f.name) for f in fields(LoraConfig) if f.name not in _NOT_COPIED and f.init}
    copied["use_rslora"] = rslora
    config = LoraConfig(**copied, **kwargs, inference_mode=True)
    # PEFT would write sets in the order of their hashes, which changes from process to process.
    config.target_modules = sorted(config.target_modules or ())
    config.modules_to_save = sorted(set(config.modules_to_save)) if config.modules_to_save else None
    if config.task_type is None:
        # With this AutoPeftModel finds the class of a model that is none of its tasks. PEFT's save writes it too.
        base = type(model.get_base_model())
        config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return config


def _other_tensors(
    model: PeftModel, adapter: str, factors: Mapping[str, Factors], save_embeddings: bool | Literal["auto"]
) -> dict[str, Tensor]:
    """What PEFT's own save writes besides A and B (and E): heads, tokens, embeddings, biases."""
    if save_embeddings == "auto" and (resized := _vocabulary_was_resized(model, adapter)) is not None:
        targeted = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in factors)
        tokens = getattr(model.peft_config[adapter], "trainable_token_indices", None) is not None
        save_embeddings = resized or (targeted and not tokens)
    saved: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=save_embeddings
    )
    own = tuple(f"base_model.model.{name}.lora_" for name in factors)
    return {key: value for key, value in saved.items() if not key.startswith(own)}


def _vocabulary_was_resized(model: PeftModel, adapter: str) -> bool | None:
    """Whether the vocabulary differs from that of the base model's files here; None if they are not here.

    PEFT's "auto" would ask the hub at every save.
    """
    config: Any = getattr(model, "config", None)
    vocabulary, base = getattr(config, "vocab_size", None), model.peft_config[adapter].base_model_name_or_path
    if not vocabulary or not base:
        return False
    try:
        return vocabulary != type(config).from_pretrained(base, local_files_only=True).vocab_size
    except (OSError, ValueError):
        return None


def _replaced(
    factors: Mapping[str, Factors],
    written: Mapping[str, tuple[Tensor, Tensor]],
    s: Mapping[str, float],
    adapter: str,
) -> dict[str, Tensor]:
    """The tensors with which the model computes what the file holds."""
    replaced: dict[str, Tensor] = {}
    for name, f in factors.items():
        a, b = written[name]
        replaced |= replacing(f, adapter, a, b if s[name] == f.scale else b * (s[name] / f.scale))
    return replaced


def _write(path: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Write both files, or leave the folder as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        new, former = Path(temporary) / "new", Path(temporary) / "former"
        former.mkdir()
        config.save_pretrained(str(new))
        tensors = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()
        }
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        existed = path.is_dir()
        path.mkdir(exist_ok=True)
        names = sorted(file.name for file in new.iterdir())
        moved: list[str] = []
        try:
            for name in names:
                if (path / name).exists():
                    os.replace(path / name, former / name)
                moved.append(name)
                os.replace(new / name, path / name)
        except BaseException:
            for name in moved:
                (path / name).unlink(missing_ok=True)
                if (former / name).exists():
                    os.replace(former / name, path / name)
            if not existed:
                path.rmdir()
            raise
