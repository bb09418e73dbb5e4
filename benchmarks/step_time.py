"""What the one added line costs: FW-LoRA against plain PEFT LoRA, step by step, in one process.

    python benchmarks/step_time.py [--batches 120] [--threads 1]

MiniLM, batches of 32 with CoLA's lengths, padded to the longest. Every batch goes through every contestant before
the next is drawn, forwards and backwards in turn (ABBA), so that what slows the machine down slows all of them;
the ratio is taken batch by batch. "control" is a second plain LoRA: how far its interval is from 1 is what the
measurement can resolve.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import fwlora
from fwlora import FWLoraConfig
from fwlora.budget import lora_kwargs
from fwlora_lab.backbones import head_modules, load_backbone, target_linears
from fwlora_lab.compose import load_run
from fwlora_lab.records import cpu_name

# Word pieces of a sentence in CoLA's training set, [CLS] and [SEP] counted, and how many sentences have so many.
COLA_LENGTHS = (
    "4:7 5:129 6:310 7:649 8:979 9:1154 10:1129 11:916 12:797 13:574 14:452 15:334 16:235 17:182 18:145 "
    "19:125 20:96 21:66 22:67 23:66 24:41 25:26 26:21 27:17 28:6 29:8 30:6 31:1 32:8 33:1 35:1 37:1 40:1 "
    "47:1"
)
BATCH, RANK, WHOLE, K = 32, 4, 800, 200


class Contestant:
    """A PEFT model with its own adapters and AdamW; `step` trains one batch and returns the seconds."""

    def __init__(self, config: FWLoraConfig | None) -> None:
        cfg = load_run("minilm-cola-lora")
        backbone = load_backbone(cfg.model)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(backbone.path_or_id, num_labels=2)
        names = target_linears(model, cfg.model.lora.target_modules)
        self.model = get_peft_model(
            model,
            LoraConfig(
                task_type="SEQ_CLS",
                modules_to_save=head_modules(model),
                **lora_kwargs(dict.fromkeys(names, RANK), 2.0),
            ),
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.handle = config and fwlora.attach(self.model, self.optimizer, config)

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def draw(generator: np.random.Generator) -> dict[str, torch.Tensor]:
    """A batch of random word pieces with CoLA's lengths: timing does not depend on what they say."""
    values, counts = np.array([pair.split(":") for pair in COLA_LENGTHS.split()], dtype=int).T
    lengths = torch.from_numpy(generator.choice(values, BATCH, p=counts / counts.sum()))
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.from_numpy(generator.integers(1000, 30000, mask.shape))
    labels = torch.from_numpy(generator.integers(0, 2, BATCH))
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def interval(ratios: np.ndarray, generator: np.random.Generator) -> tuple[float, float, float]:
    """Median of the paired ratios with its 95 % bootstrap interval."""
    draws = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    forever = 10**9
    contestants = {
        "lora": Contestant(None),
        "control": Contestant(None),
        "steady": Contestant(FWLoraConfig(warmup=1, estimator="adapter")),
        "warm-up, sketch": Contestant(FWLoraConfig(warmup=forever, estimator="sketch")),
        "warm-up, exact": Contestant(FWLoraConfig(warmup=forever, estimator="exact")),
    }
    generator = np.random.default_rng(0)
    for _ in range(3):  # warm-up of the machine, and the steady contestant's own
        for contestant in contestants.values():
            contestant.step(draw(generator))
    steady = contestants["steady"].handle
    assert steady is not None and steady.phase == "shrink"
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(options.batches):
        batch = draw(generator)
        order = list(contestants)
        # Forwards and backwards, from a place that moves on: nobody always follows the same neighbour.
        order = order[i // 2 % len(order) :] + order[: i // 2 % len(order)]
        for name in order if i % 2 == 0 else reversed(order):
            seconds[name].append(contestants[name].step(batch))
    times = {name: np.array(column) for name, column in seconds.items()}
    lora = times["lora"]
    print(f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}, {options.batches} batches of {BATCH}")
    print(
        f"plain PEFT LoRA: {1e3 * np.median(lora):.1f} ms a step (quartiles "
        f"{1e3 * np.quantile(lora, 0.25):.1f} to {1e3 * np.quantile(lora, 0.75):.1f})"
    )
    part = K / WHOLE
    rows = {
        "control / lora": (times["control"] / lora, None),
        "FW-LoRA / lora, steady step": (times["steady"] / lora, 1.01),
        f"FW-LoRA / lora, whole run, sketch, K = {K} of {WHOLE}": (
            (part * times["warm-up, sketch"] + (1 - part) * times["steady"]) / lora,
            1.02,
        ),
        f"FW-LoRA / lora, whole run, exact, K = {K} of {WHOLE}": (
            (part * times["warm-up, exact"] + (1 - part) * times["steady"]) / lora,
            None,
        ),
        "warm-up step / lora, sketch": (times["warm-up, sketch"] / lora, None),
        "warm-up step / lora, exact": (times["warm-up, exact"] / lora, None),
    }
    for name, (ratios, target) in rows.items():
        median, low, high = interval(ratios, generator)
        verdict = "" if target is None else f"   target <= {target}: {'met' if median <= target else 'MISSED'}"
        print(f"{name:58s} {median:.4f}  [{low:.4f}, {high:.4f}]{verdict}")


if __name__ == "__main__":
    main()
