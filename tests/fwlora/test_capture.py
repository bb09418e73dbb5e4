"""What counts for F, and what models do to the outputs and inputs of their layers, against an unfrozen twin.

The twin is a copy of the model whose adapted weights are trained: after the same calls of `backward` and `zero_grad`,
`‖weight.grad‖²` is what F must be.

pytest tests/fwlora/test_capture.py
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import D_IN, D_OUT, HIDDEN, Net, batches, lora_net, trainable
from test_method import layers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import fwlora
from fwlora import FWLoraConfig, capture, estimators

ESTIMATORS = ("exact", "sketch", "per_example")


def config(estimator: str = "exact", **more: Any) -> FWLoraConfig:
    settings: dict[str, Any] = {"warmup_steps": 50, "fisher_ema_decay": 0.0, "penalty_strength": 0.0}
    return FWLoraConfig(**{**settings, **more}, estimator=estimator)


def wrapped(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """PEFT's LoRA on `first` and `second` of a model, with B not zero."""
    torch.manual_seed(1)
    peft: Any = get_peft_model(kind(), LoraConfig(**{"r": 2, "target_modules": ["first", "second"], **lora})).to(dtype)  # type: ignore[arg-type]
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return peft


def unfrozen(model: Any) -> Any:
    twin = copy.deepcopy(model)
    for layer in layers(twin).values():
        layer.base_layer.weight.requires_grad_(True)
    return twin


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def zero_grad(model: nn.Module, how: str = "none") -> None:
    for p in model.parameters():
        if p.grad is not None:
            if how == "none":
                p.grad = None
            elif how == "in place":
                p.grad.zero_()
            else:  # invisible to autograd's counter of changes
                p.grad.data.zero_()


def f_of_twin(twin: Any, estimator: str, columns: int, step: int = 0) -> dict[str, float]:
    """f of each matrix from the twin's weight gradients; the sketch by its own probe, so that equality is exact."""
    found: dict[str, float] = {}
    for name, layer in layers(twin).items():
        weight = layer.base_layer.weight
        g = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if layer.fan_in_fan_out:
            g = g.T
        if estimator == "sketch":
            probe = estimators.gaussian_probe(
                g.shape[1],
                columns,
                seed=0,
                step=step,
                device=g.device,
                dtype=torch.promote_types(g.dtype, torch.float32),
            )
            g = g.to(probe.dtype) @ probe / columns**0.5
        found[name] = float(g.double().square().sum())
    return found


def check(
    model: Any,
    run: Callable[[Any], None],
    estimator: str = "exact",
    *,
    optimizer: Any = None,
    rel: float = 1e-9,
    **settings: Any,
) -> fwlora.FisherWeightedLoRA:
    """After `run(model)`, an attached model's step measures what `run(twin)` leaves in the twin's weights."""
    twin = unfrozen(model)
    run(twin)
    optimizer = optimizer or torch.optim.SGD(trainable(model), lr=0.0)
    handle = fwlora.attach(model, optimizer, config(estimator, **settings))
    run(model)
    optimizer.step()
    want = f_of_twin(twin, estimator, handle.config.sketch_columns)
    assert max(want.values()) > 0.0
    assert handle.fisher() == pytest.approx(want, rel=rel, abs=1e-30)
    return handle


def hooks_on(
    model: Any, estimator: fwlora.HookedEstimator, dtype: torch.dtype = torch.float64, group: Any = None
) -> capture.HookCapture:
    """The capture alone, at an observed step."""
    handle: Any = fwlora.attach(model, torch.optim.SGD(trainable(model), lr=0.0), config("adapter"))
    arguments: Any = dict(dtype=dtype, step=lambda: 0, is_observing=lambda: True, scaler=None, group=group)
    return capture.HookCapture(handle._trained, handle._penalty, estimator, **arguments)


def backward(model: Any, *data: tuple[Tensor, Tensor]) -> None:
    for batch in data:
        loss_of(model, batch).backward()


@pytest.fixture
def norms_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a large model: no statistic is small enough to be kept without a reason."""
    monkeypatch.setattr(capture, "SMALL", 0)


# What models do to a layer's output and input


class InPlace(Net):
    """Changes the output of both layers in place, as Falcon (`+=`), OLMo (`clamp_`) and ReLU(inplace=True) do."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.clamp_(-0.8, 0.8)
        second = self.second(torch.tanh(h))
        second += h
        return self.head(nn.functional.relu(second, inplace=True).mean(1))


