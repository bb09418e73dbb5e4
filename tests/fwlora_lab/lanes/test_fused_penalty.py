"""The penalty's fused kernel against batched products, in Triton's interpreter: no GPU is needed.

pytest tests/fwlora_lab/lanes/test_fused_penalty.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA only; `pip install triton` for this test")

CODE = """
import torch
from transformers import BertConfig, BertForSequenceClassification
from fwlora import FWLoraConfig
from fwlora_lab.lanes.buffers import FactorStacks
from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.settings import LaneSettings

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=136)
model = BertForSequenceClassification(config)
targets = [n for n, m in model.named_modules() if n.endswith(("query", "value", "intermediate.dense"))]
for rank in (1, 5, 20):
    engine = LaneEngine(BertForSequenceClassification(config), targets, 3, rank)
    for e in range(3):
        fw = FWLoraConfig(penalty_strength=0.1)
        settings = LaneSettings(dict.fromkeys(targets, rank), 2.0, 0.0, 0.0, None, e, fw=fw, warmup_steps=1)
        engine.admit(settings, {}, {})
    buffers, penalty = engine.buffers, engine.penalty
    buffers.values.normal_()
    buffers.coefficients["update"].uniform_(0.5, 2.0)
    buffers.coefficients["update"][1] = 0.0
    buffers.grads.normal_()
    before = buffers.grads.clone()
    penalty.add_stacked("update", FactorStacks(buffers), torch.zeros(3, 1))
    stacked = buffers.grads.clone()
    buffers.grads.copy_(before)
    penalty.add_fused()
    torch.testing.assert_close(buffers.grads, stacked, rtol=1e-4, atol=1e-4)
    assert torch.equal(buffers.grads[1], before[1]), "a lane without a penalty"
    size = buffers.layout.adapter_size
    assert torch.equal(buffers.grads[:, size:], before[:, size:]), "the heads"
    assert not torch.allclose(stacked[0], before[0])
"""


def test_the_fused_kernel_adds_what_batched_products_add():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
