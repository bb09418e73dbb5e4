"""Fisher-Weighted LoRA: one added line that shrinks the updates of matrices which little gradient reaches."""

from typing import TYPE_CHECKING, Any

from fwlora.config import FWLoraConfig
from fwlora.export import export_adapter
from fwlora.method import FisherWeightedLoRA, attach

if TYPE_CHECKING:
    from fwlora.callback import FWLoraCallback

__all__ = ["FWLoraCallback", "FWLoraConfig", "FisherWeightedLoRA", "attach", "export_adapter"]


def __getattr__(name: str) -> Any:
    if name == "FWLoraCallback":  # importing transformers' Trainer takes seconds
        from fwlora.callback import FWLoraCallback

        return FWLoraCallback
    raise AttributeError(f"module 'fwlora' has no attribute {name!r}")
