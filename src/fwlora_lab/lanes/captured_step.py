"""Training steps captured as CUDA graphs: one launch replays all kernels of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class CapturedStep:
    """One step as a CUDA graph, with the tensors that it reads its inputs from."""

    def __init__(
        self, inputs: Sequence[Tensor], generators: Sequence[torch.Generator], compute: Callable[[], Tensor]
    ) -> None:
        """Capture `compute`, which reads `inputs` and draws from `generators`."""
        self._inputs = list(inputs)
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        with torch.cuda.graph(self._graph):
            self._losses = compute()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for captured, given in zip(self._inputs, inputs, strict=True):
            if captured is not given:
                captured.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._losses.clone()


class StepCache:
    """The captured steps of an engine, one for each kind of step: the same kernels on tensors of the same shapes."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._steps: dict[Hashable, CapturedStep | None] = {}

    def clear(self) -> None:
        """Forget all steps, because tensors that they use have been replaced."""
        self._steps.clear()

    def run(
        self,
        kind: Hashable,
        inputs: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        """The losses of `compute`, captured when a kind of step comes for the second time and replayed from then on.

        The first one runs directly, because it initialises what a capture must not (workspaces, lazily loaded
        kernels).
        """
        if not self._enabled:
            return compute()
        if kind not in self._steps:
            self._steps[kind] = None
            return compute()
        step = self._steps[kind]
        if step is None:
            try:
                step = self._steps[kind] = CapturedStep(inputs, generators, compute)
            except RuntimeError as error:
                warnings.warn(f"The step cannot be captured as a CUDA graph and runs without: {error}", stacklevel=2)
                self._enabled = False
                return compute()
        return step(inputs)
