"""Files and folders are written in one piece or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fwlora_lab import files
from fwlora_lab.errors import UserError
from fwlora_lab.files import clear_leftovers, write_all_atomic, write_atomic, write_folder_atomic


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fail_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int, number: int) -> None:
    """The `call`-th use of a method of Path, counted from 1, raises the system's error `number` after half its work."""
    real, calls = getattr(Path, method), []

    def failing(self: Path, *args: object) -> object:
        calls.append(self)
        if len(calls) == call:
            if method == "write_bytes":
                real(self, b"ha")
            raise OSError(number, os.strerror(number))
        return real(self, *args)

    monkeypatch.setattr(Path, method, failing)


def test_a_file_is_written_as_utf8_and_its_folder_is_made(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.txt", "λ\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "λ\n".encode()
    write_atomic(tmp_path / "a" / "b.txt", b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\x00\xff"
    assert len(list((tmp_path / "a").iterdir())) == 1, "no temporary file is left"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message_and_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file = tmp_path / "a.txt"
    write_atomic(file, "former")
    fail_at(monkeypatch, "write_bytes", 1, number)
    with pytest.raises(UserError) as caught:
        write_atomic(file, "new", "set results_dir=DIR")
    assert str(caught.value) == (
        f"{file}: cannot be written: the disk is full. Free some space, or set results_dir=DIR."
    )
    assert content(tmp_path) == {"a.txt": "former"}


def test_without_permission_the_message_asks_for_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "write_bytes", 1, errno.EACCES)
    with pytest.raises(UserError, match=r"a.txt: cannot be written: Permission denied\. Choose a folder"):
        write_atomic(tmp_path / "a.txt", "new")
    assert content(tmp_path) == {}


def test_a_path_that_no_system_takes_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "a\0b" / "c.txt", "new")


def test_several_files_change_only_when_all_of_them_could_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = {tmp_path / name: f"former {name}" for name in ("a", "b", "c")}
    write_all_atomic(former)
    fail_at(monkeypatch, "write_bytes", 3, errno.ENOSPC)
    with pytest.raises(UserError, match="c: cannot be written: the disk is full"):
        write_all_atomic({path: "new" for path in former})
    assert content(tmp_path) == {path.name: text for path, text in former.items()}


KILLED_BEFORE_THE_RENAME = """
    import os, signal, sys
    from pathlib import Path
    from fwlora_lab.files import write_atomic

    Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
    write_atomic(Path(sys.argv[1]), "new")
"""


def test_a_writer_killed_before_the_rename_leaves_the_former_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_atomic(file, "former")
    script = textwrap.dedent(KILLED_BEFORE_THE_RENAME)
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert file.read_text() == "former"
    assert [p.read_text() for p in tmp_path.glob(".a.txt.*.tmp")] == ["new"], "it was killed after writing"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_folder_atomic(tmp_path / "run", lambda new: (new / "a").write_text("1") and None)
    write_folder_atomic(tmp_path / "run", lambda new: (new / "b").write_text("2") and None)
    assert content(tmp_path) == {"run/b": "2"}


@pytest.mark.parametrize("rename", [1, 2])
def test_a_folder_whose_rename_fails_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    write_folder_atomic(tmp_path / "run", lambda new: (new / "a").write_text("1") and None)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as on systems that cannot
    fail_at(monkeypatch, "rename", rename, errno.EACCES)
    with pytest.raises(UserError, match=r"run: cannot be written: Permission denied"):
        write_folder_atomic(tmp_path / "run", lambda new: (new / "b").write_text("2") and None)
    assert content(tmp_path) == {"run/a": "1"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault in the program")])
def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(tmp_path: Path, error: BaseException) -> None:
    def stop(new: Path) -> None:
        (new / "half").write_text("x")
        raise error

    with pytest.raises(type(error)) as caught:
        write_folder_atomic(tmp_path / "run", stop)
    assert caught.value is error and content(tmp_path) == {}


def test_leftovers_of_killed_writers_are_cleared(tmp_path: Path) -> None:
    for name in (".run.7.old", ".run.7.tmp", ".run.8.tmp", ".run2.7.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_leftovers(tmp_path / "run")
    assert content(tmp_path) == {"run/file": ".run.7.old", ".run2.7.tmp/file": ".run2.7.tmp"}