class Views(Net):
    """Writes into slices and views of an output, and takes it apart."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.view(-1, HIDDEN)[:, :2].mul_(0.5)
        left, right = self.second(h).chunk(2, dim=-1)
        return self.head(torch.cat([left.tanh(), right.transpose(0, 1).transpose(0, 1)], -1).mean(1))


class Repeated(Net):
    """Calls one layer many times, once with an output that nothing depends on."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(5):
            self.second(h)
            h = h + torch.tanh(self.second(h))
        return self.head(h.mean(1))


class Checkpointed(Net):
    """Both layers in checkpointed parts, `second` also outside them."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        h = checkpoint(lambda t: torch.tanh(self.first(t)), x, use_reentrant=self.reentrant)
        h = self.second(h)
        h = checkpoint(lambda t: self.second(t).clamp_(-0.9, 0.9).sin(), h, use_reentrant=self.reentrant)
        return self.head(h.mean(1))


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("kind", [InPlace, Views, Repeated, Checkpointed, Reentrant])
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_what_models_do_to_outputs(kind: type[Net], estimator: str) -> None:
    check(wrapped(kind), lambda m: backward(m, *batches(1)), estimator)


@pytest.mark.parametrize("kind", [InPlace, Views, Repeated, Checkpointed])
def test_it_trains_like_plain_lora_to_the_bit(kind: type[Net]) -> None:
    plain = wrapped(kind, lora_dropout=0.1)
    attached = copy.deepcopy(plain)
    for model in (plain, attached):
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        if model is attached:
            fwlora.attach(model, optimizer, config("sketch"))
        torch.manual_seed(3)
        for batch in batches(3):
            backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(trainable(plain), trainable(attached), strict=True))


class InputInPlace(Net):
    """Changes the input of `second` after the layer, which plain LoRA allows where its dropout copies it."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) * 1.0
        y = self.second(h)
        h.add_(1.0)
        return self.head((h + torch.tanh(y)).mean(1))


def test_a_sketch_does_not_need_an_input_that_is_changed_in_place() -> None:
    model = wrapped(InputInPlace, lora_dropout=0.5)

    def run(m: Any) -> None:
        torch.manual_seed(2)
        # The twin's weight gradient needs the input: give it a copy.
        second = layers(m)["second"].base_layer
        kept = (
            second.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
            if second.weight.requires_grad
            else None
        )
        backward(m, *batches(1))
        if kept is not None:
            kept.remove()

    check(model, run, "sketch")


def test_exact_leaves_the_step_out_and_copies_the_input_from_then_on() -> None:
    model = wrapped(InputInPlace, lora_dropout=0.5)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    handle = fwlora.attach(model, optimizer, config())
    with pytest.warns(UserWarning, match="input of 'second' is changed in place.*step 0 is left out.*sketch"):
        backward(model, *batches(1))
        optimizer.step()
    assert handle.skipped_steps == 1 and not any(handle.fisher().values())
    optimizer.zero_grad()

    other = wrapped(InputInPlace, lora_dropout=0.5)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str, args: Any, y: Tensor) -> None:
        y.retain_grad()
        seen[name] = args[0].clone(), y

    for name, layer in layers(other).items():
        layer.register_forward_hook(lambda _, args, y, name=name: look(name, args, y))
    for m in (other, model):
        torch.manual_seed(2)
        backward(m, *batches(1))
    optimizer.step()
    want = {n: float((y.grad.flatten(0, 1).T @ x.flatten(0, 1)).square().sum()) for n, (x, y) in seen.items()}
    assert handle.fisher() == pytest.approx(want, rel=1e-9)


