"""The data that the tests of the lane engine train on."""

from __future__ import annotations

import pytest
from lane_runs import token_table

from fwlora_lab.data.tokens import TokenTable


@pytest.fixture(scope="package")
def table() -> TokenTable:
    return token_table()
