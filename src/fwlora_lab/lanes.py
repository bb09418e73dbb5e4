"""Many runs at once on one frozen backbone.

A lane is a run: its own data order, adapters, head, rank, learning rate, λ and dropout. The activations of all
lanes go through the frozen matrices together, [E·N, d]; the adapters are stacked, A [E, r_max, d_in] and
B [E, d_out, r_max], and go through batched products. Smaller ranks are padded with zeros, which is exact: where the
padding of A and of B is zero its gradients are zero, and AdamW leaves it there. The loss is the sum over lanes of
each lane's mean, every hyper-parameter is a tensor over lanes, and nothing in a lane depends on another: a lane
computes what the run would compute alone, and one that diverges harms nobody.

All that is trained lives in one flat buffer [E, P], beside its gradients and AdamW's two moments, so that clipping
and the update are a dozen operations for all matrices and lanes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import fwlora
from fwlora import fisher as estimators
from fwlora.importance import penalty_weights
from fwlora.shrinkage import NORMS, factor_gradients, factor_norms, update_gradients, update_norms
from fwlora_lab.packing import ATTENTION, Block, Packed

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own


@dataclass(frozen=True)
class Allocation:
    """AdaLoRA's schedule, in steps counted from 1, under PEFT's names; `final` is the ranks left over all targets.

    AdaLoRA (arXiv 2303.10512) trains ΔW = s·B·diag(Λ)·A with A and B held near orthogonal, scores each (row of A,
    λ, column of B) by a smoothed |w·∇w| times its uncertainty, and sets the λ of the least ones to zero on a
    budget that falls with the cube of the remaining time.
    """

    final: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float
    orth_reg_weight: float
    total_steps: int

    def budget(self, step: int, initial: int) -> int | None:
        """Ranks to keep after this step; None where nothing is masked."""
        if step <= self.tinit:
            return None
        if step >= self.total_steps - self.tfinal:  # the last allocation is forced, then it stays
            return self.final
        if step % self.delta_t:
            return None
        left = 1 - (step - self.tinit) / (self.total_steps - self.tfinal - self.tinit)
        return int((initial - self.final) * left**3 + self.final)


@dataclass
class LaneSettings:
    """What makes a lane's run differ from its neighbours'.

    ranks by target (0: no adapter there); scale: s of ΔW = s·B·A; dropout: of the adapters' input; seed: of its
    dropout masks; warmup_steps: K in steps; fw: the method's settings; ada: AdaLoRA's; both None for plain LoRA.
    """

    ranks: Mapping[str, int]
    scale: float
    dropout: float
    weight_decay: float
    max_grad_norm: float | None
    seed: int
    fw: fwlora.FWLoraConfig | None = None
    warmup_steps: int = 0
    ada: Allocation | None = None


@dataclass
class Lane:
    """What the engine remembers of a lane besides its row of the buffers."""

    settings: LaneSettings
    generator: torch.Generator
    step: int = 0


@dataclass(frozen=True)
class _Group:
    """Targets of one shape: A [E, M, r, d_in], B [E, M, d_out, r] and Λ [E, M, r] at these offsets of a lane's row."""

    names: tuple[str, ...]
    d_in: int
    d_out: int
    a: int
    b: int
    e: int


class LaneLinear(nn.Module):
    """A frozen Linear with one adapter per lane: `y_e = x_e Wᵀ + bias + s_e (x_e A_eᵀ) B_eᵀ`, x [E, N, d_in]."""

    def __init__(self, base: nn.Linear, lanes: Lanes, name: str) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._lanes = [lanes]  # in a list: it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        lanes = self._lanes[0]
        a, b, *spectrum = lanes.factors[self.name]
        if spectrum:
            a = a * spectrum[0][..., None]
        if lanes.chosen is not None:
            a, b = a[lanes.chosen], b[lanes.chosen]
        y = self.base(x)
        low = torch.bmm(lanes.adapter_dropout(x), a.mT) * lanes.scales
        y = torch.baddbmm(y, low, b.mT)
        if lanes.watching:
            y = estimators.tap(y, x, lambda g, x: lanes.watch(self.name, g, x))
        return y


class LaneDropout(nn.Module):
    """Dropout of hidden states [E, N, d], each lane's mask from its own generator and for its true tokens only."""

    def __init__(self, p: float, lanes: Lanes) -> None:
        super().__init__()
        self.p = p
        self._lanes = [lanes]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return x * self._lanes[0].token_mask(x, [self.p] * x.shape[0])


