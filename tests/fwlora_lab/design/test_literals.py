"""Printed Python values are read, never evaluated.

pytest tests/fwlora_lab/design/test_literals.py
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwlora_lab.design.literals import read_fields
from fwlora_lab.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES)
def test_what_python_prints_is_read_back(first, second):
    assert read_fields(f"a={first!r} b={second!r}", "x") == {"a": first, "b": second}


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="a=b'\"\\[](){}:, 1.eE-\n", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        read_fields(text, "x")
    except UserError as error:
        assert str(error).startswith("x: character ")


def test_calls_become_their_arguments_and_are_never_made(tmp_path):
    mark = tmp_path / "made"
    text = f"a=__import__('os').system('touch {mark}')"
    with pytest.raises(UserError):
        read_fields(text, "x")
    assert read_fields(f"a=os.system('touch {mark}') b=Path(x=open('{mark}', 'w'))", "x") == {
        "a": {},
        "b": {"x": {}},
    }
    assert not mark.exists()
    assert read_fields("t=datetime.datetime(2022, 3, 2, tzinfo=TzInfo(UTC))", "x") == {"t": {"tzinfo": {}}}
    assert read_fields("t=(1, 'b',) u=[] v={'k': (2,)}", "x") == {"t": [1, "b"], "u": [], "v": {"k": [2]}}
