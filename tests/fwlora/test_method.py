"""`fwlora.attach` against an unfrozen twin, a naive oracle, and everything that wraps an optimizer.

pytest tests/fwlora/test_method.py
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import D_IN, HIDDEN, Net, batches, lora_net, trainable
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fwlora
from fwlora import FWLoraConfig

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "conv1d": {},
    "tied": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"second": 3}, "alpha_pattern": {"second": 5}},
}


def net(kind: str, **more: Any) -> Any:
    base = kind if kind in ("conv1d", "tied") else "linear"
    return lora_net(base, **{**KINDS[kind], **more})


def layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers by the name that fwlora gives them."""
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }


def frozen_gradients(model: nn.Module, loss) -> dict[str, torch.Tensor]:
    """The gradients that the frozen weights would get: those of an unfrozen twin with the same values."""
    weights = {n: m.base_layer.weight for n, m in layers(model).items()}
    for w in weights.values():
        w.requires_grad_(True)
    grads = torch.autograd.grad(loss(model), list(weights.values()))
    for w in weights.values():
        w.requires_grad_(False)
    return dict(zip(weights, grads, strict=True))


def penalty_by_autograd(model, weights, norm) -> torch.Tensor:
    """Σ w ‖ΔW‖² with ΔW formed in full (or with the factors), for autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for name, m in layers(model).items():
        a, b = m.lora_A["default"].weight, m.lora_B["default"].weight
        if norm == "update":
            total = total + weights[name] * (m.scaling["default"] * b @ a).square().sum()
        else:
            total = total + weights[name] * (a.square().sum() + b.square().sum())
    return total


def train(model, data, config, *, optimizer=None, micro=1, total_steps=None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.01)
    handle = fwlora.attach(model, optimizer, config, total_steps=total_steps)
    for x, y in data:
        for xs, ys in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (cross_entropy(model(xs), ys) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle


def parameters(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainable(model)]


def same(one, other, **tolerance) -> None:
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, **(tolerance or {"rtol": 1e-10, "atol": 1e-12}))


# The Fisher proxy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 2])
def test_exact_is_the_gradient_of_an_unfrozen_twin(kind, micro):
    model = net(kind)
    ((x, y),) = batches(1)
    twin = frozen_gradients(copy.deepcopy(model), lambda m: cross_entropy(m(x), y))
    handle = train(model, [(x, y)], FWLoraConfig(warmup_steps=2, fisher_ema_decay=0.0), micro=micro)
    want = {n: float(g.square().sum()) for n, g in twin.items()}
    assert handle.fisher() == pytest.approx(want, rel=1e-10)
    total = sum(want.values())
    assert handle.importance() == pytest.approx({n: w / total for n, w in want.items()}, rel=1e-9)


def test_per_example_is_the_sum_over_single_examples():
    model = net("linear")
    ((x, y),) = batches(1)
    want = dict.fromkeys(layers(model), 0.0)
    for i in range(len(x)):
        grads = frozen_gradients(model, lambda m, i=i: cross_entropy(m(x[i : i + 1]), y[i : i + 1]) / len(x))
        for n, g in grads.items():
            want[n] += float(g.square().sum())
    handle = train(model, [(x, y)], FWLoraConfig(warmup_steps=2, fisher_ema_decay=0.0, estimator="per_example"))
    assert handle.fisher() == pytest.approx(want, rel=1e-10)


def test_sketch_follows_exact():
    data = batches(300)
    exact = train(net("linear"), data, FWLoraConfig(warmup_steps=299, penalty_strength=0.0, fisher_ema_decay=0.99))
    config = FWLoraConfig(
        warmup_steps=299, penalty_strength=0.0, fisher_ema_decay=0.99, estimator="sketch", sketch_columns=8
    )
    sketch = train(net("linear"), data, config)
    assert sketch.importance() == pytest.approx(exact.importance(), rel=0.1)
    assert sketch.importance() != exact.importance()


def test_adapter_estimator_reads_the_gradient_of_b():
    model = net("linear")
    ((x, y),) = batches(1)
    twin = copy.deepcopy(model)
    cross_entropy(twin(x), y).backward()
    want = {}
    for n, m in layers(twin).items():
        g = m.lora_B["default"].weight.grad
        want[n] = float(g.square().sum()) * 3 * m.in_features / (2 * m.scaling["default"] ** 2)
    handle = train(model, [(x, y)], FWLoraConfig(warmup_steps=2, fisher_ema_decay=0.0, estimator="adapter"))
    assert handle.fisher() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            h = torch.tanh(self.first(x.requires_grad_(True)))
            h = checkpoint(lambda t: torch.tanh(self.second(t)), h, use_reentrant=reentrant)
            return self.head(h.mean(1))

    plain, checked = net("linear"), net("linear")
    checked.base_model.model.__class__ = Checkpointed
    data = batches(3)
    one = train(plain, data, FWLoraConfig(warmup_steps=2))
    other = train(checked, data, FWLoraConfig(warmup_steps=2))
    assert one.fisher() == pytest.approx(other.fisher(), rel=1e-12)


def test_checkpointing_still_frees_the_input():
    """The tap saves x through autograd's saved tensors, which checkpointing intercepts."""
    packed = []
    model = net("linear")
    optimizer = torch.optim.AdamW(trainable(model))
    fwlora.attach(model, optimizer)
    ((x, y),) = batches(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        model(x)
    assert any(t.data_ptr() == x.data_ptr() for t in packed)


def test_every_and_start_choose_the_steps():
    data = batches(8)
    looked = train(
        net("linear"), data, FWLoraConfig(warmup_steps=7, fisher_interval=3, fisher_start=1, penalty_strength=0.0)
    )
    model = net("linear")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.01)
    fisher = dict.fromkeys(layers(model), 0.0)
    for step, (x, y) in enumerate(data):
        grads = frozen_gradients(model, lambda m, x=x, y=y: cross_entropy(m(x), y))
        if step in (1, 4):
            fisher = {n: 0.98 * f + 0.02 * float(grads[n].square().sum()) for n, f in fisher.items()}
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert looked.fisher() == pytest.approx(fisher, rel=1e-9)


