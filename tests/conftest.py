"""Checks the shapes in the annotations of the method's tensor functions, in every test."""

import builtins

import torch
from jaxtyping import Float, install_import_hook

# The package itself imports jaxtyping for type checkers only, so that it needs torch and peft and nothing else.
builtins.Float = Float  # type: ignore[attr-defined]
install_import_hook(["fwlora.estimators", "fwlora.weighting", "fwlora.penalty"], "beartype.beartype")
torch.set_num_threads(1)
