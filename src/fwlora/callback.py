"""Fisher-Weighted LoRA in the Hugging Face Trainer: `Trainer(..., callbacks=[FWLoraCallback(config)])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fwlora.config import FWLoraConfig
from fwlora.method import FisherWeightedLoRA, attach

_STATE = "fwlora.pt"


class FWLoraCallback(TrainerCallback):
    """Attaches the method when training begins.

    The Trainer knows the number of steps, so a `warmup_steps` given as a fraction works, and a K that is too large is
    refused. The state is saved into each checkpoint and read from the one that training resumes from.

    Args:
        config: the method's settings; by default `FWLoraConfig()`.

    Attributes:
        handle: what `fwlora.attach` returned; None before training begins.
    """

    def __init__(self, config: FWLoraConfig | None = None) -> None:
        self.config = config or FWLoraConfig()
        self.handle: FisherWeightedLoRA | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is not None:
            self.handle.detach()
        self.handle = attach(kwargs["model"], kwargs["optimizer"], self.config, total_steps=state.max_steps)
        if state.global_step > 0:
            saved = self._checkpoint(args, state) / _STATE
            if not saved.exists():
                raise ValueError(
                    f"training resumes at step {state.global_step}, but {saved} is missing: the checkpoint was "
                    "written without FWLoraCallback. Start from the beginning, or leave the callback out."
                )
            self.handle.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.handle is not None and state.is_world_process_zero:
            torch.save(self.handle.state_dict(), self._checkpoint(args, state) / _STATE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.handle is not None and self.handle.phase == "penalty" and logs is not None:
            # The Trainer has appended a copy of `logs` to its history before it calls the callbacks; later callbacks
            # read `logs` itself. Both get the value.
            penalty = float(self.handle.penalty())
            logs["fw_lora_penalty"] = state.log_history[-1]["fw_lora_penalty"] = penalty

    @staticmethod
    def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
