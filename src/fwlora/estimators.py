"""How much gradient reaches a frozen matrix: the estimators, as tensor functions and as what a hook calls.

A frozen layer computes `y = x Wᵀ`. With `X` the inputs of all tokens of a step, one row a token, and `G` the
gradients of the loss with respect to the outputs, the gradient that `W` would get if it were not frozen is

    ∇W L = Gᵀ X                       [d_out, d_in]

and the Fisher proxy of the step is `‖∇W L‖_F²`. The estimators differ in what they keep of it:

    exact        Gᵀ X                 the request's quantity; costs as much as a weight gradient
    sketch       (X Ω)ᵀ G             Ω a Gaussian probe of k columns, fresh each step: E ‖(XΩ)ᵀG‖_F² = k ‖GᵀX‖_F²
                                      (Hutchinson's estimator; relative standard error at most √(2/k))
    per_example  Σ_i ‖G_iᵀ X_i‖_F²    the diagonal of the empirical Fisher matrix, a different quantity
    adapter      ‖∇B L‖_F²            free, from LoRA's own gradient, and unbiased only at initialisation

`exact` and `sketch` keep a statistic that is linear in the batch, so that micro-batches, several uses of one
module and several processes are summed before the norm is taken, as they are for a real gradient.

What each keeps at its peak, with n tokens a step, beside what training keeps anyway:

    exact        X of every matrix until its backward pass (most of it is kept by training too), and one Gᵀ X at a
                 time; with accumulation or several processes Gᵀ X of all matrices until the step
    sketch       n·k numbers for X Ω and k·d_out for (X Ω)ᵀ G of every matrix: bounded, whatever the model's width
    per_example  X of every matrix until its backward pass, and a T × T product for each sentence of T tokens
    adapter      nothing
"""

# Parts of torch are untyped, and its batched operations (_foreach_*) have no public names.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fwlora.choices import Averaging, add_choice
from fwlora.config import FWLoraConfig

if TYPE_CHECKING:
    from jaxtyping import Float


# A half-precision activation is read in pieces of so many numbers, so that its fp32 copy stays below 16 MiB.
_PIECE = 2**22


def _precision(*tensors: Tensor) -> torch.dtype:
    """At least fp32: squares of half-precision gradients overflow or vanish."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _rows(t: Float[Tensor, "*batch d"]) -> Float[Tensor, "n d"]:
    """All tokens as rows."""
    return t.reshape(-1, t.shape[-1])


def _pieces(rows: Float[Tensor, "n d"], dtype: torch.dtype) -> Sequence[Tensor]:
    """The rows in pieces whose copies of that dtype are small; in one piece if they have it already."""
    if rows.dtype == dtype:
        return [rows]
    return cast(tuple[Tensor, ...], rows.split(max(1, _PIECE // rows.shape[-1])))


def weight_gradient(g: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The gradient `GᵀX` that the frozen weight does not get, summed over all leading dimensions."""
    dtype = _precision(g, x)
    return _rows(g).to(dtype).T @ _rows(x).to(dtype)


def sketched_inputs(x: Float[Tensor, "*batch d_in"], probe: Float[Tensor, "d_in k"]) -> Float[Tensor, "n k"]:
    """`XΩ`: all that a sketch needs of a layer's inputs."""
    return torch.cat([piece.to(probe.dtype) @ probe for piece in _pieces(_rows(x), probe.dtype)])


def sketch_of(g: Float[Tensor, "*batch d_out"], sketched: Float[Tensor, "n k"]) -> Float[Tensor, "k d_out"]:
    """`(XΩ)ᵀG` from `XΩ`: the transpose of `Gᵀ(XΩ)`, because a tall G is read several times faster along its rows."""
    dtype = _precision(g, sketched)
    pieces = _pieces(_rows(g), dtype)
    parts = cast(tuple[Tensor, ...], sketched.to(dtype).split(len(pieces[0])))
    total = parts[0].T @ pieces[0].to(dtype)
    for part, piece in zip(parts[1:], pieces[1:], strict=True):
        total += part.T @ piece.to(dtype)
    return total


def sketched_gradient(
    g: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    probe: Float[Tensor, "d_in k"],
) -> Float[Tensor, "k d_out"]:
    """`(XΩ)ᵀG`, which costs k·(d_in + d_out) a token instead of d_in·d_out."""
    return sketch_of(g, sketched_inputs(x, probe))


