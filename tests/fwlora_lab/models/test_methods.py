"""pytest tests/fwlora_lab/models/test_methods.py"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny import World
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import fwlora
from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.config.schema import FWLoraSettings, RunConfig
from fwlora_lab.errors import UserError
from fwlora_lab.models.adapter_plan import plan_adapters
from fwlora_lab.models.adapter_state import SvdLoraState, fw_config
from fwlora_lab.models.backbones import Backbone, load_backbone
from fwlora_lab.models.methods import (
    AdaLoraMethod,
    FWLoraMethod,
    Method,
    build_method,
    parts_of,
)
from fwlora_lab.seeds import derive
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.lane_settings import lane_settings
from fwlora_lab.training.scheduler import train_runs

SPEC = TaskSpec("two", "classification", ("no", "yes"), 1, ("accuracy",), "accuracy")
METHODS = ["lora", "fw_lora", "adalora", "svd_lora"]
# Rank 1 on all of the tiny BERT's matrices: 2 layers of 3·(16 + 16) and 2·(16 + 32).
UNIT = 2 * (3 * 32 + 2 * 48)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def backbone(world: World) -> Backbone:
    return load_backbone(world.config().model)


def build(cfg: RunConfig, backbone: Backbone, seed: int = 1, steps: int = 20) -> Method:
    cfg = cfg.model_copy(update={"training": cfg.training.model_copy(update={"seed": seed})})
    return build_method(cfg, backbone, SPEC, steps)


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (6, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(6) % 2}


def train(arm: Method, steps: int) -> None:
    arm.model.train()
    for step in range(steps):
        arm.model(**batch(step)).loss.backward()
        arm.optimizer.step()
        arm.scheduler.step()
        arm.optimizer.zero_grad()


def tensors(arm: Method, part: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in arm.model.named_parameters() if part in n and p.requires_grad}


def test_seeds_of_different_uses_differ_and_stay() -> None:
    uses = [derive(seed, purpose) for seed in (0, 1, 2) for purpose in ("head", "adapters", "dropout", "order")]
    assert len(set(uses)) == len(uses) and all(0 <= u < 2**63 for u in uses)
    assert derive(0, "head") == 51187490648214554, "a change here makes old and new runs differ"


def test_all_arms_start_from_one_head_and_lora_arms_from_one_a(world: World, backbone: Backbone) -> None:
    arms = {}
    for method in METHODS:
        torch.manual_seed(len(method))  # whatever was drawn before
        arms[method] = build(world.config(method), backbone)
    heads = {m: tensors(a, "modules_to_save") for m, a in arms.items()}
    assert len(heads["lora"]) == 4
    for method in METHODS[1:]:
        torch.testing.assert_close(heads[method], heads["lora"], rtol=0, atol=0)
    torch.testing.assert_close(tensors(arms["fw_lora"], "lora_A"), tensors(arms["lora"], "lora_A"), rtol=0, atol=0)
    other = build(world.config("lora"), backbone, seed=2)
    for part in ("lora_A", "classifier"):
        first = next(iter(tensors(arms["lora"], part).values()))
        assert not torch.equal(first, next(iter(tensors(other, part).values())))


def test_rank_wins_over_the_budget_and_says_the_true_percentage(world: World, backbone: Backbone) -> None:
    cfg = world.config(model__parameter_budget_percent=0.5)
    plan = plan_adapters(cfg, backbone, 20)
    assert set(plan.pattern.values()) == {2} and len(plan.pattern) == 10 and plan.scale == 2.0
    percent = 100 * 2 * UNIT / backbone.parameters
    assert plan.warnings == (
        "model.lora.rank=2 wins over model.parameter_budget_percent=0.5: the adapters hold "
        f"{2 * UNIT} parameters, {percent:.3f} % of the backbone. "
        "Set model.lora.rank=null to let the budget decide.",
    )
    parameters = build(cfg, backbone).state.parameters()
    assert parameters.adapters == parameters.adapters_trained == 2 * UNIT
    assert parameters.percent == pytest.approx(percent) and parameters.asked_percent == 0.5
    assert parameters.backbone == backbone.parameters
    assert parameters.head == (16 * 16 + 16) + (16 * 2 + 2)
    fitting = world.config(model__parameter_budget_percent=percent)
    assert plan_adapters(fitting, backbone, 20).warnings == ()


@pytest.mark.parametrize("method", ["lora", "fw_lora"])
def test_a_budget_becomes_ranks_at_one_scale(world: World, backbone: Backbone, method: str) -> None:
    percent = 100 * 1.4 * UNIT / backbone.parameters
    cfg = world.config(
        method,
        model__parameter_budget_percent=percent,
        model__lora__rank=None,
        model__lora__alpha=None,
    )
    arm = build(cfg, backbone)
    rows = arm.state.matrix_rows()
    assert {row.rank for row in rows} == {1, 2}
    used = arm.state.parameters().adapters
    assert 1.4 * UNIT - 32 < used <= 1.4 * UNIT
    scales = {m.scaling["default"] for m in arm.model.modules() if isinstance(m, LoraLayer)}
    assert scales == {2.0}


def test_a_budget_for_nothing_is_refused(world: World, backbone: Backbone) -> None:
    percent = 100 * 20 / backbone.parameters
    cfg = world.config(model__parameter_budget_percent=percent, model__lora__rank=None, model__lora__alpha=None)
    with pytest.raises(UserError, match=r"model\.parameter_budget_percent=.*buys no adapter"):
        plan_adapters(cfg, backbone, 20)


def test_matrices_decay_and_vectors_do_not(world: World, backbone: Backbone) -> None:
    arm = build(world.config(training__weight_decay=0.3, training__warmup_ratio=0.1), backbone, steps=100)
    decayed, plain = arm.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n for n, p in arm.model.named_parameters()}
    assert all(n.endswith(".bias") for n in (names[id(p)] for p in plain["params"]))
    assert len(plain["params"]) == 2 and len(decayed["params"]) == 20 + 2
    rates = []
    for _ in range(100):
        rates.append(arm.scheduler.get_last_lr()[0])
        arm.scheduler.step()
    assert rates[0] == 0.0 and rates[10] == max(rates) == 5e-3
    assert rates[55] == pytest.approx(2.5e-3) and arm.scheduler.get_last_lr() == [0.0, 0.0]


def test_every_setting_reaches_the_method(world: World) -> None:
    changed = {
        "penalty_strength": 0.3,
        "warmup_steps": 7,
        "fisher_ema_decay": 0.4,
        "estimator": "sketch",
        "fisher_interval": 3,
        "sketch_columns": 2,
        "averaging": "normalized",
        "weighting": "power",
        "gamma": 0.7,
        "max_weight_ratio": 3.0,
        "normalize_weights": True,
        "penalty_mode": "decoupled",
        "penalty_norm": "factors",
        "fisher_start": 2,
    }
    assert set(changed) == set(FWLoraSettings.model_fields)
    config = fw_config(world.config(fw_lora=changed), seed=5)
    for key, value in changed.items():
        assert getattr(config, key) == value
    assert config.seed == 5
    assert set(changed) | {"seed"} == {f.name for f in fields(fwlora.FWLoraConfig)}
    without = RunConfig.model_validate(world.config().model_dump() | {"fw_lora": {}})
    assert fw_config(without, 0) == fwlora.FWLoraConfig(warmup_steps=500)  # a run config's K is the request's


def test_fw_lora_watches_and_then_shrinks(world: World, backbone: Backbone) -> None:
    arm = build(world.config("fw_lora"), backbone)
    assert isinstance(arm, FWLoraMethod)
    assert arm.phase() == "warmup"
    train(arm, 5)
    assert arm.phase() == "warmup"
    train(arm, 1)
    assert arm.phase() == "penalty"
    rows = arm.state.matrix_rows(arm.fisher())
    assert [r.name for r in rows] == list(arm.handle.names) and rows[0].name == (
        "bert.encoder.layer.0.attention.self.query"
    )
    shares = [r.importance or 0.0 for r in rows]
    fisher = [r.fisher or 0.0 for r in rows]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx([f / sum(fisher) for f in fisher])
    assert [r.weight for r in rows] == pytest.approx([1 - s for s in shares])


@pytest.mark.parametrize("method", METHODS)
def test_the_update_norm_is_that_of_the_product(world: World, backbone: Backbone, method: str) -> None:
    arm = build(world.config(method), backbone)
    train(arm, 8)
    got = {row.name: row.delta_norm for row in arm.state.matrix_rows()}
    layers = dict(arm.model.base_model.model.named_modules())  # type: ignore[operator]
    for name, norm in got.items():
        layer = layers[name]
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        if parts_of(method).spectral:
            delta = 2.0 * b @ torch.diag(layer.lora_E["default"][:, 0]) @ a
        else:
            delta = 2.0 * b.weight @ a.weight
        assert norm == pytest.approx(float(delta.detach().norm()), rel=1e-4)
    assert sum(norm > 0 for norm in got.values() if norm is not None) >= (5 if method == "adalora" else 10)


def test_adalora_has_the_budget_the_schedule_and_the_scale(world: World, backbone: Backbone) -> None:
    percent = 100 * 1.25 * UNIT / backbone.parameters
    cfg = world.config(
        "adalora",
        model__parameter_budget_percent=percent,
        model__lora__rank=None,
        model__lora__alpha=None,
    )
    arm = build(cfg, backbone, steps=50)
    assert isinstance(arm, AdaLoraMethod)
    config = arm.model.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step) == (6, 25, 50)  # type: ignore[attr-defined]
    assert (config.init_r, config.target_r) == (2, 1)  # type: ignore[attr-defined]
    phases, ranks = [], []
    for _ in range(50):
        phases.append(arm.phase())
        train(arm, 1)
        ranks.append(sum(row.rank for row in arm.state.matrix_rows()))
    assert phases == ["initial"] * 6 + ["allocating"] * 19 + ["final"] * 25
    assert ranks[5] == 20 and ranks[24:] == [12] * 26, "1.25 ranks for each of 10 matrices, rounded down"
    assert ranks[6] == 12 + int(8 * (18 / 19) ** 3), "the cubic schedule begins at once"
    assert all(a >= b for a, b in zip(ranks[5:], ranks[6:], strict=False))
    parameters = arm.state.parameters()
    assert parameters.adapters_trained == 2 * (UNIT + 10)
    assert 12 * 33 <= parameters.adapters <= 12 * 49
    ruler = build(cfg.model_copy(update={"method": "lora"}), backbone)
    scale = next(m.scaling["default"] for m in ruler.model.modules() if isinstance(m, LoraLayer))
    layer = next(m for m in arm.model.modules() if hasattr(m, "ranknum") and m.ranknum)
    assert layer.scaling["default"] / float(layer.ranknum["default"]) == pytest.approx(scale)  # type: ignore[index]


def test_adaloras_regulariser_is_in_the_loss_only_with_labels(world: World, backbone: Backbone) -> None:
    arm = build(world.config("adalora"), backbone)
    arm.model.eval()
    inputs = batch()
    out = arm.model(**inputs)
    task = torch.nn.functional.cross_entropy(out.logits, inputs["labels"])
    assert out.loss > task + 0.1
    del inputs["labels"]
    assert arm.model(**inputs).loss is None


@pytest.mark.parametrize("steps", [4, 5, 6, 7])
def test_adalora_manages_the_shortest_runs(world: World, backbone: Backbone, steps: int) -> None:
    arm = build(world.config("adalora"), backbone, steps=steps)
    train(arm, steps)
    assert sum(row.rank for row in arm.state.matrix_rows()) <= 20


@pytest.mark.parametrize(("steps", "tinit"), [(1, 0.12), (2, 0.12), (3, 0.12), (50, 0.495)])
def test_an_adalora_schedule_without_room_is_refused(
    world: World, backbone: Backbone, steps: int, tinit: float
) -> None:
    cfg = world.config("adalora", adalora__tinit_ratio=tinit)
    with pytest.raises(UserError, match=f"leave none of the {steps} steps for allocating ranks"):
        plan_adapters(cfg, backbone, steps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [False, True])
def test_vanilla_peft_reads_the_adapter_with_the_same_predictions(
    world: World, backbone: Backbone, method: str, budget: bool, tmp_path: Path
) -> None:
    changes = {}
    if budget:
        # Half a unit: some matrices have no adapter at all.
        percent = 100 * 0.5 * UNIT / backbone.parameters
        changes = {
            "model__parameter_budget_percent": percent,
            "model__lora__rank": None,
            "model__lora__alpha": None,
        }
    arm = build(world.config(method, **changes), backbone)
    train(arm, 20)
    ranks = [row.rank for row in arm.state.matrix_rows()]
    assert (0 in ranks or len(ranks) < 10) == (budget or method == "adalora" and 0 in ranks)
    arm.state.export(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(world.backbone, num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    arm.model.eval()
    inputs = {k: v for k, v in batch(99).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, arm.model(**inputs).logits, rtol=0, atol=1e-6)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**inputs).logits, arm.model(**inputs).logits, atol=1e-3)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for key in ("target_modules", "modules_to_save"):
        assert written[key] == sorted(set(written[key])), "an order of its own in every process"


def test_adaloras_divisor_is_no_parameter(world: World, backbone: Backbone) -> None:
    """PEFT 0.21.2 would train it and not save it."""
    arm = build_method(world.config("adalora"), backbone, SPEC, 22)
    named = dict(arm.model.named_parameters())
    divisors = [p for name, p in named.items() if "ranknum" in name]
    assert divisors and not any(p.requires_grad for p in divisors)


# SVD-LoRA: AdaLoRA's parametrisation, plain LoRA's ranks


def budgeted(world: World, backbone: Backbone, method: str, units: float, **changes: object) -> RunConfig:
    percent = 100 * units * UNIT / backbone.parameters
    budget = {"model__parameter_budget_percent": percent, "model__lora__rank": None, "model__lora__alpha": None}
    return world.config(method, **budget, **changes)


@pytest.mark.parametrize("units", [0.5, 1.4, 2.001])
def test_svd_lora_has_plain_loras_ranks_and_one_parameter_a_rank_more(
    world: World, backbone: Backbone, units: float
) -> None:
    arm = build(budgeted(world, backbone, "svd_lora", units), backbone)
    plain = build(budgeted(world, backbone, "lora", units), backbone)
    assert isinstance(arm.state, SvdLoraState)
    ranks = {row.name: row.rank for row in plain.state.matrix_rows()}
    assert {row.name: row.rank for row in arm.state.matrix_rows()} == ranks
    assert {0.5: len(ranks) < 10, 1.4: set(ranks.values()) == {1, 2}, 2.001: set(ranks.values()) == {2}}[units]
    counts, without = arm.state.parameters(), plain.state.parameters()
    assert counts.adapters == counts.adapters_trained == without.adapters + sum(ranks.values())
    assert counts.head == without.head and counts.backbone == without.backbone
    trained = [p for group in arm.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in trained) == counts.adapters + counts.head, "all is trained, and nothing else"
    for name, (a, b, spectrum) in arm.state.adapters().items():
        assert a.shape[0] == b.shape[1] == spectrum.shape[0] == ranks[name]
        assert not spectrum.any() and a.any() and b.any(), "the update is zero at first through Λ alone"


def test_svd_loras_scale_is_exactly_s_at_every_rank(world: World, backbone: Backbone) -> None:
    arm = build(budgeted(world, backbone, "svd_lora", 1.4), backbone)
    arm.model.double().eval()
    layers = dict(arm.model.base_model.model.named_modules())  # type: ignore[operator]
    for name, (a, b, spectrum) in arm.state.adapters().items():
        spectrum.copy_(torch.tensor([0.7, -0.4][: len(spectrum)]))
        layer = layers[name]
        x = torch.linspace(-1, 1, a.shape[1], dtype=torch.float64)[None]
        got = layer(x) - layer.base_layer(x)  # type: ignore[operator]
        torch.testing.assert_close(got, 2.0 * x @ (b @ torch.diag(spectrum) @ a).T, rtol=1e-12, atol=1e-14)


def test_svd_loras_loss_carries_the_orthogonality_of_every_factor(world: World, backbone: Backbone) -> None:
    """`w·mean(‖AAᵀ − I‖_F, ‖BᵀB − I‖_F)` with w = adalora.orth_reg_weight, each I of its matrix's own rank."""
    arm = build(budgeted(world, backbone, "svd_lora", 1.4, adalora__orth_reg_weight=0.25), backbone)
    arm.model.eval()
    inputs = batch()
    out = arm.model(**inputs)
    task = torch.nn.functional.cross_entropy(out.logits, inputs["labels"])
    norms = []
    for a, b, _ in arm.state.adapters().values():
        norms += [float((gram - torch.eye(len(gram))).norm()) for gram in (a @ a.T, b.T @ b)]
    assert len(norms) == 20
    assert float((out.loss - task).detach()) == pytest.approx(0.25 * sum(norms) / 20, rel=1e-4)
    lane_config = budgeted(world, backbone, "svd_lora", 1.4)
    settings = lane_settings(lane_config, plan_adapters(lane_config, backbone, 20), 20)
    assert settings.ada is not None and settings.ada.orth_reg_weight == lane_config.adalora.orth_reg_weight == 0.5


