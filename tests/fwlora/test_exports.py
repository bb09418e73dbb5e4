"""What `import fwlora` offers: the names that its docstring documents, without the cost of importing torch.

pytest tests/fwlora/test_exports.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import fwlora

ROOT = Path(__file__).parents[2]


def test_the_exported_names_are_sorted_and_documented():
    assert fwlora.__all__ == sorted(fwlora.__all__)
    documented = re.findall(r"^    (\w+)  ", fwlora.__doc__ or "", re.M)
    assert sorted([*documented, "__version__"]) == fwlora.__all__


def test_every_exported_name_is_there():
    for name in fwlora.__all__:
        assert getattr(fwlora, name) is not None
        assert name in dir(fwlora)
    for name in set(fwlora.__all__) - {"__version__"}:
        assert getattr(fwlora, name).__doc__, f"fwlora.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(fwlora, "atach")


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fwlora.__version__ == project["version"]


def test_checking_settings_does_not_import_torch():
    """The experiment runner's command line checks settings, and must answer at once."""
    code = "import sys, fwlora; fwlora.FWLoraConfig(warmup_steps=3); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
