"""Models that come in packages from PyPI, for machines without access to the hub.

A small one is a folder inside its package. A large one is a zip in several parts, one a package, because PyPI limits
the size of a file: the parts are read as one file, and the model's folder is unpacked once, into the cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import filelock
from huggingface_hub import constants

from fwlora_lab.catalog.encoders import EncoderInfo, PackagedModel
from fwlora_lab.errors import UserError
from fwlora_lab.files import cannot_write, clear_leftovers, write_folder_atomic

_WEIGHTS = "model.safetensors"
_CHUNK = 1 << 20
_ELSEWHERE = "set HF_HOME to a folder with room for it"


def packaged_folder(encoder: EncoderInfo) -> tuple[Path, str]:
    """The model's folder, and where it comes from in words.

    Raises:
        UserError: a package is missing or damaged, or the cache cannot be written.
    """
    model = encoder.packaged
    assert model is not None
    name = encoder.repository.rpartition("/")[2]
    where = f"model.pretrained_id={encoder.pretrained_id!r}"
    files, versions = _installed(model, where)
    package, many = model.distributions[0], len(files) > 1
    source = f"{name} from the package{'s' * many} {package}{' and following' * many} {versions[0]}"
    if model.sha256 is None:
        return files[0], source
    return _unpacked(files, _cache() / f"{name}-{model.sha256[:8]}", model, where), source


def is_installed(encoder: EncoderInfo) -> bool:
    """Whether all of the encoder's packages are there."""
    assert encoder.packaged is not None
    try:
        _installed(encoder.packaged, "")
    except UserError:
        return False
    return True


def _installed(model: PackagedModel, where: str) -> tuple[list[Path], list[str]]:
    files, versions = [], []
    for distribution, path in zip(model.distributions, model.paths, strict=True):
        try:
            found = importlib.metadata.distribution(distribution)
        except importlib.metadata.PackageNotFoundError:
            found = None
        file = None if found is None else Path(str(found.locate_file(path)))
        if found is None or file is None or not file.exists():
            raise UserError(
                f"{where} needs the package {distribution}, which is not installed. Install it: {model.install}"
            )
        files.append(file)
        versions.append(found.version)
    return files, versions


def _cache() -> Path:
    """Beside the hub's own cache, so that HF_HOME moves both."""
    return Path(constants.HF_HOME) / "fwlora"


def _unpacked(parts: Sequence[Path], folder: Path, model: PackagedModel, where: str) -> Path:
    """The folder with the model's files; unpacked by the first process that needs it, while others wait."""
    if folder.is_dir():
        return folder  # it got its name only after the hash was right
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise cannot_write(folder, error, _ELSEWHERE) from error
    with lock:
        clear_leftovers(folder)
        if not folder.is_dir():
            broken = f"{where}: the files of the packages {model.distributions[0]} and following are damaged"
            cure = f"Install them again: {model.install} --force-reinstall"
            try:
                write_folder_atomic(folder, lambda new: _unpack(parts, new, model), _ELSEWHERE)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise UserError(f"{broken} ({error}). {cure}") from error
    return folder


def _unpack(parts: Sequence[Path], folder: Path, model: PackagedModel) -> None:
    """The files at the top of the zip's one folder, into `folder`.

    Raises:
        zipfile.BadZipFile: the parts form no zip, or the weights are not those that the hash is of.
    """
    with ExitStack() as stack:
        joined = _Joined([stack.enter_context(part.open("rb")) for part in parts])
        archive = stack.enter_context(zipfile.ZipFile(io.BufferedReader(joined, _CHUNK)))
        digest = hashlib.sha256()
        for member in archive.infolist():
            name = Path(member.filename)
            if member.is_dir() or len(name.parts) != 2:
                continue
            with archive.open(member) as source, (folder / name.name).open("wb") as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    if name.name == _WEIGHTS:
                        digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        raise zipfile.BadZipFile(f"the SHA-256 of {_WEIGHTS} is {digest.hexdigest()}, not {model.sha256}")


class _Joined(io.RawIOBase):
    """Files one after the other, read as one."""

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        self._files = files
        self._sizes = [file.seek(0, io.SEEK_END) for file in files]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._sizes)}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            if self._at < start + size:
                file.seek(self._at - start)
                data = file.read(min(len(buffer), start + size - self._at))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            start += size
        return 0
