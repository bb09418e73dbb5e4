"""The Hugging Face Trainer with FWLoraCallback trains what a plain loop trains, and resumes.

pytest tests/fwlora/test_callback.py
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fwlora
from fwlora import FWLoraCallback, FWLoraConfig

STEPS = 10
CONFIG = FWLoraConfig(warmup_steps=4, fisher_ema_decay=0.5, penalty_strength=0.5)


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))


def rows(n: int = 4 * STEPS) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(0, 50, (6,), generator=g),
            "labels": int(torch.randint(0, 2, (), generator=g)),
        }
        for _ in range(n)
    ]


class InOrder(Trainer):
    """The Trainer without shuffling, so that a plain loop sees the same batches."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def train(folder, model, callback, **more):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_steps=1000,
    )
    args = TrainingArguments(**{**settings, **more})
    trainer = InOrder(model, args, train_dataset=cast(Any, rows()), callbacks=[callback])
    return trainer


def adapters_of(model) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "lora_" in n]


def adapters(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_trainer_equals_a_plain_loop(tmp_path):
    model = bert()
    callback = FWLoraCallback(CONFIG)
    trainer = train(tmp_path, model, callback)
    trainer.train()
    assert callback.handle is not None and callback.handle.phase == "penalty"
    logged = [entry for entry in trainer.state.log_history if "fw_lora_penalty" in entry]
    assert len(logged) >= STEPS - CONFIG.warmup_steps and logged[-1]["fw_lora_penalty"] > 0

    plain = bert().train()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    handle = fwlora.attach(plain, optimizer, CONFIG)
    data = rows()
    for i in range(STEPS):
        part = data[4 * i : 4 * i + 4]
        ids = torch.stack([r["input_ids"] for r in part])
        plain(input_ids=ids, labels=torch.tensor([r["labels"] for r in part])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert callback.handle.fisher() == pytest.approx(handle.fisher(), rel=1e-4)
    ours = adapters(plain)
    for name, value in adapters(model).items():
        torch.testing.assert_close(value, ours[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 6])
def test_trainer_resumes_from_a_checkpoint(tmp_path, stop):
    whole = bert()
    train(tmp_path / "whole", whole, FWLoraCallback(CONFIG)).train()
    train(tmp_path / "part", bert(), FWLoraCallback(CONFIG), save_steps=stop).train()
    resumed = bert()
    with torch.no_grad():  # the checkpoint must bring the adapters
        for p in adapters_of(resumed):
            p.normal_()
    callback = FWLoraCallback(CONFIG)
    trainer = train(tmp_path / "part", resumed, callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{stop}"))
    want = adapters(whole)
    for name, value in adapters(resumed).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-7)


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    train(tmp_path, bert(), FWLoraCallback(CONFIG), save_steps=5).train()
    (tmp_path / "checkpoint-5" / "fwlora.pt").unlink()
    trainer = train(tmp_path, bert(), FWLoraCallback(CONFIG))
    with pytest.raises(ValueError, match="fwlora.pt is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_warmup_that_fills_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only 10 optimizer steps"):
        train(tmp_path, bert(), FWLoraCallback(FWLoraConfig(warmup_steps=500))).train()
