"""Count test functions and assertions by revision, to see that a move of tests lost none.

    python scripts/count_assertions.py [REVISION ...]      (default: HEAD)

Counted are `assert` statements, and calls of pytest.raises, pytest.warns, pytest.fail and of the assert_* functions of
torch and NumPy, in every .py file below tests/.
"""

from __future__ import annotations

import ast
import subprocess
import sys


def counts(revision: str) -> tuple[int, int]:
    """Test functions and assertions of a revision."""
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", revision, "tests"], capture_output=True, text=True, check=True
    )
    tests = assertions = 0
    for path in listed.stdout.splitlines():
        if not path.endswith(".py"):
            continue
        source = subprocess.run(
            ["git", "show", f"{revision}:{path}"], capture_output=True, text=True, check=True
        ).stdout
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                tests += 1
            elif isinstance(node, ast.Assert):
                assertions += 1
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                last = name.rsplit(".", 1)[-1]
                assertions += name in ("pytest.raises", "pytest.warns", "pytest.fail") or last.startswith("assert_")
    return tests, assertions


def main() -> int:
    print(f"{'revision':<12} {'tests':>6} {'assertions':>11}")
    for revision in sys.argv[1:] or ["HEAD"]:
        tests, assertions = counts(revision)
        print(f"{revision[:12]:<12} {tests:>6} {assertions:>11}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
