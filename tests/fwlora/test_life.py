"""The model and the optimizer change after attach; what happens to the adapters is followed or said.

pytest tests/fwlora/test_life.py
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from peft import LoraConfig
from small_models import batches, lora_net, trainable
from torch.nn.functional import cross_entropy

import fwlora
from fwlora import FWLoraConfig

LORA = LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"])
CONFIG = FWLoraConfig(warmup_steps=2, penalty_strength=0.1, penalty_mode="decoupled")


def two_adapters():
    """A model with the adapters "default" and "b", both with nonzero updates, and an optimizer that holds both."""
    model = lora_net()
    model.add_adapter("b", LORA)
    for name, p in model.named_parameters():
        if "lora_" in name and ".b." in name:
            torch.nn.init.normal_(p, std=0.3)
            p.data = p.data.double()
    everything = [p for n, p in model.named_parameters() if "lora_" in n]
    return model, torch.optim.SGD(everything, lr=0.1)


def steps(model, optimizer, n, seed=1):
    for x, y in batches(n, seed=seed):
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def step_without_gradient(optimizer):
    """A step whose only effect is the decoupled penalty's."""
    optimizer.zero_grad()
    optimizer.step()


def weights_of(model, adapter):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{adapter}." in n and "lora_" in n}


def expected_after_one_penalty(model, handle, adapter, lr):
    """lr · ∂/∂(A, B) of λ Σ w ‖sBA‖² by autograd, subtracted: SGD without gradients moves nothing else."""
    pairs = {}
    for name, m in model.named_modules():
        if hasattr(m, "lora_A") and adapter in m.lora_A:
            a = m.lora_A[adapter].weight.detach().clone().requires_grad_()
            b = m.lora_B[adapter].weight.detach().clone().requires_grad_()
            pairs[name] = (a, b, m.scaling[adapter])
    w = handle.weights()
    total = sum(w[n.removeprefix("base_model.model.")] * (s * b @ a).square().sum() for n, (a, b, s) in pairs.items())
    (handle.config.penalty_strength * total).backward()
    after = {}
    for n, (a, b, _) in pairs.items():
        after[f"{n}.lora_A.{adapter}.weight"] = a.detach() - lr * a.grad
        after[f"{n}.lora_B.{adapter}.weight"] = b.detach() - lr * b.grad
    return after


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-14)


# Adapters


def test_the_adapter_that_is_chosen_later_is_the_one_that_is_penalized():
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    before = weights_of(model, "default")
    model.set_adapter("b")
    want = expected_after_one_penalty(model, handle, "b", lr=0.1)
    step_without_gradient(optimizer)
    assert_same(weights_of(model, "b"), want)
    assert_same(weights_of(model, "default"), before)
    model.set_adapter("default")
    want = expected_after_one_penalty(model, handle, "default", lr=0.1)
    step_without_gradient(optimizer)
    assert_same(weights_of(model, "default"), want)


def test_an_adapter_that_the_optimizer_does_not_hold_is_named_once():
    model, _ = two_adapters()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if ".default." in n and "lora_" in n], lr=0.1)
    fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="adapter 'b' is active.*add_param_group") as caught:
        steps(model, optimizer, 2)
    assert len(caught) == 1
    before = weights_of(model, "b")
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if ".b." in n and "lora_" in n]})
    step_without_gradient(optimizer)
    assert any((before[n] != p).any() for n, p in weights_of(model, "b").items())


def test_a_deleted_adapter_leaves_the_other_one_to_be_penalized():
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    model.set_adapter("b")
    model.delete_adapter("default")
    want = expected_after_one_penalty(model, handle, "b", lr=0.1)
    step_without_gradient(optimizer)
    assert_same(weights_of(model, "b"), want)


def test_an_adapter_added_later_on_other_matrices_is_named():
    model = lora_net(target_modules=["first"])
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    model.add_adapter("b", LORA)
    model.double()
    model.set_adapter("b")
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if ".b." in n and "lora_" in n]})
    with pytest.warns(UserWarning, match="1 matrices got an adapter after attach.*'second'"):
        step_without_gradient(optimizer)


