"""Budgets, rank patterns and counts: `pytest tests/fwlora/test_budget.py`."""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fwlora.budget import Counts, Matrix, count, lora_kwargs, matrices, parameters_of_percent, rank_pattern

ROBERTA_BASE = 124_645_632
ATTENTION = ["query", "key", "value"]
FFN = ["intermediate.dense"]


def roberta_targets(layers: int, attention_output: bool, prefix: str = "") -> list[str]:
    ends = ["attention.self." + name for name in ATTENTION] + [*FFN, "output.dense"]
    ends += ["attention.output.dense"] if attention_output else []
    return [f"{prefix}encoder.layer.{i}.{end}" for i in range(layers) for end in ends]


def used(found: list[Matrix], pattern: dict[str, int]) -> int:
    return sum(pattern[m.name] * m.cost for m in found)


@pytest.fixture(scope="module")
def roberta_base() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


# ------------------------------------------------------------------ the figures of roberta-base


@pytest.mark.parametrize(
    ("attention_output", "matrices_", "unit", "percents"),
    [
        (False, 60, 147_456, {1: 0.118, 2: 0.237, 4: 0.473, 8: 0.946, 16: 1.893}),
        (True, 72, 165_888, {1: 0.133, 2: 0.266, 4: 0.532, 8: 1.065, 16: 2.129}),
    ],
)
def test_uniform_ranks_of_roberta_base(roberta_base, attention_output, matrices_, unit, percents):
    assert sum(p.numel() for p in roberta_base.parameters()) == ROBERTA_BASE
    found = matrices(roberta_base, roberta_targets(12, attention_output))
    assert len(found) == matrices_
    assert {m.cost for m in found} == {1_536, 3_840}
    assert sum(m.cost for m in found) == unit
    for rank, percent in percents.items():
        assert round(100 * rank * unit / ROBERTA_BASE, 3) == percent
        exact = rank_pattern(found, rank * unit)
        assert set(exact.values()) == {rank}
        assert min(rank_pattern(found, rank * unit - 1).values()) == rank - 1


@pytest.mark.parametrize("attention_output", [False, True])
@pytest.mark.parametrize(("percent", "budget"), [(0.1, 124_645), (0.2, 249_291), (0.5, 623_228)])
def test_budgets_of_roberta_base(roberta_base, percent, budget, attention_output):
    assert parameters_of_percent(percent, ROBERTA_BASE) == budget
    found = matrices(roberta_base, roberta_targets(12, attention_output))
    pattern = rank_pattern(found, budget)
    assert 0.9975 * budget <= used(found, pattern) <= budget
    assert max(pattern.values()) - min(pattern.values()) <= 1
    assert list(pattern) == [m.name for m in found]


def test_one_tenth_percent_of_roberta_base_by_hand(roberta_base):
    found = matrices(roberta_base, roberta_targets(12, False))
    pattern = rank_pattern(found, 124_645)
    ffn = [pattern[m.name] for m in found if m.cost == 3_840]
    attention = [pattern[m.name] for m in found if m.cost == 1_536]
    assert (len(ffn), sum(ffn), len(attention), sum(attention)) == (24, 20, 36, 31)
    assert used(found, pattern) == 124_416
    # Even over depth: the four missing of 24 stand six apart, the five of 36 seven or eight.
    for ranks, gaps in ((ffn, {6}), (attention, {7, 8})):
        missing = [i for i, rank in enumerate(ranks) if rank == 0]
        assert {b - a for a, b in itertools.pairwise(missing)} <= gaps


def test_roberta_base_with_adapters_and_head_on_the_meta_device():
    config = transformers.RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)  # type: ignore[call-arg]
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        pattern = rank_pattern(matrices(model, roberta_targets(12, False, "roberta.")), 124_645)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **lora_kwargs(pattern, 2.0)))
    counts = count(wrapped)
    assert counts.adapters == 124_416
    assert counts.head == 592_130
    # The classifier has no pooler (590,592), which the figure for the bare encoder includes.
    assert counts.backbone == ROBERTA_BASE - 590_592
    assert counts.trainable == counts.adapters + counts.head
    assert counts.percent == pytest.approx(100 * 124_416 / counts.backbone, rel=1e-12)


