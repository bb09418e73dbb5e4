"""The pure tensor functions against values worked out by hand and against autograd.

pytest tests/fwlora/test_tensor_functions.py
"""

import pytest
import torch
from torch.testing import assert_close

from fwlora import estimators, penalty, weighting

F64 = torch.float64


def exact_close(a, b):
    assert_close(a, b, rtol=1e-10, atol=1e-12)


# fisher


def test_weight_gradient_by_hand():
    g = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=F64)  # two tokens, two outputs
    x = torch.tensor([[1.0, 0.0, 3.0], [2.0, 1.0, 0.0]], dtype=F64)  # three inputs
    want = torch.tensor([[1.0, 0.0, 3.0], [4.0, 1.0, 6.0]], dtype=F64)
    exact_close(estimators.weight_gradient(g, x), want)
    exact_close(estimators.squared_norms([want]), torch.tensor([63.0], dtype=F64))
    exact_close(estimators.squared_norms([want], 3.0), torch.tensor([7.0], dtype=F64))


def test_weight_gradient_is_autograds():
    torch.manual_seed(0)
    w = torch.randn(5, 7, dtype=F64, requires_grad=True)
    x = torch.randn(3, 4, 7, dtype=F64)
    y = x @ w.T
    g = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, w, g)
    exact_close(estimators.weight_gradient(g, x), want)


def test_sketch_is_unbiased_and_fresh():
    torch.manual_seed(0)
    g, x = torch.randn(20, 6, dtype=F64), torch.randn(20, 9, dtype=F64)
    want = float(estimators.weight_gradient(g, x).square().sum())
    got = []
    for step in range(4000):
        probe = estimators.gaussian_probe(9, 4, seed=1, step=step, device=torch.device("cpu"), dtype=F64)
        got.append(float(estimators.sketched_gradient(g, x, probe).square().sum()) / 4)
    mean = sum(got) / len(got)
    spread = (sum((v - mean) ** 2 for v in got) / len(got)) ** 0.5
    assert abs(mean - want) < 4 * spread / len(got) ** 0.5
    assert spread / want <= (2 / 4) ** 0.5 * 1.05  # the docstring's bound
    assert len(set(got)) == len(got)


def test_probe_depends_on_seed_step_and_width():
    def probe(d_in=5, seed=0, step=0):
        cpu = torch.device("cpu")
        return estimators.gaussian_probe(d_in, 3, seed=seed, step=step, device=cpu, dtype=F64)

    assert torch.equal(probe(), probe())
    for other in (probe(seed=1), probe(step=1), probe(d_in=6)[:5]):
        assert not torch.allclose(probe(), other)


def test_per_example_squared_norm_by_hand():
    torch.manual_seed(0)
    g, x = torch.randn(3, 4, 5, dtype=F64), torch.randn(3, 4, 7, dtype=F64)
    want = sum((g[i].T @ x[i]).square().sum() for i in range(3))
    exact_close(estimators.per_example_squared_norm(g, x), want)
    single = sum((g[i, :1].T @ x[i, :1]).square().sum() for i in range(3))
    exact_close(estimators.per_example_squared_norm(g[:, 0], x[:, 0]), single)


def test_adapter_squared_norm_is_unbiased_at_initialisation():
    torch.manual_seed(0)
    gradient = torch.randn(6, 40, dtype=F64)
    s, r = 1.7, 3
    draws = []
    for _ in range(4000):
        a = (torch.rand(r, 40, dtype=F64) * 2 - 1) / 40**0.5
        grad_b = s * gradient @ a.T
        draws.append(estimators.adapter_squared_norm([grad_b], torch.tensor([s]), [(r, 40)]))
    got = torch.cat(draws)
    error = got.std() / len(got) ** 0.5
    assert abs(got.mean() - gradient.square().sum()) < 4 * error


def test_half_precision_is_squared_in_fp32():
    big = torch.full((4, 2), 300.0, dtype=torch.float16)  # 300² · 4 tokens overflows fp16
    assert torch.isfinite(estimators.weight_gradient(big, big)).all()
    assert estimators.weight_gradient(big, big).dtype == torch.float32
    assert torch.isfinite(estimators.per_example_squared_norm(big, big))


@pytest.mark.parametrize(("averaging", "want"), [("raw", [1.1, 1.9]), ("normalized", [0.9 + 0.2 / 3, 1.8 + 0.1 / 3])])
def test_update_average_by_hand(averaging, want):
    start, step = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([2.0, 1.0], dtype=F64)
    got, counted = estimators.update_average(start, step, 0.9, averaging)
    exact_close(got, torch.tensor(want, dtype=F64))
    assert bool(counted)


