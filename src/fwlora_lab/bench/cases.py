"""What the bench measures: our engine, plain PEFT, the Trainer, and the best matrix product as a floor."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fwlora_lab.bench.workload import NEVER, PADDED, WHOLE, Workload
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.data.tokens import collate
from fwlora_lab.lanes.engine import LaneEngine
from fwlora_lab.lanes.packing import Packed, Shape, pack, pack_shaped, shape_of
from fwlora_lab.models.adapter_plan import plan_adapters
from fwlora_lab.models.classifier import ClassifierSkeleton, build_classifier
from fwlora_lab.models.methods import build_method, new_state
from fwlora_lab.seeds import derive
from fwlora_lab.training.lane_settings import lane_settings


def _seeded(cfg: RunConfig, seed: int) -> RunConfig:
    return cfg.model_copy(update={"training": cfg.training.model_copy(update={"seed": seed})})


class LaneCase:
    """The lane engine: as many batches at a step as there are lanes; its encoder in bf16 on a GPU, or with `half`."""

    def __init__(
        self, workload: Workload, method: str = "lora", lanes: int = 1, warmup: int = 1, half: bool = False
    ) -> None:
        self.workload, self.width = workload, lanes
        self.losses: list[float] = []
        total = WHOLE if method == "adalora" else NEVER
        cfg = workload.config(method, warmup_steps=warmup, estimator="sketch")
        model = build_classifier(workload.backbone, workload.spec, 0).to(workload.device)  # type: ignore[arg-type]
        if half or workload.device.type == "cuda":
            model.bfloat16()
        plan = plan_adapters(cfg, workload.backbone, total)
        ranks = plan.initial_ranks()
        self.engine = LaneEngine(model, list(ranks), lanes, max(ranks.values()), svd_parametrized=method == "adalora")
        skeleton = ClassifierSkeleton(workload.backbone, workload.spec)
        for seed in range(lanes):
            own = _seeded(cfg, seed)
            state = new_state(own, workload.backbone, skeleton.with_head(derive(seed, "head")), plan, total)
            self.engine.admit(lane_settings(own, plan, total), state.adapters(), state.head())
        self.table = workload.table.to(workload.device)
        self.shape: Shape | None = None
        if workload.device.type == "cuda":
            self.shape = shape_of(workload.table, workload.batches)

    def pack(self, batches: Sequence[Tensor]) -> Packed:
        """One batch for each lane."""
        return pack(self.table, batches) if self.shape is None else pack_shaped(self.table, batches, self.shape)

    def train(self, batches: Sequence[Tensor]) -> float:
        rates = [self.workload.cfg.training.learning_rate] * self.width
        start = self.workload.clock()
        losses = [
            self.engine.step(self.pack(batches[i : i + self.width]), rates) for i in range(0, len(batches), self.width)
        ]
        self.workload.wait()
        seconds = self.workload.clock() - start
        self.losses = torch.cat(losses).tolist()
        return seconds

    def memory(self, batches: Sequence[Tensor]) -> float:
        """Bytes a lane: its parameters' buffers and what a step on such batches keeps for its backward pass."""
        return self.engine.memory(self.pack(batches[: self.width])) / self.width


class PeftLoop:
    """PEFT in a plain loop: batches padded to their longest sentence. `fw_lora` is LoRA with the one added line."""

    def __init__(self, workload: Workload, method: str = "lora", warmup: int = 1) -> None:
        self.workload = workload
        self.losses: list[float] = []
        total = WHOLE if method == "adalora" else NEVER
        cfg = workload.config(method, warmup_steps=warmup, estimator="sketch")
        self.method = build_method(_seeded(cfg, 0), workload.backbone, workload.spec, total, workload.device)
        self.method.model.train()
        self.table = workload.table.to(workload.device)

    def train(self, batches: Sequence[Tensor]) -> float:
        method, training, pad = (
            self.method,
            self.workload.cfg.training,
            cast(int, self.workload.backbone.tokenizer.pad_token_id),
        )
        losses = []
        start = self.workload.clock()
        for index in batches:
            batch = collate(self.table, index.to(self.workload.device), pad, "longest", PADDED)
            with _autocast(self.workload.device):
                loss = method.model(**batch).loss
            loss.backward()
            if training.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(method.trainable, training.max_grad_norm)
            method.optimizer.step()
            method.scheduler.step()
            method.optimizer.zero_grad()
            losses.append(loss.detach())
        self.workload.wait()
        seconds = self.workload.clock() - start
        self.losses = torch.stack(losses).tolist()
        return seconds