@pytest.mark.parametrize("off", ["disabled", "merged"])
def test_adapters_that_are_switched_off_are_not_penalized(off):
    model, optimizer = two_adapters()
    fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    before = weights_of(model, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if off == "disabled":
            with model.disable_adapter():
                step_without_gradient(optimizer)
        else:
            model.merge_adapter()
            step_without_gradient(optimizer)
            model.unmerge_adapter()
    assert_same(weights_of(model, "default"), before)
    step_without_gradient(optimizer)
    assert any((before[n] != p).any() for n, p in weights_of(model, "default").items())


def test_a_choice_made_in_the_warmup_changes_nothing_about_f():
    """F is the frozen matrices' and not an adapter's: switching adapters goes on measuring it."""
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=2, fisher_ema_decay=0.0))
    steps(model, optimizer, 1)
    model.set_adapter("b")
    twin = copy.deepcopy(model)
    steps(model, optimizer, 1, seed=3)
    frozen = {n: p for n, p in twin.named_parameters() if n.endswith("base_layer.weight")}
    for p in frozen.values():
        p.requires_grad_(True)
    ((x, y),) = batches(1, seed=3)
    grads = torch.autograd.grad(cross_entropy(twin(x), y), list(frozen.values()))
    want = {n.split(".")[2]: float(g.square().sum()) for n, g in zip(frozen, grads, strict=True)}
    assert handle.fisher() == pytest.approx(want, rel=1e-10)


# The optimizer


@pytest.mark.parametrize("lr", [0.0, 0.3])
def test_the_learning_rate_after_loading_the_optimizers_state_is_the_one_that_counts(lr):
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = lr
    optimizer.load_state_dict(state)
    want = expected_after_one_penalty(model, handle, "default", lr=lr)
    step_without_gradient(optimizer)
    assert_same(weights_of(model, "default"), want)


def test_an_optimizer_that_no_longer_holds_the_adapters_is_said_once():
    model, optimizer = two_adapters()
    fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(1))]
    before = weights_of(model, "default")
    with pytest.warns(UserWarning, match="fwlora: the adapter 'default' is active, but the optimizer") as caught:
        step_without_gradient(optimizer)
        step_without_gradient(optimizer)
    assert len(caught) == 1
    assert_same(weights_of(model, "default"), before)


def test_adapters_moved_to_another_type_are_followed():
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer, CONFIG)
    steps(model, optimizer, 3)
    model.float()
    want = expected_after_one_penalty(model, handle, "default", lr=0.1)
    step_without_gradient(optimizer)
    for name, p in weights_of(model, "default").items():
        torch.testing.assert_close(p, want[name], rtol=1e-5, atol=1e-7)


def test_a_new_optimizer_takes_the_adapters_over():
    model, first = two_adapters()
    old = fwlora.attach(model, first, CONFIG)
    steps(model, first, 3)
    second = torch.optim.SGD(first.param_groups[0]["params"], lr=0.1)
    with pytest.warns(UserWarning, match="attached to another optimizer already"):
        new = fwlora.attach(model, second, CONFIG)
    assert old.phase == "detached" and new.phase == "warmup"
    assert not first._optimizer_step_pre_hooks


def test_two_optimizers_with_an_adapter_each_both_work():
    model, _ = two_adapters()
    handles = []
    for adapter in ("default", "b"):
        model.set_adapter(adapter)
        own = [p for n, p in model.named_parameters() if f".{adapter}." in n and "lora_" in n]
        optimizer = torch.optim.SGD(own, lr=0.1)
        handles.append(fwlora.attach(model, optimizer, CONFIG))
    assert [h.phase for h in handles] == ["warmup", "warmup"]


# Nothing silently does nothing


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_a_run_that_ends_in_the_warmup_is_said_when_it_is_detached():
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=500))
    steps(model, optimizer, 3)
    with pytest.warns(UserWarning, match="ended after 3 steps, within the warm-up of 500.*total_steps") as caught:
        handle.detach()
        handle.detach()
    assert len(caught) == 1 and hooks(model) == 0
    assert sum(handle.importance().values()) == pytest.approx(1.0)


def test_a_run_that_is_dropped_in_the_warmup_is_said():
    model, optimizer = two_adapters()
    fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=500))
    steps(model, optimizer, 3)
    with pytest.warns(UserWarning, match="ended after 3 steps, within the warm-up"):
        del model, optimizer
        gc.collect()


def test_an_optimizer_that_never_steps_is_said():
    model, optimizer = two_adapters()
    fwlora.attach(model, torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1), CONFIG)
    steps(model, optimizer, 3)
    with pytest.warns(UserWarning, match="attached to never made a step"):
        del model, optimizer
        gc.collect()