def test_percent_is_read_as_written():
    assert parameters_of_percent(0.29, 10_000) == 29  # 0.29 / 100 * 10_000 == 28.999999999999996
    assert parameters_of_percent(0.57, 10_000) == 57
    assert parameters_of_percent(100, 7) == 7
    assert parameters_of_percent(1e-4, 10**9) == 1_000


# ------------------------------------------------------------------------- properties of patterns


def kinds_of(found: list[Matrix]) -> dict[int, list[str]]:
    kinds: dict[int, list[str]] = {}
    for m in found:
        kinds.setdefault(m.cost, []).append(m.name)
    return kinds


def brute_force(costs: list[int], counts: list[int], room: int) -> tuple[int, float]:
    """Largest fill, and the least unequal shares among all fills of that size."""
    options = {}
    for taken in itertools.product(*(range(n + 1) for n in counts)):
        options.setdefault(sum(c * t for c, t in zip(costs, taken, strict=True)), []).append(taken)
    fill = max(total for total in options if total <= room)
    return fill, min(unequal(costs, counts, taken) for taken in options[fill])


def unequal(costs, counts, taken) -> float:
    fill = sum(c * t for c, t in zip(costs, taken, strict=True))
    share = fill / sum(c * n for c, n in zip(costs, counts, strict=True))
    return sum(n * (t / n - share) ** 2 for n, t in zip(counts, taken, strict=True))


@st.composite
def small_problems(draw):
    # Sizes in steps of 8, as real models have them, give many patterns of equal size.
    step, top = draw(st.sampled_from([(1, 40), (8, 5)]))
    size = st.integers(max(1, 5 // step), top).map(lambda i: i * step)
    shapes = draw(st.lists(st.tuples(size, size), min_size=1, max_size=4))
    layers = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=22))
    found = [Matrix(f"layer.{i}", *shape) for i, shape in enumerate(layers)]
    cheapest = min(m.cost for m in found)
    return found, draw(st.integers(cheapest, 5 * sum(m.cost for m in found)))


@settings(max_examples=300, deadline=None)
@given(small_problems())
def test_pattern_is_the_best_near_uniform_one(problem):
    found, budget = problem
    pattern = rank_pattern(found, budget)
    assert rank_pattern(list(found), budget) == pattern
    assert max(pattern.values()) - min(pattern.values()) <= 1
    assert used(found, pattern) <= budget

    base, left = divmod(budget, sum(m.cost for m in found))
    assert set(pattern.values()) <= {base, base + 1}
    kinds = kinds_of([m for m in found if base < min(m.in_features, m.out_features)])
    costs, counts = list(kinds), [len(names) for names in kinds.values()]
    taken = [sum(pattern[name] - base for name in names) for names in kinds.values()]
    fill, least = brute_force(costs, counts, left) if kinds else (0, 0.0)
    assert used(found, pattern) == base * sum(m.cost for m in found) + fill
    if kinds:
        assert unequal(costs, counts, taken) <= least + 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_many_kinds_get_the_most_equal_shares_of_a_full_budget(seed):
    rng = random.Random(seed)
    kinds = 6 + seed % 5
    costs = [8 * c for c in rng.sample(range(4, 30), kinds)]
    counts = [rng.randint(1, 9) for _ in costs]
    found = [
        Matrix(f"{cost}.{i}", cost - 8, 8) for cost, number in zip(costs, counts, strict=True) for i in range(number)
    ]
    total = sum(m.cost for m in found)
    pattern = rank_pattern(found, int(rng.uniform(0.2, 0.8) * total))
    fill = used(found, pattern)
    taken = [sum(pattern[name] for name in names) for names in kinds_of(found).values()]
    # Oracle: the least inequality for every reachable sum, kind after kind.
    least = {0: 0.0}
    for cost, number in zip(costs, counts, strict=True):
        grown: dict[int, float] = {}
        for (total_, value), t in itertools.product(least.items(), range(number + 1)):
            new = total_ + t * cost
            if new <= fill:
                value_ = value + number * (t / number - fill / total) ** 2
                grown[new] = min(grown.get(new, math.inf), value_)
        least = grown
    assert unequal(costs, counts, taken) == pytest.approx(least[fill], abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.data())
