"""Names of methods, without the code behind them: run configs are checked against these."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Every name that a run config may give -> the method's one short name.
METHODS: dict[str, str] = {
    "lora": "lora",
    "baseline_lora": "lora",
    "adalora": "adalora",
    "baseline_adalora": "adalora",
    "fw_lora": "fw_lora",
    "proposed_fw_lora": "fw_lora",
    "svd_lora": "svd_lora",
}
MethodName = str


def register_method_name(name: str, aliases: Sequence[str] = ()) -> None:
    """Let run configs name a method; `fwlora_lab.models.methods.register_method` calls this.

    Raises:
        ValueError: a name that is no identifier, or that means another method already.
    """
    for word in (name, *aliases):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", word):
            raise ValueError(f"{word!r} cannot name a method: use letters, digits and underscores, a letter first")
        if METHODS.get(word, name) != name:
            raise ValueError(f"{word!r} already means the method {METHODS[word]}: choose another name")
    METHODS.update(dict.fromkeys((name, *aliases), name))