def test_outputs_that_are_tuples() -> None:
    """A hook of a model's own may make a tuple of a layer's output, before or after ours."""
    model = lora_net()
    second = layers(model)["second"]
    second.register_forward_hook(lambda m, a, y: (y, "more"))

    def run(m: Any) -> None:
        x, y = batches(1)[0]
        h = torch.tanh(m.base_model.model.first(x))
        h, more = m.base_model.model.second(h)
        assert more == "more"
        cross_entropy(m.base_model.model.head(torch.tanh(h).mean(1)), y).backward()

    check(model, run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_does_not_reach_the_statistic(estimator: str) -> None:
    """fp16 would overflow: the gradients here are about 3e4, their squares and products are not below 65504."""
    x, y = batches(1, dtype=torch.float32)[0]

    def fisher(inside: bool) -> dict[str, float]:
        model = wrapped(Net, torch.float32)
        optimizer = torch.optim.SGD(trainable(model), lr=0.0)
        handle = fwlora.attach(model, optimizer, config(estimator))
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(model(x).float(), y) * 3e4
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        optimizer.step()
        return handle.fisher()

    inside = fisher(True)
    assert all(1e4 < f < float("inf") for f in inside.values())
    assert inside == pytest.approx(fisher(False), rel=5e-3)


# What counts: the batches that the optimizer steps on


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("large", [False, True])
class TestWhatCounts:
    @pytest.fixture(autouse=True)
    def size(self, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if large:
            monkeypatch.setattr(capture, "SMALL", 0)

    def test_autograd_grad_counts_for_nothing(self, estimator: str) -> None:
        def run(m: Any) -> None:
            torch.autograd.grad(loss_of(m, batches(2)[1]), trainable(m))
            backward(m, batches(1)[0])
            torch.autograd.grad(loss_of(m, batches(2)[1]), trainable(m))

        handle = check(lora_net(), run, estimator)
        assert not handle._capture._passes, "nothing is kept of them"  # type: ignore[attr-defined]

    def test_only_the_given_inputs_of_backward_count(self, estimator: str) -> None:
        """`backward(inputs=…)` without the adapters leaves their `.grad` alone, and the optimizer steps on nothing."""
        model = lora_net()
        optimizer = torch.optim.SGD(trainable(model), lr=0.0)
        handle = fwlora.attach(model, optimizer, config(estimator))
        x = batches(1)[0][0].requires_grad_(True)
        cross_entropy(model(x), batches(1)[0][1]).backward(inputs=[x])
        optimizer.step()
        assert not any(handle.fisher().values())

    @pytest.mark.parametrize("how", ["none", "in place", "data"])
    def test_a_batch_whose_gradients_are_zeroed_counts_for_nothing(self, estimator: str, how: str) -> None:
        def run(m: Any) -> None:
            backward(m, batches(2)[1])
            zero_grad(m, how)
            backward(m, batches(1)[0])

        check(lora_net(), run, estimator)

    @pytest.mark.parametrize("how", ["none", "in place", "data"])
    def test_evaluation_with_gradients_before_the_step_of_nothing(self, estimator: str, how: str) -> None:
        model = lora_net()
        optimizer = torch.optim.SGD(trainable(model), lr=0.0)
        handle = fwlora.attach(model, optimizer, config(estimator))
        backward(model, batches(1)[0])
        zero_grad(model, how)
        optimizer.step()
        assert not any(handle.fisher().values())

    @pytest.mark.parametrize("how", ["none", "in place"])
    def test_an_overflow_that_is_zeroed_leaves_no_nan(self, estimator: str, how: str) -> None:
        def run(m: Any) -> None:
            (loss_of(m, batches(2)[1]) * float("nan")).backward()
            zero_grad(m, how)
            backward(m, batches(1)[0])

        check(lora_net(), run, estimator)

    def test_a_layer_that_the_counted_batch_does_not_use(self, estimator: str) -> None:
        """As an expert that only the discarded batch was routed to."""

        class Routed(Net):
            skip = False

            def forward(self, x: Tensor) -> Tensor:
                h = torch.tanh(self.first(x))
                return self.head((h if self.skip else self.second(h)).mean(1))

        def run(m: Any) -> None:
            backward(m, batches(2)[1])
            zero_grad(m)
            m.base_model.model.skip = True
            backward(m, batches(1)[0])
            m.base_model.model.skip = False

        handle = check(wrapped(Routed), run, estimator)
        assert handle.fisher()["second"] == 0.0 < handle.fisher()["first"]

    def test_reference_passes_count_for_nothing(self, estimator: str) -> None:
        """A pass with the adapters disabled has gradients with respect to its input alone."""

        def run(m: Any) -> None:
            (x, y), (x2, _) = batches(2)
            with m.disable_adapter():
                weights = [layer.base_layer.weight for layer in layers(m).values()]
                unfrozen = [w.requires_grad for w in weights]
                for w in weights:
                    w.requires_grad_(False)
                reference = m(x2.requires_grad_(True))
                for w, was in zip(weights, unfrozen, strict=True):
                    w.requires_grad_(was)
            (cross_entropy(m(x), y) + reference.square().sum()).backward()

        check(lora_net(), run, estimator)

    def test_two_targets_with_shared_factors(self, estimator: str) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(D_IN, D_IN), nn.Linear(D_IN, D_IN)
                self.head = nn.Linear(D_IN, D_OUT)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.second(torch.tanh(self.first(x))).mean(1))

        model = wrapped(Twice)
        one, other = layers(model)["first"], layers(model)["second"]
        for holder in ("lora_A", "lora_B"):
            getattr(other, holder)["default"].weight = getattr(one, holder)["default"].weight
        check(model, lambda m: backward(m, batches(1)[0]), estimator)

    def test_one_factor_frozen(self, estimator: str) -> None:
        for frozen in ("lora_A", "lora_B"):
            model = lora_net()
            for n, p in model.named_parameters():
                if frozen in n:
                    p.requires_grad_(False)
            check(model, lambda m: backward(m, batches(1)[0]), estimator)

    def test_to_another_dtype_in_the_warmup(self, estimator: str) -> None:
        model = lora_net(dtype=torch.float32)
        optimizer = torch.optim.SGD(trainable(model), lr=0.0)
        handle = fwlora.attach(model, optimizer, config(estimator))
        model.to(torch.float64)
        twin = unfrozen(model)
        for m in (model, twin):
            backward(m, batches(1)[0])
        optimizer.step()
        assert handle.fisher() == pytest.approx(f_of_twin(twin, estimator, 4), rel=1e-6)

    def test_copies_feed_nobody(self, estimator: str) -> None:
        """EMA models and DPO's reference model are deep copies, `torch.save(model)` pickles."""
        copies = []

        def run(m: Any) -> None:
            copies.append(copy.deepcopy(m))
            file = io.BytesIO()
            torch.save(m, file)
            copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
            copies.append(pickle.loads(pickle.dumps(m)))
            backward(m, batches(1)[0])
            for other in copies[-3:]:
                backward(other, batches(2)[1])

        check(lora_net(), run, estimator)
        for other in copies[3:]:  # those of the attached model
            check(other, lambda m: backward(m, batches(1)[0]), estimator)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_two_passes_over_one_retained_graph(estimator: str) -> None:
    def run(m: Any) -> None:
        loss = loss_of(m, batches(1)[0])
        loss.backward(retain_graph=True)
        loss.backward()

    check(lora_net(), run, estimator)


def test_a_second_handle_on_the_other_factors() -> None:
    """Two optimizers, one for A and one for B: each handle sees every pass."""
    model = lora_net()
    twin = unfrozen(model)
    parts = [[p for n, p in model.named_parameters() if name in n] for name in ("lora_A", "lora_B")]
    optimizers = [torch.optim.SGD(part, lr=0.0) for part in parts]
    handles = [fwlora.attach(model, o, config()) for o in optimizers]
    for m in (model, twin):
        backward(m, batches(1)[0])
    for optimizer in optimizers:
        optimizer.step()
    want = f_of_twin(twin, "exact", 4)
    assert handles[0].fisher() == pytest.approx(want) and handles[1].fisher() == pytest.approx(want)
    for handle in handles:
        handle.detach()
    assert all(not m._forward_hooks for m in model.modules())


def test_a_second_attach_after_detach_in_the_middle_of_a_pass() -> None:
    model = lora_net()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    first = fwlora.attach(model, optimizer, config())
    loss = loss_of(model, batches(1)[0])
    first.detach()
    second = fwlora.attach(model, optimizer, config())
    loss.backward()  # its forward pass was the first handle's
    zero_grad(model)
    check_twin = unfrozen(model)
    for m in (model, check_twin):
        backward(m, batches(2)[1])
    optimizer.step()
    assert second.fisher() == pytest.approx(f_of_twin(check_twin, "exact", 4))
    assert not any(first.fisher().values())


def test_a_step_inside_the_backward_pass_is_refused() -> None:
    model = lora_net()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    fwlora.attach(model, optimizer, config())
    trainable(model)[0].register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match="called inside the backward pass.*after loss.backward"):
        backward(model, batches(1)[0])


