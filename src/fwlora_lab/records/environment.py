"""What a run ran with: versions of packages, the git commit of the source, the processor."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    packages = ("torch", "transformers", "peft", "fwlora")
    found = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def git_commit() -> str | None:
    """The commit that the working directory has checked out, with "-dirty" if tracked files were changed.

    None outside a git repository, or if git is not installed.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The processor's name as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
