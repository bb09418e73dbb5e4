"""Finds the pretrained model that a config names, and reads its config and tokenizer.

There are three kinds: `minilm` and `mpnet` (inside installed packages, no network), a local folder, and a model of the
Hugging Face hub at one commit. Each becomes a local folder with config.json, safetensors weights and tokenizer files,
and is read from there in the same way. Code that comes with a model is never run.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

from fwlora_lab.catalog.encoders import aliases, packaged_encoder
from fwlora_lab.errors import UserError
from fwlora_lab.models.folder import (
    check_names,
    check_weights,
    file_names,
    max_tokens,
    read_config,
    read_tokenizer,
)
from fwlora_lab.models.hub import CONFIG_AND_TOKENIZER_FILES, commit_of, download, is_hub_id, names_on_hub
from fwlora_lab.models.load_errors import CHECK_CONFIG, WHAT_CAN_BE_MEANT, as_user_error
from fwlora_lab.models.packaged import packaged_folder

if TYPE_CHECKING:
    from fwlora_lab.config.schema import ModelConfig


@dataclass(frozen=True)
class Backbone:
    """A pretrained model's config and tokenizer, without its weights.

    Attributes:
        name: as the run config has it.
        source: where it comes from, in words.
        commit: the hub's full commit hash; None for a folder or a package.
        path_or_id: the name that adapters and records give for it.
        folder: the local folder with its files.
        parameters: of the encoder as `AutoModel` builds it (roberta-base: 124,645,632).
        max_tokens: the longest input that its positions allow.
    """

    name: str
    source: str
    commit: str | None
    config: PreTrainedConfig = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    path_or_id: str
    folder: Path
    parameters: int
    max_tokens: int


def load_backbone(cfg: ModelConfig) -> Backbone:
    """Find the model that `cfg.pretrained_id` means, and read its config and tokenizer.

    Raises:
        UserError: the id, the folder or its files cannot be used, or the hub cannot be reached.
    """
    wanted = cfg.pretrained_id.strip()
    if not wanted:
        raise UserError(f"model.pretrained_id is empty. {WHAT_CAN_BE_MEANT}")
    commit = None
    where = f"model.pretrained_id={wanted!r}"
    packaged = packaged_encoder(wanted)
    if packaged is not None:
        folder, source = packaged_folder(packaged)
        path_or_id = str(folder)
        names = file_names(folder, where)
    elif is_hub_id(wanted):
        path_or_id = aliases().get(wanted, wanted)
        commit = commit_of(path_or_id, cfg.revision)
        source = f"{path_or_id} at {commit[:8]} on the hub"
        folder = download(path_or_id, commit, CONFIG_AND_TOKENIZER_FILES)
        names = names_on_hub(path_or_id, commit, folder)
    else:
        folder = Path(wanted).expanduser()
        path_or_id, source = str(folder), f"folder {folder}"
        names = file_names(folder, where)
    if commit is None and cfg.revision is not None:
        warnings.warn(f"model.revision is ignored: model.pretrained_id={wanted!r} is a folder", stacklevel=2)

    check_names(names, where)
    config = read_config(folder, where)
    if commit is None:
        check_weights(folder, where)
    tokenizer = read_tokenizer(folder, where, config)
    with as_user_error(f"{where}: transformers cannot build a model from config.json", CHECK_CONFIG):
        with torch.device("meta"):
            encoder = AutoModel.from_config(config, trust_remote_code=False)
    return Backbone(
        name=cfg.name,
        source=source,
        commit=commit,
        config=config,
        tokenizer=tokenizer,
        path_or_id=path_or_id,
        folder=folder,
        parameters=sum(p.numel() for p in encoder.parameters()),
        max_tokens=max_tokens(encoder),
    )