# Layers that are bypassed


class Bypassed(Net):
    """Computes some LoRA layers without calling them, as fused kernels do."""

    bypassed: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            layer = getattr(self, name)
            x = torch.tanh(layer.forward(x) if name in self.bypassed else layer(x))
        return self.head(x.mean(1))


def bypassing(*names: str) -> Any:
    model = wrapped(Bypassed)
    model.base_model.model.bypassed = names
    return model


@pytest.mark.parametrize("names", [("second",), ("first", "second")])
def test_at_the_first_step_f_falls_back_to_the_adapters_gradients(names: tuple[str, ...]) -> None:
    """For all matrices, since the two estimates differ in scale."""
    fisher = {}
    for estimator in ("exact", "adapter"):
        model = bypassing(*names)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        handle = fwlora.attach(model, optimizer, config(estimator, warmup_steps=3, fisher_ema_decay=0.5))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches(4):
                backward(model, batch)
                optimizer.step()
                optimizer.zero_grad()
        said = [str(w.message) for w in caught if "not called" in str(w.message)]
        assert len(said) == (estimator == "exact")
        assert all(repr(name) in said[0] for name in names if said)
        assert handle.phase == "penalty" and all(not m._forward_hooks for m in model.modules())
        fisher[estimator] = handle.fisher()
    assert fisher["exact"] == pytest.approx(fisher["adapter"], rel=1e-12)
    assert all(fisher["exact"].values())