def test_hooks_are_gone_after_the_warmup():
    model = net("linear")
    handle = train(model, batches(2), FWLoraConfig(warmup_steps=2))
    assert handle.phase == "penalty"
    assert all(not m._forward_hooks for m in model.modules())


# The penalty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["update", "factors"])
def test_closed_form_gradient_is_autograds(kind, norm):
    model = net(kind)
    config = FWLoraConfig(warmup_steps=1, penalty_norm=norm, penalty_strength=0.7)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    handle = fwlora.attach(model, optimizer, config)
    x, y = batches(1)[0]
    cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert handle.phase == "penalty"
    value = 0.7 * penalty_by_autograd(model, handle.weights(), norm)
    assert_close(handle.penalty(), value.detach(), rtol=1e-10, atol=0)
    factors = [f for m in layers(model).values() for f in (m.lora_A["default"].weight, m.lora_B["default"].weight)]
    want = torch.autograd.grad(value, factors)
    before = [f.detach().clone() for f in factors]
    optimizer.step()  # no task gradient: SGD with lr 1 takes off the penalty's gradient alone
    same([b - f.detach() for b, f in zip(before, factors, strict=True)], want)


@pytest.mark.parametrize("norm", ["update", "factors"])
def test_closed_form_gradient_on_4bit_layers(norm):
    bnb = pytest.importorskip("bitsandbytes")

    class Quantized(Net):
        def __init__(self):
            super().__init__()
            self.first = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
            self.second = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
            self.head = nn.Linear(128, 3)

    torch.manual_seed(0)
    base: Any = Quantized().to("cpu")  # moving quantises
    base.is_loaded_in_4bit = True  # what transformers sets
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"]))
    kinds = {type(m).__name__ for m in layers(model).values()}
    assert kinds == {"Linear4bit"}, kinds
    for m in layers(model).values():
        assert m.base_layer.weight.shape[-1] == 1, "the weight is packed"
        m.lora_B["default"].weight.data.normal_()
        for factor in (m.lora_A["default"], m.lora_B["default"]):
            factor.weight.data = factor.weight.data.double()
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=1, penalty_norm=norm, penalty_strength=0.7))
    x = torch.randn(4, 5, 64)
    cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert sum(handle.importance().values()) == pytest.approx(1.0)
    factors = [f for m in layers(model).values() for f in (m.lora_A["default"].weight, m.lora_B["default"].weight)]
    want = torch.autograd.grad(0.7 * penalty_by_autograd(model, handle.weights(), norm), factors)
    before = [f.detach().clone() for f in factors]
    optimizer.step()
    same([b - f.detach() for b, f in zip(before, factors, strict=True)], want)