def test_extras_of_one_kind_are_evenly_spread(n, data):
    extra = data.draw(st.integers(1, n))
    found = [Matrix(f"layer.{i}", 8, 8) for i in range(n)]
    ranks = list(rank_pattern(found, 16 * extra).values())
    assert sum(ranks) == extra
    # Any two windows of one length hold numbers that differ by at most one: the definition of even.
    sums = [0, *itertools.accumulate(ranks)]
    for width in range(1, n + 1):
        windows = [sums[i + width] - sums[i] for i in range(n - width + 1)]
        assert max(windows) - min(windows) <= 1


def test_pattern_depends_on_the_order_of_layers_only_not_on_names():
    shapes = [(8, 8), (8, 24)] * 6
    one = rank_pattern([Matrix(f"a.{i}", *s) for i, s in enumerate(shapes)], 150)
    two = rank_pattern([Matrix(f"z.{-i}", *s) for i, s in enumerate(shapes)], 150)
    assert list(one.values()) == list(two.values())


@pytest.mark.parametrize("unit", [1, 8, 64, 128])
def test_hundreds_of_matrices_of_six_kinds_are_quick(unit):
    rng = random.Random(unit)
    top = 8192 // unit
    shapes = [(unit * rng.randint(top // 32, top), unit * rng.randint(top // 32, top)) for _ in range(6)]
    found = [Matrix(f"layer.{i}", *rng.choice(shapes)) for i in range(500)]
    total = sum(m.cost for m in found)
    seconds = []
    for share in (0.07, 0.31, 0.93, 2.43):
        start = time.perf_counter()
        pattern = rank_pattern(found, int(share * total))
        seconds.append(time.perf_counter() - start)
        assert 0.9975 * share * total <= used(found, pattern) <= share * total
    assert sorted(seconds)[1] < 0.05  # not the slowest: the machine may be busy with other work


def test_dozens_of_kinds_end_in_a_full_pattern():
    rng = random.Random(0)
    found = [Matrix(f"layer.{i}", rng.randint(50, 900), rng.randint(50, 900)) for i in range(60)]
    budget = sum(m.cost for m in found) * 3 // 5
    start = time.perf_counter()
    pattern = rank_pattern(found, budget)
    assert time.perf_counter() - start < 2
    assert used(found, pattern) == budget  # sixty free choices reach every sum in the middle


def test_a_full_matrix_keeps_its_rank_while_others_get_one_more():
    found = [Matrix("thin", 2, 30), Matrix("wide", 20, 20), Matrix("wider", 20, 20)]
    assert rank_pattern(found, 2 * 112 + 80) == {"thin": 2, "wide": 3, "wider": 3}


# ------------------------------------------------------------------------------------- refusals

PAIR = [Matrix("up", 4, 12), Matrix("down", 12, 4)]


@pytest.mark.parametrize(
    ("found", "budget", "message"),
    [
        ([], 100, "no matrix"),
        (PAIR, 15, "rank 1 of the cheapest matrix costs 16"),
        (PAIR, 0, "buys no adapter"),
        (PAIR, -32, "buys no adapter"),
        (PAIR, math.nan, "budget is nan; it must be a whole number"),
        (PAIR, math.inf, "budget is inf"),
        (PAIR, 64.0, "parameters_of_percent"),
        (PAIR, "64", "whole number"),
        (PAIR, True, "whole number"),
        (PAIR, 5 * 32, r"up \(4 -> 12\) holds at most 4; stay below 160 "),
        ([*PAIR, PAIR[0]], 64, "listed twice"),
        ([Matrix("empty", 0, 8)], 64, "empty is 0 -> 8"),
    ],
)
def test_impossible_budgets_are_refused(found, budget, message):
    with pytest.raises(ValueError, match=message):
        rank_pattern(found, budget)


def test_the_largest_budget_named_by_the_refusal_is_accepted():
    assert rank_pattern(PAIR, 5 * 32 - 1) == {"up": 4, "down": 4}


@pytest.mark.parametrize("percent", [0, -0.1, math.nan, math.inf, "0.1", None, True])
def test_impossible_percentages_are_refused(percent):
    with pytest.raises(ValueError, match="percent is"):
        parameters_of_percent(percent, 1_000)


@pytest.mark.parametrize("backbone", [0, -5, 1e6, math.nan])
def test_impossible_backbones_are_refused(backbone):
    with pytest.raises(ValueError, match="backbone_parameters is"):
        parameters_of_percent(0.1, backbone)


@pytest.mark.parametrize(
    ("pattern", "scale", "message"),
    [
        ({}, 1.0, "every rank"),
        ({"a": 0}, 1.0, "every rank"),
        ({"a": -1}, 1.0, "rank of a is -1"),
        ({"a": 1.5}, 1.0, "rank of a is 1.5"),
        ({"a": True}, 1.0, "rank of a is True"),
        ({"a": 1}, 0.0, "scale is 0.0"),
        ({"a": 1}, math.nan, "scale is nan"),
        ({"a": 1}, -2, "scale is -2"),
    ],
)
def test_impossible_patterns_are_refused(pattern, scale, message):
    with pytest.raises(ValueError, match=message):
        lora_kwargs(pattern, scale)


# ----------------------------------------------------------------------------- matrices of a model


def tiny(kind: str) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    common: dict[str, Any] = dict(vocab_size=60, num_labels=3)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=12, n_layer=3, n_head=2, n_positions=24, pad_token_id=0, **common)
        ends = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        names = [f"transformer.h.{i}.{end}" for i in range(3) for end in ends]
    else:
        make = {"roberta": transformers.RobertaConfig, "bert": transformers.BertConfig}[kind]
        config = make(
            hidden_size=12,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=30,
            max_position_embeddings=24,
            **common,
        )
        names = roberta_targets(4, True, kind + ".")
    return transformers.AutoModelForSequenceClassification.from_config(config), names


def test_conv1d_is_read_in_the_right_direction():
    model, names = tiny("gpt2")
    found = {m.name: m for m in matrices(model, names)}
    assert found["transformer.h.1.attn.c_attn"] == Matrix("transformer.h.1.attn.c_attn", 12, 36)
    assert found["transformer.h.1.mlp.c_proj"] == Matrix("transformer.h.1.mlp.c_proj", 48, 12)
    assert found["transformer.h.1.mlp.c_proj"].cost == 60


def test_names_may_be_suffixes_and_come_in_the_models_order():
    model, names = tiny("roberta")
    found = [m.name for m in matrices(model, ["value", "attention.self.query", "value"])]
    wanted = [name for name in names if name.endswith(("query", "value"))]
    assert found == wanted
    assert [m.name for m in matrices(model, names[::-1])] == sorted(names, key=_by_layer(model))


def test_a_suffix_begins_after_a_dot():
    assert [m.name for m in matrices(Nested(), ["q"])] == ["block.q", "twin.block.q"]


def _by_layer(model):
    return {name: i for i, (name, _) in enumerate(model.named_modules())}.__getitem__


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["qeury"], "no module is called 'qeury'; the nearest name is 'query'"),
        (["roberta.encoder.layer.9.attention.self.query"], "nearest name is 'roberta.encoder.lay"),
        (["intermediate"], "RobertaIntermediate, neither Linear nor Conv1D"),
        (["word_embeddings"], "Embedding, neither"),
        (["zzzzzzzzzzz"], "named_modules"),
        ("query", "single string"),
    ],
)
def test_unusable_names_are_refused(names, message):
    model, _ = tiny("roberta")
    with pytest.raises(ValueError, match=re.escape(message)):
        matrices(model, names)


