"""What is installed, which device there is, and which data and backbones can be used from here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import constants, get_cached_repo_tree

from fwlora_lab.catalog.encoders import MINILM, MPNET, PackagedModel, pinned_revisions
from fwlora_lab.catalog.tasks import GLUE_REPOSITORY
from fwlora_lab.config.schema import ModelConfig
from fwlora_lab.errors import UserError
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.models.hub import hub_trouble
from fwlora_lab.models.packaged import is_installed
from fwlora_lab.training.device import cpu_has_bf16

Status = Literal["ok", "warn", "no"]
Line = tuple[Status, str, str]
_NEEDED = ("torch", "peft")
_FOR_EXPERIMENTS = ("transformers", "datasets", "hydra-core", "pydantic", "rich", "scikit-learn")
_FOR_SEARCHES = ("optuna",)


def doctor_lines(
    glue_roots: Sequence[str] = ("data/glue", "glue"),
) -> list[tuple[str, str, str]]:
    """(status, what, detail) of every finding: "ok", "warn" (works within limits) or "no"."""
    return [
        *_versions(),
        *_device(),
        *_hub(),
        *_backbones(),
        *_data(glue_roots),
    ]


def _versions() -> list[Line]:
    lines: list[Line] = [("ok", "python", platform.python_version())]
    for name in ("fwlora", *_NEEDED, *_FOR_EXPERIMENTS, *_packages(MINILM.packaged), *_FOR_SEARCHES):
        try:
            lines.append(("ok", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            optional = name in _FOR_SEARCHES
            lines.append(
                (
                    "warn" if optional else "no",
                    name,
                    "not installed; needed for `fwlora search` only"
                    if optional
                    else "not installed: pip install 'fwlora[lab]'",
                )
            )
    return lines


def _packages(model: PackagedModel | None) -> tuple[str, ...]:
    return model.distributions if model else ()


def _device() -> list[Line]:
    lines: list[Line] = []
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        lines.append(("ok", "device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, {half}"))
    else:
        precision = "bf16 and fp32" if cpu_has_bf16() else "fp32"
        lines.append(("warn", "device", f"CPU only: {precision}, fit for MiniLM and small data"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    status: Status = "ok" if usable is None or threads <= usable else "warn"
    lines.append((status, "threads", f"torch uses {threads}, {usable} cores are usable"))
    return lines


def _hub() -> list[Line]:
    trouble = hub_trouble()
    if trouble is None:
        return [("ok", "hub", f"{constants.ENDPOINT} answers")]
    return [
        (
            "warn",
            "hub",
            f"{constants.ENDPOINT} cannot be reached ({trouble}); minilm, local folders and what "
            f"the cache ({constants.HF_HUB_CACHE}) holds still work",
        )
    ]


def _backbones() -> list[Line]:
    lines: list[Line] = []
    try:
        minilm = load_backbone(ModelConfig(name="minilm", pretrained_id="minilm"))
        lines.append(("ok", "backbone minilm", f"{minilm.source}, {minilm.parameters:,} parameters"))
    except UserError as error:
        lines.append(("no", "backbone minilm", str(error)))
    # Not loaded, because that would unpack 440 MB.
    if is_installed(MPNET):
        lines.append(("ok", "backbone mpnet", "its packages are installed; unpacked at its first use"))
    else:
        assert MPNET.packaged is not None
        lines.append(("warn", "backbone mpnet", f"not installed (405 MB): {MPNET.packaged.install}"))
    for repo, commit in pinned_revisions().items():
        if _cached(repo, commit):
            lines.append(("ok", f"backbone {repo}", f"in the cache at {commit[:8]}"))
        else:
            lines.append(("warn", f"backbone {repo}", "not in the cache; fetched at its first use"))
    return lines


def _cached(repo: str, commit: str) -> bool:
    """Whether all weights that the commit lists lie in the hub's cache."""
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    try:
        files = [file.path for file in get_cached_repo_tree(repo, revision=commit)]
    except Exception:  # no listing in the cache, or one that cannot be read: nothing can be promised
        files = ["model.safetensors"]
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    return bool(weights) and all((storage / commit / file).is_file() for file in weights)


def _data(glue_roots: Sequence[str]) -> list[Line]:
    lines: list[Line] = [("ok", "data offline", "built in, generated from a seed")]
    found = False
    for root in glue_roots:
        tasks = sorted(path.parent.name for path in Path(root).glob("*/train.tsv"))
        if tasks:
            found = True
            lines.append(("ok", f"data dataset.root={root}", f"GLUE folder with {', '.join(tasks)}"))
    cache = Path(constants.HF_HUB_CACHE) / f"datasets--{GLUE_REPOSITORY.replace('/', '--')}"
    if cache.is_dir():
        found = True
        lines.append(("ok", f"data {GLUE_REPOSITORY}", "in the hub's cache, at least in part"))
    if not found:
        lines.append(
            (
                "warn",
                "data GLUE",
                "no GLUE folder here and nothing in the cache: fetched from the hub at its first "
                "use, or name a folder in GLUE's own layout with dataset.root=…",
            )
        )
    return lines