def per_example_squared_norm(g: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, ""]:
    """`Σ_i ‖G_iᵀX_i‖_F²` over the examples i (the first dimension), the loss scaled as it was in the batch.

    Computed as `‖GᵀX‖_F² = Σ_tu (GGᵀ ∘ XXᵀ)_tu`, so a sentence of T tokens costs T²·(d_in + d_out). If the loss is
    the mean over n examples, `n` times this is the trace of the matrix's block of the empirical Fisher matrix.
    A two-dimensional input has one token per example.
    """
    dtype = _precision(g, x)
    g, x = (t.reshape(t.shape[0], -1, t.shape[-1]).to(dtype) for t in (g, x))
    return ((g @ g.mT) * (x @ x.mT)).sum()


def gaussian_probe(
    d_in: int, columns: int, *, seed: int, step: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "d_in k"]:
    """A probe Ω with independent N(0, 1) entries that is a function of (seed, step, d_in) alone.

    It is fresh at each step, because the error of a fixed probe never averages out, and the same in every process,
    so that sketches can be summed over processes.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + d_in) % 2**63)
    # Drawn as rows and transposed: a thin product reads columns that are contiguous in memory several times faster.
    return torch.randn(columns, d_in, generator=generator, device=device, dtype=dtype).T


def squared_norms(statistics: Sequence[Tensor], loss_scale: Tensor | float = 1.0) -> Float[Tensor, " m"]:
    """`‖S_m‖_F²` of each statistic, after division by the factor by which a GradScaler enlarged the loss."""
    norms = torch._foreach_norm(list(statistics))
    return (torch.stack([n.to(norms[0].device) for n in norms]) / loss_scale).square()


def adapter_squared_norm(
    grads_b: Sequence[Tensor], scales: Float[Tensor, " m"], shapes: Sequence[tuple[int, int]]
) -> Float[Tensor, " m"]:
    """`3·d_in/(s²·r) · ‖∇B‖_F²`, an estimate of `‖∇W‖_F²` that costs nothing.

    `∇B = s·∇W·Aᵀ`, and PEFT draws A's entries from U(±1/√d_in), so `E‖∇B‖_F² = s²·r/(3·d_in)·‖∇W‖_F²` at
    initialisation, with LoRA's dropout off. A then aligns with the gradient and the estimate grows, unevenly over
    matrices (9x after 20 steps in one run): use it for a rough ranking only. `shapes` holds (r, d_in).
    """
    squares = squared_norms([g.to(_precision(g)) for g in grads_b])
    factor = torch.tensor([3.0 * d_in / r for r, d_in in shapes], dtype=squares.dtype)
    return squares * factor.to(squares.device) / scales.to(squares).square()


def update_average(
    fisher: Float[Tensor, "*lanes m"],
    step: Float[Tensor, "*lanes m"],
    decay: float | Float[Tensor, "*lanes 1"],
    averaging: Averaging,
) -> tuple[Float[Tensor, "*lanes m"], Tensor]:
    """`F ← α·F + (1 − α)·f` (the request), or the same over the step's normalized `f / Σf`.

    Raw values follow the global size of the gradient, so steps with a large loss dominate; normalized values weigh
    every step alike. A step with a non-finite value leaves F as it is. `*lanes` are any leading dimensions, for
    several runs at once.

    Returns:
        The new F, and whether the step was counted (boolean, [*lanes]) as a tensor, so that nothing waits for the
        device.
    """
    if averaging == "normalized":
        step = step / step.sum(-1, keepdim=True)
    counted = torch.isfinite(step).all(-1)
    return torch.where(counted[..., None], decay * fisher + (1.0 - decay) * step, fisher), counted


class HookedEstimator:
    """What a hook keeps of a layer's G and X in a backward pass, and the f_m that follows from it.

    This class keeps the weight gradient `GᵀX`. An estimator of your own overrides what it does differently, and is
    added with `fwlora.register_estimator`. Everything runs without autograd and outside autocast.

    Attributes:
        config: the settings of the run.
        loss_power: the statistic grows with the loss to this power: 1 for a gradient, 2 for squares of gradients. It
            says how the statistics of several processes, each of its own part of the batch, become that of all.
    """

    loss_power: int = 1

    def __init__(self, config: FWLoraConfig) -> None:
        self.config = config

    def compress(self, x: Tensor, step: int) -> Tensor:
        """What is kept of a layer's inputs from the forward to the backward pass; by default the inputs themselves.

        Args:
            x: the layer's inputs, [*batch, d_in].
            step: the optimizer step, counted from 0.
        """
        return x

    def statistic(self, g: Tensor, x: Tensor, step: int) -> Tensor:
        """What is kept of one use of a layer. Micro-batches, uses and processes are summed before `measure`.

        Args:
            g: gradients of the loss with respect to the layer's outputs, [*batch, d_out].
            x: what `compress` returned in the forward pass: by default the layer's inputs, [*batch, d_in].
            step: the optimizer step, counted from 0.
        """
        return weight_gradient(g, x)

    def reduce(self, statistic: Tensor) -> Tensor:
        """What `measure` needs of a statistic to which nothing is added any more; by default the statistic itself.

        If this is overridden, `measure` must take either. It saves memory where a step has one backward pass and one
        process: then no statistic is kept for longer than its layer's backward pass.
        """
        return statistic

    def shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        """The statistic's shape; a matrix that no gradient reached in a step gets zeros of it."""
        return d_out, d_in

    def measure(self, statistics: Sequence[Tensor], loss_scale: Tensor | float) -> Tensor:
        """f_m of every matrix, [m], from the statistics of the step.

        Args:
            statistics: one for each matrix, summed.
            loss_scale: the factor by which a GradScaler enlarged the loss; 1.0 without one. f must not depend on it.
        """
        return squared_norms(statistics, loss_scale)

    def end_step(self) -> None:
        """Drop what belongs to one step only. Called after each observed step."""

    def bytes(self, d_out: int, d_in: int, dtype: torch.dtype) -> int:
        """The memory that the statistic of one matrix takes until the step, if it is not reduced before."""
        return math.prod(self.shape(d_out, d_in)) * dtype.itemsize

    @property
    def reduces(self) -> bool:
        """Whether `reduce` is overridden."""
        return type(self).reduce is not HookedEstimator.reduce