@pytest.mark.parametrize("weighting", ["uniform", "importance"])
@pytest.mark.parametrize("coupling", ["loss", "decoupled"])
def test_without_shrinkage_it_is_plain_adamw_to_the_bit(weighting, coupling):
    data = batches(20)
    config = FWLoraConfig(warmup_steps=5, penalty_strength=0.0, weighting=weighting, penalty_mode=coupling)
    model = net("linear")
    train(model, data, config)
    plain = net("linear")
    optimizer = torch.optim.AdamW(trainable(plain), lr=1e-2, weight_decay=0.01)
    for x, y in data:
        cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(parameters(model), parameters(plain), strict=True):
        assert torch.equal(a, b)


def oracle(model, data, config, lr=1e-2, decay=0.01):
    """Fisher-Weighted LoRA written down as naively as possible: unfrozen weights, loops, autograd."""
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=decay)
    fisher = dict.fromkeys(layers(model), 0.0)
    weights = None
    for step, (x, y) in enumerate(data):
        loss = cross_entropy(model(x), y)
        if step < config.warmup_steps:
            grads = frozen_gradients(model, lambda m, x=x, y=y: cross_entropy(m(x), y))
            values = {n: float(g.square().sum()) for n, g in grads.items()}
            if config.averaging == "normalized":
                values = {n: v / sum(values.values()) for n, v in values.items()}
            fisher = {
                n: config.fisher_ema_decay * f + (1 - config.fisher_ema_decay) * values[n] for n, f in fisher.items()
            }
            loss.backward()
        else:
            if weights is None:
                weights = {n: 1 - f / sum(fisher.values()) for n, f in fisher.items()}
            penalty = config.penalty_strength * penalty_by_autograd(model, weights, config.penalty_norm)
            if config.penalty_mode == "loss":
                (loss + penalty).backward()
            else:
                factors = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
                gradients = torch.autograd.grad(penalty, factors)
                loss.backward()
                with torch.no_grad():
                    for p, g in zip(factors, gradients, strict=True):
                        p -= lr * g
        optimizer.step()
        optimizer.zero_grad()
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupling", ["loss", "decoupled"])
@pytest.mark.parametrize("norm", ["update", "factors"])
def test_100_steps_equal_the_naive_oracle(kind, coupling, norm):
    data = batches(100)
    config = FWLoraConfig(
        warmup_steps=30, fisher_ema_decay=0.9, penalty_strength=0.05, penalty_mode=coupling, penalty_norm=norm
    )
    naive = net(kind)
    weights = oracle(naive, data, config)
    ours = net(kind)
    handle = train(ours, data, config)
    assert handle.weights() == pytest.approx(weights, rel=1e-9)
    same(parameters(ours), parameters(naive), rtol=1e-7, atol=1e-9)
    plain = net(kind)
    oracle(plain, data, FWLoraConfig(warmup_steps=30, penalty_strength=0.0))
    assert (parameters(plain)[0] - parameters(naive)[0]).abs().max() > 1e-3, "the penalty matters here"


def test_shares_are_averaged_like_the_oracle():
    data = batches(20)
    config = FWLoraConfig(warmup_steps=10, fisher_ema_decay=0.8, averaging="normalized")
    weights = oracle(net("linear"), data, config)
    assert train(net("linear"), data, config).weights() == pytest.approx(weights, rel=1e-9)


def test_the_penalty_shrinks():
    data = batches(60)
    free, shrunk = net("linear"), net("linear")
    loose = train(free, data, FWLoraConfig(warmup_steps=5, penalty_strength=0.0))
    tight = train(shrunk, data, FWLoraConfig(warmup_steps=5, penalty_strength=0.5))
    for name, norm in tight.update_norms().items():
        assert norm < 0.5 * loose.update_norms()[name]


