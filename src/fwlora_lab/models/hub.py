"""Downloads models from the Hugging Face hub at a pinned commit."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

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

from fwlora_lab.catalog.encoders import aliases, packaged_encoders, pinned_revisions
from fwlora_lab.errors import UserError
from fwlora_lab.models.load_errors import WHAT_CAN_BE_MEANT, first_line
from fwlora_lab.text import did_you_mean

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TIMEOUT_S = 3.0
_BUSY = frozenset({500, 502, 503, 504})  # answers of a hub that may be fine a moment later
_WAITS_S = (0.5, 1.0, 2.0)  # before the second, third and fourth try
_COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG_AND_TOKENIZER_FILES = [
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
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]


def is_hub_id(wanted: str) -> bool:
    """Whether this is a known id, or has the form of an id and is not the name of a local folder."""
    if wanted in aliases() or wanted in pinned_revisions():
        return True
    if os.path.exists(wanted):
        return False
    return _HUB_ID.fullmatch(wanted) is not None and not wanted.endswith((".safetensors", ".bin"))


def commit_of(repo: str, revision: str | None) -> str:
    """The full commit hash: the config's, or the one that the catalog pins.

    Raises:
        UserError: neither gives one. A branch or a tag is not enough, because the hub may change what it means.
    """
    pinned = pinned_revisions()
    if revision is None and repo in pinned:
        return pinned[repo]
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    known = [*(e.pretrained_id for e in packaged_encoders()), *aliases(), *pinned]
    no_folder = "" if revision else " and no local folder has that name"
    problem = (
        f"model.revision={revision!r} is not a full commit hash (40 characters 0-9a-f)"
        if revision
        else f"model.pretrained_id={repo!r} has no model.revision{no_folder}"
    )
    try:
        today = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S).sha
        cure = f"To pin what the hub serves today, set model.revision={today}"
    except RepositoryNotFoundError:
        cure = "The hub knows no model of this id, or it is private: check the id"
    except Exception:  # best effort: the hub is only asked to improve the message
        cure = f"Copy the commit from {constants.ENDPOINT}/{repo}/commits/main into model.revision"
    raise UserError(f"{problem}, so a run could not be repeated{did_you_mean(repo, known)}. {cure}.")


def hub_trouble() -> str | None:
    """The reason why the hub cannot be reached, or None if it answers within three seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception as error:  # no route, no DNS, a proxy, HF_HUB_OFFLINE: what the user can do is the same
        return first_line(error)
    return None


def download(repo: str, commit: str, files: list[str]) -> Path:
    """Download `files` of one commit into the hub's cache, unless they are there, and return their folder.

    Raises:
        UserError: the files are neither in the cache nor can they be downloaded.
    """
    what = f"model.pretrained_id={repo!r} at model.revision={commit[:8]}"
    elsewhere = "or use model.pretrained_id=minilm, which needs no network"

    def snapshot(local: bool) -> Path:
        with contextlib.nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            return Path(snapshot_download(repo, revision=commit, allow_patterns=files, local_files_only=local))

    try:
        get_cached_repo_tree(repo, revision=commit)  # without the list of files, the cache may be incomplete
        return snapshot(local=True)
    except (CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError):
        pass
    # If the hub cannot be reached, the library retries for half a minute before it reads its cache.
    trouble = hub_trouble()
    try:
        return _patiently(lambda: snapshot(local=trouble is not None))
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
        raise UserError(f"{what}: not a hub id. {WHAT_CAN_BE_MEANT}") from error
    except LocalEntryNotFoundError as error:
        reason = trouble or first_line(error.__cause__ or error)
        raise UserError(
            f"{what}: the hub ({constants.ENDPOINT}) cannot be reached and the files are not in "
            f"the cache ({reason}). Check the network and HF_HUB_OFFLINE, or copy the model's "
            f"folder here and name it as ./folder, {elsewhere}."
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{what}: the hub answered {first_line(error)}. Try again later, {elsewhere}.") from error
    except Exception as error:  # proxies, certificates, a full disk, a download that broke off
        raise UserError(f"{what}: the download failed ({first_line(error)}). Try again, {elsewhere}.") from error


def _patiently(fetch: Callable[[], Path]) -> Path:
    """`fetch()`, which is tried again after a short wait while the hub cannot send a file.

    The library itself waits for a busy hub, but not if a file's download is answered with 500 to 504.
    """
    for wait in _WAITS_S:
        try:
            return fetch()
        except HfHubHTTPError as error:
            if error.response.status_code not in _BUSY or "/resolve/" not in str(error.response.url):
                raise
        time.sleep(wait)
    return fetch()


def names_on_hub(repo: str, commit: str, folder: Path) -> set[str]:
    """The names of all files of a commit that was downloaded to `folder`."""
    try:
        return {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        # The cache was filled by an older version of the library, which stored no list: only its files are known.
        return {path.name for path in folder.iterdir()}
