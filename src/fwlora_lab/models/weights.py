"""Which weights an encoder on this machine has: a hash of its files, so that replaced ones are noticed."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from fwlora_lab.catalog.encoders import packaged_encoder
from fwlora_lab.config.schema import ModelConfig
from fwlora_lab.errors import UserError
from fwlora_lab.files import json_text, write_atomic
from fwlora_lab.models.hub import is_hub_id
from fwlora_lab.models.packaged import packaged_folder

_KEPT = 1000  # files in the cache: those used last
_LARGE = 16 * 2**20  # bytes; smaller files are hashed faster than the cache is read


def local_weights(cfg: ModelConfig) -> str | None:
    """sha256 (hex) over config.json and the safetensors files of a folder or of an installed package.

    None for a model of the hub, whose commit says as much, and where the files cannot be read: loading them says why.
    A large file's own hash is kept in HF_HOME/fwlora/weights.json and is computed again when its size or its time of
    change is another.
    """
    wanted = cfg.pretrained_id.strip()
    packaged = packaged_encoder(wanted)
    try:
        if packaged is not None:
            folder = packaged_folder(packaged)[0]
        elif not wanted or is_hub_id(wanted):
            return None
        else:
            folder = Path(wanted).expanduser()
        files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
        digests = [(file.name, _digest(file)) for file in files]
    except (UserError, OSError, ValueError):  # ValueError: a path with a NUL byte
        return None
    return hashlib.sha256(json_text(digests).encode()).hexdigest()


def _digest(file: Path) -> str:
    """sha256 (hex) of a file, from the cache if it holds this size and time of change."""
    cache = Path(constants.HF_HOME) / "fwlora" / "weights.json"
    status = file.stat()
    if status.st_size < _LARGE:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    key, stamp = str(file.resolve()), [status.st_size, status.st_mtime_ns]
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(cache.read_text(encoding="utf-8")))
    found = known.get(key)
    if isinstance(found, list) and found[:2] == stamp and len(found) == 3:
        return found[2]
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    known.pop(key, None)
    known[key] = [*stamp, digest]
    with suppress(UserError):  # a cache that cannot be written costs time only
        write_atomic(cache, json_text(dict(list(known.items())[-_KEPT:])))
    return digest
