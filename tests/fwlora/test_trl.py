"""TRL's SFTTrainer and DPOTrainer train with Fisher-Weighted LoRA what its definition says.

The oracle is the same trainer without fwlora: the frozen matrices have gradients there, so that F is the average of
their squared norms, and the penalty is a term of the loss, whose gradient is autograd's.

pytest tests/fwlora/test_trl.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import fwlora
from fwlora import FWLoraCallback, FWLoraConfig

trl = pytest.importorskip("trl", reason="trl is in the extra dev")
datasets = pytest.importorskip("datasets", reason="trl needs it")

STEPS = 6
CONFIG = FWLoraConfig(warmup_steps=3, fisher_ema_decay=0.5, penalty_strength=0.5)
LORA = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
WORDS = [f"w{i}" for i in range(30)]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(WORDS) + 3,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).double()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def texts() -> Any:
    rng = random.Random(0)
    return datasets.Dataset.from_list(
        [{"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 8)))} for _ in range(2 * STEPS)]
    )


def preferences() -> Any:
    rng = random.Random(0)

    def some(k: int) -> str:
        return " " + " ".join(rng.choices(WORDS, k=k))

    return datasets.Dataset.from_list(
        [{"prompt": some(3), "chosen": some(4), "rejected": some(5)} for _ in range(2 * STEPS)]
    )


def settings(folder: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


class Oracle:
    """Mixed into a trainer: F from the gradients of the matrices themselves, and the penalty in the loss."""

    def measure_and_penalize(self: Any) -> None:
        self.layers = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A")
        }
        self.fisher = dict.fromkeys(self.layers, 0.0)
        self.counted = 0
        chosen = [p for n, p in self.model.named_parameters() if "lora_" in n and p.requires_grad]
        self.optimizer = torch.optim.AdamW(chosen, lr=self.args.learning_rate, weight_decay=0.0)
        for layer in self.layers.values():
            layer.base_layer.weight.requires_grad_(True)
        outer = self

        class Average(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                if outer.counted < CONFIG.warmup_steps:
                    for name, layer in outer.layers.items():
                        f = float(layer.base_layer.weight.grad.square().sum())
                        alpha = CONFIG.fisher_ema_decay
                        outer.fisher[name] = alpha * outer.fisher[name] + (1.0 - alpha) * f
                outer.counted += 1

        self.add_callback(Average())

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        if self.counted < CONFIG.warmup_steps:
            return loss
        total = sum(self.fisher.values())
        for name, layer in self.layers.items():
            weight = 1.0 - self.fisher[name] / total
            update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            loss = loss + CONFIG.penalty_strength * weight * update.square().sum()
        return loss


class SFTOracle(Oracle, trl.SFTTrainer):
    pass


class DPOOracle(Oracle, trl.DPOTrainer):
    pass


def sft(kind: type, folder: Path, as_peft: bool = False, callbacks: Any = None) -> Any:
    model = get_peft_model(llama(), LORA) if as_peft else llama()
    return kind(
        model,
        trl.SFTConfig(**settings(folder)),
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=None if as_peft else LORA,
        callbacks=callbacks,
    )


def dpo(kind: type, folder: Path, as_peft: bool = False, callbacks: Any = None) -> Any:
    model: nn.Module = llama()
    if as_peft:  # a trained adapter, whose start is the reference
        model = get_peft_model(llama(), LORA)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
    return kind(
        model,
        args=trl.DPOConfig(**settings(folder)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=None if as_peft else LORA,
        callbacks=callbacks,
    )


def adapters(trainer: Any) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize(
    ("make", "ours", "oracle", "as_peft"),
    [
        pytest.param(sft, trl.SFTTrainer, SFTOracle, False, id="SFT"),
        pytest.param(sft, trl.SFTTrainer, SFTOracle, True, id="SFT of a PeftModel"),
        pytest.param(dpo, trl.DPOTrainer, DPOOracle, False, id="DPO, reference without adapter"),
        pytest.param(dpo, trl.DPOTrainer, DPOOracle, True, id="DPO, reference in an adapter"),
    ],
)
def test_trl_trainers_equal_the_definition(tmp_path, make, ours, oracle, as_peft):
    want = make(oracle, tmp_path, as_peft)
    want.measure_and_penalize()
    start = {n: p.clone() for n, p in adapters(want).items()}
    want.train()
    assert want.counted == STEPS

    callback = FWLoraCallback(CONFIG)
    with_callback = make(ours, tmp_path, as_peft, [callback])
    with_callback.train()
    with_attach = make(ours, tmp_path, as_peft)
    handle = fwlora.attach(with_attach.model, with_attach.create_optimizer(), CONFIG)
    with_attach.train()

    for trainer, got in ((with_callback, callback.handle), (with_attach, handle)):
        assert got.step == STEPS
        assert got.fisher() == pytest.approx(want.fisher, rel=1e-12, abs=0)
        for name, value in adapters(want).items():
            torch.testing.assert_close(adapters(trainer)[name], value, rtol=1e-10, atol=1e-13, msg=name)
            # The copy of the start that DPO compares with stays as it is.
            assert torch.equal(adapters(trainer)[name], start[name]) == (".ref." in name)
