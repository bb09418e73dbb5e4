"""Cuts, budgets and what is written; tests/fwlora/test_consumers.py has what PEFT, vLLM and llama.cpp make of it.

pytest tests/fwlora/test_export.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import HIDDEN, Net, batches, lora_net
from torch import Tensor, nn
from torch.testing import assert_close

import fwlora
from fwlora import export

F64 = torch.float64


def trained(**lora: Any) -> Any:
    """Two matrices of rank 3 and 2 at one scale 1.5, and a head that has moved."""
    settings: dict[str, Any] = dict(
        r=3, lora_alpha=4.5, rank_pattern={"^second": 2}, alpha_pattern={"^second": 3}, seed=3
    )
    model = lora_net(**{**settings, **lora})
    with torch.no_grad():
        if "modules_to_save" not in lora:
            model.base_model.model.head.modules_to_save["default"].weight.add_(0.5)
    return model.eval()


def fresh(kind: str = "linear", seed: int = 3) -> nn.Module:
    """The backbone that `trained` began with."""
    torch.manual_seed(seed)
    return Net(kind).double()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(x) for x, _ in batches(3)])


def delta(model: Any, name: str) -> Tensor:
    layer = model.base_model.model.get_submodule(name)
    return layer.get_delta_weight("default").detach()


def load(path: Path, kind: str = "linear") -> Any:
    return PeftModel.from_pretrained(fresh(kind), str(path), autocast_adapter_dtype=False).eval()


def config(path: Path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


def test_a_rank_one_cut_by_hand(tmp_path: Path) -> None:
    """s·B·A = diag(6, 4, 0, …): the greater singular value stays, the other one is what was cut."""
    model = lora_net(target_modules=["second"], r=2, lora_alpha=4)  # s = 2
    layer = model.base_model.model.second
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(2, HIDDEN))
        layer.lora_B["default"].weight.copy_(torch.zeros(HIDDEN, 2))
        layer.lora_B["default"].weight[0, 0], layer.lora_B["default"].weight[1, 1] = 2.0, 3.0
    lost = fwlora.export_adapter(model, tmp_path / "cut", ranks=1)
    assert lost == pytest.approx({"second": 4.0}, rel=1e-12)
    loaded = load(tmp_path / "cut")
    want = torch.zeros(HIDDEN, HIDDEN, dtype=F64)
    want[1, 1] = 6.0
    assert_close(delta(loaded, "second"), want)
    written = config(tmp_path / "cut")
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (1, 2, ["second"])
    a = load_file(tmp_path / "cut" / "adapter_model.safetensors")["base_model.model.second.lora_A.weight"]
    assert float(a.square().sum()) == pytest.approx(3.0), "√(σ/s) in either factor"


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_what_is_not_cut_predicts_the_same(tmp_path: Path, kind: str, scale: float | None) -> None:
    model = trained(kind=kind)
    lost = fwlora.export_adapter(model, tmp_path / "adapter", scale=scale)
    assert lost == {"first": 0.0, "second": 0.0}
    loaded = load(tmp_path / "adapter", kind)
    assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded), logits(model), atol=1e-3)
    written = config(tmp_path / "adapter")
    assert written["r"] == 3 and written["lora_alpha"] / 3 == pytest.approx(scale or 1.5)
    assert written["rank_pattern"] == {"^second": 2}
    assert written["alpha_pattern"] == {"^second": pytest.approx(2 * (scale or 1.5))}


def test_each_matrix_keeps_its_own_scale_and_every_bit(tmp_path: Path) -> None:
    """rsLoRA and an alpha of its own: s = 3/√2 and 5/√2; cut to rank 1, α must fall with √r."""
    model = trained(r=2, lora_alpha=3, use_rslora=True, rank_pattern={}, alpha_pattern={"^second": 5})
    for ranks in (None, {"first": 1}):
        fwlora.export_adapter(model, tmp_path / "adapter", ranks=ranks)
        loaded = load(tmp_path / "adapter")
        for name, alpha in (("first", 3), ("second", 5)):
            layer, own = (m.base_model.model.get_submodule(name) for m in (loaded, model))
            assert layer.scaling["default"] == pytest.approx(alpha / 2**0.5)
            if ranks is None or name not in ranks:
                assert torch.equal(layer.lora_A["default"].weight, own.lora_A["default"].weight)
                assert torch.equal(layer.lora_B["default"].weight, own.lora_B["default"].weight)
            else:
                sigma = torch.linalg.svdvals(delta(model, name))
                assert_close(torch.linalg.svdvals(delta(loaded, name))[:1], sigma[:1])


def test_one_scale_for_all_goes_into_b(tmp_path: Path) -> None:
    model = trained(r=2, lora_alpha=3, rank_pattern={}, alpha_pattern={"^second": 5})
    fwlora.export_adapter(model, tmp_path / "adapter", scale=0.25)
    loaded = load(tmp_path / "adapter")
    for name in ("first", "second"):
        assert loaded.base_model.model.get_submodule(name).scaling["default"] == 0.25
        assert_close(delta(loaded, name), delta(model, name), rtol=1e-12, atol=1e-14)
    assert config(tmp_path / "adapter")["alpha_pattern"] == {}


def test_what_is_lost_is_the_discarded_singular_values(tmp_path: Path) -> None:
    model = trained()
    report = fwlora.export_adapter(model, tmp_path / "cut", ranks={"first": 1, "second": 1})
    loaded = load(tmp_path / "cut")
    for name in ("first", "second"):
        sigma = torch.linalg.svdvals(delta(model, name))
        assert report[name] == pytest.approx(float(sigma[1:].norm()), rel=1e-10) and report[name] > 0.01
        assert float((delta(model, name) - delta(loaded, name)).norm()) == pytest.approx(report[name], rel=1e-10)
        assert report.norms[name] == pytest.approx(float(sigma.norm()), rel=1e-10)
        assert_close(torch.linalg.svdvals(delta(loaded, name))[:1], sigma[:1])
    whole = torch.cat([delta(model, n).flatten() for n in report])
    gap = whole - torch.cat([delta(loaded, n).flatten() for n in report])
    assert report.relative == pytest.approx(float(gap.norm() / whole.norm()), rel=1e-10)
    assert report.ranks == {"first": 1, "second": 1} and report.outputs is None


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_the_change_of_the_outputs_is_that_of_the_loaded_adapter(tmp_path: Path, kind: str) -> None:
    model = trained(lora_dropout=0.5) if kind == "lora" else adalora()
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = [x for x, _ in batches(3)]
    report = fwlora.export_adapter(model, tmp_path / "cut", ranks=1, scale=0.7, batches=[(x[0],), x[1], {"x": x[2]}])
    assert model.training and all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    p, q = logits(model).reshape(-1, 3), logits(load(tmp_path / "cut")).reshape(-1, 3)
    assert report.outputs is not None and report.outputs.max > 1e-3
    assert report.outputs.mean == pytest.approx(float((p - q).abs().mean()), rel=1e-9)
    assert report.outputs.max == pytest.approx(float((p - q).abs().max()), rel=1e-9)
    kl = nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean")
    assert report.outputs.kl == pytest.approx(float(kl), rel=1e-9)
    whole = fwlora.export_adapter(model, tmp_path / "whole", batches=x).outputs
    assert whole is not None and max(whole.max, whole.mean, abs(whole.kl or 0)) < 1e-12
    with pytest.raises(ValueError, match="batches is empty"):
        fwlora.export_adapter(model, tmp_path / "none", batches=[])
    assert not (tmp_path / "none").exists()


def test_a_matrix_that_is_not_named_keeps_its_rank_and_none_is_widened(tmp_path: Path) -> None:
    model = trained()
    lost = fwlora.export_adapter(model, tmp_path / "one", ranks={"first": 2})
    assert lost["second"] == 0.0 < lost["first"]
    assert config(tmp_path / "one")["r"] == 2 and config(tmp_path / "one")["rank_pattern"] == {}
    assert fwlora.export_adapter(model, tmp_path / "wide", ranks=50) == {"first": 0.0, "second": 0.0}
    assert config(tmp_path / "wide")["r"] == 3


def test_a_rank_above_the_matrix_is_cut_to_what_it_can_hold(tmp_path: Path) -> None:
    """first is 6 → 8: an adapter of rank 8 has six singular values."""
    model = trained(r=8, lora_alpha=8, rank_pattern={}, alpha_pattern={}, target_modules=["first"])
    assert fwlora.export_adapter(model, tmp_path / "cut", ranks=7) == pytest.approx({"first": 0.0}, abs=1e-12)
    loaded = load(tmp_path / "cut")
    assert_close(delta(loaded, "first"), delta(model, "first"), rtol=1e-9, atol=1e-12)
    assert config(tmp_path / "cut")["r"] == 6


def test_rank_zero_leaves_a_matrix_out_also_where_its_name_ends_like_anothers(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(5)
        return nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})}).double()

    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)).double()
    whole = delta(model, "inner.q").norm()
    lost = fwlora.export_adapter(model, tmp_path / "adapter", ranks={"inner.q": 0})
    assert lost == pytest.approx({"q": 0.0, "inner.q": float(whole)})
    loaded = PeftModel.from_pretrained(net(), str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    adapted = [n for n, m in loaded.named_modules() if hasattr(m, "lora_A")]
    assert adapted == ["base_model.model.q"]
    assert config(tmp_path / "adapter")["exclude_modules"] == r"inner\.q"


def test_a_budget_keeps_the_greatest_singular_values_a_parameter(tmp_path: Path) -> None:
    """first (cost 14) has σ 4.6, 0.95 and second (cost 16) 5, 1: by σ²/cost 5, 4.6, 0.95, 1."""
    model = trained(r=2, lora_alpha=2, rank_pattern={}, alpha_pattern={})
    for name, values in (("first", (4.6, 0.95)), ("second", (5.0, 1.0))):
        layer = model.base_model.model.get_submodule(name)
        with torch.no_grad():
            for factor in ("lora_A", "lora_B"):
                weight = layer.get_submodule(factor)["default"].weight
                weight.copy_(torch.linalg.svd(weight, full_matrices=False)[0 if factor == "lora_B" else 2])
            layer.lora_B["default"].weight.mul_(torch.tensor(values, dtype=F64))
    kept = {}
    for budget in (14, 15, 16, 29, 30, 43, 44, 59, 60):
        lost = fwlora.export_adapter(model, tmp_path / str(budget), budget=budget)
        written = load_file(tmp_path / str(budget) / "adapter_model.safetensors")
        assert sum(v.numel() for k, v in written.items() if "lora_" in k) <= budget
        kept[budget] = tuple(round(lost[n], 6) for n in ("first", "second"))
    first, second = round((4.6**2 + 0.95**2) ** 0.5, 6), round(26**0.5, 6)
    assert kept[14] == kept[15] == (0.95, second), "the best does not fit, the second best does"
    assert kept[16] == kept[29] == (first, 1.0)
    assert kept[30] == kept[43] == (0.95, 1.0)
    assert kept[44] == kept[59] == (0.0, 1.0)
    assert kept[60] == (0.0, 0.0)


def adalora() -> Any:
    """`first` has ranks 1 and 3 left, `second` rank 1."""
    torch.manual_seed(3)
    settings = AdaLoraConfig(init_r=3, target_r=1, total_step=10, lora_alpha=6, target_modules=["first", "second"])
    model: Any = get_peft_model(Net().double(), settings).double().eval()
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name)
        layer.lora_E["default"].data.copy_(torch.tensor([[0.5], [0.0], [-2.0 if name == "first" else 0.0]]))
        layer.lora_A["default"].data.normal_()
    return model


def test_adalora_is_written_as_plain_lora_without_what_it_masked(tmp_path: Path) -> None:
    model = adalora()
    assert fwlora.export_adapter(model, tmp_path / "adapter") == {"first": 0.0, "second": 0.0}
    assert config(tmp_path / "adapter")["peft_type"] == "LORA"
    assert config(tmp_path / "adapter")["r"] == 2 and config(tmp_path / "adapter")["rank_pattern"] == {"^second": 1}
    loaded = load(tmp_path / "adapter")
    assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)


def test_the_adapter_that_is_active_is_the_one_that_is_written(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("other", LoraConfig(r=1, target_modules=["second"], init_lora_weights=False))
    fwlora.export_adapter(model, tmp_path / "default")
    assert_close(logits(load(tmp_path / "default")), logits(model), rtol=1e-12, atol=1e-12)
    model.set_adapter("other")
    fwlora.export_adapter(model, tmp_path / "other")
    assert config(tmp_path / "other")["target_modules"] == ["second"]
    assert_close(logits(load(tmp_path / "other")), logits(model), rtol=1e-6, atol=1e-6)


def test_an_export_takes_the_place_of_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    model = trained()
    fwlora.export_adapter(model, tmp_path / "deep" / "adapter", ranks=1)
    fwlora.export_adapter(model, tmp_path / "deep" / "adapter")
    assert config(tmp_path / "deep" / "adapter")["r"] == 3
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["adapter"]
    assert sorted(p.name for p in (tmp_path / "deep" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("broken", ["save_file", "replace"])
def test_an_export_that_fails_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def contents() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    def torn(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "old" / "adapter_model.safetensors" and Path(source).parent.name == "new":
            full()
        if Path(target).parent == tmp_path / "new":
            full()
        real(source, target)

    real = os.replace
    model = trained()
    fwlora.export_adapter(model, tmp_path / "old", ranks=1)
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    before = contents()
    if broken == "save_file":
        monkeypatch.setattr(export, "save_file", full)
    else:
        monkeypatch.setattr(export.os, "replace", torn)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            fwlora.export_adapter(model, tmp_path / name)
        assert contents() == before
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("former", "consumer"), [(True, "vllm"), (False, "peft")])
def test_uniform_is_a_former_spelling(tmp_path: Path, former: bool, consumer: Any) -> None:
    model = trained(modules_to_save=None)
    with pytest.warns(FutureWarning, match="uniform is now for_"):
        fwlora.export_adapter(model, tmp_path / "former", uniform=former)
    fwlora.export_adapter(model, tmp_path / "now", for_=consumer)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "former" / name).read_bytes() == (tmp_path / "now" / name).read_bytes()


def two_active() -> PeftModel:
    model = trained()
    model.add_adapter("other", LoraConfig(r=1, target_modules=["second"]))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("model", "asked", "says"),
    [
        (Net, {}, "Net is not a PEFT model: pass what peft.get_peft_model returned"),
        (two_active, {}, r"2 adapters are active \(default, other\): choose one with model.set_adapter"),
        (trained, {"ranks": 2, "budget": 100}, "ranks and budget both say how much to keep"),
        (trained, {"ranks": {"frist": 1}}, "'frist' carries no adapter; these do: first, second"),
        (trained, {"ranks": -1}, "the rank of first is -1; it must be 0"),
        (trained, {"ranks": 0}, "every rank of the pattern is 0"),
        (trained, {"budget": 13}, "a budget of 13 parameters buys no rank"),
        (trained, {"for_": "gguf"}, "for_ is 'gguf'; it must be one of 'peft', 'vllm', 'llama.cpp'"),
        (trained, {"scale": 0.0}, "scale is 0.0; it must be a positive finite number"),
        (lambda: lora_net(use_dora=True), {}, "cannot work with 'first'.*with Dora"),
        (lambda: lora_net(lora_bias=True), {}, "first has a bias inside its adapter"),
        (lambda: lora_net(init_lora_weights="pissa", dtype=torch.float32), {}, "init_lora_weights='pissa' moves"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, model, asked: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fwlora.export_adapter(model(), tmp_path / "adapter", **asked)
    assert not (tmp_path / "adapter").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ValueError, match="is a file: pass the folder"):
        fwlora.export_adapter(trained(), tmp_path / "adapter")