def test_a_second_training_takes_the_hooks_of_the_first_away_and_says_what_it_was():
    model, optimizer = two_adapters()
    fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=500))
    one = hooks(model)
    steps(model, optimizer, 3)
    second = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1)
    with pytest.warns(UserWarning, match="ended after 3 steps, within the warm-up of 500"):
        fwlora.attach(model, second, CONFIG)
    assert hooks(model) == one


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_what_is_over_or_asked_for_is_not_complained_about(penalty):
    model, optimizer = two_adapters()
    k = 2 if penalty else 500
    handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=k, penalty_strength=penalty))
    steps(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.detach()


PROGRAM = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch, fwlora
    from small_models import batches, lora_net, trainable
    model = lora_net()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    handle = fwlora.attach(model, optimizer, fwlora.FWLoraConfig(warmup_steps=500))
    for x, y in batches(2):
        model(x).square().mean().backward()
        optimizer.step()
    {end}
"""


@pytest.mark.parametrize(("end", "said"), [("pass", 1), ("1 / 0", 0)])
def test_a_program_that_ends_in_the_warmup_says_so_unless_it_fails(end, said, request):
    code = textwrap.dedent(PROGRAM).format(tests=str(request.path.parent.parent), end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.count("ended after 2 steps, within the warm-up of 500") == said


def test_the_repr_says_where_it_stands():
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer, CONFIG)
    assert repr(handle) == ("<FisherWeightedLoRA phase='warmup' step=0 warmup_steps=2 matrices=2 penalty_strength=0.1>")
    steps(model, optimizer, 3)
    assert repr(handle) == (
        "<FisherWeightedLoRA phase='penalty' step=3 warmup_steps=2 matrices=2 penalty_strength=0.1, "
        f"penalty={float(handle.penalty()):.4g}>"
    )


# A warm-up without a length


@pytest.mark.parametrize(("total", "want"), [(300, 75), (4000, 500), (2, 1)])
def test_the_default_warmup_is_a_quarter_of_the_run_and_never_more_than_the_requests(total, want):
    model, optimizer = two_adapters()
    assert fwlora.attach(model, optimizer, total_steps=total).warmup_steps == want


def observe(handle, optimizer, f_of_step, n):
    """n steps in which the capture measures what `f_of_step` says."""
    handle._capture.measure = lambda scale: f_of_step(handle.step)
    for _ in range(n):
        optimizer.step()


def test_a_reliable_ranking_ends_the_warmup_of_unknown_length():
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer)
    assert "warmup_steps=at most 128" in repr(handle)
    observe(handle, optimizer, lambda step: torch.tensor([2.0, 1.0]) + 0.1 * (step % 2), 31)
    assert handle.phase == "warmup"
    observe(handle, optimizer, lambda step: torch.tensor([2.0, 1.0]), 1)
    assert (handle.phase, handle.warmup_steps) == ("penalty", 32)


def test_an_unreliable_ranking_does_not_end_it_before_the_latest_step():
    """Ranks that turn around from 16 to 32, from 32 to 64 and from 64 to 128."""
    model, optimizer = two_adapters()
    handle = fwlora.attach(model, optimizer)

    def f(step):
        return torch.tensor([2.0, 1.0] if 16 <= step < 32 or 64 <= step else [1.0, 2.0])

    observe(handle, optimizer, f, 127)
    assert handle.phase == "warmup"
    observe(handle, optimizer, f, 1)
    assert (handle.phase, handle.warmup_steps) == ("penalty", 128)


@pytest.mark.parametrize("stop", [20, 40])
def test_a_warmup_of_unknown_length_resumes_where_it_was(stop):
    def f(step):
        return torch.tensor([2.0, 1.0] if 16 <= step else [1.0, 2.0])

    model, optimizer = two_adapters()
    whole = fwlora.attach(model, optimizer)
    observe(whole, optimizer, f, stop)
    state = whole.state_dict()
    observe(whole, optimizer, f, 80 - stop)
    assert (whole.phase, whole.warmup_steps) == ("penalty", 64)
    second = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = fwlora.attach(model, second)
    resumed.load_state_dict(state)
    observe(resumed, second, f, 80 - stop)
    assert (resumed.phase, resumed.warmup_steps) == ("penalty", 64)
    assert resumed.fisher() == whole.fisher()


# DeepSpeed (not installed here): its optimizer is known by its module, its ZeRO parameters by what it hangs on them


@pytest.mark.parametrize("seen", ["optimizer", "wrapped optimizer", "parameters"])
def test_deepspeed_is_refused_by_name(seen):
    model, optimizer = two_adapters()
    own = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    if seen == "parameters":
        for p in trainable(model):
            p._hp_mapping = None
    given = {"optimizer": own, "wrapped optimizer": type("Wrapper", (), {"optimizer": own})()}.get(seen, optimizer)
    with pytest.raises(ValueError, match="cannot work with DeepSpeed.*DDP, or FSDP2"):
        fwlora.attach(model, given)


def test_deepspeed_after_attach_is_refused_at_the_first_step():
    model, optimizer = two_adapters()
    fwlora.attach(model, optimizer, CONFIG)
    for p in trainable(model):  # what deepspeed.initialize does with ZeRO 1 and 2
        p._hp_mapping = None
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(100))]
    with pytest.raises(ValueError, match="cannot work with DeepSpeed"):
        optimizer.step()