def test_a_model_with_adapters_is_refused():
    model, _ = tiny("roberta")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="already carries an adapter"):
        matrices(model, ["query"])


# ----------------------------------------------------------------------------- real PEFT models


def lora_layers(model: nn.Module) -> dict[str, Any]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def assert_pattern(model: nn.Module, pattern: dict[str, int], scale: float) -> None:
    layers = lora_layers(model)
    assert set(layers) == {name for name, rank in pattern.items() if rank}
    for name, layer in layers.items():
        assert layer.r["default"] == pattern[name]
        assert layer.lora_A["default"].weight.shape == (pattern[name], layer.in_features)
        assert layer.lora_B["default"].weight.shape == (layer.out_features, pattern[name])
        assert layer.scaling["default"] == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize("kind", ["roberta", "bert", "gpt2"])
@pytest.mark.parametrize("units", [0.2, 0.6, 1.0, 2.7])
@pytest.mark.parametrize("scale", [2.0, 0.37])
def test_peft_builds_saves_and_loads_exactly_the_pattern(kind, units, scale, tmp_path):
    model, names = tiny(kind)
    total_before = sum(p.numel() for p in model.parameters())
    found = matrices(model, names)
    budget = int(units * sum(m.cost for m in found))
    pattern = rank_pattern(found, budget)
    if units < 1:
        assert 0 in pattern.values()
    config = peft.LoraConfig(task_type="SEQ_CLS", fan_in_fan_out=kind == "gpt2", **lora_kwargs(pattern, scale))
    wrapped: Any = peft.get_peft_model(model, config)
    assert_pattern(wrapped, pattern, scale)

    counts = count(wrapped)
    assert counts.adapters == used(found, pattern) <= budget
    head = wrapped.base_model.model.score if kind == "gpt2" else wrapped.base_model.model.classifier
    assert counts.head == sum(p.numel() for p in head.modules_to_save["default"].parameters())
    assert counts.backbone == total_before - counts.head
    assert counts.trainable == counts.adapters + counts.head

    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    wrapped.eval()
    ids = torch.randint(1, 60, (3, 7))
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(kind)[0], tmp_path).eval()
    assert_pattern(again, pattern, scale)
    torch.testing.assert_close(again(input_ids=ids).logits, wrapped(input_ids=ids).logits)
    assert count(again) == Counts(counts.backbone, counts.adapters, counts.head, 0)


