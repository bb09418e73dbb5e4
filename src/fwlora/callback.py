"""Fisher-Weighted LoRA in the Hugging Face Trainer: `Trainer(..., callbacks=[FWLoraCallback(config)])`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from fwlora.config import FWLoraConfig
from fwlora.method import FisherWeightedLoRA, attach

_SAVED = "saved_state"


class FWLoraCallback(TrainerCallback, ExportableState):
    """Attaches the method when training begins, and detaches it when training ends.

    The Trainer knows the number of steps, so a `warmup_steps` given as a fraction works, and a K that is too large is
    refused. The method's state is a part of each checkpoint's `trainer_state.json`: training resumes from a checkpoint
    wherever it lies, and what is pushed to a hub is complete. The penalty is logged as `fw_lora_penalty`, to the
    Trainer's history and to every tracker of `report_to`.

    With `TrainingArguments(restore_callback_states_from_checkpoint=True)` the Trainer replaces this callback by one
    made from the checkpoint, with the settings of the checkpoint: then `trainer.pop_callback(FWLoraCallback)` is the
    one that has the handle.

    Args:
        config: the method's settings, also as a mapping of `FWLoraConfig`'s arguments; by default `FWLoraConfig()`.

    Attributes:
        handle: what `fwlora.attach` returned; None before training begins. Its values can be read after training too.
    """

    def __init__(self, config: FWLoraConfig | Mapping[str, Any] | None = None) -> None:
        self.config = FWLoraConfig(**config) if isinstance(config, Mapping) else config or FWLoraConfig()
        self.handle: FisherWeightedLoRA | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json`: numbers and lists, from which F comes back exactly."""
        saved: dict[str, Any] | None = None
        if self.handle is not None:
            values = self.handle.state_dict()
            saved = {k: cast(Any, v).tolist() if isinstance(v, Tensor) else v for k, v in values.items()}
        return {"args": {"config": asdict(self.config)}, "attributes": {_SAVED: saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.n_gpu > 1 and self.config.estimator != "adapter":
            raise ValueError(
                f"the Trainer would split each batch over {args.n_gpu} GPUs in one process (DataParallel), where "
                "fwlora cannot see a layer's inputs. Start one process a GPU (torchrun or accelerate launch), show "
                "the process one GPU (CUDA_VISIBLE_DEVICES=0), or use estimator='adapter'."
            )
        self._go_before_the_reporters()
        if self.handle is not None:  # of an earlier train(), or of a batch size that did not fit in memory
            self.handle.detach()
        self.handle = attach(kwargs["model"], kwargs["optimizer"], self.config, total_steps=state.max_steps)
        if state.global_step > 0:
            self.handle.load_state_dict(self._saved_state(self.handle, args, state))

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is not None:
            self.handle.detach()

    def _go_before_the_reporters(self) -> None:
        """Move to the front of the Trainer's callbacks, so that what `on_log` adds is there when trackers read it.

        The Trainer puts the trackers of `report_to` before the callbacks that it is given, and tells a callback
        nothing of its handler. But the handler is what calls this callback: it is one of the calling frames.
        """
        frame = inspect.currentframe()
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler):
                # A new list: the handler is just now iterating over the old one.
                others = [c for c in cast(Any, handler).callbacks if c is not self]
                handler.callbacks = [self, *others]
                return
            frame = frame.f_back

    def _saved_state(self, handle: FisherWeightedLoRA, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """The method's state in the checkpoint that training resumes from.

        Raises:
            ValueError: the checkpoint has none.
        """
        name = type(self).__name__
        callbacks: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        if name in callbacks:
            saved = callbacks[name]["attributes"][_SAVED]
            own = handle.state_dict()
            return {
                k: torch.tensor(v, dtype=own[k].dtype) if isinstance(own.get(k), Tensor) else v
                for k, v in saved.items()
            }
        # Version 0.1 wrote a file of its own into the checkpoint. The Trainer does not say where the checkpoint lies:
        # the output folder's is taken only if its state of the Trainer is the one that training resumes from.
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        former = folder / "fwlora.pt"
        if former.exists() and state.log_history:
            there = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            if there.log_history == state.log_history:
                callbacks[name] = self.state()  # the Trainer updates this entry at each save, and expects it there
                return torch.load(former, map_location="cpu", weights_only=True)
        raise ValueError(
            f"training resumes at step {state.global_step} from a checkpoint without the state of {name}: it was "
            "written without this callback. Start from the beginning, or leave the callback out. (A checkpoint of "
            f"fwlora 0.1 is read only as {folder}: put it there.)"
        )