class TrainerBaseline:
    """transformers' Trainer on a PEFT model, padded to a fixed length, or in batches of similar length to the longest.

    Timed is its training: fetching, collating and its steps, from the beginning of the epoch to its end.
    """

    def __init__(self, workload: Workload, grouped: bool = False) -> None:
        self.workload = workload
        self.losses: list[float] = []  # one, the mean over the batches
        lora = build_method(
            _seeded(workload.config("lora"), 0), workload.backbone, workload.spec, NEVER, workload.device
        )
        training = workload.cfg.training
        self._folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            output_dir=self._folder.name,
            num_train_epochs=1,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm or 0.0,
            lr_scheduler_type="constant",
            train_sampling_strategy="group_by_length" if grouped else "sequential",
            bf16=workload.device.type == "cuda",
            use_cpu=workload.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tokenizer = workload.backbone.tokenizer
        collator = (
            DataCollatorWithPadding(tokenizer)
            if grouped
            else DataCollatorWithPadding(tokenizer, padding="max_length", max_length=PADDED)
        )
        self._clock = _EpochClock(workload)
        self.trainer = Trainer(
            model=lora.model,
            args=arguments,
            data_collator=collator,
            train_dataset=cast(Any, []),
            processing_class=tokenizer,
            callbacks=[self._clock],
        )
        self.trainer.remove_callback(PrinterCallback)

    def train(self, batches: Sequence[Tensor]) -> float:
        table = self.workload.table
        examples = []
        for i in torch.cat(list(batches)).tolist():
            here = slice(int(table.offsets[i]), int(table.offsets[i + 1]))
            ids = table.tokens[here].tolist()
            example = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(table.labels[i])}
            if table.types is not None:
                example["token_type_ids"] = table.types[here].tolist()
            examples.append(example)
        self.trainer.train_dataset = cast(Any, examples)
        self.losses = [self.trainer.train().training_loss]
        return self._clock.seconds


class _EpochClock(TrainerCallback):
    def __init__(self, workload: Workload) -> None:
        self.workload, self.seconds, self._started = workload, 0.0, 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.workload.wait()
        self._started = self.workload.clock()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.workload.wait()
        self.seconds = self.workload.clock() - self._started


class Roofline:
    """The machine's best matrix product, for as much arithmetic as the batches need."""

    _LEAST = 0.02  # seconds at a time

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        config = workload.backbone.config
        d, f = config.hidden_size, config.intermediate_size
        rows = (512, 1536, 4096) if workload.device.type == "cpu" else (4096, 16384)
        shapes = [(n, *inner) for n in rows for inner in ((d, d), (d, f), (f, d))]
        shapes += [(side, side, side) for side in ((768, 1536) if workload.device.type == "cpu" else (4096, 8192))]
        dtype = torch.bfloat16 if workload.device.type == "cuda" else torch.float32
        sides = {side for shape in shapes for side in (shape[:2], shape[1:])}
        random = {side: torch.randn(side, device=workload.device).to(dtype) for side in sides}
        self._factors = {shape: (random[shape[:2]], random[shape[1:]]) for shape in shapes}
        best = {shape: min(self._second_per_flop(shape) for _ in range(5)) for shape in shapes}
        self.shape = min(best, key=lambda shape: best[shape])
        self._factors = {self.shape: self._factors[self.shape]}

    def _second_per_flop(self, shape: tuple[int, int, int]) -> float:
        a, b = self._factors[shape]
        torch.mm(a, b)
        self.workload.wait()
        clock = self.workload.clock
        times, start = [], clock()
        while (began := clock()) - start < self._LEAST:
            torch.mm(a, b)
            self.workload.wait()
            times.append(clock() - began)
        return float(np.median(times)) / (2.0 * shape[0] * shape[1] * shape[2])

    def train(self, batches: Sequence[Tensor]) -> float:
        return self._second_per_flop(self.shape) * self.workload.flops(batches)


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