def test_at_a_later_step_that_step_is_left_out() -> None:
    model, clean = bypassing(), bypassing()
    data = batches(3)
    handles = []
    for m in (model, clean):
        optimizer = torch.optim.SGD(trainable(m), lr=0.0)
        handles.append(fwlora.attach(m, optimizer, config(fisher_ema_decay=0.5)))
        for i, batch in enumerate(data):
            if i == 1:
                if m is clean:
                    continue
                m.base_model.model.bypassed = ("second",)
                backward(m, batch)
                with pytest.warns(UserWarning, match="1 of 2 layers.*'second'.*the first is 1.*left out"):
                    optimizer.step()
                m.base_model.model.bypassed = ()
            else:
                backward(m, batch)
                optimizer.step()
            optimizer.zero_grad()
    assert handles[0].skipped_steps == 1
    assert handles[0].fisher() == pytest.approx(handles[1].fisher(), rel=1e-12)


def test_without_gradients_of_b_a_bypassed_layer_is_refused_by_name() -> None:
    model = bypassing("second")
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.requires_grad_(False)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    fwlora.attach(model, optimizer, config())
    backward(model, batches(1)[0])
    with pytest.raises(RuntimeError, match="'second'.*Turn that off"):
        optimizer.step()


def test_a_penalty_on_the_adapters_of_an_observed_layer_is_no_bypass() -> None:
    """A separate backward pass of a term that reads the factors only."""

    def run(m: Any) -> None:
        backward(m, batches(1)[0])
        terms = [p.square().sum() for n, p in m.named_parameters() if "lora_" in n]
        torch.stack(terms).sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(lora_net(), run)


# What is kept, and for how long


