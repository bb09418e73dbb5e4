"""F on 70 and more architectures of transformers, from tiny configs, against an unfrozen twin with the same weights.

`python scripts/architectures.py` prints the table.

pytest tests/fwlora/test_architectures.py
"""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from tiny_architectures import ARCHITECTURES, EXPERTS, Architecture, attached, compare, lora_layers

NAMES = [a.name for a in ARCHITECTURES]
# Several matrices of one layer in one module, or called more than once in a pass.
REPEATED = {"albert": 2, "deberta-v2": 2}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()


# transformers 4 knows no such model, or its own code fails: masks that overflow, experts that mix fp32 and fp64.
NOT_IN_4 = ("exaone4", "smollm3", "mpt", "led", "clip", "qwen2_moe", "granitemoe", "phimoe", "deepseek_v3")
IS_4 = int(transformers.__version__.split(".")[0]) < 5
since_5 = pytest.mark.skipif(IS_4, reason="transformers 4 has no such layers")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=NAMES)
def test_f_is_that_of_an_unfrozen_twin(architecture: Architecture) -> None:
    if IS_4 and architecture.name in NOT_IN_4:
        pytest.skip("transformers 4 cannot compute this model by itself")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = compare(architecture)
    said = [str(w.message) for w in caught if str(w.message).startswith("fwlora")]
    # LED projects its global attention apart, which no token has here; Switch routes no token to some experts.
    # transformers 4's RecurrentGemma reads no keys and values of one layer.
    unused = architecture.name in ("led", "switch_transformers", *(("recurrent_gemma",) if IS_4 else ()))
    assert all(unused and "got no gradient" in text for text in said), said
    tolerance = 1e-12 if architecture.dtype == torch.float64 else 1e-5
    assert result.loss <= tolerance, "the attached model computes what the twin computes"
    assert result.targets > 0 and result.uses == REPEATED.get(architecture.name, 1)
    for estimator, error in result.errors.items():
        assert error is not None and error <= tolerance, (estimator, error)


def test_the_list_holds_every_kind() -> None:
    kinds = {a.kind for a in ARCHITECTURES}
    assert {"encoder", "decoder", "encoder-decoder", "mixture of experts", "state space"} <= kinds
    assert len({a.model_type or a.name for a in ARCHITECTURES}) >= 70 and len(set(NAMES)) == len(NAMES)


def named(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.name == name)


@since_5
def test_experts_that_are_parameters_are_refused_by_name() -> None:
    every = Architecture("mixtral", "mixture of experts", settings=EXPERTS, targets="all-linear")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.\S+' .*ParamWrapper is not a Linear layer"):
        attached(every.model(), "exact")


@since_5
def test_a_layer_whose_weight_is_read_without_calling_it_is_named() -> None:
    """Mamba's dt_proj: LoRA on it never gets a gradient, so its F is 0 and it is said."""
    mamba = Architecture("mamba", "state space", settings=named("mamba").settings, targets=["in_proj", "dt_proj"])
    model = mamba.model()
    handle, optimizer = attached(model, "exact")
    mamba.loss(model, mamba.inputs()).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"2 of 4 layers got no gradient.*layers\.0\.mixer\.dt_proj.*target_modules"):
        handle.detach()
    zero = {n for n, f in handle.fisher().items() if f == 0.0}
    assert zero == {n for n in lora_layers(model) if "dt_proj" in n}
