"""Whether a results folder holds what was written to it: no file changed, torn, missing or misplaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import UNHASHED, RunFolder, file_sha256, load_record
from fwlora_lab.records.study_plan import load_plan
from fwlora_lab.search.storage import database_fault
from fwlora_lab.training.checkpoints import FOLDER, is_intact


@dataclass(frozen=True)
class Fault:
    """A file or folder that is not as it was written, and what is wrong with it."""

    path: Path
    text: str


@dataclass
class Verification:
    """What was looked at below a folder.

    Attributes:
        runs: how many runs there are.
        without_hashes: those from before records had hashes: only that they can be read is known.
        in_training: folders of runs that another process is writing.
    """

    faults: list[Fault] = field(default_factory=list)
    runs: int = 0
    without_hashes: int = 0
    in_training: int = 0


def verify(folder: str | Path) -> Verification:
    """Look at every run, plan, checkpoint and database of a search below a folder.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder.")
    found = Verification()
    for run in sorted(path for path in root.rglob("seed-*") if path.is_dir()):
        _verify_run(run, found)
    for plan in sorted(root.rglob("study.json")):
        try:
            load_plan(plan.parent)
        except UserError as error:
            found.faults.append(Fault(plan, _without_path(error, plan)))
    for database in sorted(root.rglob("study.db")):
        if (text := database_fault(database)) is not None:
            found.faults.append(Fault(database, text))
    return found


def _verify_run(folder: Path, found: Verification) -> None:
    found.runs += 1
    if RunFolder(folder.parent.parent, folder.parent.name, _seed(folder)).is_locked():
        found.in_training += 1
        return
    found.faults += [
        Fault(file, "torn or changed: the run goes on from another checkpoint")
        for file in sorted((folder / FOLDER).glob("step-*.pt"))
        if not is_intact(file)
    ]
    file = folder / "record.json"
    if not file.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name != FOLDER)
        if others:
            found.faults.append(Fault(folder, f"the record is missing; there is {', '.join(others)}"))
        return
    try:
        record = load_record(folder)
    except UserError as error:
        found.faults.append(Fault(file, _without_path(error, file)))
        return
    if record.files is None:
        found.without_hashes += 1
        return
    found.faults += _changed_files(folder, record.files)


def _changed_files(folder: Path, hashes: dict[str, str]) -> Iterator[Fault]:
    for name, digest in hashes.items():
        file = folder / name
        try:
            if file_sha256(file) != digest:
                yield Fault(file, "changed after the run wrote it (its sha256 is another)")
        except FileNotFoundError:
            yield Fault(file, "missing")
        except OSError as error:
            yield Fault(file, f"cannot be read: {error.strerror}")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in hashes and name not in UNHASHED and not name.startswith(f"{FOLDER}/"):
            yield Fault(file, "not written by the run")


def _seed(folder: Path) -> int:
    number = folder.name.removeprefix("seed-")
    return int(number) if number.isdecimal() else 0


def _without_path(error: UserError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
