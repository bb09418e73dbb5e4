"""Small models for the method's tests: real PEFT layers, float64, milliseconds a step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

D_IN, HIDDEN, D_OUT = 6, 8, 3


class Net(nn.Module):
    """Two targeted matrices of different shape, of the layer kind asked for, and a head."""

    def __init__(self, kind: str = "linear") -> None:
        super().__init__()

        def layer(i: int, o: int) -> nn.Module:
            return Conv1D(o, i) if kind == "conv1d" else nn.Linear(i, o)

        self.first = layer(D_IN, HIDDEN)
        self.second = layer(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, D_OUT)
        self.uses = 2 if kind == "tied" else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(self.uses):
            h = torch.tanh(self.second(h))
        return self.head(h.mean(1))


def lora_net(kind: str = "linear", seed: int = 0, dtype=torch.float64, **lora: Any) -> Any:
    """A PEFT model over `Net` whose B is not zero, so that the penalty has a gradient everywhere."""
    torch.manual_seed(seed)
    settings = dict(r=2, lora_alpha=3, target_modules=["first", "second"], modules_to_save=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D: PEFT says that it sets fan_in_fan_out itself
        model = get_peft_model(Net(kind), LoraConfig(**{**settings, **lora}))  # type: ignore[arg-type]
    model = model.to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batches(n: int, size: int = 4, tokens: int = 5, seed: int = 1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, tokens, D_IN, generator=g, dtype=dtype),
            torch.randint(0, D_OUT, (size,), generator=g),
        )
        for _ in range(n)
    ]
