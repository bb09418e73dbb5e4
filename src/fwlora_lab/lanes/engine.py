"""The engine: one training step of many runs on one frozen backbone.

The activations of all lanes go through the frozen matrices together, [E·N, d]. The adapters are stacked, A
[E, rank, d_in] and B [E, rank, d_out], and go through batched products. Smaller ranks are padded with zeros, which is
exact: where the padding of A and of B is zero its gradients are zero, and AdamW leaves it there. The loss is the sum
over lanes of each lane's mean, every hyper-parameter is a tensor over lanes, and no lane depends on another: a lane
computes what its run would compute alone, and one that diverges has no effect on the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fwlora_lab.lanes.adalora import LaneAdaLora
from fwlora_lab.lanes.adamw import LaneAdamW
from fwlora_lab.lanes.buffers import FactorStacks, LaneBuffers
from fwlora_lab.lanes.captured_step import StepCache
from fwlora_lab.lanes.dropout import DropoutRng
from fwlora_lab.lanes.fisher import FisherCapture, LaneFisher
from fwlora_lab.lanes.layers import LaneEncoder, LaneHead
from fwlora_lab.lanes.layout import BufferLayout
from fwlora_lab.lanes.memory import saved_for_backward, storage_sizes
from fwlora_lab.lanes.packing import Packed, Shape
from fwlora_lab.lanes.pass_context import PassContext
from fwlora_lab.lanes.penalty import LanePenalty
from fwlora_lab.lanes.settings import Lane, LaneSettings
from fwlora_lab.lanes.step_plan import StepPlan, plan_step


class LaneEngine:
    """A classifier's frozen encoder, the lanes' parameters, and one optimiser step for all of them.

    The encoder computes in its own dtype. What is trained is kept in at least fp32 and, for an encoder in half
    precision, cast once a step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[str],
        width: int,
        rank: int,
        svd_parametrized: bool = False,
    ) -> None:
        """Take over `model`: its encoder's layers are replaced, and each lane gets a head of its own.

        Args:
            model: an encoder with a classification head (see `architectures`), on its device.
            targets: the Linears of the encoder's layers that any lane may adapt.
            width: the most lanes at a time.
            rank: the highest rank of any lane.
            svd_parametrized: whether the lanes train AdaLoRA's B·diag(Λ)·A instead of B·A.

        Raises:
            TypeError: the model is not supported, or a target is not a Linear of an encoder layer.
        """
        # The autograd leaves are views of one buffer on purpose; PyTorch recommends a block of its own for each.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        self.model = model.requires_grad_(False).eval()  # dropout masks come from the pass's context
        self.targets, self.width = list(dict.fromkeys(targets)), width
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        self._head = LaneHead(model)
        shapes = {name: _shape_of(model, name) for name in self.targets}
        self._encoder = LaneEncoder(model, self.targets)
        layout = BufferLayout(shapes, self._head.shapes, rank, svd_parametrized, self.device)
        self.buffers = LaneBuffers(layout, self.dtype, parameter.dtype)
        self.penalty = LanePenalty(self.buffers)
        self._fisher = LaneFisher(self.buffers, self._encoder.groups)
        self._adalora = LaneAdaLora(self.buffers) if svd_parametrized else None
        self._optimizer = LaneAdamW(self.buffers)
        self.lanes: list[Lane] = []
        self._grad_anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._rng = DropoutRng(self.device)
        self._drawn: dict[Shape, int] = {}  # random numbers that a training pass takes, by the batch's shape
        self._captured = StepCache(enabled=self.device.type == "cuda")

    def admit(
        self,
        settings: LaneSettings,
        adapters: Mapping[str, tuple[Tensor, ...]],
        head: Mapping[str, Tensor],
    ) -> int:
        """Put a run into a new lane and return the lane's number.

        Args:
            settings: the run's hyper-parameters.
            adapters: A [r, d_in], B [d_out, r] (and Λ [r]) by target, as the run begins.
            head: the head's parameters by name, as the run begins.

        Raises:
            RuntimeError: there are already `width` lanes.
        """
        if len(self.lanes) == self.width:
            raise RuntimeError(f"All {self.width} lanes are taken")
        row = len(self.lanes)
        self.buffers.resize(row + 1, range(row))
        self.lanes.append(Lane(settings, torch.Generator(self.device).manual_seed(settings.seed)))
        with torch.no_grad():
            for target, name in enumerate(self.targets):
                if name in adapters:
                    a, b, *singular = adapters[name]
                    own = self.buffers.layout.factors(self.buffers.values, target)
                    for stacked, given in zip(own, (a, b.mT, *singular), strict=True):
                        stacked[row, : len(given)] = given.to(stacked)
            for name, value in head.items():
                self.buffers.head_values[name][row] = value.to(self.buffers.head_values[name])
        self._arrange()
        return row

    def release(self, lane: int) -> None:
        """Take a run out. Lanes with a higher number move down by one."""
        kept = [e for e in range(len(self.lanes)) if e != lane]
        del self.lanes[lane]
        self.buffers.resize(len(kept), kept)
        self._arrange()

    def _arrange(self) -> None:
        """Bring up to date what follows from which runs are in the lanes."""
        scales = [lane.settings.scale for lane in self.lanes]
        self._scales = self.buffers.column(scales, self.buffers.compute_dtype)[:, None]
        self._fisher.arrange(self.lanes)
        self.penalty.arrange(self.lanes)
        if self._adalora is not None:
            self._adalora.arrange(self.lanes)
        # Both depend on which lanes there are: on their tensors and on whether any of them uses dropout.
        self._captured.clear()
        self._drawn.clear()

    def adapters(self, lane: int) -> dict[str, tuple[Tensor, ...]]:
        """A [r, d_in], B [d_out, r] (and Λ) by target, cut to the lane's own ranks; targets of rank 0 are left out."""
        ranks = self.lanes[lane].settings.ranks
        own = self.buffers.layout.parameters_of(self.buffers.values, lane, ranks)
        kinds = ("A", "B", "E") if self._adalora is not None else ("A", "B")
        return {
            name: tuple(own[f"{name}.{kind}"].clone(memory_format=torch.contiguous_format) for kind in kinds)
            for name in self.targets
            if ranks.get(name)
        }

    def head_of(self, lane: int) -> dict[str, Tensor]:
        """The head's parameters by name."""
        return {name: value[lane].detach().clone() for name, value in self.buffers.head_values.items()}

    def fisher_of(self, lane: int) -> dict[str, float]:
        """F by target."""
        ranks, fisher = self.lanes[lane].settings.ranks, self.buffers.fisher[lane].tolist()
        return {name: value for name, value in zip(self.targets, fisher, strict=True) if ranks.get(name)}

    def phase(self, lane: int) -> str:
        """The part of its run that the lane's next step belongs to, by the names that the methods use."""
        return self.lanes[lane].phase

    def lane_state(self, lane: int) -> dict[str, Tensor]:
        """All that the rest of the run in a lane depends on, as copies by name.

        Together with the run's settings it is enough for `restore_lane` in another engine, which may have other lanes
        and a higher rank. With dropout that engine must have the same targets, because masks are drawn for all of
        them.
        """
        run = self.lanes[lane]
        state = {name: value.clone() for name, value in self.buffers.state_of(lane, run.settings.ranks).items()}
        return state | {"generator": run.generator.get_state(), "step": torch.tensor(run.step)}

    def restore_lane(self, lane: int, state: Mapping[str, Tensor]) -> None:
        """Continue a run from `lane_state`. The lane must have been admitted with the run's settings.

        Raises:
            KeyError: the state is of a run with other targets, another head or another method.
        """
        run = self.lanes[lane]
        own = self.buffers.state_of(lane, run.settings.ranks)
        if unknown := state.keys() ^ {*own, "generator", "step"}:
            raise KeyError(f"The lane's parameters and those of the state differ: {', '.join(sorted(unknown))}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])
        run.generator.set_state(state["generator"])
        run.step = int(state["step"])
        if run.is_penalized:
            self.penalty.set_weights(lane, run)
        self._captured.clear()

    def logits(self, packed: Packed, lanes: Sequence[int] | None = None) -> Tensor:
        """Logits [E, b, classes] without dropout; row e of `packed` belongs to lane `lanes[e]` (None: to lane e)."""
        self.buffers.update_compute_values()
        return self._forward(packed.to(self.device), lanes, rng=None)

    @torch.inference_mode()
    def predict(self, packed: Packed, lanes: Sequence[int]) -> Tensor:
        """The same, without a graph for a backward pass."""
        return self.logits(packed, lanes)

    def _forward(
        self,
        packed: Packed,
        lanes: Sequence[int] | None,
        rng: DropoutRng | None,
        capture: FisherCapture | None = None,
    ) -> Tensor:
        """Logits of these lanes (None: of all), with dropout from `rng`."""
        all_lanes = list(range(len(self.lanes)))
        present = all_lanes if lanes is None else list(lanes)
        selected = None if present == all_lanes else torch.tensor(present, device=self.device)
        context = PassContext(
            packed=packed,
            buffers=self.buffers,
            selected=selected,
            scales=self._scales if selected is None else self._scales[selected],
            adapter_dropout=[self.lanes[e].settings.dropout for e in present],
            rng=rng,
            capture=capture,
            grad_anchor=self._grad_anchor,
        )
        return self._head(self._encoder(context).to(self.dtype), context)

    def step(self, packed: Packed, learning_rates: Sequence[float], regression: bool = False) -> Tensor:
        """One optimiser step of every lane.

        Args:
            packed: a batch for each lane, in the order of their numbers.
            learning_rates: of this step, by lane.
            regression: whether the loss is the mean squared error instead of the mean cross-entropy.

        Returns:
            The losses of the lanes [E], on the device.
        """
        plan = plan_step(self.lanes, learning_rates, regression, self.buffers)
        packed = packed.to(self.device)
        if packed.fixed_shape:
            losses = self._captured.run(
                kind=(plan.kind, self.penalty.fused, packed.types is None, packed.shape),
                inputs=[*packed.tensors(), *plan.tensors()],
                generators=[lane.generator for lane in self.lanes],
                compute=partial(self._compute, packed, plan, self._numbers_drawn(packed)),
            )
        else:
            losses = self._compute(packed, plan, None)
        if self._adalora is not None:
            self._adalora.allocate(self.lanes)
        for e, lane in enumerate(self.lanes):
            lane.step += 1
            if lane.settings.fw is not None and lane.step == lane.settings.warmup_steps:
                self.penalty.set_weights(e, lane)
        return losses

    def _compute(self, packed: Packed, plan: StepPlan, drawn: int | None) -> Tensor:
        """The whole step on the device: nothing here waits for the device or copies from the host.

        drawn: the random numbers that a lane needs if the batch has a fixed shape, see `_numbers_drawn`.
        """
        numbers = plan.numbers()
        buffers, factors = self.buffers, FactorStacks(self.buffers)
        self._start_dropout(packed, self.lanes, drawn)
        capture = None
        if plan.observed:
            capture = FisherCapture(self.lanes, plan.observed, plan.probes, packed, self.dtype)
        buffers.zero_grads()
        buffers.update_compute_values()
        losses = _losses(self._forward(packed, None, self._rng, capture), packed, plan.regression)
        losses.sum().backward()
        losses = losses.detach()
        with torch.no_grad():
            buffers.collect_grads()
            if self._adalora is not None:
                losses = losses + self._adalora.add_orthogonality(factors)
            norms = torch.linalg.vector_norm(buffers.grads, dim=1, keepdim=True)
            # As torch.nn.utils.clip_grad_norm_: clamp_ keeps NaN, so the limit hides no norm that is not finite.
            buffers.grads.mul_((numbers.max_grad_norm / (norms + 1e-6)).clamp_(max=1.0))
            if capture is not None:
                self._fisher.update(capture, numbers.is_observed > 0)
            for norm in plan.penalty_norms:
                self.penalty.add_gradient(norm, factors, numbers.learning_rate)
            self._optimizer.step(numbers.learning_rate, numbers.weight_decay, numbers.bias1, numbers.bias2)
            if self._adalora is not None:
                self._adalora.update_scores(numbers.is_scored > 0)
        return losses

    def _start_dropout(self, packed: Packed, lanes: Sequence[Lane], drawn: int | None) -> None:
        generators = [lane.generator for lane in lanes]
        if packed.fixed_shape:
            self._rng.start_shared(generators, drawn)
        else:
            self._rng.start_by_lane(generators)

    def _numbers_drawn(self, packed: Packed) -> int:
        """How many random numbers a lane needs for a step on batches of this fixed shape, from a trial pass."""
        if packed.shape not in self._drawn:
            self._start_dropout(packed, self.lanes, drawn=None)
            with torch.no_grad():
                self._forward(packed, None, self._rng)
            self._drawn[packed.shape] = self._rng.used
        return self._drawn[packed.shape]

    def memory(self, packed: Packed) -> int:
        """Bytes of a training step on such a batch: the lanes' buffers and what a forward pass keeps for its backward.

        Changes neither the lanes' parameters nor their generators.
        """
        packed = packed.to(self.device)
        present = self.lanes[: len(packed.tokens)]
        states = [lane.generator.get_state() for lane in present]
        self._start_dropout(packed, present, drawn=None)
        saved = saved_for_backward(lambda: self._forward(packed, range(len(present)), self._rng))
        for lane, state in zip(present, states, strict=True):
            lane.generator.set_state(state)
        frozen = storage_sizes([*self.model.parameters(), *self.model.buffers()])
        buffers = storage_sizes(self.buffers.tensors())
        activations = sum(size for address, size in saved.items() if address not in frozen.keys() | buffers.keys())
        return sum(buffers.values()) + activations


def _losses(logits: Tensor, packed: Packed, regression: bool) -> Tensor:
    """The mean loss of each lane's sentences [E]."""
    if regression:
        single = (logits[..., 0] - packed.labels).square()
    else:
        single = functional.cross_entropy(logits.mT, packed.labels, reduction="none")
    # Unused places have weight 0; they are masked as well, because NaN · 0 is NaN.
    return torch.where(packed.weights > 0, single * packed.weights, 0.0).sum(-1)


def _shape_of(model: PreTrainedModel, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a target."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is {type(module).__name__}, not Linear")
    return module.in_features, module.out_features
