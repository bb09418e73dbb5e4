"""Reads and checks a model's folder: config.json, safetensors weights and tokenizer."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from fwlora_lab.errors import UserError
from fwlora_lab.models.load_errors import CHECK_CONFIG, FETCH_AGAIN, WHAT_CAN_BE_MEANT, as_user_error, first_line
from fwlora_lab.text import did_you_mean

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def read_config(folder: Path, where: str) -> PreTrainedConfig:
    """The model's config.

    Args:
        where: the key and value of the run config, for messages.

    Raises:
        UserError: config.json is malformed, or the architecture cannot be used.
    """
    raw = _read_config_file(folder, where)
    if "auto_map" in raw:
        raise UserError(
            f"{where}: the model brings its own code (auto_map in config.json), which is never "
            "run. Use a model whose architecture is part of transformers."
        )
    if "quantization_config" in raw:
        raise UserError(
            f"{where}: the weights are stored quantised (quantization_config in config.json). Use "
            "the model's unquantised weights."
        )
    if not isinstance(raw.get("model_type"), str):
        raise UserError(
            f"{where}: config.json has no model_type, so the architecture is unknown. Save the "
            "model with transformers' save_pretrained, or add its model_type (bert, roberta, …)."
        )
    if raw["model_type"] not in CONFIG_MAPPING:
        similar = did_you_mean(raw["model_type"], CONFIG_MAPPING.keys())
        raise UserError(
            f"{where}: transformers {importlib.metadata.version('transformers')} has no "
            f"architecture model_type={raw['model_type']!r}{similar}. Correct config.json or use another model."
        )
    with as_user_error(f"{where}: config.json is not valid", CHECK_CONFIG):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if config.is_encoder_decoder:
        raise UserError(
            f"{where}: {config.model_type} is an encoder-decoder. Use an encoder (BERT, RoBERTa, "
            "DeBERTa-v2, ModernBERT) or a decoder (Llama, Qwen2, GPT-2)."
        )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{where}: transformers has no text classifier for model_type={config.model_type!r}. "
            "Use a text encoder (BERT, RoBERTa, DeBERTa-v2, ModernBERT) or a decoder (Llama, "
            "Qwen2, GPT-2)."
        )
    return config


def check_names(names: set[str], where: str) -> None:
    """Check by the names of its files that a folder, or a commit on the hub, is a model.

    Raises:
        UserError: a file is missing, or the folder is an adapter.
    """
    if "adapter_config.json" in names:
        raise UserError(
            f"{where}: this is a PEFT adapter, not a backbone. Name the model that it was trained "
            "on (base_model_name_or_path in adapter_config.json)."
        )
    if "config.json" not in names:
        raise UserError(
            f"{where}: config.json is missing, so this is not a model. It must come with config.json, "
            "model.safetensors and the tokenizer's files."
        )
    if not names & {"model.safetensors", "model.safetensors.index.json"}:
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        found = f" {pickled[0]} is a pickle, which can run code and is not read." if pickled else ""
        raise UserError(
            f"{where}: model.safetensors is missing.{found} Use a model or commit with safetensors "
            "weights, or convert them: from_pretrained(…).save_pretrained(…)."
        )
    if not any(fnmatch.filter(names, pattern) for pattern in _VOCABULARIES):
        raise UserError(
            f"{where}: the tokenizer is missing (none of {', '.join(_VOCABULARIES)}). Copy it next "
            "to the weights, or save it there: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(folder)."
        )


def file_names(folder: Path, where: str) -> set[str]:
    """The names of the files in a folder.

    Raises:
        UserError: it does not exist, is a file, or cannot be read.
    """
    if not os.path.exists(folder):
        raise UserError(f"{where}: there is no such folder. {WHAT_CAN_BE_MEANT}")
    if not os.path.isdir(folder):
        raise UserError(
            f"{where}: this is a file. Name the folder that holds config.json, the weights and the tokenizer."
        )
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({first_line(error)}). Check its permissions.") from error


def _read_config_file(folder: Path, where: str) -> dict[str, Any]:
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        raw = json.loads(text)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({first_line(error)}). Check its permissions.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: config.json is not valid JSON ({first_line(error)}). {FETCH_AGAIN}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where}: config.json must hold a JSON object, not a {type(raw).__name__}. {FETCH_AGAIN}")
    return raw


def check_weights(folder: Path, where: str) -> None:
    """Check that every safetensors file is there, and that its header matches its size.

    Raises:
        UserError: a file is missing, incomplete or empty.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        shards = [single]
    else:
        try:
            shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {index.name} is broken ({first_line(error)}). {FETCH_AGAIN}") from error
        if any(shard.parent != folder for shard in shards):
            raise UserError(f"{where}: {index.name} points outside its folder. {FETCH_AGAIN}")
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{where}: the shard {shard.name} named in {index.name} is missing. {FETCH_AGAIN}")
        try:
            with safe_open(shard, framework="pt") as file:
                empty = not any(True for _ in file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{where}: {shard.name} is incomplete or not a safetensors file ({first_line(error)}). {FETCH_AGAIN}"
            ) from error
        if empty:
            raise UserError(f"{where}: {shard.name} holds no tensors. {FETCH_AGAIN}")


def read_tokenizer(folder: Path, where: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer, with a padding token.

    Raises:
        UserError: there is none, or it has more tokens than the model.
    """
    with as_user_error(f"{where}: the tokenizer cannot be loaded", FETCH_AGAIN):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError(
            f"{where}: the tokenizer has no tokenizer.json, so it is too slow to use. Save the "
            "fast one next to the weights."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{where}: the tokenizer has neither a padding nor an end token. Add pad_token to "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token  # as is usual for decoders, which are trained without padding
    ids = len(tokenizer)
    if ids > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer knows {ids} tokens and the model {config.vocab_size} "
            "(vocab_size), so they do not belong together. Put the model's own tokenizer into the "
            "folder."
        )
    return tokenizer


def max_tokens(encoder: nn.Module) -> int:
    """Number of usable positions, from the position table or else from config.json.

    RoBERTa-style models reserve the first padding_idx + 1 rows of the table.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in (
            "position_embeddings",
            "wpe",
        ):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return int(getattr(encoder.config, "max_position_embeddings", None) or 2**31)