def test_update_norms_is_the_norm_of_the_change():
    model = net("rslora")
    handle = fwlora.attach(model, torch.optim.AdamW(trainable(model)))
    want = {n: float(m.get_delta_weight("default").detach().norm()) for n, m in layers(model).items()}
    assert handle.update_norms() == pytest.approx(want, rel=1e-10)


def test_a_changed_scale_is_followed():
    model = net("linear")
    handle = train(model, batches(2), FWLoraConfig(warmup_steps=2, penalty_strength=1.0))
    before = float(handle.penalty())
    for m in layers(model).values():
        m.scaling["default"] *= 2
    assert float(handle.penalty()) == pytest.approx(4 * before)


# What surrounds the optimizer


def test_accumulation_is_one_larger_batch():
    data = batches(12)
    config = FWLoraConfig(warmup_steps=6, penalty_strength=0.05)
    whole, parts = net("linear"), net("linear")
    train(whole, data, config)
    train(parts, data, config, micro=2)
    same(parameters(whole), parameters(parts), rtol=1e-8, atol=1e-10)


def test_only_active_trainable_adapters_are_touched():
    model = net("linear")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model = model.double()
    other = {n: p.detach().clone() for n, p in model.named_parameters() if ".other." in n}
    handle = train(model, batches(4), FWLoraConfig(warmup_steps=2, penalty_strength=0.5))
    assert [p.adapter for t in handle.targets for p in t.pairs] == ["default", "default"]
    for n, p in model.named_parameters():
        if ".other." in n:
            assert torch.equal(p, other[n])
    model.set_adapter("other")
    handle = fwlora.attach(model, torch.optim.AdamW(trainable(model)))
    assert handle.names == ["first"]


def test_two_active_adapters_share_the_weight_of_their_matrix():
    model = net("linear")
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=6, target_modules=["first"]))
    model = model.double()
    model.base_model.set_adapter(["default", "other"])
    handle = train(model, batches(3), FWLoraConfig(warmup_steps=2, penalty_strength=0.5))
    assert handle.names == ["first", "second"]
    first = layers(model)["first"]
    want = sum(
        0.5 * handle.weights()["first"] * float(first.get_delta_weight(a).square().sum()) for a in ("default", "other")
    ) + 0.5 * handle.weights()["second"] * float(layers(model)["second"].get_delta_weight("default").square().sum())
    assert float(handle.penalty()) == pytest.approx(want, rel=1e-9)