class Lanes:
    """The engine: a classifier's frozen encoder, the lanes' parameters, and one training step for all of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[str],
        width: int,
        rank: int,
        spectral: bool = False,
    ) -> None:
        """Takes `model` over: its target Linears and dropouts are replaced, its head becomes the lanes' own.

        width: lanes at most; rank: r_max; spectral: the lanes are AdaLoRA's, with a Λ between B and A.
        """
        # The leaves are views of one buffer on purpose; autograd would have each in a block of its own.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        self.spectral = spectral
        self.model = model
        self.rank = rank
        self.width = width
        self.encoder: nn.Module = model.base_model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._position_offset = _position_offset(model)
        model.config._attn_implementation = ATTENTION
        model.requires_grad_(False)
        self.head = _Head(model, self)
        shapes = {}
        for name in targets:
            base = model.get_submodule(name)
            if not isinstance(base, nn.Linear):
                raise TypeError(f"{name} is {type(base).__name__}, not Linear")
            shapes[name] = (base.in_features, base.out_features)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LaneLinear(base, self, name))
        for name, module in list(self.encoder.named_modules()):
            if isinstance(module, nn.Dropout):
                parent, _, leaf = name.rpartition(".")
                setattr(self.encoder.get_submodule(parent), leaf, LaneDropout(module.p, self))
        self._lay_out(shapes)
        self.lanes: list[Lane] = []
        self._resize(0)
        # What a forward pass reads.
        self.chosen: Tensor | None = None
        self.present: list[int] = []
        self.watching = False
        self.scales = torch.empty(0)
        self._packed: Packed | None = None
        self._energies: dict[str, Tensor] = {}

    # The flat buffer

    def _lay_out(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        kinds: dict[tuple[int, int], list[str]] = {}
        for name, shape in shapes.items():
            kinds.setdefault(shape, []).append(name)
        offset = 0
        self.groups: list[_Group] = []
        for (d_in, d_out), names in kinds.items():
            size = len(names) * self.rank
            a, b = offset, offset + size * d_in
            e = b + size * d_out
            offset = e + size * self.spectral
            self.groups.append(_Group(tuple(names), d_in, d_out, a, b, e))
        self.adapter_size = offset
        self.head_places: dict[str, tuple[int, torch.Size]] = {}
        for name, p in self.head.shapes.items():
            self.head_places[name] = (offset, p)
            offset += p.numel()
        self.size = offset
        self.targets = [name for g in self.groups for name in g.names]
        decays = torch.ones(self.size, dtype=self.dtype, device=self.device)
        for start, shape in self.head_places.values():
            if len(shape) < 2:
                decays[start : start + shape.numel()] = 0.0
        self._decays = decays

    def _resize(self, lanes: int, keep: Sequence[int] = ()) -> None:
        """Buffers for so many lanes; the rows `keep` of the present ones come first."""
        # Four tensors, not four rows of one: autograd takes a write to the gradients for one to the values.
        new = [torch.zeros(lanes, self.size, dtype=self.dtype, device=self.device) for _ in range(4)]
        # AdaLoRA's smoothed sensitivity and its uncertainty.
        scores = torch.zeros(2, lanes, self.adapter_size * self.spectral, dtype=self.dtype, device=self.device)
        fisher = torch.zeros(lanes, len(self.targets), dtype=self.dtype, device=self.device)
        coefficients = torch.zeros(2, lanes, len(self.targets), dtype=self.dtype, device=self.device)
        if keep:
            rows = torch.tensor(list(keep), device=self.device)
            for buffer, old in zip(new, self._buffers, strict=True):
                buffer[: len(keep)] = old[rows]
            scores[:, : len(keep)] = self._scores[:, rows]
            fisher[: len(keep)] = self.fisher[rows]
            coefficients[:, : len(keep)] = self.coefficients[:, rows]
        self._buffers, self.fisher, self.coefficients, self._scores = new, fisher, coefficients, scores
        self.values, self.grads, self._first, self._second = new
        self.factors: dict[str, tuple[Tensor, ...]] = {}
        for g in self.groups:
            values, grads = self._group(self.values, g), self._group(self.grads, g)
            if self.spectral:
                values, grads = (*values, self._spectrum(self.values, g)), (*grads, self._spectrum(self.grads, g))
            for m, name in enumerate(g.names):
                self.factors[name] = tuple(_leaf(v[:, m], d[:, m]) for v, d in zip(values, grads, strict=True))
        self.head_values = {
            name: _leaf(self._head_view(self.values, name), self._head_view(self.grads, name))
            for name in self.head_places
        }

    def _group(self, buffer: Tensor, g: _Group) -> tuple[Tensor, Tensor]:
        lanes, m = buffer.shape[0], len(g.names)
        a = buffer[:, g.a : g.b].view(lanes, m, self.rank, g.d_in)
        b = buffer[:, g.b : g.b + m * g.d_out * self.rank].view(lanes, m, g.d_out, self.rank)
        return a, b

    def _spectrum(self, buffer: Tensor, g: _Group) -> Tensor:
        size = len(g.names) * self.rank
        return buffer[:, g.e : g.e + size].view(buffer.shape[0], len(g.names), self.rank)

    def _head_view(self, buffer: Tensor, name: str) -> Tensor:
        start, shape = self.head_places[name]
        return buffer[:, start : start + shape.numel()].view(buffer.shape[0], *shape)

    # Lanes come and go

    def admit(
        self,
        settings: LaneSettings,
        adapters: Mapping[str, tuple[Tensor, ...]],
        head: Mapping[str, Tensor],
    ) -> int:
        """Put a run into a new lane, from A [r, d_in], B [d_out, r] (and Λ [r]) by target and its head; its number."""
        if len(self.lanes) == self.width:
            raise RuntimeError("every lane is taken")
        lane = len(self.lanes)
        self._resize(lane + 1, range(lane))
        generator = torch.Generator(self.device).manual_seed(settings.seed)
        self.lanes.append(Lane(settings, generator))
        with torch.no_grad():
            for name, (a, b, *spectrum) in adapters.items():
                own_a, own_b, *own_spectrum = self.factors[name]
                own_a[lane, : a.shape[0]] = a.to(own_a)
                own_b[lane, :, : b.shape[1]] = b.to(own_b)
                for own, given in zip(own_spectrum, spectrum, strict=True):
                    own[lane, : len(given)] = given.to(own)
            for name, value in head.items():
                self.head_values[name][lane] = value.to(self.dtype)
        return lane

    def release(self, lane: int) -> None:
        """Take a run out; the lanes behind it move up by one."""
        keep = [e for e in range(len(self.lanes)) if e != lane]
        del self.lanes[lane]
        self._resize(len(keep), keep)

    def adapters(self, lane: int) -> dict[str, tuple[Tensor, ...]]:
        """A, B (and Λ) by target, cut to the lane's own ranks; targets of rank 0 are left out."""
        ranks = self.lanes[lane].settings.ranks
        out: dict[str, tuple[Tensor, ...]] = {}
        for name, (a, b, *spectrum) in self.factors.items():
            if r := ranks.get(name):
                own = (a[lane, :r], b[lane, :, :r], *(e[lane, :r] for e in spectrum))
                out[name] = tuple(t.detach().clone() for t in own)
        return out

    def head_of(self, lane: int) -> dict[str, Tensor]:
        """The head's parameters by name."""
        return {name: value[lane].detach().clone() for name, value in self.head_values.items()}

    # Randomness: every lane draws from its own generator, for its own tokens

    def token_mask(self, x: Tensor, rates: Sequence[float]) -> Tensor:
        """Masks [E, N, d] of dropout, divided by 1 − p; `rates` by lane."""
        assert self._packed is not None
        mask = torch.zeros_like(x)
        for row, (e, p) in enumerate(zip(self.present, rates, strict=True)):
            n = self._packed.counts[row]
            mask[row, :n].bernoulli_(1.0 - p, generator=self.lanes[e].generator)
            mask[row, :n].div_(1.0 - p)
        return mask

    def adapter_dropout(self, x: Tensor) -> Tensor:
        rates = [self.lanes[e].settings.dropout for e in self.present]
        if not self.model.training or not any(rates):
            return x
        return x * self.token_mask(x, rates)

    def _attention_mask(self, block: Block, shape: torch.Size, p: float) -> Tensor:
        mask = torch.empty(shape, dtype=self.dtype, device=self.device)
        start = 0
        for row, sentences in block.lanes:
            part = mask[start : start + sentences]
            part.bernoulli_(1.0 - p, generator=self.lanes[self.present[row]].generator)
            start += sentences
        return mask.div_(1.0 - p)

    def _head_mask(self, x: Tensor, p: float) -> Tensor:
        assert self._packed is not None
        mask = torch.zeros_like(x)
        for row, e in enumerate(self.present):
            n = int((self._packed.weights[row] > 0).sum())
            mask[row, :n].bernoulli_(1.0 - p, generator=self.lanes[e].generator)
        return mask.div_(1.0 - p)

    # Forward, backward, update

    def logits(self, packed: Packed, lanes: Sequence[int] | None = None) -> Tensor:
        """Logits [E, b, classes] of each lane's sentences; row e of `packed` belongs to lane `lanes[e]`."""
        self.present = list(range(len(self.lanes))) if lanes is None else list(lanes)
        whole = self.present == list(range(len(self.lanes)))
        self.chosen = None if whole else torch.tensor(self.present, device=self.device)
        self.scales = torch.tensor(
            [self.lanes[e].settings.scale for e in self.present],
            dtype=self.dtype,
            device=self.device,
        )[:, None, None]
        self._packed = packed
        inputs = {
            "input_ids": packed.tokens,
            "position_ids": packed.positions + self._position_offset,
        }
        if packed.types is not None:
            inputs["token_type_ids"] = packed.types
        hidden = self.encoder(**inputs, packed=packed, drop=self._attention_mask).last_hidden_state
        first = hidden.reshape(-1, hidden.shape[-1]).index_select(0, packed.first.flatten())
        return self.head(first.view(*packed.first.shape, -1))

    def step(self, packed: Packed, learning_rates: Sequence[float], regression: bool = False) -> Tensor:
        """One optimiser step of every lane; the lanes' losses [E], on the device."""
        self.model.train()
        self.watching = self._is_watching()
        self.grads.zero_()
        packed = packed.to(self.device)
        losses = self._losses(self.logits(packed), packed, regression)
        losses.sum().backward()
        self.watching = False
        with torch.no_grad():
            if self.spectral:
                losses = losses + self._orthogonalise()
            self._clip()
            self._observe()
            lr = torch.tensor(list(learning_rates), dtype=self.dtype, device=self.device)[:, None]
            self._shrink(lr)
            self._adamw(lr)
            if self.spectral:
                self._allocate()
        for e, lane in enumerate(self.lanes):
            lane.step += 1
            if lane.settings.fw is not None and lane.step == lane.settings.warmup_steps:
                self._freeze(e)
        return losses.detach()

    @torch.inference_mode()
    def predict(self, packed: Packed, lanes: Sequence[int]) -> Tensor:
        """Logits without dropout, as `logits`."""
        self.model.eval()
        return self.logits(packed.to(self.device), lanes)

    @staticmethod
    def _losses(logits: Tensor, packed: Packed, regression: bool) -> Tensor:
        if regression:
            single = (logits[..., 0] - packed.labels).square()
        else:
            single = functional.cross_entropy(logits.mT, packed.labels, reduction="none")
        # Where there is no sentence the weight is 0, and NaN times 0 must not be.
        return torch.where(packed.weights > 0, single * packed.weights, 0.0).sum(-1)

    def _clip(self) -> None:
        limits = [lane.settings.max_grad_norm for lane in self.lanes]
        if all(limit is None for limit in limits):
            return
        limit = torch.tensor([float("inf") if v is None else v for v in limits], dtype=self.dtype, device=self.device)
        norms = torch.linalg.vector_norm(self.grads, dim=1)
        # As torch.nn.utils.clip_grad_norm_ does it; a norm that is not finite must not hide behind the limit.
        self.grads.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None])

    def _adamw(self, lr: Tensor) -> None:
        """torch.optim.AdamW's update, on all lanes at once; lr [E, 1]."""
        column = [[lane.settings.weight_decay, lane.step + 1.0] for lane in self.lanes]
        decay, t = torch.tensor(column, dtype=self.dtype, device=self.device)[:, :, None].unbind(1)
        beta1, beta2 = _BETAS
        self.values.mul_(1.0 - lr * decay * self._decays)
        self._first.lerp_(self.grads, 1.0 - beta1)
        self._second.mul_(beta2).addcmul_(self.grads, self.grads, value=1.0 - beta2)
        denominator = (self._second.sqrt() / (1.0 - beta2**t).sqrt()).add_(_EPS)
        self.values.sub_(self._first / denominator * (lr / (1.0 - beta1**t)))

    # Fisher-Weighted LoRA over lanes

    def _watches(self, lane: Lane) -> bool:
        fw = lane.settings.fw
        if fw is None or lane.step >= lane.settings.warmup_steps:
            return False
        ago = lane.step - fw.start
        return ago >= 0 and ago % fw.every == 0

    def _is_watching(self) -> bool:
        self._energies = {}
        self._watched = [
            e
            for e, lane in enumerate(self.lanes)
            if self._watches(lane) and lane.settings.fw.estimator != "adapter"  # type: ignore[union-attr]
        ]
        return bool(self._watched)

    def watch(self, name: str, g: Tensor, x: Tensor) -> None:
        """The step's Fisher energy of one target for the lanes that watch; g [E, N, d_out], x [E, N, d_in]."""
        assert self._packed is not None
        energies = g.new_zeros(len(self.lanes))
        for e in self._watched:
            fw, n = self.lanes[e].settings.fw, self._packed.counts[e]
            assert fw is not None
            own_g, own_x = g[e, :n], x[e, :n]
            match fw.estimator:
                case "exact":
                    energies[e] = estimators.weight_gradient(own_g, own_x).square().sum()
                case "sketch":
                    probe = estimators.gaussian_probe(
                        x.shape[-1],
                        fw.sketch_columns,
                        seed=fw.seed,
                        step=self.lanes[e].step,
                        device=x.device,
                        dtype=x.dtype,
                    )
                    sketch = estimators.sketched_gradient(own_g, own_x, probe)
                    energies[e] = sketch.square().sum() / fw.sketch_columns
                case _:
                    energies[e] = self._per_example(e, g, x)
        self._energies[name] = energies

    def _per_example(self, lane: int, g: Tensor, x: Tensor) -> Tensor:
        assert self._packed is not None
        flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        total = g.new_zeros(())
        for block in self._packed.blocks:
            start = 0
            for row, sentences in block.lanes:
                rows = slice(start, start + sentences)
                start += sentences
                if row == lane:
                    keep = block.keep[rows, :, None]
                    total = total + estimators.per_example_energy(
                        flat_g[block.rows[rows]] * keep, flat_x[block.rows[rows]] * keep
                    )
        return total

    def _observe(self) -> None:
        if self._watched:
            energies = torch.stack([self._energies[name] for name in self.targets], -1)
            self._average(self._watched, energies[self._watched])
        free = [
            e
            for e, lane in enumerate(self.lanes)
            if self._watches(lane) and lane.settings.fw.estimator == "adapter"  # type: ignore[union-attr]
        ]
        for e in free:
            ranks = self.lanes[e].settings.ranks
            shapes = [(max(1, ranks.get(n, 0)), self.factors[n][0].shape[-1]) for n in self.targets]
            grads = [self.factors[n][1].grad[e] for n in self.targets]  # type: ignore[index]
            scale = torch.full((len(shapes),), self.lanes[e].settings.scale, dtype=torch.float64)
            self._average([e], estimators.adapter_energy(grads, scale, shapes)[None])

    def _average(self, lanes: Sequence[int], energies: Tensor) -> None:
        for row, e in enumerate(lanes):
            fw = self.lanes[e].settings.fw
            assert fw is not None
            own = torch.tensor([bool(self.lanes[e].settings.ranks.get(n)) for n in self.targets])
            step = torch.where(own.to(energies.device), energies[row], 0.0)
            # Nobody need count a step that is left out: its update makes the lane NaN, and the run fails and says so.
            self.fisher[e], _ = estimators.update_average(self.fisher[e], step, fw.ema, fw.averaging)

    def _freeze(self, e: int) -> None:
        """Weights from F over the lane's own targets, once; the penalty's coefficients for the rest of its run."""
        settings = self.lanes[e].settings
        fw = settings.fw
        assert fw is not None
        own = torch.tensor([i for i, n in enumerate(self.targets) if settings.ranks.get(n)])
        weights = penalty_weights(
            self.fisher[e, own],
            fw.weighting,
            gamma=fw.gamma,
            clip=fw.clip,
            normalize=fw.normalize_weights,
            seed=fw.seed,
        )
        square = settings.scale**2 if fw.norm == "update" else 1.0
        self.coefficients[NORMS.index(fw.norm), e, own] = fw.shrinkage * square * weights

    def _shrink(self, lr: Tensor) -> None:
        """Adds the penalty's gradient to the gradients, or takes it off the values at the learning rate."""
        shrinking = [
            lane.settings.fw
            for lane in self.lanes
            if lane.settings.fw is not None and lane.step >= lane.settings.warmup_steps
        ]
        for norm, gradients in enumerate((update_gradients, factor_gradients)):
            if not any(NORMS.index(fw.norm) == norm for fw in shrinking):
                continue
            in_loss = torch.tensor(
                [lane.settings.fw is None or lane.settings.fw.coupling == "loss" for lane in self.lanes],
                device=self.device,
            )[:, None, None, None]
            start = 0
            for g in self.groups:
                m = len(g.names)
                c = self.coefficients[norm, :, start : start + m].flatten()
                start += m
                values = self._group(self.values, g)
                terms = gradients(values[0].flatten(0, 1), values[1].flatten(0, 1), c)
                for value, grad, term in zip(values, self._group(self.grads, g), terms, strict=True):
                    term = term.view_as(value)
                    if all(fw.coupling == "loss" for fw in shrinking):
                        grad.add_(term)
                    else:
                        grad.add_(torch.where(in_loss, term, 0.0))
                        value.sub_(torch.where(in_loss, 0.0, term) * lr[:, :, None, None])

    def phase(self, lane: int) -> str:
        """The part of its run that the lane's next step belongs to, as the methods name them."""
        settings, step = self.lanes[lane].settings, self.lanes[lane].step
        if settings.ada is not None:
            if step < settings.ada.tinit:
                return "initial"
            return "allocating" if step < settings.ada.total_steps - settings.ada.tfinal else "final"
        return "fisher" if settings.fw and step < settings.warmup_steps else "steady"

    # AdaLoRA over lanes

    def _orthogonalise(self) -> Tensor:
        """Adds the gradient of `w·mean(‖AAᵀ − I‖_F, ‖BᵀB − I‖_F)` over all A and B; its value by lane [E]."""
        adas = [_allocation(lane) for lane in self.lanes]
        weights = self.values.new_tensor([ada.orth_reg_weight for ada in adas])
        ranks = [lane.settings.ranks for lane in self.lanes]
        counts = self.values.new_tensor([2.0 * sum(r > 0 for r in of.values()) for of in ranks])
        total = self.values.new_zeros(len(self.lanes))
        for g in self.groups:
            own = torch.tensor([[of.get(n, 0) for n in g.names] for of in ranks], device=self.device)
            # The identity of each lane's own rank: padding is orthogonal to nothing.
            eye = (torch.arange(self.rank, device=self.device) < own[..., None]).to(self.dtype).diag_embed()
            (a, b), (grad_a, grad_b) = self._group(self.values, g), self._group(self.grads, g)
            for off, grad, left in ((a @ a.mT - eye, grad_a, True), (b.mT @ b - eye, grad_b, False)):
                norm = torch.linalg.matrix_norm(off)
                total += norm.sum(1)
                # ∂‖C‖/∂A = 2·C·A/‖C‖ for C = AAᵀ − I, which is symmetric; 0 where C is.
                unit = 2.0 * off / norm.clamp_min(torch.finfo(self.dtype).tiny)[..., None, None]
                unit = unit * (weights / counts)[:, None, None, None]
                grad.add_(unit @ a if left else b @ unit)
        return weights * total / counts

    def _allocate(self) -> None:
        """Updates the scores after the optimizer's step, and masks the least important λ where the schedule says."""
        steps = [lane.step + 1 for lane in self.lanes]
        adas = [_allocation(lane) for lane in self.lanes]
        learning = [t < ada.total_steps - ada.tfinal for t, ada in zip(steps, adas, strict=True)]
        sensitivity, uncertainty = self._scores
        if any(learning):
            on = torch.tensor(learning, device=self.device)[:, None]
            beta1 = self.values.new_tensor([[ada.beta1] for ada in adas])
            beta2 = self.values.new_tensor([[ada.beta2] for ada in adas])
            now = (self.values[:, : self.adapter_size] * self.grads[:, : self.adapter_size]).abs()
            smooth = beta1 * sensitivity + (1.0 - beta1) * now
            unsure = beta2 * uncertainty + (1.0 - beta2) * (now - smooth).abs()
            self._scores = torch.stack([torch.where(on, smooth, sensitivity), torch.where(on, unsure, uncertainty)])
        initial = [sum(lane.settings.ranks.values()) for lane in self.lanes]
        budgets = [ada.budget(t, i) for ada, t, i in zip(adas, steps, initial, strict=True)]
        if all(budget is None for budget in budgets):
            return
        score = self._scores[0] * self._scores[1]
        triplets = []  # [E, M, r] by group
        for g in self.groups:
            a, b = self._group(score, g)
            triplets.append(self._spectrum(score, g) + (a.mean(-1) + b.mean(-2)))
        for e, budget in enumerate(budgets):
            if budget is None or initial[e] <= budget:
                continue
            ranks = self.lanes[e].settings.ranks
            own = [
                torch.arange(self.rank, device=self.device)
                < torch.tensor([[ranks.get(n, 0)] for n in g.names], device=self.device)
                for g in self.groups
            ]
            mine = torch.cat([t[e][keep] for t, keep in zip(triplets, own, strict=True)])
            threshold = mine.kthvalue(initial[e] - budget).values
            for g, t in zip(self.groups, triplets, strict=True):
                self._spectrum(self.values, g)[e].masked_fill_(t[e] <= threshold, 0.0)

    def fisher_of(self, lane: int) -> dict[str, float]:
        """F_m by target."""
        ranks = self.lanes[lane].settings.ranks
        return {n: f for n, f in zip(self.targets, self.fisher[lane].tolist(), strict=True) if ranks.get(n)}

    def penalties(self) -> Tensor:
        """The value of each lane's penalty [E]; 0 before its weights are frozen."""
        total = self.values.new_zeros(len(self.lanes))
        for norm, norms in enumerate((update_norms, factor_norms)):
            start = 0
            for g in self.groups:
                m = len(g.names)
                a, b = self._group(self.values, g)
                squares = norms(a.flatten(0, 1), b.flatten(0, 1)).view(-1, m)
                total = total + (self.coefficients[norm, :, start : start + m] * squares).sum(1)
                start += m
        return total


