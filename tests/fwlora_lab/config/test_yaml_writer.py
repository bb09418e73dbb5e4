"""Single values as YAML.

pytest tests/fwlora_lab/config/test_yaml_writer.py
"""

from __future__ import annotations

from fwlora_lab.config.yaml_writer import yaml_scalar


def test_values_that_are_equal_in_python_keep_their_yaml():
    assert [yaml_scalar(v) for v in (1, 1.0, True, [1, 2], [1.0, True])] == [
        "1",
        "1.0",
        "true",
        "[1, 2]",
        "[1.0, true]",
    ]