def test_shared_factors_get_both_terms():
    model = net("linear")
    one: Any = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["a", "b"])).double()
    la, lb = (one.base_model.model.a, one.base_model.model.b)
    lb.lora_A["default"].weight = la.lora_A["default"].weight
    lb.lora_B["default"].weight = la.lora_B["default"].weight
    la.lora_B["default"].weight.data.normal_()
    del model
    optimizer = torch.optim.SGD(trainable(one), lr=1.0)
    handle = fwlora.attach(one, optimizer, FWLoraConfig(warmup_steps=1, penalty_strength=1.0, weighting="uniform"))
    one(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    a, b = la.lora_A["default"].weight, la.lora_B["default"].weight
    s = la.scaling["default"]
    want = torch.autograd.grad(2 * (s * b @ a).square().sum(), (a, b))
    before = (a.detach().clone(), b.detach().clone())
    optimizer.step()
    same([before[0] - a.detach(), before[1] - b.detach()], want)
    assert handle.names == ["a", "b"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_bf16_adapters_are_shrunk_in_fp32():
    model = lora_net("linear", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=1, penalty_strength=0.5))
    x, y = batches(1, dtype=torch.bfloat16)[0]
    cross_entropy(model(x).float(), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    m = layers(model)["first"]
    a, b = m.lora_A["default"].weight, m.lora_B["default"].weight
    a32, b32 = a.detach().float(), b.detach().float()
    c = 0.5 * handle.weights()["first"] * m.scaling["default"] ** 2
    want = 2 * c * b32 @ (a32 @ a32.T)
    optimizer.step()
    assert_close(b.detach().float(), (b32.bfloat16() - want.bfloat16()).float(), rtol=2e-2, atol=1e-3)
    assert handle._fisher.dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("coupling", ["loss", "decoupled"])
def test_grad_scaler_changes_nothing(fused, unscale, coupling):
    data = batches(12, dtype=torch.float32)
    config = FWLoraConfig(warmup_steps=6, penalty_strength=0.05, penalty_mode=coupling)

    def run(scaled: bool):
        model = lora_net("linear", dtype=torch.float32)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
        # A small growth interval: the scale changes in the middle of the warm-up.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
        handle = fwlora.attach(model, optimizer, config, scaler=scaler)
        for x, y in data:
            scaler.scale(cross_entropy(model(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model, handle

    (one, a), (other, b) = run(False), run(True)
    assert a.fisher() == pytest.approx(b.fisher(), rel=1e-4)
    same(parameters(one), parameters(other), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("phase", ["warmup", "shrink"])
def test_a_step_that_overflows_leaves_no_trace(fused, phase):
    """The batch whose gradients overflow counts neither for F nor for the parameters."""
    data = batches(10, dtype=torch.float32)
    bad = 2 if phase == "warmup" else 7
    config = FWLoraConfig(warmup_steps=5, penalty_strength=0.05, penalty_mode="decoupled")

    def run(overflow: bool):
        model = lora_net("linear", dtype=torch.float32)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        handle = fwlora.attach(model, optimizer, config, scaler=scaler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, (x, y) in enumerate(data):
                if i == bad and not overflow:
                    if fused:  # the fused optimizer's hook runs, so the clock counts the step
                        handle.step += 1
                    continue
                scale = float("inf") if i == bad else 1.0
                (scaler.scale(cross_entropy(model(x), y)) * scale).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return model, handle

    (one, a), (other, b) = run(False), run(True)
    assert b.fisher() == pytest.approx(a.fisher(), rel=1e-3)
    same(parameters(one), parameters(other), rtol=1e-3, atol=1e-5)


def test_non_finite_steps_are_reported_and_never_averaged():
    model = net("linear")
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=4, fisher_ema_decay=0.5))
    with pytest.warns(UserWarning, match="1 of the 4 warm-up steps had a gradient that was not finite"):
        for i, (x, y) in enumerate(batches(4)):
            loss = cross_entropy(model(x), y)
            (loss * float("nan") if i == 1 else loss).backward()
            if i == 1:
                optimizer.zero_grad(set_to_none=False)  # as a training loop that guards itself does
            optimizer.step()
            optimizer.zero_grad()
    assert handle.skipped_steps == 1
    assert all(0 < f < float("inf") for f in handle.fisher().values())


def test_schedulers_and_clipping():
    data = batches(10)
    config = FWLoraConfig(warmup_steps=4, penalty_strength=0.1)

    def run(attach: bool):
        model = net("linear")
        optimizer = torch.optim.SGD(trainable(model), lr=1.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        handle = fwlora.attach(model, optimizer, config) if attach else None
        deltas = []
        for x, y in data:
            cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(trainable(model), 1e-3)
            before = parameters(model)
            optimizer.step()
            deltas.append(max(float((a - b).abs().max()) for a, b in zip(before, parameters(model), strict=True)))
            schedule.step()
            optimizer.zero_grad()
        return handle, deltas

    handle, deltas = run(True)
    assert handle is not None and handle.phase == "penalty"
    assert max(deltas[:4]) <= 1e-3 < min(deltas[4:]), "the penalty comes after clipping"


def test_accelerators_wrapper_is_looked_through():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = lora_net("linear", dtype=torch.float32)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=2))
    for x, y in batches(4, dtype=torch.float32):
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert handle.phase == "penalty" and handle.step == 4


@pytest.mark.parametrize("stop", [3, 8])
def test_state_dict_resumes_exactly(stop):
    data = batches(14)
    config = FWLoraConfig(warmup_steps=6, penalty_strength=0.1, estimator="sketch")
    whole = net("linear")
    train(whole, data, config)

    first = net("linear")
    optimizer = torch.optim.AdamW(trainable(first), lr=1e-2, weight_decay=0.01)
    handle = train(first, data[:stop], config, optimizer=optimizer)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), handle.state_dict()))

    second = net("linear", seed=5)
    second.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(trainable(second), lr=1e-2, weight_decay=0.01)
    optimizer.load_state_dict(saved[1])
    handle = fwlora.attach(second, optimizer, config)
    handle.load_state_dict(saved[2])
    for x, y in data[stop:]:
        cross_entropy(second(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(parameters(whole), parameters(second), strict=True):
        assert torch.equal(a, b)


def test_detach_leaves_nothing_behind():
    model = net("linear")
    optimizer = torch.optim.AdamW(trainable(model))
    handle = fwlora.attach(model, optimizer)
    handle.detach()
    assert handle.phase == "detached"
    assert not optimizer._optimizer_step_pre_hooks
    assert all(not m._forward_hooks for m in model.modules())
    fwlora.attach(model, optimizer)


# What is refused, and how


def error(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def attach_to(model, config=FWLoraConfig(), **more):  # noqa: B008
    return fwlora.attach(model, torch.optim.AdamW(trainable(model) or [nn.Parameter(torch.ones(1))]), config, **more)


def test_refuses_a_model_without_lora():
    error(lambda: attach_to(Net()), "found no LoRA layer.*get_peft_model")


def test_refuses_frozen_adapters():
    model = net("linear")
    model.requires_grad_(False)
    error(lambda: attach_to(model), "none whose active adapter is trainable.*is_trainable=True")


def test_refuses_dora():
    error(lambda: attach_to(net("linear", use_dora=True)), "not s·B·A.*use_dora=False")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_refuses_inits_that_split_the_weight(init):
    model = lora_net("linear", dtype=torch.float32, init_lora_weights=init)
    error(lambda: attach_to(model), f"init_lora_weights='{init}'.*init_lora_weights=True")


def test_refuses_adalora():
    from peft import AdaLoraConfig

    config = AdaLoraConfig(target_modules=["first"], total_step=10, init_r=3, target_r=2)
    error(
        lambda: attach_to(get_peft_model(Net(), config)),
        "does not hold A and B as Linear.*LoraConfig",
    )


def test_refuses_embeddings():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5, 4)

        def forward(self, x):
            return self.words(x)

    model = get_peft_model(Words(), LoraConfig(target_modules=["words"]))
    error(lambda: attach_to(model), "it is an embedding.*exclude_modules")


def test_refuses_convolutions():
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["0"]))
    error(lambda: attach_to(model), "Conv2d is not a Linear layer.*target_modules")


def test_refuses_merged_adapters():
    model = net("linear")
    model.merge_adapter()
    error(lambda: attach_to(model), "merged into the weight.*unmerge_adapter")


def test_refuses_zero_partitioned_parameters():
    model = net("linear")
    layers(model)["first"].lora_A["default"].weight.ds_id = 0
    error(lambda: attach_to(model), "partitioned by ZeRO stage 3.*stage 2")


def test_refuses_an_optimizer_without_adapters():
    model = net("linear")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    error(
        lambda: fwlora.attach(model, optimizer),
        "trains none of the 2 LoRA layers.*after get_peft_model",
    )


def test_refuses_what_is_no_optimizer():
    error(
        lambda: fwlora.attach(net("linear"), object()),
        "needs a torch.optim.Optimizer.*inner optimizer",
    )


def test_refuses_to_attach_twice():
    model = net("linear")
    optimizer = torch.optim.AdamW(trainable(model))
    fwlora.attach(model, optimizer)
    error(lambda: fwlora.attach(model, optimizer), "attached to this optimizer already.*detach")


@pytest.mark.parametrize("style", ["positional", "keyword"])
def test_refuses_closures(style):
    model = net("linear")
    optimizer = torch.optim.AdamW(trainable(model))
    fwlora.attach(model, optimizer)

    def closure():
        return model(batches(1)[0][0]).sum()

    step = (lambda: optimizer.step(closure)) if style == "positional" else (lambda: optimizer.step(closure=closure))
    error(step, r"optimizer.step\(closure\).*without a closure")


@pytest.mark.parametrize(("warmup", "total"), [(500, 267), (267, 267)])
def test_refuses_a_warmup_that_fills_the_run(warmup, total):
    error(
        lambda: attach_to(net("linear"), FWLoraConfig(warmup_steps=warmup), total_steps=total),
        "leaves no step to penalize in: the run has only 267.*0.25",
    )


def test_a_fraction_needs_the_number_of_steps():
    error(lambda: attach_to(net("linear"), FWLoraConfig(warmup_steps=0.25)), "pass total_steps")
    handle = attach_to(net("linear"), FWLoraConfig(warmup_steps=0.25), total_steps=100)
    assert handle.warmup_steps == 25


def test_refuses_a_foreign_state():
    state = attach_to(net("linear")).state_dict()
    other = lora_net("linear", target_modules=["first"])
    error(lambda: attach_to(other).load_state_dict(state), "belongs to other adapters.*'second'")


def test_refuses_the_adapter_estimator_with_b_frozen():
    model = net("linear")
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.requires_grad_(False)
    error(
        lambda: attach_to(model, FWLoraConfig(estimator="adapter")),
        "gradient of B, which is frozen.*sketch",
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"warmup_steps": 0}, {"warmup_steps": -1}, {"warmup_steps": 1.0}, {"warmup_steps": 0.0},
        {"warmup_steps": float("nan")}, {"warmup_steps": "always"}, {"warmup_steps": True},
        {"fisher_ema_decay": 1.0}, {"fisher_ema_decay": -0.1}, {"estimator": "exakt"},
        {"fisher_interval": 0}, {"fisher_start": -1},
        {"fisher_start": 500, "warmup_steps": 500}, {"sketch_columns": 0}, {"averaging": "mean"},
        {"weighting": "shares"}, {"gamma": -1.0}, {"gamma": float("inf")},
        {"max_weight_ratio": 0.5}, {"penalty_strength": -1e-4},
        {"penalty_strength": float("nan")}, {"penalty_mode": "both"}, {"penalty_norm": "nuclear"},
    ],
)  # fmt: skip
def test_config_names_the_setting_that_is_wrong(bad):
    error(lambda: FWLoraConfig(**bad), f"FWLoraConfig.{next(iter(bad))} = ")


