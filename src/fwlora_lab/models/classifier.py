"""Builds the text classifier: the pretrained encoder with a new head, and the names of the head's modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fwlora_lab.errors import UserError
from fwlora_lab.models.backbones import Backbone
from fwlora_lab.models.folder import check_weights
from fwlora_lab.models.hub import WEIGHT_FILES, download
from fwlora_lab.models.load_errors import FETCH_AGAIN, as_user_error, quiet_loading

if TYPE_CHECKING:
    from fwlora_lab.catalog.tasks import TaskSpec


def build_classifier(
    backbone: Backbone, spec: TaskSpec, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load the weights and put a new classification head on them, all frozen and in eval mode.

    The head is drawn in float32 from `seed` alone, so every method starts from the same one, whatever was drawn
    before; the global random state does not change. A pooler inside the encoder (BERT) keeps its stored weights.

    Raises:
        UserError: weights are missing, malformed, or of another shape than config.json says.
    """
    model, missing = _load(backbone, spec, dtype)
    return _with_head(model, missing, seed)


class ClassifierSkeleton:
    """Classifiers of one encoder and task whose frozen weights take no memory.

    For adapters and heads that are drawn, summarized and written, but not run here: the weights are loaded once, for
    the part of the head that is stored with them, and dropped.
    """

    def __init__(self, backbone: Backbone, spec: TaskSpec) -> None:
        self._model, self._missing = _load(backbone, spec, torch.float32)
        head = {id(module) for part in head_parts(self._model) for module in part.modules()}
        self._frozen = [name for name, module in self._model.named_modules() if id(module) not in head]
        self._move_frozen(self._model, lambda t: t.to("meta"))

    def with_head(self, seed: int) -> PreTrainedModel:
        """A classifier with the head that `build_classifier` draws from the same seed."""
        model = copy.deepcopy(self._model)
        # One zero, seen as a whole matrix: PEFT puts adapters on the device of the frozen weight, so it must be real.
        self._move_frozen(model, lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape))
        return _with_head(model, self._missing, seed)

    def _move_frozen(self, model: PreTrainedModel, move: Callable[[Tensor], Tensor]) -> None:
        for name in self._frozen:
            module = model.get_submodule(name)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(move(parameter.data), requires_grad=False)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = move(buffer)


def _load(backbone: Backbone, spec: TaskSpec, dtype: torch.dtype) -> tuple[PreTrainedModel, set[str]]:
    """The classifier with its stored weights, and the names of the parameters that are not stored."""
    where = f"model.pretrained_id ({backbone.source})"
    if backbone.commit is not None:
        download(backbone.path_or_id, backbone.commit, WEIGHT_FILES)
        check_weights(backbone.folder, where)

    config = copy.deepcopy(backbone.config)
    config.num_labels = 1 if spec.kind == "regression" else len(spec.labels)
    if spec.kind == "classification":
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {label: i for i, label in enumerate(spec.labels)}
    config.problem_type = "regression" if spec.kind == "regression" else "single_label_classification"
    config.use_cache = False  # otherwise a decoder stores keys and values that are never read

    with torch.random.fork_rng(devices=[]), quiet_loading():
        with as_user_error(f"{where}: the weights cannot be loaded", FETCH_AGAIN):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                backbone.folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        _check_report(model, report, where)
    # Decoders find a sentence's last token by this id, so it must be the one that batches are padded with.
    model.config.pad_token_id = backbone.tokenizer.pad_token_id
    model.name_or_path = model.config._name_or_path = backbone.path_or_id
    return model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}


def _with_head(model: PreTrainedModel, missing: set[str], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), quiet_loading():
        torch.manual_seed(seed)
        _draw_head(model, missing)
    model.requires_grad_(False)
    return model


def head_modules(model: PreTrainedModel) -> list[str]:
    """The names, for PEFT's `modules_to_save`, of the modules after the encoder's last layer.

    RoBERTa ["classifier"], BERT ["classifier", "pooler"], ModernBERT ["head", "classifier"],
    decoders ["score"].
    """
    encoder = _encoder(model)
    names = [
        name
        for name, module in model.named_children()
        if module is not encoder and any(True for _ in module.parameters())
    ]
    pooler = getattr(encoder, "pooler", None)
    if isinstance(pooler, nn.Module):
        names.append("pooler")
    return names


def _encoder(model: PreTrainedModel) -> nn.Module:
    """The pretrained part of a classifier, which owns all stored weights."""
    encoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(encoder, nn.Module):
        raise UserError(f"{type(model).__name__} has no separate encoder, so its head cannot be told apart")
    return encoder


def head_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that `head_modules` names."""
    encoder = _encoder(model)
    children = dict(model.named_children())
    return [encoder.get_submodule("pooler") if name not in children else children[name] for name in head_modules(model)]


def _check_report(model: PreTrainedModel, report: dict[str, Any], where: str) -> None:
    """Refuse missing weights and wrong shapes in the encoder; in the head they do not matter, because it is drawn."""
    inside = f"{model.base_model_prefix}."

    def encoder_only(keys: list[str]) -> list[str]:
        return [k for k in keys if k.startswith(inside) and not k.startswith(f"{inside}pooler.")]

    wrong = {key: (stored, here) for key, stored, here in report["mismatched_keys"]}
    if keys := encoder_only(sorted(wrong)):
        stored, here = wrong[keys[0]]
        raise UserError(
            f"{where}: {len(keys)} weights have another shape than config.json says, for instance "
            f"{keys[0]}: stored {tuple(stored)}, expected {tuple(here)}. Put the config.json that "
            "belongs to the weights into the folder."
        )
    if keys := encoder_only(sorted(report["missing_keys"])):
        raise UserError(
            f"{where}: model.safetensors lacks {len(keys)} weights of the encoder, for instance "
            f"{keys[0]}. Is model_type={model.config.model_type!r} in config.json right? "
            f"{FETCH_AGAIN}"
        )


def _draw_head(model: PreTrainedModel, missing: set[str]) -> None:
    """Initialise everything outside the encoder, and what is `missing` in the encoder, as transformers does.

    The values come from the current random state and are drawn in float32 whatever the model's dtype is, so that a
    seed means one head.
    """
    inside = f"{model.base_model_prefix}."
    fresh = {name for name, _ in model.named_parameters() if not name.startswith(inside) or name in missing}
    types = {part: next(part.parameters()).dtype for part in head_parts(model)}
    for part in types:
        part.float()
    # transformers does not initialise parameters with this mark, nor modules with it.
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = name not in fresh  # type: ignore[attr-defined]
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        module._is_hf_initialized = not any(key.startswith(prefix) for key in fresh)  # type: ignore[assignment]
    model.initialize_weights()
    for part, dtype in types.items():
        part.to(dtype)
