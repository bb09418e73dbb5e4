"""The penalty's one kernel against the plain path, its oracle, in Triton's interpreter: no GPU is needed.

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
from fwlora_lab.lanes.engine import Lanes
from fwlora_lab.lanes.settings import LaneSettings

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=136)
model = BertForSequenceClassification(config)
targets = [n for n, m in model.named_modules() if n.endswith(("query", "value", "intermediate.dense"))]
for rank in (1, 5, 20):
    engine = Lanes(BertForSequenceClassification(config), targets, 3, rank)
    for e in range(3):
        fw = FWLoraConfig(penalty_strength=0.1)
        settings = LaneSettings(dict.fromkeys(targets, rank), 2.0, 0.0, 0.0, None, e, fw=fw, warmup_steps=1)
        engine.admit(settings, {}, {})
    engine.values.normal_()
    engine.coefficients[0].uniform_(0.5, 2.0)
    engine.coefficients[0, 1] = 0.0
    engine.grads.normal_()
    before = engine.grads.clone()
    stacks = engine._stacks()
    engine._shrink(0, stacks, engine._grams(stacks), torch.zeros(3, 1))
    plain = engine.grads.clone()
    engine.grads.copy_(before)
    engine._shrink_fused()
    torch.testing.assert_close(engine.grads, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(engine.grads[1], before[1]), "a lane without a penalty"
    assert torch.equal(engine.grads[:, engine.adapter_size :], before[:, engine.adapter_size :]), "the heads"
    assert not torch.allclose(plain[0], before[0])
"""


def test_one_kernel_adds_what_the_plain_path_adds():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
