"""A weighting and an estimator of one's own, added as CONTRIBUTING says, against values computed another way.

pytest tests/fwlora/test_extensions.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small_models import batches, trainable
from test_method import frozen_gradients, layers, net, train
from torch import Tensor
from torch.nn.functional import cross_entropy

import fwlora
from fwlora import FWLoraConfig, choices, estimators, weighting


class MaxNorm(fwlora.HookedEstimator):
    """f_m = max |∇W|, the max-norm of the weight gradient."""

    def measure(self, statistics: Sequence[Tensor], loss_scale: Tensor | float) -> Tensor:
        return torch.stack([s.abs().max() for s in statistics]) / loss_scale


class InputNorm(fwlora.HookedEstimator):
    """f_m = Σ x², which has a statistic of another shape and reads no gradient."""

    loss_power = 2

    def statistic(self, g: Tensor, x: Tensor, step: int) -> Tensor:
        return x.square().sum()

    def shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        return ()

    def measure(self, statistics: Sequence[Tensor], loss_scale: Tensor | float) -> Tensor:
        return torch.stack(list(statistics))


def inverse_square_root(fisher: Tensor) -> Tensor:
    return fisher.rsqrt()


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Each test registers on a clean slate, and leaves none behind."""
    monkeypatch.setattr(choices, "_ADDED", {"estimator": [], "weighting": []})
    monkeypatch.setattr(weighting, "_REGISTERED", {})
    monkeypatch.setattr(estimators, "_HOOKED", dict(estimators._HOOKED))


def test_a_registered_weighting_decides_the_weights():
    fwlora.register_weighting("inverse_square_root", inverse_square_root)
    handle = train(net("linear"), batches(3), FWLoraConfig(warmup_steps=2, weighting="inverse_square_root"))
    assert handle.phase == "penalty"
    want = {name: f**-0.5 for name, f in handle.fisher().items()}
    assert handle.weights() == pytest.approx(want, rel=1e-10)
    config = FWLoraConfig(warmup_steps=2, weighting="inverse_square_root", normalize_weights=True)
    mean = sum(want.values()) / len(want)
    normal = train(net("linear"), batches(3), config)
    assert normal.weights() == pytest.approx({n: w / mean for n, w in want.items()}, rel=1e-10)


def test_a_registered_weighting_decides_the_penalty():
    fwlora.register_weighting("inverse_square_root", inverse_square_root)
    model = net("linear")
    handle = train(model, batches(3), FWLoraConfig(warmup_steps=2, weighting="inverse_square_root"))
    weights, total = handle.weights(), 0.0
    for name, layer in layers(model).items():
        total += weights[name] * float(layer.get_delta_weight("default").detach().square().sum())
    assert float(handle.penalty()) == pytest.approx(handle.config.penalty_strength * total, rel=1e-9)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "tied"])
def test_a_registered_estimator_measures_f(kind, micro):
    fwlora.register_estimator("max_norm", MaxNorm)
    model = net(kind)
    ((x, y),) = batches(1)
    gradients = frozen_gradients(net(kind), lambda m: cross_entropy(m(x), y))
    config = FWLoraConfig(warmup_steps=2, fisher_ema_decay=0.0, estimator="max_norm")
    handle = train(model, [(x, y)], config, micro=micro)
    assert handle.fisher() == pytest.approx({n: float(g.abs().max()) for n, g in gradients.items()}, rel=1e-10)


def test_a_registered_estimator_gets_the_loss_scale():
    fwlora.register_estimator("max_norm", MaxNorm)
    config = FWLoraConfig(warmup_steps=2, fisher_ema_decay=0.0, estimator="max_norm")
    ((x, y),) = batches(1)
    plain = train(net("linear"), [(x, y)], config)
    model = net("linear")
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # type: ignore[attr-defined]
    scaled = fwlora.attach(model, optimizer, config, scaler=scaler)
    scaler.scale(cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    assert scaled.fisher() == pytest.approx(plain.fisher(), rel=1e-10)


def test_a_statistic_may_have_any_shape():
    fwlora.register_estimator("input_norm", InputNorm)
    model = net("linear")
    ((x, y),) = batches(1)
    config = FWLoraConfig(warmup_steps=2, fisher_ema_decay=0.0, estimator="input_norm")
    handle = train(model, [(x, y)], config, micro=2)
    assert handle.fisher()["first"] == pytest.approx(float(x.square().sum()), rel=1e-10)


@pytest.mark.parametrize("register", [fwlora.register_weighting, fwlora.register_estimator])
def test_a_name_is_registered_once(register):
    register("my_own", MaxNorm)
    with pytest.raises(ValueError, match="'my_own' exists already"):
        register("my_own", MaxNorm)
    with pytest.raises(ValueError, match="'my own' cannot name a"):
        register("my own", MaxNorm)


@pytest.mark.parametrize(
    ("register", "name"), [(fwlora.register_weighting, "rank"), (fwlora.register_estimator, "adapter")]
)
def test_a_built_in_name_is_taken(register, name):
    with pytest.raises(ValueError, match=f"'{name}' exists already"):
        register(name, MaxNorm)


def test_a_name_that_nobody_registered_is_refused_with_the_names_that_are_there():
    fwlora.register_weighting("inverse_square_root", inverse_square_root)
    with pytest.raises(ValueError, match="weighting = 'cubic': must be one of importance, .*inverse_square_root"):
        FWLoraConfig(weighting="cubic")
    with pytest.raises(ValueError, match="estimator = 'max_norm': must be one of exact"):
        FWLoraConfig(estimator="max_norm")


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.tensor([1.0]), r"shape \[1\] for 2 matrices"),
        (torch.tensor([1.0, -0.5]), "negative or not finite"),
        (torch.tensor([1.0, float("nan")]), "negative or not finite"),
    ],
)
def test_unusable_weights_are_refused(weights, match):
    fwlora.register_weighting("unusable", lambda fisher: weights)
    with pytest.raises(ValueError, match=match):
        weighting.penalty_weights(torch.tensor([1.0, 2.0]), "unusable")


def test_every_built_in_name_is_implemented():
    fisher = torch.tensor([4.0, 1.0, 3.0])
    for name in choices.choices_of("weighting"):
        assert weighting.penalty_weights(fisher, name).shape == fisher.shape
    hooked = {*choices.choices_of("estimator")} - {"adapter"}
    assert hooked == set(estimators._HOOKED)
    for name in hooked:
        assert isinstance(estimators.hooked_estimator(FWLoraConfig(estimator=name)), fwlora.HookedEstimator)
    with pytest.raises(ValueError, match="'adapter' is not one of the hooked estimators"):
        estimators.hooked_estimator(FWLoraConfig(estimator="adapter"))
