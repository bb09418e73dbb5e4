"""The methods, and the names that designs and run configs give them."""

from __future__ import annotations

from typing import Literal

MethodName = Literal["lora", "adalora", "fw_lora", "svd_lora"]
METHODS: dict[str, MethodName] = {
    "lora": "lora",
    "baseline_lora": "lora",
    "adalora": "adalora",
    "baseline_adalora": "adalora",
    "fw_lora": "fw_lora",
    "proposed_fw_lora": "fw_lora",
    "svd_lora": "svd_lora",
}
