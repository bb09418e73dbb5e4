"""Packed batches compute what padded batches compute.

pytest tests/fwlora_lab/lanes/test_packing.py
"""

from __future__ import annotations

import pytest
import torch
from lane_runs import (
    F64,
    KINDS,
    RUNS,
    SHAPE,
    World,
    batch_of,
    classifier,
    equal_lane,
    initial,
    settings,
    shaped,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)

from fwlora_lab.data.tokens import collate
from fwlora_lab.lanes.attention import attention
from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.packing import Packed, pack, pack_shaped, shape_of


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, scaling: float, packed: Packed, **__
) -> tuple[Tensor, None]:
    """The engine's attention as transformers' own layers call it: [E, heads, N, d_head] -> [E, N, heads, d_head]."""
    lanes, heads, n, width = query.shape
    tokens = torch.stack((query, key, value), 1).permute(0, 3, 1, 2, 4).reshape(lanes, n, -1)
    return attention(tokens, None, packed, heads, scaling).view(lanes, n, heads, width), None


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_,
    scaling: float,
    packed: Packed,
    sliding_window: int | None = None,
    **__,
) -> tuple[Tensor, None]:
    """The same in plain PyTorch from the blocks of `packed`, for a model with a sliding window.

    The engine supports no such model; this shows that the blocks hold each sentence's tokens in their order.
    """
    lanes, heads, n, width = query.shape
    flat = [part.transpose(1, 2).reshape(lanes * n, heads, width) for part in (query, key, value)]
    results = []
    for block in packed.blocks:
        q, k, v = (part[block.token_index].transpose(1, 2) for part in flat)  # [S, heads, T, d_head]
        position = torch.arange(q.shape[2])
        seen = block.is_token[:, None, None, :]
        if sliding_window is not None:
            seen = seen & ((position[:, None] - position).abs() < sliding_window)
        scores = (q @ k.mT * scaling).masked_fill(~seen, float("-inf"))
        # Padding in a block may be out of sight of every token of its sentence: its rows are not used.
        results.append((scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1))
    return torch.cat(results)[packed.from_blocks].view(lanes, n, heads, width), None


for name, function in (("test_packed", packed_attention), ("test_windowed", windowed_attention)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *_, **__: None)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_packed_is_padded(kind, table):
    torch.manual_seed(0)
    config, model, offset, pad = {
        "bert": (BertConfig(**SHAPE), BertModel, 0, 0),
        "roberta": (RobertaConfig(**SHAPE, pad_token_id=1, type_vocab_size=2), RobertaModel, 2, 1),
        # A window much narrower than the sentences: who sees whom must be right there, too.
        "modernbert": (
            ModernBertConfig(**{**SHAPE, "num_hidden_layers": 4}, local_attention=8, pad_token_id=0),
            ModernBertModel,
            0,
            0,
        ),
    }[kind]
    encoder = model(config).double().eval()
    with torch.no_grad():  # far from the initialisation, where every output looks alike
        for p in encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    batches = [torch.arange(0, 13), torch.arange(13, 64)]
    packed = pack(table, batches, F64)
    assert packed.tokens.shape[1] == max(packed.token_counts) == int(table.lengths()[13:].sum())
    want = []
    for b in batches:
        batch = collate(table, b, pad, "longest", 64)
        del batch["labels"]
        if kind == "modernbert":
            del batch["token_type_ids"]
        want.append(encoder(**batch).last_hidden_state[:, 0])
    encoder.config._attn_implementation = "test_windowed" if kind == "modernbert" else "test_packed"
    types = {} if kind == "modernbert" else {"token_type_ids": packed.types}
    hidden = encoder(
        input_ids=packed.tokens, position_ids=packed.positions + offset, packed=packed, **types
    ).last_hidden_state
    first = hidden.reshape(-1, 16)[packed.first_token]
    for e, w in enumerate(want):
        assert_close(first[e, : len(w)], w, rtol=1e-9, atol=1e-11)


def test_the_least_shape_holds_every_batch(table):
    batches = [torch.arange(0, 13), torch.arange(13, 64)]
    shape = shape_of(table, batches)
    assert shape.tokens % 64 == 0 and shape.sentences == 51 and shape.width == 32
    longest = int(table.lengths()[13:].sum())
    assert longest <= shape.tokens < longest + 64
    packed = pack_shaped(table, batches, shape, F64)
    assert packed.tokens.view(-1)[packed.is_token].tolist() == [*table.tokens.tolist()]
    assert packed.weights.sum(1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_shape_computes_the_same(kind, table):
    """Without dropout, where nothing is drawn: every kind of lane, with room to spare in each batch."""
    world = World(kind, table)
    table = world.table
    which = range(len(RUNS))
    ragged, one = world.lanes(which), world.lanes(which)
    for step in range(15):
        batches = [batch_of(table, i, step) for i in which]
        rates = [RUNS[i][1] for i in which]
        want = ragged.step(pack(table, batches, F64), rates)
        assert_close(one.step(shaped(table, which, step), rates), want, rtol=1e-9, atol=1e-11)
    for i in which:
        equal_lane(one, i, ragged, i)
        assert one.fisher_of(i) == pytest.approx(ragged.fisher_of(i), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_each_examples_logits_and_adapter_gradients_are_those_of_a_padded_batch(kind, table):
    """In fp32, to 1e-5: the loss is one example's, the batch holds its neighbours."""
    from peft import LoraConfig, get_peft_model

    world = World(kind, table)
    table = world.table
    adapters, head = initial(classifier(kind), world.targets, 4, 0)
    engine = LaneEngine(classifier(kind).float(), world.targets, 1, 4)
    engine.admit(settings(4, world.targets), adapters, head)
    model = classifier(kind).float().eval()
    with torch.no_grad():
        for name, value in head.items():
            model.get_parameter(name).copy_(value)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=world.targets))
    for name, (a, b) in adapters.items():
        layer = peft.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    index = torch.arange(0, 9)
    batch = collate(table, index, model.config.pad_token_id, "longest", 64)
    labels = batch.pop("labels")
    padded = peft.eval()(**batch).logits
    packed = engine.logits(pack(table, [index]))[0]
    assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    for i in range(len(index)):
        peft.zero_grad()
        engine.buffers.grads.zero_()
        cross_entropy(padded[i : i + 1], labels[i : i + 1]).backward(retain_graph=True)
        cross_entropy(packed[i : i + 1], labels[i : i + 1]).backward(retain_graph=True)
        for m, name in enumerate(engine.targets):
            layer = peft.base_model.model.get_submodule(name)
            a, b = engine.buffers.layout.factors(engine.buffers.grads, m)
            assert_close(a[0], layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
            assert_close(b[0].T, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)
