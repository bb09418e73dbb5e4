"""Fisher-Weighted LoRA: one added line that penalizes the updates of matrices which little gradient reaches.

    attach                one line after the optimizer is made; returns a FisherWeightedLoRA
    FisherWeightedLoRA    the handle: phase, importance, weights, penalty, state_dict, detach
    FWLoraConfig          the method's settings
    FWLoraCallback        the same line for the Hugging Face Trainer
    export_adapter        write a trained adapter as plain LoRA, cut to fewer ranks on request
    register_weighting    add a rule from Fisher proxies to weights
    register_estimator    add a measure of the gradient that reaches a matrix; see HookedEstimator
    HookedEstimator       the base class of estimators

`fwlora.budget` plans the ranks that a parameter budget buys; it is imported by that name.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fwlora.config import FWLoraConfig

if TYPE_CHECKING:
    from fwlora.callback import FWLoraCallback
    from fwlora.estimators import HookedEstimator, register_estimator
    from fwlora.export import export_adapter
    from fwlora.method import FisherWeightedLoRA, attach
    from fwlora.weighting import register_weighting

__version__ = "0.1.0"

__all__ = [
    "FWLoraCallback",
    "FWLoraConfig",
    "FisherWeightedLoRA",
    "HookedEstimator",
    "__version__",
    "attach",
    "export_adapter",
    "register_estimator",
    "register_weighting",
]

# Imported when first asked for: torch, PEFT and above all transformers' Trainer take seconds, and whoever only checks
# settings (the experiment runner's command line) needs none of them.
_HOMES = {
    "FWLoraCallback": "callback",
    "FisherWeightedLoRA": "method",
    "HookedEstimator": "estimators",
    "attach": "method",
    "export_adapter": "export",
    "register_estimator": "estimators",
    "register_weighting": "weighting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fwlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fwlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
