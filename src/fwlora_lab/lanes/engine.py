"""Many runs at once on one frozen backbone.

A lane is a run: its own data order, adapters, head, rank, learning rate, λ and dropout. The activations of all
lanes go through the frozen matrices together, [E·N, d]; the adapters are stacked, A [E, r_max, d_in] and
B [E, d_out, r_max], and go through batched products. Smaller ranks are padded with zeros, which is exact: where the
padding of A and of B is zero its gradients are zero, and AdamW leaves it there. The loss is the sum over lanes of
each lane's mean, every hyper-parameter is a tensor over lanes, and nothing in a lane depends on another: a lane
computes what the run would compute alone, and one that diverges harms nobody.

All that is trained lives in one flat buffer [E, P], beside its gradients and AdamW's two moments. B lies in it
transposed, and A and B alike are sorted by the length of their rows, so that the Gram matrices, the penalty, clipping
and the update are a dozen operations each for all matrices and lanes together.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fwlora import estimators
from fwlora.penalty import NORMS
from fwlora.weighting import penalty_weights
from fwlora_lab.lanes.adapted_linear import Adapter, adapted_linear
from fwlora_lab.lanes.attention import ATTENTION, attention
from fwlora_lab.lanes.dropout import DropoutRng, add_dropped
from fwlora_lab.lanes.packing import Block, Packed
from fwlora_lab.lanes.settings import Allocation, Lane, LaneSettings

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own
_UPDATE = NORMS.index("update")


@dataclass(frozen=True)
class FactorRows:
    """The factors with rows of d entries: A where d_in = d, transposed B where d_out = d. [E, K, r, d] from `start` on.

    Counted over all such groups, these are the factors `first` … `first` + K − 1.
    """

    d: int
    start: int
    first: int
    k: int


class LaneLinear(nn.Module):
    """Frozen Linears of one input and equal width side by side, with one adapter per lane on those that are targets.

    `y_e = x_e Wᵀ + bias`, and `+ s_e (x_e A_eᵀ) B_eᵀ` in a target's columns; x [E, N, d_in], or with `sentences`
    [E, b, d_in], one row a sentence.
    """

    def __init__(self, lanes: Lanes, names: Sequence[str], sentences: bool = False) -> None:
        super().__init__()
        linears = [cast(nn.Linear, lanes.model.get_submodule(name)) for name in names]
        self.weight, self.bias = linears[0].weight, linears[0].bias
        if len(linears) > 1:
            self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), False)
            self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), False)
        self.names, self.width = names, linears[0].out_features
        self.sentences = sentences
        self.adapted: list[tuple[str, slice]] = []
        start = 0
        for name, linear in zip(names, linears, strict=True):
            if name in lanes.targets:
                self.adapted.append((name, slice(start, start + linear.out_features)))
            start += linear.out_features
        self._lanes = [lanes]  # in a list: it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        lanes = self._lanes[0]
        if not self.adapted:
            return functional.linear(x, self.weight, self.bias)
        adapters = [lanes.adapter(name, columns) for name, columns in self.adapted]
        masks = [lanes.adapter_mask(x, self.sentences) for _ in adapters]
        # x meets the probe here, where it was just written; by the backward pass it has left the caches.
        watch = partial(lanes.watch, self, probed=lanes.probed(x)) if lanes.watching else None
        return adapted_linear(x, lanes.anchor, self.weight, self.bias, adapters, masks, watch)


class LaneDropout(nn.Module):
    """Dropout of hidden states [E, N, d], each lane's mask from its own generator and for its true tokens only."""

    def __init__(self, p: float, lanes: Lanes) -> None:
        super().__init__()
        self.p = p
        self._lanes = [lanes]

    def forward(self, x: Tensor) -> Tensor:
        mask = self._lanes[0].hidden_mask(x, self.p)
        return x if mask is None else x * mask


class LaneLayer(nn.Module):
    """A layer of BERT or RoBERTa over packed lanes: [E, N, d] -> [E, N, d].

    Of the last layer's outputs the classifier reads each sentence's first token and nothing else, so the last layer
    takes its keys and values from all tokens and computes the rest for the first ones only: [E, N, d] -> [E, b, d].
    """

    def __init__(self, lanes: Lanes, name: str, last: bool) -> None:
        super().__init__()
        layer: Any = lanes.model.get_submodule(name)
        own = layer.attention.self
        self.heads, self.scaling = own.num_attention_heads, own.scaling
        self.rates = own.dropout.p, layer.attention.output.dropout.p, layer.output.dropout.p
        query, *others = (f"{name}.attention.self.{n}" for n in ("query", "key", "value"))
        self.first = LaneLinear(lanes, [query], sentences=True) if last else None
        self.inputs = LaneLinear(lanes, others if last else [query, *others])
        self.projection = LaneLinear(lanes, [f"{name}.attention.output.dense"], last)
        self.intermediate = LaneLinear(lanes, [f"{name}.intermediate.dense"], last)
        self.output = LaneLinear(lanes, [f"{name}.output.dense"], last)
        self.activation = layer.intermediate.intermediate_act_fn
        self.norms = nn.ModuleList([layer.attention.output.LayerNorm, layer.output.LayerNorm])
        self._lanes = [lanes]

    def forward(self, x: Tensor, *_: Any, packed: Packed, **__: Any) -> Tensor:
        lanes, last = self._lanes[0], self.first is not None
        tokens, queries = self.inputs(x), None
        if self.first is not None:
            x = x.flatten(0, 1).index_select(0, packed.first.flatten()).view(*packed.first.shape, -1)
            queries = self.first(x)
        drop = partial(lanes.attention_mask, p=self.rates[0]) if self.training and self.rates[0] > 0.0 else None
        seen = self.projection(attention(tokens, queries, packed, self.heads, self.scaling, drop))
        x = self.norms[0](add_dropped(x, seen, lanes.hidden_mask(seen, self.rates[1], last)))
        y = self.output(self.activation(self.intermediate(x)))
        return self.norms[1](add_dropped(x, y, lanes.hidden_mask(y, self.rates[2], last)))