class ExactEstimator(HookedEstimator):
    """The weight gradient itself; only its norm is kept where nothing more is added to it."""

    def reduce(self, statistic: Tensor) -> Tensor:
        return torch._foreach_norm([statistic])[0]


class SketchEstimator(HookedEstimator):
    """A Gaussian sketch of the weight gradient, with one probe for all matrices of one width in a step."""

    def __init__(self, config: FWLoraConfig) -> None:
        super().__init__(config)
        self._probes: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def compress(self, x: Tensor, step: int) -> Tensor:
        # In the forward pass, so that neither the backward pass nor a change of x in place needs x itself.
        return sketched_inputs(x, self._probe(x, step))

    def statistic(self, g: Tensor, x: Tensor, step: int) -> Tensor:
        return sketch_of(g, x)

    def _probe(self, x: Tensor, step: int) -> Tensor:
        key = (step, x.shape[-1], x.device, _precision(x))
        if key not in self._probes:
            self._probes[key] = gaussian_probe(
                x.shape[-1],
                self.config.sketch_columns,
                seed=self.config.seed,
                step=step,
                device=x.device,
                dtype=_precision(x),
            )
        return self._probes[key]

    def shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        return self.config.sketch_columns, d_out

    def measure(self, statistics: Sequence[Tensor], loss_scale: Tensor | float) -> Tensor:
        return squared_norms(statistics, loss_scale) / self.config.sketch_columns

    def end_step(self) -> None:
        self._probes.clear()


class PerExampleEstimator(HookedEstimator):
    """The sum over examples of the squared norm of each example's weight gradient."""

    loss_power = 2

    def statistic(self, g: Tensor, x: Tensor, step: int) -> Tensor:
        return per_example_squared_norm(g, x)

    def shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        return ()

    def measure(self, statistics: Sequence[Tensor], loss_scale: Tensor | float) -> Tensor:
        return torch.stack([s.to(statistics[0].device) for s in statistics]) / loss_scale**2


# "adapter" is not here: it reads the gradient of B, which PEFT computes anyway, and needs no hook (see `capture`).
_HOOKED: dict[str, Callable[[FWLoraConfig], HookedEstimator]] = {
    "exact": ExactEstimator,
    "sketch": SketchEstimator,
    "per_example": PerExampleEstimator,
}


def register_estimator(name: str, estimator: Callable[[FWLoraConfig], HookedEstimator]) -> None:
    """Add an estimator, which `FWLoraConfig(estimator=name)` and run configs accept from then on.

    Args:
        name: an identifier that no other estimator has.
        estimator: a subclass of `HookedEstimator`; one object of it is made for each call of `fwlora.attach`.

    Raises:
        ValueError: the name is taken or is not an identifier.
    """
    add_choice("estimator", name)
    _HOOKED[name] = estimator


def hooked_estimator(config: FWLoraConfig) -> HookedEstimator:
    """The estimator that `config` names.

    Raises:
        ValueError: "adapter", which needs no hook, or a name that was never registered in this process.
    """
    if config.estimator not in _HOOKED:
        raise ValueError(f"{config.estimator!r} is not one of the hooked estimators: {', '.join(_HOOKED)}")
    return _HOOKED[config.estimator](config)