def statistics_alive(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[int]]:
    """Weak references to every dense gradient, and how many were alive when each was made."""
    made: list[Any] = []
    alive: list[int] = []
    right = estimators.weight_gradient

    def watched(g: Tensor, x: Tensor) -> Tensor:
        statistic = right(g, x)
        made.append(weakref.ref(statistic))
        alive.append(sum(r() is not None for r in made))
        return statistic

    monkeypatch.setattr(estimators, "weight_gradient", watched)
    return made, alive


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D_IN, HIDDEN)
        self.second = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(6))
        self.head = nn.Linear(HIDDEN, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for layer in self.second:
            h = h + torch.tanh(layer(h))
        return self.head(h.mean(1))


def deep() -> Any:
    return wrapped(Deep, target_modules="all-linear")


def test_exact_keeps_one_dense_gradient_at_a_time(norms_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, alive = statistics_alive(monkeypatch)
    check(deep(), lambda m: backward(m, *batches(1)))
    assert len(made) == 8 and max(alive) == 1


def test_exact_keeps_one_dense_gradient_where_a_layer_is_called_many_times(
    norms_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, alive = statistics_alive(monkeypatch)
    check(wrapped(Repeated), lambda m: backward(m, *batches(1)))
    assert len(made) == 6 and max(alive) <= 2, "the sum over the uses, and the next use"


def test_accumulation_is_measured_from_the_second_step_on(norms_only: None) -> None:
    model = lora_net()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    handle = fwlora.attach(model, optimizer, config())
    data = batches(4)
    with pytest.warns(UserWarning, match="step 0 is left out.*several backward passes"):
        backward(model, *data[:2])
    optimizer.step()
    optimizer.zero_grad()
    assert handle.skipped_steps == 1
    twin = unfrozen(model)
    for m in (model, twin):
        backward(m, *data[2:])
    optimizer.step()
    assert handle.fisher() == pytest.approx(f_of_twin(twin, "exact", 4), rel=1e-9)
    assert handle.skipped_steps == 1


def test_accelerates_accumulation_is_known_from_the_first_pass_on(norms_only: None) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        model = lora_net()
        twin = unfrozen(model)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
        handle = fwlora.attach(model, optimizer, config())
        for batch in batches(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
            (loss_of(twin, batch) / 2).backward()
        assert handle.skipped_steps == 0
        assert handle.fisher() == pytest.approx(f_of_twin(twin, "exact", 4), rel=1e-9)
    finally:
        accelerate.state.GradientState._reset_state()
        accelerate.state.AcceleratorState._reset_state(True)


def test_an_estimator_that_does_not_reduce_keeps_its_statistics(norms_only: None) -> None:
    class Largest(fwlora.HookedEstimator):
        def measure(self, statistics: Any, loss_scale: Any) -> Tensor:
            return torch.stack([s.abs().max() for s in statistics])

    model = lora_net()
    twin = unfrozen(model)
    hooks = hooks_on(model, Largest(config()))
    for m in (model, twin):
        backward(m, *batches(2))
    want = [float(layer.base_layer.weight.grad.abs().max()) for layer in layers(twin).values()]
    assert hooks.measure(None).tolist() == pytest.approx(want)


def test_the_memory_of_dense_statistics_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SMALL", 100)
    model = lora_net()
    gib = 8 * (D_IN * HIDDEN + HIDDEN * HIDDEN) / 2**30
    with pytest.warns(UserWarning, match=f"several processes.*estimator='exact'.*{gib:.2f} GiB for 2 matrices.*sketch"):
        hooks_on(model, estimators.ExactEstimator(config()), group=object()).remove()
    monkeypatch.setattr(capture, "SMALL", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sketch = estimators.SketchEstimator(config("sketch", sketch_columns=4))
        hooks_on(model, sketch, group=object()).remove()
    assert sketch.bytes(HIDDEN, D_IN, torch.float32) == 4 * 4 * HIDDEN


def test_a_sketch_keeps_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """With LoRA's dropout, plain training frees the input of a layer after it; so must the sketch."""
    model = wrapped(Net, lora_dropout=0.5)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    fwlora.attach(model, optimizer, config("sketch", sketch_columns=1))
    packed: list[int] = []
    x = batches(1)[0][0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.data_ptr()) or t, lambda t: t):
        loss_of(model, (x, batches(1)[0][1]))
    assert x.data_ptr() not in packed


def test_half_precision_is_sketched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    g, x = torch.randn(7, 5, dtype=torch.bfloat16), torch.randn(7, 3, dtype=torch.bfloat16)
    probe = torch.randn(3, 2)
    whole = (x.float() @ probe).T @ g.float()
    monkeypatch.setattr(estimators, "_PIECE", 9)
    torch.testing.assert_close(estimators.sketched_gradient(g, x, probe), whole)
    empty = estimators.sketched_gradient(g[:0], x[:0], probe)
    assert empty.shape == (2, 5) and not empty.any()
