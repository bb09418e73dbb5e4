"""Print what the core's tests need, for pip: on the oldest versions that pyproject.toml claims, or on the newest.

python scripts/core_versions.py oldest|newest

"oldest" turns each `name>=version` of the core's dependencies into `name==version`; "newest" leaves the version to pip.
The tests' own tools have the versions of constraints.txt.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("pytest", "hypothesis", "jaxtyping", "beartype", "accelerate")


def floors() -> dict[str, str]:
    """The oldest version of each of the core's dependencies, by its name."""
    found = {}
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        found[name] = version
    return found


def pins() -> dict[str, str]:
    """What constraints.txt pins, by the package's name."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def requirements(which: str) -> list[str]:
    core = [f"{name}=={version}" if which == "oldest" else name for name, version in floors().items()]
    return core + [f"{tool}=={pins()[tool]}" for tool in TOOLS]


if __name__ == "__main__":
    if sys.argv[1:] not in (["oldest"], ["newest"]):
        sys.exit(__doc__)
    print("\n".join(requirements(sys.argv[1])))
