"""The base of everything that is read from a file that people write: run configs, studies, designs, claims."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """A frozen block of keys: unknown keys, NaN, infinity and values of another type (`"3"` for 3) are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)
