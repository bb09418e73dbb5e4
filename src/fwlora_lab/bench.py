"""`fwlora bench`: what training costs, contestant beside contestant in one process, as ratios with intervals.

Every contestant trains on the same batches, drawn beforehand with the real lengths of CoLA or SST-2; what the word
pieces say does not matter to a clock. A block goes through its contestants forwards and then backwards (ABBA), from a
place that moves on, so that what slows the machine down slows all of them and nobody always follows the same
neighbour. A ratio is taken within each block; reported are the median over blocks and its bootstrap interval. Two
equal contestants are the control: how far their ratio is from 1 is what the measurement can resolve.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from fwlora_lab.backbones import Backbone, build_classifier, cpu_has_bf16, load_backbone
from fwlora_lab.compose import load_run
from fwlora_lab.errors import UserError
from fwlora_lab.lanes import Lanes
from fwlora_lab.methods import build_arm, initial_ranks, lane_settings
from fwlora_lab.packing import Packed, Shape, pack, pack_shaped, shape_of
from fwlora_lab.records import cpu_name
from fwlora_lab.runconfig import RunConfig
from fwlora_lab.tasks import TaskSpec, TokenTable, collate, epoch_batches
from fwlora_lab.train import pick_device

# Word pieces of a sentence in the training set, [CLS] and [SEP] counted, and how many sentences have so many.
LENGTHS = {
    "cola": (
        "4:7 5:129 6:310 7:649 8:979 9:1154 10:1129 11:916 12:797 13:574 14:452 15:334 16:235 17:182 18:145 "
        "19:125 20:96 21:66 22:67 23:66 24:41 25:26 26:21 27:17 28:6 29:8 30:6 31:1 32:8 33:1 35:1 37:1 40:1 47:1"
    ),
    "sst2": (
        "3:1978 4:5323 5:6064 6:5345 7:4749 8:4155 9:3713 10:3267 11:2947 12:2650 13:2413 14:2138 15:1950 16:1777 "
        "17:1661 18:1515 19:1373 20:1285 21:1132 22:1106 23:1046 24:909 25:820 26:806 27:733 28:692 29:628 30:538 "
        "31:491 32:442 33:448 34:400 35:337 36:304 37:286 38:242 39:195 40:203 41:192 42:155 43:148 44:130 45:89 "
        "46:82 47:85 48:73 49:55 50:42 51:50 52:40 53:36 54:19 55:21 56:22 57:15 58:8 59:6 60:3 61:2 62:5 63:5 64:1 "
        "65:2 66:2"
    ),
}
BACKBONES = ("minilm", "roberta-base")
PADDED = 128  # tokens, to which people pad
WHOLE, K = 800, 200  # steps of the whole run and of its warm-up
_NEVER = 10**9  # steps of a run that does not end here
_SECONDS = {False: 600.0, True: 130.0}  # of measuring, by --quick; loading comes on top
_AT_ONCE = {"cpu": 4, "cuda": 16}  # the lanes whose cost is compared with one's

# The most that a ratio may be, or for the last three the least, by device: CPU and GPU.
_AT_MOST = {
    "aa_control": (1.005, 1.005),
    "penalty_steady": (1.005, 1.002),
    "penalty_whole_run": (1.01, 1.005),
    "attach_steady": (1.01, 1.02),
    "adalora_over_lora": (1.15, 1.10),
    "lanes_cost": (3.6, 3.0),
}
_AT_LEAST = {
    "usual_over_ours_one_lane": (9.0, 10.0),
    "usual_over_ours_best": (11.0, 30.0),
    "matmul_share": (0.60, 0.30),
}
_MEANING = {
    "aa_control": "our LoRA / our LoRA: must be 1 to within 0.5 %",
    "penalty_steady": "FW-LoRA / LoRA, ours, a step after the warm-up",
    "penalty_whole_run": f"FW-LoRA / LoRA, ours, whole run of {WHOLE} steps, sketch, K = {K}",
    "attach_steady": "fwlora.attach on plain PEFT / plain PEFT LoRA, a step after the warm-up",
    "adalora_over_lora": "AdaLoRA / LoRA, ours, a step that allocates",
    "usual_over_ours_one_lane": f"Trainer + PEFT padded to {PADDED} / ours, one run, one lane",
    "usual_over_ours_best": "the same at the best number of lanes",
    "lanes_cost": "a step of {at_once} lanes / a step of one",
    "matmul_share": "share of the best matrix product's rate, at the best number of lanes",
}


@dataclass(frozen=True)
class Ratio:
    """One line of the result; `target` bounds it from the side on which it would be bad."""

    name: str
    ratio: float
    low: float
    high: float
    target: float
    met: bool


# --- what is trained on -------------------------------------------------------------------------


def token_table(task: str, config: PreTrainedConfig, seed: int = 0) -> TokenTable:
    """Random word pieces in sentences of the task's own lengths, every length as often as the task has it."""
    generator = np.random.default_rng(seed)
    values, counts = np.array([pair.split(":") for pair in LENGTHS[task].split()], dtype=int).T
    lengths = generator.permutation(values.repeat(counts))
    n, total = len(lengths), int(lengths.sum())
    low = min(1000, config.vocab_size // 2)  # above the special tokens
    return TokenTable(
        tokens=torch.from_numpy(generator.integers(low, config.vocab_size, total, dtype=np.int32)),
        types=torch.zeros(total, dtype=torch.int8) if config.type_vocab_size > 1 else None,
        offsets=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
        labels=torch.from_numpy(generator.integers(0, 2, n)),
    )


@contextlib.contextmanager
def backbone_of(name: str) -> Iterator[tuple[RunConfig, Backbone]]:
    """A run's config and its encoder: the packaged MiniLM, or random weights of roberta-base's shape."""
    cfg = load_run("minilm-cola-lora", ["training.lr_scheduler=constant", "training.warmup_ratio=0"])
    if name == "minilm":
        yield cfg, load_backbone(cfg.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_random_roberta(Path(folder))
        model = cfg.model.model_copy(update={"name": "roberta-base's shape", "pretrained_id": folder})
        cfg = cfg.model_copy(update={"model": model})
        yield cfg, load_backbone(cfg.model)


def _write_random_roberta(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Course:
    """What all contestants run on: the encoder, the examples, and the batches in their order."""

    cfg: RunConfig
    backbone: Backbone
    table: TokenTable
    batches: Sequence[Tensor]
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    spec: TaskSpec = field(
        default=TaskSpec("bench", "classification", ("0", "1"), 1, ("accuracy",), "accuracy"), repr=False
    )

    def config(self, method: str, **fw: Any) -> RunConfig:
        """The run's config for a method, with settings of FW-LoRA; AdaLoRA allocates from its first step on."""
        update: dict[str, Any] = {"method": method}
        if method == "adalora":
            update["adalora"] = self.cfg.adalora.model_copy(update={"tinit_ratio": 0.0, "tfinal_ratio": 0.5})
        if fw:
            update["fw_lora"] = self.cfg.fw_lora.model_copy(update=fw)
        return self.cfg.model_copy(update=update)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flops(self, batches: Sequence[Tensor]) -> float:
        """Arithmetic of the matrix products that a LoRA step on these batches cannot do without."""
        rank = self.cfg.model.lora.rank
        assert rank is not None
        return sum(step_flops(self.backbone.config, rank, self.table.lengths()[batch]) for batch in batches)


def step_flops(config: PreTrainedConfig, rank: int, lengths: Tensor, classes: int = 2) -> float:
    """FLOPs of the matrix products of one training step on sentences of these lengths, [b], and nothing for padding.

    Frozen matrices forwards and for the gradient of their inputs, LoRA on query, key, value and both FFN matrices
    with its gradients, attention within each sentence, and the head. The first layer's inputs need no gradient, and of
    the last layer's outputs the classifier reads each sentence's first token only.
    """
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    n, b, squares = float(lengths.sum()), float(len(lengths)), float(lengths.square().sum())

    def linear(tokens: float, d_in: int, d_out: int, adapted: bool = True, inner: bool = True) -> float:
        frozen = 2 * d_in * d_out * (1 + inner)
        # x·Aᵀ, ·Bᵀ, their transposes for the gradients of A and B, and of the inputs.
        thin = 2 * rank * (2 * d_in + 3 * d_out + inner * d_in) if adapted else 0
        return tokens * (frozen + thin)

    total = 0.0
    for layer in range(layers):
        inner, tokens = layer > 0, (n if layer < layers - 1 else b)
        total += linear(tokens, d, d, inner=inner) + 2 * linear(n, d, d, inner=inner)
        total += linear(tokens, d, d, adapted=False) + linear(tokens, d, f) + linear(tokens, f, d)
        total += 12 * d * (squares if layer < layers - 1 else n)  # two products, and two each for their gradients
    return total + 6 * b * (d * d + d * classes)


# --- contestants --------------------------------------------------------------------------------


class Contestant(Protocol):
    """Trains on whole batches, one optimiser step each, and returns the seconds; `losses` are the last call's."""

    def train(self, batches: Sequence[Tensor]) -> float: ...


class Ours:
    """The lane engine: as many batches at a step as there are lanes; its encoder in bf16 on a GPU, or with `half`."""

    def __init__(
        self, course: Course, method: str = "lora", lanes: int = 1, warmup: int = 1, half: bool = False
    ) -> None:
        self.course, self.width = course, lanes
        self.losses: list[float] = []
        total = WHOLE if method == "adalora" else _NEVER
        cfg = course.config(method, warmup_steps=warmup, estimator="sketch")
        model = build_classifier(course.backbone, course.spec, 0).to(course.device)  # type: ignore[arg-type]
        if half or course.device.type == "cuda":
            model.bfloat16()
        ranks = initial_ranks(cfg, course.backbone, total)
        self.engine = Lanes(model, list(ranks), lanes, max(ranks.values()), spectral=method == "adalora")
        for seed in range(lanes):
            arm = build_arm(cfg, course.backbone, course.spec, seed, total)
            self.engine.admit(lane_settings(cfg, arm, seed, total), arm.adapters(), arm.head())
        self.table = course.table.to(course.device)
        self.shape: Shape | None = None
        if course.device.type == "cuda":
            self.shape = shape_of(course.table, course.batches)

    def pack(self, batches: Sequence[Tensor]) -> Packed:
        """One batch for each lane."""
        return pack(self.table, batches) if self.shape is None else pack_shaped(self.table, batches, self.shape)

    def train(self, batches: Sequence[Tensor]) -> float:
        rates = [self.course.cfg.training.learning_rate] * self.width
        start = self.course.clock()
        losses = [
            self.engine.step(self.pack(batches[i : i + self.width]), rates) for i in range(0, len(batches), self.width)
        ]
        self.course.wait()
        seconds = self.course.clock() - start
        self.losses = torch.cat(losses).tolist()
        return seconds

    def memory(self, batches: Sequence[Tensor]) -> float:
        """Bytes a lane: its parameters' buffers and what a step on such batches keeps for its backward pass."""
        return self.engine.memory(self.pack(batches[: self.width])) / self.width


class Plain:
    """PEFT in a plain loop: batches padded to their longest sentence. `fw_lora` is LoRA with the one added line."""

    def __init__(self, course: Course, method: str = "lora", warmup: int = 1) -> None:
        self.course = course
        self.losses: list[float] = []
        total = WHOLE if method == "adalora" else _NEVER
        cfg = course.config(method, warmup_steps=warmup, estimator="sketch")
        self.arm = build_arm(cfg, course.backbone, course.spec, 0, total, course.device)
        self.arm.model.train()
        self.table = course.table.to(course.device)

    def train(self, batches: Sequence[Tensor]) -> float:
        arm, training, pad = self.arm, self.course.cfg.training, cast(int, self.course.backbone.tokenizer.pad_token_id)
        losses = []
        start = self.course.clock()
        for index in batches:
            batch = collate(self.table, index.to(self.course.device), pad, "longest", PADDED)
            with _autocast(self.course.device):
                loss = arm.model(**batch).loss
            loss.backward()
            if training.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(arm.trainable, training.max_grad_norm)
            arm.optimizer.step()
            arm.scheduler.step()
            arm.optimizer.zero_grad()
            losses.append(loss.detach())
        self.course.wait()
        seconds = self.course.clock() - start
        self.losses = torch.stack(losses).tolist()
        return seconds


class Usual:
    """transformers' Trainer on a PEFT model, padded to a fixed length, or in batches of similar length to the longest.

    Timed is its training: fetching, collating and its steps, from the beginning of the epoch to its end.
    """

    def __init__(self, course: Course, grouped: bool = False) -> None:
        self.course = course
        self.losses: list[float] = []  # one, the mean over the batches
        arm = build_arm(course.config("lora"), course.backbone, course.spec, 0, _NEVER, course.device)
        training = course.cfg.training
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
            bf16=course.device.type == "cuda",
            use_cpu=course.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tokenizer = course.backbone.tokenizer
        collator = (
            DataCollatorWithPadding(tokenizer)
            if grouped
            else DataCollatorWithPadding(tokenizer, padding="max_length", max_length=PADDED)
        )
        self._clock = _EpochClock(course)
        self.trainer = Trainer(
            model=arm.model,
            args=arguments,
            data_collator=collator,
            train_dataset=cast(Any, []),
            processing_class=tokenizer,
            callbacks=[self._clock],
        )
        self.trainer.remove_callback(PrinterCallback)

    def train(self, batches: Sequence[Tensor]) -> float:
        table = self.course.table
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
    def __init__(self, course: Course) -> None:
        self.course, self.seconds, self._started = course, 0.0, 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.course.wait()
        self._started = self.course.clock()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.course.wait()
        self.seconds = self.course.clock() - self._started


class Floor:
    """The machine's best matrix product, for as much arithmetic as the batches need."""

    _LEAST = 0.02  # seconds at a time

    def __init__(self, course: Course) -> None:
        self.course = course
        config = course.backbone.config
        d, f = config.hidden_size, config.intermediate_size
        rows = (512, 1536, 4096) if course.device.type == "cpu" else (4096, 16384)
        shapes = [(n, *inner) for n in rows for inner in ((d, d), (d, f), (f, d))]
        shapes += [(side, side, side) for side in ((768, 1536) if course.device.type == "cpu" else (4096, 8192))]
        dtype = torch.bfloat16 if course.device.type == "cuda" else torch.float32
        sides = {side for shape in shapes for side in (shape[:2], shape[1:])}
        random = {side: torch.randn(side, device=course.device).to(dtype) for side in sides}
        self._factors = {shape: (random[shape[:2]], random[shape[1:]]) for shape in shapes}
        best = {shape: min(self._second_per_flop(shape) for _ in range(5)) for shape in shapes}
        self.shape = min(best, key=lambda shape: best[shape])
        self._factors = {self.shape: self._factors[self.shape]}

    def _second_per_flop(self, shape: tuple[int, int, int]) -> float:
        a, b = self._factors[shape]
        torch.mm(a, b)
        self.course.wait()
        clock = self.course.clock
        times, start = [], clock()
        while (began := clock()) - start < self._LEAST:
            torch.mm(a, b)
            self.course.wait()
            times.append(clock() - began)
        return float(np.median(times)) / (2.0 * shape[0] * shape[1] * shape[2])

    def train(self, batches: Sequence[Tensor]) -> float:
        return self._second_per_flop(self.shape) * self.course.flops(batches)


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


# --- measuring ----------------------------------------------------------------------------------


def order_of(names: Sequence[str], block: int) -> list[str]:
    """A block's order: forwards and then backwards, from a place that moves on."""
    k = block % len(names)
    around = [*names[k:], *names[:k]]
    return around + around[::-1]


def measure(
    contestants: Mapping[str, Contestant], batches: Sequence[Tensor], size: int, seconds: float, least: int = 3
) -> dict[str, np.ndarray]:
    """Seconds by contestant [blocks], all on the same `size` batches a block; for `seconds`, or `least` blocks."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for contestant in contestants.values():  # what only a first step pays for
        contestant.train(batches[:size])
    started = time.perf_counter()
    block = 0
    while block < least or (time.perf_counter() - started) * (block + 1) / block < seconds:
        at = block * size % (len(batches) - size + 1)
        mine = batches[at : at + size]
        spent = dict.fromkeys(names, 0.0)
        for name in order_of(names, block):
            spent[name] += contestants[name].train(mine) / 2
        for name in names:
            times[name].append(spent[name])
        block += 1
    return {name: np.array(column) for name, column in times.items()}


def interval(
    terms: Sequence[np.ndarray], generator: np.random.Generator, draws: int = 2000
) -> tuple[float, float, float]:
    """The product of the terms' medians over blocks, with its 95 % bootstrap interval; terms are resampled apart."""
    center, spread = 1.0, np.ones(draws)
    for values in terms:
        center *= float(np.median(values))
        spread *= np.median(generator.choice(values, (draws, len(values))), axis=1)
    low, high = np.quantile(spread, [0.025, 0.975])
    return center, float(low), float(high)


def judge(name: str, ratio: float, low: float, high: float, device: str = "cpu") -> Ratio:
    """The ratio beside its target."""
    column = 0 if device == "cpu" else 1
    if name in _AT_LEAST:
        target = _AT_LEAST[name][column]
        return Ratio(name, ratio, low, high, target, ratio >= target)
    target = _AT_MOST[name][column]
    worst = max(ratio, 1 / ratio) if name == "aa_control" else ratio
    return Ratio(name, ratio, low, high, target, worst <= target)


@dataclass
class Result:
    """Ratios by name, and what else a reader wants to know: lines of plain text."""

    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_bench(course: Course, quick: bool, say: Callable[[str], object]) -> Result:
    """All comparisons, one group of contestants after another so that memory holds them."""
    generator = np.random.default_rng(0)
    device, seconds = course.device.type, _SECONDS[quick]
    result = Result()

    def add(name: str, *terms: np.ndarray) -> None:
        result.ratios.append(judge(name, *interval(terms, generator), device))

    def note(text: str, *terms: np.ndarray, unit: str = "") -> None:
        center, low, high = interval(terms, generator)
        result.notes.append(f"{text}: {center:.4g}{unit} ({low:.4g} to {high:.4g})")

    def group(title: str, share: float, size: int, make: Callable[[], Mapping[str, Contestant]], least: int):
        gc.collect()
        began = time.perf_counter()
        times = measure(make(), course.batches, size, share * seconds, least)
        blocks = len(next(iter(times.values())))
        took = time.perf_counter() - began
        say(f"{title}: {blocks} blocks of {size} x {course.cfg.training.batch_size} examples, {took:.0f} s")
        return times

    times = group(
        "ours, steady and warm-up",
        0.36,
        1,
        lambda: {
            "lora": Ours(course),
            "control": Ours(course),
            "steady": Ours(course, "fw_lora"),
            "watching": Ours(course, "fw_lora", warmup=_NEVER - 1),
        },
        least=3,
    )
    lora = times["lora"]
    add("aa_control", times["control"] / lora)
    add("penalty_steady", times["steady"] / lora)
    part = K / WHOLE
    add("penalty_whole_run", (part * times["watching"] + (1 - part) * times["steady"]) / lora)
    note("a step of our LoRA, one lane", 1e3 * lora, unit=" ms")
    note("a step of the warm-up / LoRA, ours, sketch", times["watching"] / lora)

    times = group(
        "plain PEFT",
        0.18,
        1,
        lambda: (
            {"lora": Plain(course), "attach": Plain(course, "fw_lora")} | ({} if quick else {"control": Plain(course)})
        ),
        least=2 if quick else 3,
    )
    add("attach_steady", times["attach"] / times["lora"])
    note("a step of plain PEFT LoRA, batches padded to their longest", 1e3 * times["lora"], unit=" ms")
    if not quick:
        note("plain PEFT LoRA / plain PEFT LoRA", times["control"] / times["lora"])

    times = group(
        "AdaLoRA",
        0.12,
        1,
        lambda: (
            {"lora": Ours(course), "adalora": Ours(course, "adalora")}
            | ({} if quick else {"plain": Plain(course), "peft": Plain(course, "adalora")})
        ),
        least=2 if quick else 3,
    )
    add("adalora_over_lora", times["adalora"] / times["lora"])
    if not quick:
        note("PEFT's AdaLoRA / PEFT's LoRA, plain loop", times["peft"] / times["plain"])
        note("PEFT's LoRA, plain loop / ours, one lane", times["plain"] / times["lora"])
        note("PEFT's AdaLoRA, plain loop / ours, one lane", times["peft"] / times["adalora"])

    at_once = _AT_ONCE[device]
    counts = [1, at_once] if quick else [1, 4, 8, 16]
    size = max(counts)
    ours, floor = {e: Ours(course, lanes=e) for e in counts}, Floor(course)
    named = {**{str(e): contestant for e, contestant in ours.items()}, "floor": floor}
    with_half = not quick and device == "cpu" and cpu_has_bf16()
    if with_half:
        named["half"] = Ours(course, lanes=at_once, half=True)
    times = group("lanes", 0.16, size, lambda named=named: named, least=2 if quick else 3)
    # Seconds for the same batches: what a step of e lanes costs is e times as much as its share.
    per_run = {e: times[str(e)] / times["1"] for e in counts}
    best = min(counts, key=lambda e: float(np.median(per_run[e])))
    for e in counts:
        note(f"a run in {e} lanes / a run in one", per_run[e])
        note(f"share of the best matrix product's rate, {e} lanes", times["floor"] / times[str(e)])
        memory = ours[e].memory(course.batches) / 2**20
        result.notes.append(f"memory of a training step, {e} lanes: {memory:.0f} MiB a lane, the frozen encoder apart")
    if with_half:
        note(f"a step with the encoder in bf16 / in fp32, {at_once} lanes", times["half"] / times[str(at_once)])
    rate = 1e-9 * course.flops(course.batches[:size]) / floor.train(course.batches[:size])
    result.notes.append(f"best matrix product: {'x'.join(map(str, floor.shape))}, {rate:.0f} GFLOP/s")
    share = times["floor"] / times[str(best)]
    del ours, floor, named

    times = group("the usual", 0.10, 1, lambda: {"ours": Ours(course), "usual": Usual(course)}, least=1 if quick else 2)
    add("usual_over_ours_one_lane", times["usual"] / times["ours"])
    add("usual_over_ours_best", times["usual"] / times["ours"], 1 / per_run[best])
    add("lanes_cost", at_once * per_run[at_once])
    add("matmul_share", share)
    result.notes.append(f"best number of lanes: {best}")

    times = group(
        "length-grouped Trainer",
        0.08,
        4 if quick else 50,  # batches among which it groups
        lambda: {"ours": Ours(course), "grouped": Usual(course, grouped=True)},
        least=1,
    )
    note("Trainer + PEFT, length-grouped, padded to the longest / ours, one lane", times["grouped"] / times["ours"])
    return result


def profile_step(course: Course, lanes: int, steps: int = 10, most: int = 14) -> tuple[float, list[tuple[str, float]]]:
    """Milliseconds of a LoRA step of `lanes` runs, and the share of its time that each kind of operation takes."""
    ours = Ours(course, lanes=lanes)
    ours.train(course.batches[: 2 * lanes])
    mine = course.batches[: steps * lanes]
    seconds = ours.train(mine)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if course.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        ours.train(mine)
    own = "self_device_time_total" if course.device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, own)) for event in profiler.key_averages()}
    total = sum(times.values())
    ranked = sorted(((name, time / total) for name, time in times.items()), key=lambda pair: -pair[1])
    return 1e3 * seconds * lanes / len(mine), [*ranked[:most], ("all others", sum(share for _, share in ranked[most:]))]