def test_no_gradient_at_all_is_said():
    model = net("linear")
    optimizer = torch.optim.AdamW(trainable(model))
    fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=1))
    with pytest.raises(RuntimeError, match="no gradient reached a frozen matrix"):
        optimizer.step()


def test_importance_before_the_first_step_is_said():
    with pytest.raises(RuntimeError, match="after 0 steps"):
        attach_to(net("linear")).importance()


def test_defaults_are_the_request_but_for_the_warmup():
    c = FWLoraConfig()
    assert (c.warmup_steps, c.fisher_ema_decay, c.estimator, c.weighting, c.penalty_strength) == (
        "auto",
        0.98,
        "exact",
        "importance",
        1e-4,
    )
    assert (c.penalty_mode, c.penalty_norm, c.averaging, c.fisher_interval) == ("loss", "update", "raw", 1)
    assert D_IN != HIDDEN, "matrices of different shapes, or a swapped transpose would pass"


def test_former_names_are_read_with_one_warning_each():
    with pytest.warns(FutureWarning, match="shrinkage is now called penalty_strength"):
        config = FWLoraConfig(shrinkage=0.3)  # type: ignore[call-arg]
    assert config == FWLoraConfig(penalty_strength=0.3)
    old: dict[str, Any] = dict(
        lambda_fw=0.2, warmup=7, fisher_alpha=0.5, every=2, start=1, clip=3.0, coupling="decoupled", norm="factors"
    )
    with pytest.warns(FutureWarning) as caught:
        config = FWLoraConfig(**old, averaging="share", weighting="share")  # type: ignore[arg-type]
    assert len(caught) == len(old) + 2
    new: dict[str, Any] = dict(
        penalty_strength=0.2, warmup_steps=7, fisher_ema_decay=0.5, fisher_interval=2, fisher_start=1
    )
    new |= dict(max_weight_ratio=3.0, penalty_mode="decoupled", penalty_norm="factors")
    assert config == FWLoraConfig(**new, averaging="normalized", weighting="importance")
    with pytest.warns(FutureWarning):
        assert config.ema == 0.5  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="penalty_strength twice"):
        FWLoraConfig(shrinkage=0.1, penalty_strength=0.1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="shrinking"):
        config.shrinking  # type: ignore[attr-defined]  # noqa: B018