def test_svd_lora_never_prunes(world: World, backbone: Backbone) -> None:
    arm = build(budgeted(world, backbone, "svd_lora", 1.4), backbone, steps=50)
    before = {name: a.shape[0] for name, (a, _, _) in arm.state.adapters().items()}
    for _ in range(50):
        assert arm.phase() == "training"
        train(arm, 1)
    assert {row.name: row.rank for row in arm.state.matrix_rows()} == before
    assert all(spectrum.all() for _, _, spectrum in arm.state.adapters().values()), "no λ was set to zero"
    divisors = [p for name, p in arm.model.named_parameters() if "ranknum" in name]
    assert divisors and not any(p.requires_grad for p in divisors)
    assert sorted(float(p) for p in divisors) == sorted(before.values())


def test_svd_lora_is_written_as_plain_lora(world: World, backbone: Backbone, tmp_path: Path) -> None:
    arm = build(budgeted(world, backbone, "svd_lora", 1.4), backbone)
    train(arm, 10)
    arm.state.export(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["r"] == 2 and written["lora_alpha"] == 4
    base = AutoModelForSequenceClassification.from_pretrained(world.backbone, num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    for name, (a, b, spectrum) in arm.state.adapters().items():
        layer = loaded.base_model.model.get_submodule(name)  # type: ignore[operator]
        assert layer.scaling["default"] == 2.0
        torch.testing.assert_close(layer.lora_A["default"].weight.data, a, rtol=0, atol=0)
        torch.testing.assert_close(layer.lora_B["default"].weight.data, b * spectrum, rtol=1e-6, atol=0)
    arm.state.export(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


# The controls that are settings of FW-LoRA: each is the loss that it is said to be

CONTROLS = {
    "request": {},
    "uniform": {"fw_lora__weighting": "uniform"},
    "permuted": {"fw_lora__weighting": "permuted"},
    "literal": {"fw_lora__weighting": "uniform", "fw_lora__penalty_norm": "factors"},
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_is_plain_lora_with_its_penalty_in_the_loss(world: World, backbone: Backbone, control: str) -> None:
    """`L + λ Σ w_m‖s·B·A‖²`, for the request's own code `L + λ Σ (‖A‖² + ‖B‖²)`, by autograd after the warm-up."""
    own = {"model__lora__dropout": 0.0, "training__max_grad_norm": None, **CONTROLS[control]}
    arm = build(world.config("fw_lora", **own), backbone, seed=3)
    naive = build(world.config("lora", **own), backbone, seed=3)
    assert isinstance(arm, FWLoraMethod)
    for each in (arm, naive):
        each.model.double().eval()  # the encoder's dropout would draw other masks

    def step(each: Method, number: int, penalty: Tensor | float = 0.0) -> None:
        (each.model(**batch(number)).loss + penalty).backward()
        each.optimizer.step()
        each.scheduler.step()
        each.optimizer.zero_grad()

    for number in range(6):
        step(arm, number)
        step(naive, number)
    fisher = torch.tensor(list(arm.handle.fisher().values()), dtype=torch.float64)
    share = fisher / fisher.sum()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert order.tolist() != sorted(order.tolist())
    weights = {"request": 1 - share, "permuted": 1 - share[order]}.get(control, torch.ones(10))
    assert [row.weight for row in arm.state.matrix_rows(arm.fisher())] == pytest.approx(weights.tolist(), rel=1e-6)
    layers = [m for m in naive.model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 10
    for number in range(6, 16):
        penalty = torch.zeros((), dtype=torch.float64)
        for weight, layer in zip(weights.tolist(), layers, strict=True):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            norm = a.square().sum() + b.square().sum() if control == "literal" else (2.0 * b @ a).square().sum()  # type: ignore
            penalty = penalty + 0.05 * weight * norm
        step(naive, number, penalty)
        step(arm, number)
    for name, factors in arm.state.adapters().items():
        for got, want in zip(factors, naive.state.adapters()[name], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_controls_train_alike_in_lanes_and_with_peft_and_their_records_say_what_they_are(tmp_path: Path) -> None:
    own = World(tmp_path, dropout=0.0)
    records = {}
    for control, changes in CONTROLS.items():
        for engine in ("lanes", "peft"):
            common = {"training__engine": engine, "training__epochs": 1, "model__lora__dropout": 0.0}
            cfg = own.config("fw_lora", run_id=f"{control}-{engine}", **common, **changes)
            (records[control, engine],) = train_runs([RunSpec(cfg, 1)])
    for control in CONTROLS:
        lanes, peft = records[control, "lanes"], records[control, "peft"]
        assert lanes.status == peft.status == "complete", lanes.error or peft.error
        for mine, theirs in zip(lanes.matrices, peft.matrices, strict=True):
            assert mine.weight == pytest.approx(theirs.weight, rel=1e-4)
            assert mine.delta_norm == pytest.approx(theirs.delta_norm, rel=1e-3)
    weights = {c: [row.weight for row in records[c, "lanes"].matrices] for c in CONTROLS}
    norms = {c: [row.delta_norm for row in records[c, "lanes"].matrices] for c in CONTROLS}
    assert weights["uniform"] == weights["literal"] == [1.0] * 10
    assert sorted(weights["permuted"]) == pytest.approx(sorted(weights["request"]), rel=1e-5)
    assert weights["permuted"] != pytest.approx(weights["request"], rel=1e-3)
    assert len({tuple(norms[c]) for c in CONTROLS}) == 4, "four different runs"