class Nested(nn.Module):
    """One name is the end of another; a careless pattern takes the third for the first."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.block = nn.ModuleDict({"q": nn.Linear(width, width)})
        self.twin: Any = nn.ModuleDict({"block": nn.ModuleDict({"q": nn.Linear(width, width)})})
        self.blockXq = nn.Linear(width, width)

    def forward(self, x):
        return self.blockXq(self.twin["block"]["q"](self.block["q"](x)))


@pytest.mark.parametrize(
    "pattern",
    [
        {"block.q": 2, "twin.block.q": 0, "blockXq": 1},
        {"block.q": 0, "twin.block.q": 3, "blockXq": 3},
        {"block.q": 1, "twin.block.q": 3, "blockXq": 2},
        {"block.q": 3, "twin.block.q": 1, "blockXq": 0},
    ],
)
def test_names_that_end_alike_keep_their_own_ranks(pattern, tmp_path):
    wrapped = peft.get_peft_model(Nested(), peft.LoraConfig(**lora_kwargs(pattern, 0.5)))
    assert_pattern(wrapped, pattern, 0.5)
    wrapped.save_pretrained(tmp_path)
    assert_pattern(peft.PeftModel.from_pretrained(Nested(), tmp_path), pattern, 0.5)


def test_keys_are_anchored_whole_names():
    kwargs = lora_kwargs({"a.0.q": 2, "a.1.q": 1, "a.2.q": 0}, 4)
    assert kwargs == {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["a.0.q", "a.1.q"],
        "rank_pattern": {r"^a\.1\.q": 1},
        "alpha_pattern": {r"^a\.1\.q": 4},
    }


# ------------------------------------------------------------------------------------- counting


def test_adalora_counts_its_three_factors_and_not_its_rank_counter():
    model, names = tiny("roberta")
    total = sum(p.numel() for p in model.parameters())
    found = matrices(model, names)
    wrapped = peft.get_peft_model(
        model,
        peft.AdaLoraConfig(
            task_type="SEQ_CLS", init_r=3, target_r=2, tinit=1, tfinal=2, total_step=10,
            target_modules=names,
        ),
    )  # fmt: skip
    counts = count(wrapped)
    assert counts.adapters == 3 * sum(m.cost + 1 for m in found)
    assert counts.backbone == total - counts.head
    assert counts.trainable == counts.adapters + counts.head


def test_inactive_adapters_and_their_heads_are_not_counted():
    model, _ = tiny("bert")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    before = count(wrapped)
    wrapped.add_adapter("other", peft.LoraConfig(task_type="SEQ_CLS", r=5, target_modules=["key"]))
    assert count(wrapped) == before
    wrapped.set_adapter("other")
    other = count(wrapped)
    assert other.adapters == 4 * 5 * 24
    assert (other.backbone, other.head) == (before.backbone, before.head)


def test_a_head_that_is_unfrozen_by_hand_is_a_head():
    model, names = tiny("roberta")
    saved = count(peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=1,
                                                             target_modules=names)))  # fmt: skip
    model, names = tiny("roberta")
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=names))
    wrapped.base_model.model.classifier.requires_grad_(True)
    assert count(wrapped) == saved


def test_tied_tensors_count_once_and_stay_in_the_backbone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 10, bias=False)
            self.mix = nn.Linear(4, 4, bias=False)
            self.embed = nn.Embedding(10, 4)
            self.embed.weight = self.head.weight

    wrapped = peft.get_peft_model(Tied(), peft.LoraConfig(r=1, target_modules=["mix"], modules_to_save=["head"]))
    assert count(wrapped) == Counts(backbone=40 + 16, adapters=8, head=40, trainable=48)


def test_dora_magnitudes_are_adapter_parameters():
    model, names = tiny("roberta")
    found = matrices(model, names)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, use_dora=True, target_modules=names))
    assert count(wrapped).adapters == sum(2 * m.cost + m.out_features for m in found)


def test_packed_4bit_weights_count_their_true_elements():
    bnb = pytest.importorskip("bitsandbytes")

    def model(linear) -> Any:
        return nn.Sequential(linear(64, 128), nn.ReLU(), linear(128, 64)).to("cpu")

    plain = model(nn.Linear)
    packed = model(bnb.nn.Linear4bit)
    assert packed[0].weight.numel() == 64 * 128 // 2, "the weight is not packed: nothing is tested"
    assert matrices(packed, ["0", "2"]) == matrices(plain, ["0", "2"])
    pattern = {"0": 2, "2": 3}
    one, two = (count(peft.get_peft_model(m, peft.LoraConfig(**lora_kwargs(pattern, 2.0)))) for m in (plain, packed))
    assert one == two
    assert one.backbone == 2 * 64 * 128 + 128 + 64
    for layer in (packed[0], packed[2]):  # the layer's own shape serves where the state is absent
        layer.base_layer.weight.quant_state = None
    assert count(packed) == two


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no active adapter"):
        count(nn.Linear(3, 3))