@pytest.mark.parametrize("averaging", ["raw", "normalized"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_step_is_left_out(averaging, bad):
    start = torch.tensor([1.0, 2.0])
    got, counted = estimators.update_average(start, torch.tensor([bad, 1.0]), 0.9, averaging)
    assert torch.equal(got, start) and not bool(counted)


# importance

FISHER = torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=F64)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("importance", [0.6, 0.9, 0.7, 0.8]),
        ("uniform", [1.0, 1.0, 1.0, 1.0]),
        ("rank", [0.0, 0.75, 0.25, 0.5]),
        ("power", [(2.5 / 4) ** 0.5, 1.5, (2.5 / 3) ** 0.5, (2.5 / 2) ** 0.5]),
    ],
)
def test_weights_by_hand(name, want):
    got = weighting.penalty_weights(FISHER, name, gamma=0.5, max_weight_ratio=1.5)
    exact_close(got, torch.tensor(want, dtype=F64))
    normal = weighting.penalty_weights(FISHER, name, gamma=0.5, max_weight_ratio=1.5, normalize=True)
    exact_close(normal.mean(), torch.tensor(1.0, dtype=F64))
    exact_close(normal / normal[1], got / got[1])


def test_importance_sums_to_one():
    exact_close(weighting.importance(FISHER), FISHER / 10)


def test_rank_shares_ties():
    got = weighting.penalty_weights(torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=F64), "rank")
    exact_close(got, torch.tensor([1 - 1.5 / 4, 1 - 1.5 / 4, 1 - 3.5 / 4, 1 - 3.5 / 4], dtype=F64))


def test_permuted_shuffles_by_seed():
    fisher_values = torch.rand(50, dtype=F64)
    share = weighting.penalty_weights(fisher_values, "importance")
    one = weighting.penalty_weights(fisher_values, "permuted", seed=1)
    assert torch.equal(one, weighting.penalty_weights(fisher_values, "permuted", seed=1))
    assert not torch.equal(one, weighting.penalty_weights(fisher_values, "permuted", seed=2))
    assert not torch.equal(one, share)
    exact_close(one.sort().values, share.sort().values)


def test_power_survives_a_matrix_without_gradient():
    got = weighting.penalty_weights(torch.tensor([0.0, 1.0]), "power", max_weight_ratio=4.0)
    assert_close(got[0], torch.tensor(4.0))


# shrinkage


def stack():
    torch.manual_seed(0)
    a = torch.randn(3, 2, 5, dtype=F64, requires_grad=True)
    b = torch.randn(3, 4, 2, dtype=F64, requires_grad=True)
    return a, b, torch.tensor([0.3, 1.1, 2.0], dtype=F64)


def test_update_norm_and_gradient_are_autograds():
    a, b, c = stack()
    product = (b @ a).square().sum((-2, -1))
    exact_close(penalty.update_norms(a, b), product)
    want = torch.autograd.grad((c * product).sum(), (a, b))
    for got, expected in zip(penalty.update_gradients(a, b, c), want, strict=True):
        exact_close(got, expected)


def test_factor_norm_and_gradient_are_autograds():
    a, b, c = stack()
    norms = a.square().sum((-2, -1)) + b.square().sum((-2, -1))
    exact_close(penalty.factor_norms(a, b), norms)
    want = torch.autograd.grad((c * norms).sum(), (a, b))
    for got, expected in zip(penalty.factor_gradients(a, b, c), want, strict=True):
        exact_close(got, expected)


def test_norms_by_hand():
    a = torch.tensor([[[1.0, 2.0]]], dtype=F64)  # rank 1
    b = torch.tensor([[[3.0], [1.0]]], dtype=F64)
    exact_close(penalty.update_norms(a, b), torch.tensor([50.0], dtype=F64))
    exact_close(penalty.factor_norms(a, b), torch.tensor([15.0], dtype=F64))


@pytest.mark.parametrize("norm", penalty.NORMS)
def test_penalty_over_mixed_shapes(norm):
    torch.manual_seed(0)
    shapes = [(2, 5, 4), (1, 5, 4), (2, 5, 4), (3, 4, 6)]
    pairs = [
        (
            torch.randn(r, i, dtype=F64, requires_grad=True),
            torch.randn(o, r, dtype=F64, requires_grad=True),
        )
        for r, i, o in shapes
    ]
    c = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64)
    whole = penalty.Penalty(pairs, norm)
    assert sorted(len(s.index) for s in whole.stacks) == [1, 1, 2]
    coefficients = [c[s.index] for s in whole.stacks]
    terms = [(b @ a).square().sum() if norm == "update" else a.square().sum() + b.square().sum() for a, b in pairs]
    total = sum((ci * t for ci, t in zip(c, terms, strict=True)), torch.zeros((), dtype=F64))
    exact_close(whole.value(coefficients), total.detach())
    want = torch.autograd.grad(total, [f for pair in pairs for f in pair])
    for got, expected in zip(whole.gradient(coefficients), want, strict=True):
        exact_close(got, expected)