# --- the command --------------------------------------------------------------------------------


def bench(
    task: str,
    backbone: str,
    threads: int | None,
    quick: bool = False,
    cpu_time: bool = False,
    as_json: bool = False,
    profile: bool = False,
) -> int:
    """Measure and print: a table, or with `as_json` one object a line and the table on standard error.

    With `profile` the ratios are left out and what a step's time goes into is printed.

    Raises:
        UserError: CPU time is asked for where it is not that of one thread, or a profile as what it is not.
    """
    if profile and (quick or as_json or cpu_time):
        raise UserError("--profile measures no ratios: leave out --quick, --json and --cpu-time.")
    if threads is not None:
        torch.set_num_threads(threads)
    device = pick_device()
    if cpu_time and (device.type != "cpu" or torch.get_num_threads() != 1):
        raise UserError("--cpu-time counts the seconds of one thread of a CPU: add --threads 1, and hide the GPU.")
    console = Console(highlight=False, stderr=as_json, width=None if sys.stdout.isatty() else 140)
    with _quiet(), backbone_of(backbone) as (cfg, found):
        table = token_table(task, found.config)
        batches = epoch_batches(len(table), cfg.training.batch_size, 0, 0)[:-1]
        course = Course(cfg, found, table, batches, device, time.thread_time if cpu_time else time.perf_counter)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        console.print(
            f"{backbone}, lengths of {task}, batches of {cfg.training.batch_size}; {where}, "
            f"{torch.get_num_threads()} threads, {'CPU' if cpu_time else 'wall-clock'} time, "
            f"torch {torch.__version__}{load}"
        )
        if profile:
            for lanes in (1, _AT_ONCE[device.type]):
                milliseconds, shares = profile_step(course, lanes)
                console.print(f"a step of our LoRA, lanes: {lanes}, {milliseconds:.0f} ms")
                for name, share in shares:
                    console.print(f"  {100 * share:5.1f} %  {name}", markup=False)
            return 0
        result = run_bench(course, quick, lambda text: console.print(f"  {text}"))
    if as_json:
        for ratio in result.ratios:
            print(json.dumps(asdict(ratio)), flush=True)
    _show(result, device.type, console)
    return 0


def _show(result: Result, device: str, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column()
    for title in ("ratio", "95 % interval", "target", ""):
        table.add_column(title, justify="right")
    for r in result.ratios:
        sign = "≥" if r.name in _AT_LEAST else "≤"
        meaning = _MEANING[r.name].format(at_once=_AT_ONCE[device])
        table.add_row(
            f"{r.name}: {meaning}",
            f"{r.ratio:.4g}",
            f"{r.low:.4g} to {r.high:.4g}",
            f"{sign} {r.target:g}",
            "met" if r.met else "MISSED",
        )
    console.print(table)
    for text in result.notes:
        console.print(text)
    control = next(r for r in result.ratios if r.name == "aa_control")
    if not control.met:
        console.print(
            f"The control is off by {100 * abs(control.ratio - 1):.2f} %, more than 0.5 %: this machine was not calm "
            "enough, and the ratios near 1 above say nothing. Measure again with nothing else running."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        enable_progress_bar()
        logger.setLevel(level)
