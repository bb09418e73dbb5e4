"""A tiny BERT with LoRA in the Hugging Face Trainer, which sees its batches in the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fwlora import FWLoraConfig

STEPS = 10
BATCH = 4
CONFIG = FWLoraConfig(warmup_steps=4, fisher_ema_decay=0.5, penalty_strength=0.5)


def bert() -> nn.Module:
    torch.manual_seed(0)
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


def rows() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 50, (6,), generator=g), "labels": int(torch.randint(0, 2, (), generator=g))}
        for _ in range(STEPS * BATCH)
    ]


class InOrder(Trainer):
    """The Trainer without shuffling, so that a plain loop sees the same batches."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def trainer_of(
    folder: Path,
    model: nn.Module | None,
    callback: Any,
    kind: type[Trainer] = InOrder,
    model_init: Any = None,
    **more: Any,
) -> Trainer:
    """A Trainer that takes STEPS steps on the CPU and reports to no tracker; `more` are TrainingArguments."""
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    args = TrainingArguments(**{**settings, **more})
    data = cast(Any, rows())
    trainer = kind(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=[callback], model_init=model_init)
    # BERT's loss is a micro-batch's mean whatever it is told. The Trainer takes it for one that is divided already, and
    # would add up the means of a step's micro-batches.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def adapters(model: nn.Module | None) -> dict[str, Tensor]:
    assert model is not None
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def hooks(model: nn.Module) -> int:
    """How many forward hooks are on the model's modules."""
    return sum(len(m._forward_hooks) for m in model.modules())