@dataclass(frozen=True)
class StepPlan:
    """What the host decides before a step: the kind of step, and its numbers by lane.

    watching: lanes whose Fisher energy is taken; shrinking: norms of the penalties at work; numbers [7, E, 1]: learning
    rate, weight decay, 1 − β₁ᵗ, √(1 − β₂ᵗ), limit of the gradient's norm, whether it watches, whether its allocation
    still learns; probes by d_in: [E, k, d_in], zero for lanes that do not sketch.
    """

    watching: tuple[int, ...]
    shrinking: tuple[int, ...]
    regression: bool
    numbers: Tensor
    probes: Mapping[int, Tensor]

    @property
    def kind(self) -> tuple:
        return self.watching, self.shrinking, self.regression, tuple(sorted(self.probes))

    def tensors(self) -> list[Tensor]:
        return [self.numbers, *(self.probes[d] for d in sorted(self.probes))]


class Lanes:
    """The engine: a classifier's frozen encoder, the lanes' parameters, and one training step for all of them.

    The encoder computes in its own dtype. What is trained is kept in at least fp32 and, for an encoder in half
    precision, cast once a step.
    """

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
        parameter = next(model.parameters())
        self.device, self.compute_dtype = parameter.device, parameter.dtype
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._position_offset = _position_offset(model)
        model.config._attn_implementation = ATTENTION
        model.requires_grad_(False)
        self.head = LaneHead(model, self)
        shapes = {}
        for name in targets:
            base = model.get_submodule(name)
            if not isinstance(base, nn.Linear):
                raise TypeError(f"{name} is {type(base).__name__}, not Linear")
            shapes[name] = (base.in_features, base.out_features)
        self.targets = list(shapes)
        self._shapes = list(shapes.values())
        layers = cast(nn.ModuleList, self.encoder.get_submodule("encoder.layer"))
        for i in range(len(layers)):
            layers[i] = LaneLayer(self, f"{model.base_model_prefix}.encoder.layer.{i}", last=i == len(layers) - 1)
        linears = [m for m in layers.modules() if isinstance(m, LaneLinear) and m.adapted]
        if left := shapes.keys() - {name for linear in linears for name, _ in linear.adapted}:
            raise TypeError(f"{min(left)} is no matrix of an encoder layer")
        dropout = cast(nn.Dropout, self.encoder.get_submodule("embeddings.dropout"))
        self.encoder.get_submodule("embeddings").dropout = LaneDropout(dropout.p, self)
        self._lay_out()
        # Their sketches side by side, equal widths together: one sum for all of a width.
        self._sketched = sorted(linears, key=lambda linear: linear.width)
        self._widths = Counter(linear.width for linear in self._sketched for _ in linear.names)
        place = {name: i for i, name in enumerate(name for linear in self._sketched for name in linear.names)}
        self._sketch_of = torch.tensor([place[name] for name in self.targets], device=self.device)
        self.lanes: list[Lane] = []
        self._resize(0)
        # What a forward pass reads.
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        self.present: list[int] = []
        self._chosen: Tensor | None = None
        self._packed: Packed | None = None
        self._plan: StepPlan | None = None
        self._sketches: dict[LaneLinear, Tensor] = {}
        self._energies: dict[str, Tensor] = {}
        self._fused = False
        self._draws = DropoutRng(self.device)
        self._drawn: dict[tuple[int, ...], int] = {}  # numbers that a pass takes, by the batch's shape
        self._replays: dict[tuple, CapturedStep] | None = {} if self.device.type == "cuda" else None

    # The flat buffer

    def _lay_out(self) -> None:
        lengths = [d for shape in self._shapes for d in shape]  # A of target 0, its B, A of target 1, …
        places: list[tuple[int, int]] = [(0, 0)] * len(lengths)  # (group, slot)
        offset = first = 0
        self.rows: list[FactorRows] = []
        for d in dict.fromkeys(lengths):
            mine = [f for f, length in enumerate(lengths) if length == d]
            for slot, f in enumerate(mine):
                places[f] = (len(self.rows), slot)
            self.rows.append(FactorRows(d, offset, first, len(mine)))
            offset += len(mine) * self.rank * d
            first += len(mine)
        self._places = places
        # Numbered as they lie in the buffer: the two factors of each target, each factor's partner and its target.
        number = [self.rows[group].first + slot for group, slot in places]
        self._a_of = torch.tensor(number[0::2], device=self.device)
        self._b_of = torch.tensor(number[1::2], device=self.device)
        self._partner = torch.empty(len(number), dtype=torch.int64, device=self.device)
        self._partner[self._a_of], self._partner[self._b_of] = self._b_of, self._a_of
        self._owner = torch.empty_like(self._partner)
        self._owner[self._a_of] = self._owner[self._b_of] = torch.arange(len(self.targets), device=self.device)
        lengths = [rows.d for rows in self.rows for _ in range(rows.k)]
        starts = [rows.start + i * self.rank * rows.d for rows in self.rows for i in range(rows.k)]
        self._factor_lengths, self._factor_starts = (torch.tensor(v, device=self.device) for v in (lengths, starts))
        self._spectrum_start = offset
        self.adapter_size = offset + self.spectral * len(self.targets) * self.rank
        offset = self.adapter_size
        self.head_places: dict[str, tuple[int, torch.Size]] = {}
        for name, p in self.head.shapes.items():
            self.head_places[name] = (offset, p)
            offset += p.numel()
        self.size = offset
        decays = torch.ones(self.size, dtype=self.dtype, device=self.device)
        for start, shape in self.head_places.values():
            if len(shape) < 2:
                decays[start : start + shape.numel()] = 0.0
        self._decays = decays

    def _resize(self, lanes: int, keep: Sequence[int] = ()) -> None:
        """Buffers for so many lanes; the rows `keep` of the present ones come first."""

        def zeros(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        # Four tensors, not four rows of one: autograd takes a write to the gradients for one to the values.
        new = [zeros(lanes, self.size) for _ in range(4)]
        # AdaLoRA's smoothed sensitivity and its uncertainty.
        scores = zeros(2, lanes, self.adapter_size * self.spectral)
        fisher = zeros(lanes, len(self.targets))
        coefficients = zeros(2, lanes, 2 * len(self.targets))
        if keep:
            rows = torch.tensor(list(keep), device=self.device)
            for buffer, old in zip(new, self._buffers, strict=True):
                buffer[: len(keep)] = old[rows]
            scores[:, : len(keep)] = self._scores[:, rows]
            fisher[: len(keep)] = self.fisher[rows]
            coefficients[:, : len(keep)] = self.coefficients[:, rows]
        self._buffers, self.fisher, self.coefficients, self._scores = new, fisher, coefficients, scores
        self.values, self.grads, self._first, self._second = new
        # What the encoder reads and writes: the buffers themselves, or their copies in half precision.
        self._work, self._work_grads = self.values, self.grads
        if self.compute_dtype != self.dtype:
            self._work, self._work_grads = (zeros(lanes, self.adapter_size, dtype=self.compute_dtype) for _ in range(2))
        self.factors = {n: self._factors(self._work, m) for m, n in enumerate(self.targets)}
        self._factor_grads = {n: self._factors(self._work_grads, m) for m, n in enumerate(self.targets)}
        self.head_values = {
            name: _leaf(self._head_view(self.values, name), self._head_view(self.grads, name))
            for name in self.head_places
        }

    def _of(self, buffer: Tensor, rows: FactorRows) -> Tensor:
        """[E, K, r, d]."""
        size = rows.k * self.rank * rows.d
        return buffer[:, rows.start : rows.start + size].view(-1, rows.k, self.rank, rows.d)

    def _spectrum(self, buffer: Tensor) -> Tensor:
        """Λ [E, M, r]."""
        size = len(self.targets) * self.rank
        start = self._spectrum_start
        return buffer[:, start : start + size].view(-1, len(self.targets), self.rank)

    def _factors(self, buffer: Tensor, m: int) -> tuple[Tensor, ...]:
        """A [E, r, d_in] and transposed B [E, r, d_out] (and Λ [E, r]) of target m."""
        pair = [self._of(buffer, self.rows[g])[:, slot] for g, slot in self._places[2 * m : 2 * m + 2]]
        return (*pair, self._spectrum(buffer)[:, m]) if self.spectral else tuple(pair)

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
            for m, name in enumerate(self.targets):
                if name in adapters:
                    a, b, *spectrum = adapters[name]
                    own = self._factors(self.values, m)
                    for there, given in zip(own, (a, b.mT, *spectrum), strict=True):
                        there[lane, : len(given)] = given.to(there)
            for name, value in head.items():
                self.head_values[name][lane] = value.to(self.head_values[name])
        self._arrange()
        return lane

    def release(self, lane: int) -> None:
        """Take a run out; the lanes behind it move up by one."""
        keep = [e for e in range(len(self.lanes)) if e != lane]
        del self.lanes[lane]
        self._resize(len(keep), keep)
        self._arrange()

    def _arrange(self) -> None:
        """What follows from which runs are in the lanes, as tensors over lanes."""
        settings = [lane.settings for lane in self.lanes]

        def column(values: Sequence[float | bool], dtype: torch.dtype | None = None) -> Tensor:
            return torch.tensor(values, dtype=dtype or self.dtype, device=self.device)[:, None]

        self.scales = column([s.scale for s in settings], self.compute_dtype)[:, None]
        ranks = torch.tensor([[s.ranks.get(n, 0) for n in self.targets] for s in settings], device=self.device)
        ranks = ranks.view(len(settings), len(self.targets))
        self._owned = ranks > 0
        fws = [s.fw for s in settings]
        self._ema = column([fw.fisher_ema_decay if fw else 0.0 for fw in fws])
        self._shares = column([bool(fw and fw.averaging == "normalized") for fw in fws], torch.bool)
        self._columns = column([fw.sketch_columns if fw else 1 for fw in fws])
        self._free = column([bool(fw and fw.estimator == "adapter") for fw in fws], torch.bool)
        self._in_loss = column([not fw or fw.penalty_mode == "loss" for fw in fws], torch.bool)[:, None, None]
        # 3·d_in/(s²·r), see `fwlora.estimators.adapter_squared_norm`.
        d_in = torch.tensor([d for d, _ in self._shapes], device=self.device)
        self._adapter_factor = 3.0 * d_in / ranks.clamp_min(1) / column([s.scale for s in settings]).square()
        if self.spectral:
            adas = [_allocation(lane) for lane in self.lanes]
            self._betas = [column([b[i] for b in ((ada.beta1, ada.beta2) for ada in adas)]) for i in range(2)]
            self._orthogonality = column([ada.orth_reg_weight for ada in adas])[:, 0]
            # The identity of each lane's own rank: padding is orthogonal to nothing.
            self._own_rank = torch.arange(self.rank, device=self.device) < ranks[..., None]
            self._eye = self._own_rank[:, self._owner].to(self.dtype).diag_embed()
        if self._replays:
            self._replays.clear()

    def adapters(self, lane: int) -> dict[str, tuple[Tensor, ...]]:
        """A [r, d_in], B [d_out, r] (and Λ) by target, cut to the lane's own ranks; targets of rank 0 are left out."""
        ranks = self.lanes[lane].settings.ranks
        out: dict[str, tuple[Tensor, ...]] = {}
        for m, name in enumerate(self.targets):
            if r := ranks.get(name):
                a, b, *spectrum = self._factors(self.values, m)
                own = (a[lane, :r], b[lane, :r].mT, *(e[lane, :r] for e in spectrum))
                out[name] = tuple(t.clone(memory_format=torch.contiguous_format) for t in own)
        return out

    def head_of(self, lane: int) -> dict[str, Tensor]:
        """The head's parameters by name."""
        return {name: value[lane].detach().clone() for name, value in self.head_values.items()}

    # What the layers ask for

    def of_present(self, t: Tensor) -> Tensor:
        """The rows [E, …] of the lanes in this pass."""
        return t if self._chosen is None else t[self._chosen]

    def adapter(self, name: str, columns: slice) -> Adapter:
        """The factors of a target for the lanes in this pass."""
        a, b, *spectrum = map(self.of_present, self.factors[name])
        grad_a, grad_b, *grad_e = self._factor_grads[name]
        scale = self.of_present(self.scales)
        c = scale * spectrum[0][:, None] if spectrum else scale
        return Adapter(columns, a, b, c, grad_a, grad_b, scale[:, 0], grad_e[0] if grad_e else None)

    @property
    def watching(self) -> bool:
        """Whether a lane's Fisher energy is taken in this pass."""
        return self._plan is not None and bool(self._plan.watching)

    def adapter_mask(self, x: Tensor, sentences: bool) -> Tensor | None:
        """Dropout of the adapters' input [E, N, d] or [E, b, d], divided by 1 − p; None where there is none."""
        rates = [self.lanes[e].settings.dropout for e in self.present]
        return self._mask(x.shape, sentences, rates) if self.model.training and any(rates) else None

    def hidden_mask(self, x: Tensor, p: float, sentences: bool = False) -> Tensor | None:
        """The same for hidden states, at one rate for all lanes."""
        return self._mask(x.shape, sentences, [p] * len(x)) if self.model.training and p > 0.0 else None

    def _mask(self, shape: torch.Size, sentences: bool, rates: Sequence[float]) -> Tensor:
        assert self._packed is not None
        counts = self._packed.sentences if sentences else self._packed.counts
        lanes, _, d = shape
        if self._packed.uniform and len(set(rates)) == 1:
            mask = torch.empty(shape, dtype=self.compute_dtype, device=self.device)
            self._draws.keep(self._draws.same(shape[1:].numel()), rates[0], mask)
            return mask
        mask = torch.zeros(shape, dtype=self.compute_dtype, device=self.device)
        drawn = self._draws.same(shape[1:].numel()) if self._packed.uniform else None
        for row, (n, p) in enumerate(zip(counts, rates, strict=True)):
            self._draws.keep(self._draws.one(row, n * d) if drawn is None else drawn[row], p, mask[row, :n])
        return mask

    def attention_mask(self, block: Block, shape: tuple[int, ...], p: float) -> Tensor:
        """The mask of attention dropout in a block, divided by 1 − p."""
        assert self._packed is not None
        mask = torch.empty(shape, dtype=self.compute_dtype, device=self.device)
        lanes = len(self.present)
        each = mask[0].numel()
        if self._packed.uniform:
            self._draws.keep(self._draws.same(shape[0] // lanes * each), p, mask.view(lanes, -1))
            return mask
        start = 0
        for row, sentences in block.lanes:
            part = mask[start : start + sentences]
            self._draws.keep(self._draws.one(row, sentences * each), p, part)
            start += sentences
        return mask

    # Forward, backward, update

    def logits(self, packed: Packed, lanes: Sequence[int] | None = None) -> Tensor:
        """Logits [E, b, classes] of each lane's sentences; row e of `packed` belongs to lane `lanes[e]`."""
        self.present = list(range(len(self.lanes))) if lanes is None else list(lanes)
        whole = self.present == list(range(len(self.lanes)))
        self._chosen = None if whole else torch.tensor(self.present, device=self.device)
        self._packed = packed
        inputs = {
            "input_ids": packed.tokens,
            "position_ids": packed.positions + self._position_offset,
        }
        if packed.types is not None:
            inputs["token_type_ids"] = packed.types
        return self.head(self.encoder(**inputs, packed=packed).last_hidden_state.to(self.dtype))

    def step(self, packed: Packed, learning_rates: Sequence[float], regression: bool = False) -> Tensor:
        """One optimiser step of every lane; the lanes' losses [E], on the device."""
        if not self.model.training:
            self.model.train()
        plan = self._plan_step(learning_rates, regression)
        packed = packed.to(self.device)
        if packed.uniform and _shape(packed) not in self._drawn:
            self.memory(packed)  # a pass that counts what a step draws
        losses = self._replay(packed, plan) if packed.uniform and self._replays is not None else None
        if losses is None:
            losses = self._compute(packed, plan)
        if self.spectral:
            self._allocate()
        for e, lane in enumerate(self.lanes):
            lane.step += 1
            if lane.settings.fw is not None and lane.step == lane.settings.warmup_steps:
                self._freeze(e)
        return losses

    def _plan_step(self, learning_rates: Sequence[float], regression: bool) -> StepPlan:
        watching, shrinking, numbers = [], set(), []
        for e, (lane, lr) in enumerate(zip(self.lanes, learning_rates, strict=True)):
            own, t = lane.settings, lane.step + 1
            watches = self._watches(lane)
            if watches:
                watching.append(e)
            if own.fw is not None and lane.step >= own.warmup_steps:
                shrinking.add(NORMS.index(own.fw.penalty_norm))
            limit = float("inf") if own.max_grad_norm is None else own.max_grad_norm
            learns = own.ada is not None and t < own.ada.total_steps - own.ada.tfinal
            bias1, bias2 = (1.0 - beta**t for beta in _BETAS)
            numbers.append([lr, own.weight_decay, bias1, bias2**0.5, limit, float(watches), float(learns)])
        table = torch.tensor(numbers, dtype=self.dtype).T.contiguous()[..., None]
        return StepPlan(
            watching=tuple(watching),
            shrinking=tuple(sorted(shrinking)),
            regression=regression,
            numbers=table.to(self.device, non_blocking=True),
            probes=self._probes(watching),
        )

    def _compute(self, packed: Packed, plan: StepPlan) -> Tensor:
        """The whole step on the device: nothing here waits for it, and nothing comes from the host."""
        self._plan = plan
        lr, decay, bias1, bias2, limit, watches, learns = plan.numbers.unbind()
        generators = [lane.generator for lane in self.lanes]
        if packed.uniform:
            self._draws.begin_same(generators, self._drawn[_shape(packed)])
        else:
            self._draws.begin(generators)
        self.grads.zero_()
        size = self.adapter_size
        if self._work is not self.values:
            self._work.copy_(self.values[:, :size])
            self._work_grads.zero_()
        losses = self._losses(self.logits(packed), packed, plan.regression)
        losses.sum().backward()
        self._plan = None
        losses = losses.detach()
        with torch.no_grad():
            if self._work_grads is not self.grads:
                self.grads[:, :size].copy_(self._work_grads)
            plain = plan.shrinking and not self._fused
            stacks = self._stacks() if self.spectral or plain else []
            grams = self._grams(stacks) if self.spectral or (plain and _UPDATE in plan.shrinking) else None
            if self.spectral:
                losses = losses + self._orthogonalise(stacks, grams)
            norms = torch.linalg.vector_norm(self.grads, dim=1, keepdim=True)
            # As torch.nn.utils.clip_grad_norm_ does it; a norm that is not finite must not hide behind the limit.
            self.grads.mul_((limit / (norms + 1e-6)).clamp_(max=1.0))
            if plan.watching:
                self._observe(watches > 0)
            for norm in plan.shrinking:
                if self._fused:
                    self._shrink_fused()
                else:
                    self._shrink(norm, stacks, grams, lr)
            self._adamw(lr, decay, bias1, bias2)
            if self.spectral:
                self._sense(learns > 0)
        return losses

    @torch.inference_mode()
    def predict(self, packed: Packed, lanes: Sequence[int]) -> Tensor:
        """Logits without dropout, as `logits`."""
        self.model.eval()
        if self._work is not self.values:
            self._work.copy_(self.values[:, : self.adapter_size])
        return self.logits(packed.to(self.device), lanes)

    @staticmethod
    def _losses(logits: Tensor, packed: Packed, regression: bool) -> Tensor:
        if regression:
            single = (logits[..., 0] - packed.labels).square()
        else:
            single = functional.cross_entropy(logits.mT, packed.labels, reduction="none")
        # Where there is no sentence the weight is 0, and NaN times 0 must not be.
        return torch.where(packed.weights > 0, single * packed.weights, 0.0).sum(-1)

    def _adamw(self, lr: Tensor, decay: Tensor, bias1: Tensor, bias2: Tensor) -> None:
        """torch.optim.AdamW's update, on all lanes at once."""
        beta1, beta2 = _BETAS
        self.values.addcmul_(self.values, lr * decay * self._decays, value=-1.0)
        self._first.lerp_(self.grads, 1.0 - beta1)
        self._second.mul_(beta2).addcmul_(self.grads, self.grads, value=1.0 - beta2)
        denominator = self._second.sqrt().div_(bias2).add_(_EPS)
        self.values.sub_((self._first / denominator).mul_(lr / bias1))

    # Fisher-Weighted LoRA over lanes

    def _watches(self, lane: Lane) -> bool:
        fw = lane.settings.fw
        if fw is None or lane.step >= lane.settings.warmup_steps:
            return False
        ago = lane.step - fw.fisher_start
        return ago >= 0 and ago % fw.fisher_interval == 0

    def _probes(self, watching: Sequence[int]) -> dict[int, Tensor]:
        sketching = [(e, self.lanes[e].settings.fw) for e in watching]
        sketching = [(e, fw) for e, fw in sketching if fw is not None and fw.estimator == "sketch"]
        if not sketching:
            return {}
        most = max(fw.sketch_columns for _, fw in sketching)
        probes = {}
        for d in dict.fromkeys(d for d, _ in self._shapes):
            probes[d] = torch.zeros(len(self.lanes), most, d, dtype=self.compute_dtype, device=self.device)
            for e, fw in sketching:
                probes[d][e, : fw.sketch_columns] = estimators.gaussian_probe(
                    d,
                    fw.sketch_columns,
                    seed=fw.seed,
                    step=self.lanes[e].step,
                    device=self.device,
                    dtype=self.compute_dtype,
                ).T
        return probes

    def probed(self, x: Tensor) -> Tensor | None:
        """`x Ω` [E, N, k] of the sketch for x [E, N, d_in]; None where no lane sketches."""
        assert self._plan is not None
        if not self._plan.probes:
            return None
        with torch.no_grad():
            return torch.bmm(x, self._plan.probes[x.shape[-1]].mT)

    def watch(self, linear: LaneLinear, g: Tensor, x: Tensor, probed: Tensor | None) -> None:
        """Note what the step's Fisher energies of the targets of `linear` are made of.

        g [E, N, d_out], x [E, N, d_in], or with `linear.sentences` [E, b, …], a row a sentence; `probed` of x.
        """
        assert self._packed is not None and self._plan is not None
        if probed is not None:
            self._sketches[linear] = torch.bmm(probed.mT, g)
        counts = self._packed.sentences if linear.sentences else self._packed.counts
        for e in self._plan.watching:
            fw, n = self.lanes[e].settings.fw, counts[e]
            assert fw is not None
            if fw.estimator not in ("exact", "per_example"):
                continue
            for name, columns in linear.adapted:
                if fw.estimator == "exact":
                    energy = estimators.weight_gradient(g[e, :n, columns], x[e, :n]).square().sum()
                elif linear.sentences:
                    energy = estimators.per_example_squared_norm(g[e, :n, None, columns], x[e, :n, None])
                else:
                    energy = self._per_example(e, g[..., columns], x)
                self._energies.setdefault(name, self.fisher.new_zeros(len(self.lanes)))[e] = energy

    def _per_example(self, lane: int, g: Tensor, x: Tensor) -> Tensor:
        assert self._packed is not None
        flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for block in self._packed.blocks:
            start = 0
            for row, sentences in block.lanes:
                rows = slice(start, start + sentences)
                start += sentences
                if row == lane:
                    keep = block.keep[rows, :, None]
                    if self._packed.uniform:  # an empty place is no example
                        keep = keep & (self._packed.weights[lane] > 0)[:, None, None]
                    total = total + estimators.per_example_squared_norm(
                        flat_g[block.rows[rows]] * keep, flat_x[block.rows[rows]] * keep
                    )
        return total

    def _observe(self, watches: Tensor) -> None:
        """Average the step's energies into F for the lanes that watch [E, 1]."""
        energies = torch.zeros_like(self.fisher)
        if self._energies:
            energies = torch.stack([self._energies[name] for name in self.targets], -1)
        if self._sketches:
            sketches = torch.cat([self._sketches[linear] for linear in self._sketched], -1)
            squares = sketches.to(self.dtype).square_().sum(1)
            of_width = squares.split([width * n for width, n in self._widths.items()], -1)
            sums = [own.unflatten(-1, (-1, width)).sum(-1) for own, width in zip(of_width, self._widths, strict=True)]
            energies = energies + torch.cat(sums, -1)[:, self._sketch_of] / self._columns
        self._sketches, self._energies = {}, {}
        if any(lane.settings.fw is not None and lane.settings.fw.estimator == "adapter" for lane in self.lanes):
            squares = torch.cat([self._of(self.grads, rows).square().sum((-2, -1)) for rows in self.rows], 1)
            energies = torch.where(self._free, squares[:, self._b_of] * self._adapter_factor, energies)
        energies = torch.where(self._owned, energies, 0.0)
        # Nobody need count a step that is left out: its update makes the lane NaN, and the run fails and says so.
        raw, share = (
            estimators.update_average(self.fisher, energies, self._ema, how)[0] for how in ("raw", "normalized")
        )
        self.fisher.copy_(torch.where(watches, torch.where(self._shares, share, raw), self.fisher))

    def _freeze(self, e: int) -> None:
        """Weights from F over the lane's own targets, once; the penalty's coefficients for the rest of its run."""
        settings = self.lanes[e].settings
        fw = settings.fw
        assert fw is not None
        own = torch.tensor([i for i, n in enumerate(self.targets) if settings.ranks.get(n)], device=self.device)
        weights = penalty_weights(
            self.fisher[e, own],
            fw.weighting,
            gamma=fw.gamma,
            max_weight_ratio=fw.max_weight_ratio,
            normalize=fw.normalize_weights,
            seed=fw.seed,
        )
        square = settings.scale**2 if fw.penalty_norm == "update" else 1.0
        twice = 2.0 * fw.penalty_strength * square * weights  # of ∂‖·‖², for both factors
        for factor in (self._a_of, self._b_of):
            self.coefficients[NORMS.index(fw.penalty_norm), e, factor[own]] = twice
        self._fused = self._is_fused_faster()

    def _stacks(self) -> list[Tensor]:
        """The factors as stacks [E·K, r, d] of adjacent matrices, a copy for each length of rows."""
        return [self._of(self.values, rows).flatten(0, 1) for rows in self.rows]

    def _grams(self, stacks: Sequence[Tensor]) -> Tensor:
        """`AAᵀ` and `BᵀB` of every factor: [E, 2M, r, r]."""
        grams = [torch.bmm(s, s.mT).view(len(self.lanes), -1, self.rank, self.rank) for s in stacks]
        return torch.cat(grams, 1)

    def _shrink(self, norm: int, stacks: Sequence[Tensor], grams: Tensor | None, lr: Tensor) -> None:
        """Adds the penalty's gradient to the gradients, or takes it off the values at the learning rate.

        `fwlora.penalty.update_gradients` over the flat buffer: each factor is multiplied with its partner's Gram
        matrix, A with BᵀB and Bᵀ with AAᵀ. For the norm of the factors themselves there is nothing to multiply with.
        """
        partners = grams[:, self._partner] if grams is not None else None
        mixed = any(lane.settings.fw is not None and lane.settings.fw.penalty_mode != "loss" for lane in self.lanes)
        for rows, term in zip(self.rows, stacks, strict=True):
            own = slice(rows.first, rows.first + rows.k)
            if norm == _UPDATE:
                assert partners is not None
                term = torch.bmm(partners[:, own].flatten(0, 1), term)
            values, grads = self._of(self.values, rows), self._of(self.grads, rows)
            term, c = term.view_as(values), self.coefficients[norm, :, own, None, None]
            if not mixed:
                grads.addcmul_(term, c)
            else:
                term = term * c
                grads.add_(torch.where(self._in_loss, term, 0.0))
                values.sub_(torch.where(self._in_loss, 0.0, term) * lr[..., None, None])

    def _shrink_fused(self) -> None:
        from fwlora_lab.lanes.fused_penalty import add_gradient

        add_gradient(
            self.values,
            self.grads,
            self.coefficients[_UPDATE],
            self._factor_starts,
            self._factor_lengths,
            self._partner,
            self.rank,
        )

    def _is_fused_faster(self) -> bool:
        """Whether one kernel takes the penalty's place, measured here and now; where there is no GPU it does not."""
        fws = [lane.settings.fw for lane in self.lanes if lane.settings.fw is not None]
        usual = all(fw.penalty_norm == "update" and fw.penalty_mode == "loss" for fw in fws)
        if self.device.type != "cuda" or self.dtype != torch.float32 or self.spectral or not usual:
            return False
        if importlib.util.find_spec("triton") is None:
            return False

        def plain() -> None:
            stacks = self._stacks()
            self._shrink(_UPDATE, stacks, self._grams(stacks), lr)

        lr = torch.zeros(len(self.lanes), 1, dtype=self.dtype, device=self.device)
        times = []
        for way in (self._shrink_fused, plain):  # into gradients that the next step zeroes
            way()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(20):
                way()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return times[0] < times[1]

    def phase(self, lane: int) -> str:
        """The part of its run that the lane's next step belongs to, as the methods name them."""
        settings, step = self.lanes[lane].settings, self.lanes[lane].step
        if settings.ada is not None and settings.ada.tinit < settings.ada.total_steps:
            if step < settings.ada.tinit:
                return "initial"
            return "allocating" if step < settings.ada.total_steps - settings.ada.tfinal else "final"
        if settings.fw is None:
            return "training"
        return "warmup" if step < settings.warmup_steps else "penalty"

    # AdaLoRA over lanes

    def _orthogonalise(self, stacks: Sequence[Tensor], grams: Tensor | None) -> Tensor:
        """Adds the gradient of `w·mean(‖AAᵀ − I‖_F, ‖BᵀB − I‖_F)` over all A and B; its value by lane [E]."""
        assert grams is not None
        off = grams - self._eye
        norms = torch.linalg.matrix_norm(off)
        share = self._orthogonality / (2.0 * self._owned.sum(1))
        # ∂‖C‖/∂A = 2·C·A/‖C‖ for C = AAᵀ − I, which is symmetric; 0 where C is.
        unit = off * (2.0 * share[:, None] / norms.clamp_min(torch.finfo(self.dtype).tiny))[..., None, None]
        for rows, values in zip(self.rows, stacks, strict=True):
            grads = self._of(self.grads, rows)
            own = unit[:, rows.first : rows.first + rows.k].flatten(0, 1)
            grads.add_(torch.bmm(own, values).view_as(grads))
        return share * norms.sum(1)

    def _sense(self, learns: Tensor) -> None:
        """Update the sensitivities and their uncertainties after the optimizer's step, for lanes [E, 1] that learn."""
        sensitivity, uncertainty = self._scores
        beta1, beta2 = self._betas
        size = self.adapter_size
        now = (self.values[:, :size] * self.grads[:, :size]).abs_()
        smooth = torch.lerp(now, sensitivity, beta1)
        unsure = torch.lerp((now - smooth).abs_(), uncertainty, beta2)
        self._scores[0] = torch.where(learns, smooth, sensitivity)
        self._scores[1] = torch.where(learns, unsure, uncertainty)

    def _allocate(self) -> None:
        """Mask the least important λ where the schedule says so."""
        adas = [_allocation(lane) for lane in self.lanes]
        initial = [sum(lane.settings.ranks.values()) for lane in self.lanes]
        budgets = [ada.budget(lane.step + 1, first) for ada, lane, first in zip(adas, self.lanes, initial, strict=True)]
        if all(budget is None for budget in budgets):
            return
        score = self._scores[0] * self._scores[1]
        means = torch.cat([self._of(score, rows).mean(-1) for rows in self.rows], 1)
        triplets = self._spectrum(score) + (means[:, self._a_of] + means[:, self._b_of])  # [E, M, r]
        for e, budget in enumerate(budgets):
            if budget is None or initial[e] <= budget:
                continue
            threshold = triplets[e][self._own_rank[e]].kthvalue(initial[e] - budget).values
            self._spectrum(self.values)[e].masked_fill_(triplets[e] <= threshold, 0.0)

    def fisher_of(self, lane: int) -> dict[str, float]:
        """F_m by target."""
        ranks = self.lanes[lane].settings.ranks
        return {n: f for n, f in zip(self.targets, self.fisher[lane].tolist(), strict=True) if ranks.get(n)}

    def memory(self, packed: Packed) -> int:
        """Bytes of a training step on such a batch: the lanes' buffers and what a forward pass keeps for its backward.

        Trains nothing and moves no lane's randomness.
        """
        frozen = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return t.detach()  # a node that keeps its own output would keep itself

        present = self.lanes[: len(packed.tokens)]
        generators = [lane.generator for lane in present]
        states = [generator.get_state() for generator in generators]
        self.model.train()
        if packed.uniform:
            self._draws.begin_same(generators, None)
        else:
            self._draws.begin(generators)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            self.logits(packed.to(self.device), range(len(present)))
        if packed.uniform:
            self._drawn[_shape(packed)] = self._draws.used
        for lane, state in zip(present, states, strict=True):
            lane.generator.set_state(state)
        mine = [*self._buffers, self._work, self._work_grads, self._scores]
        buffers = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in mine}
        return sum(buffers.values()) + sum(size for at, size in kept.items() if at not in frozen | buffers.keys())

    # One graph of GPU launches a step

    def _replay(self, packed: Packed, plan: StepPlan) -> Tensor | None:
        """The step as one captured graph; None where this kind of step is not captured yet, or cannot be."""
        assert self._replays is not None
        kind = (*plan.kind, self._fused, packed.types is None, _shape(packed))
        if kind not in self._replays:
            self._replays[kind] = CapturedStep()
            return None  # the first of its kind runs as it is, and warms up what a capture must not
        replay = self._replays[kind]
        if replay.graph is None:
            try:
                replay.capture(self, packed, plan)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of the step, it runs launch by launch: {error}", stacklevel=2)
                self._replays = None
                return None
        return replay(packed, plan)


@dataclass
class CapturedStep:
    """A captured step, its inputs' places and its losses."""

    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[Tensor] = field(default_factory=list)
    losses: Tensor | None = None

    def capture(self, lanes: Lanes, packed: Packed, plan: StepPlan) -> None:
        self.inputs = [*packed.tensors(), *plan.tensors()]
        graph = torch.cuda.CUDAGraph()
        for lane in lanes.lanes:
            graph.register_generator_state(lane.generator)
        with torch.cuda.graph(graph):
            self.losses = lanes._compute(packed, plan)
        self.graph = graph

    def __call__(self, packed: Packed, plan: StepPlan) -> Tensor:
        assert self.graph is not None and self.losses is not None
        for place, now in zip(self.inputs, [*packed.tensors(), *plan.tensors()], strict=True):
            if place is not now:
                place.copy_(now, non_blocking=True)
        self.graph.replay()
        return self.losses.clone()


def _shape(packed: Packed) -> tuple[int, ...]:
    return (packed.tokens.shape[1], packed.first.shape[1], packed.blocks[0].rows.shape[1])


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
class LaneHead:
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
                weight, bias = (lanes.of_present(lanes.head_values[f"{layer}.{k}"]) for k in ("weight", "bias"))
                x = torch.baddbmm(bias[:, None], x, weight.mT)
            elif isinstance(layer, float):
                mask = lanes.hidden_mask(x, layer, sentences=True)
                x = x if mask is None else x * mask
            else:
                x = layer(x)
        return x