def _allocation(lane: Lane) -> Allocation:
    assert lane.settings.ada is not None
    return lane.settings.ada


def _leaf(value: Tensor, grad: Tensor) -> Tensor:
    """A view of the buffer that autograd trains; its gradient accumulates in the other buffer."""
    leaf = value.detach().requires_grad_(True)
    leaf.grad = grad
    return leaf


def _position_offset(model: PreTrainedModel) -> int:
    """RoBERTa counts positions from padding_idx + 1."""
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


@dataclass
class _Head:
    """A classifier's head on the first token, one per lane: x [E, b, d] -> logits [E, b, classes]."""

    model: PreTrainedModel
    lanes: Lanes
    layers: list = field(default_factory=list)
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        match model.config.model_type:
            case "roberta" | "xlm-roberta" | "camembert":
                p = model.get_submodule("classifier.dropout").p
                self.layers = [p, "classifier.dense", torch.tanh, p, "classifier.out_proj"]
            case "bert":
                self.layers = ["bert.pooler.dense", torch.tanh, model.get_submodule("dropout").p, "classifier"]
            case other:
                raise TypeError(f"no lanes for {other}")
        for layer in self.layers:
            if isinstance(layer, str):
                for name, p in model.get_submodule(layer).named_parameters():
                    self.shapes[f"{layer}.{name}"] = p.shape

    def __call__(self, x: Tensor) -> Tensor:
        lanes = self.lanes
        for layer in self.layers:
            if isinstance(layer, str):
                weight, bias = (lanes.head_values[f"{layer}.{k}"] for k in ("weight", "bias"))
                if lanes.chosen is not None:
                    weight, bias = weight[lanes.chosen], bias[lanes.chosen]
                x = torch.baddbmm(bias[:, None], x, weight.mT)
            elif isinstance(layer, float):
                if lanes.model.training and layer > 0.0:
                    x = x * lanes._head_mask(x, layer)
            else:
                x = layer(x)
        return x


def supports(config) -> bool:
    """Whether the engine knows this architecture's head and attention."""
    return config.model_type in ("bert", "roberta", "xlm-roberta", "camembert")
