"""What the training tests train: a tiny random BERT in a folder, on sentences of their own."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast  # type: ignore[attr-defined]

from fwlora_lab.config.schema import RunConfig

_NOUNS = ("dog", "cat", "tree", "bird", "boat", "house")
_VERBS = ("sees", "eats", "likes", "finds")
_GOOD, _BAD = ("well", "gladly", "nicely"), ("badly", "sadly", "slowly")


def make_backbone(folder: Path, dropout: float = 0.1) -> str:
    """Write a BERT of two layers of width 16 with its tokenizer, and return the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a"]
    words += [*_NOUNS, *_VERBS, *_GOOD, *_BAD]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def make_data(folder: Path, train: int = 44, dev: int = 21) -> tuple[str, str]:
    """Write two CSV files of sentences of different lengths, and return their paths."""
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, count in (("train", train), ("dev", dev)):
        path = folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for i in range(count):
                ending = draw.choice(_GOOD if i % 2 else _BAD)
                words = [
                    "the",
                    draw.choice(_NOUNS),
                    draw.choice(_VERBS),
                    "a",
                    draw.choice(_NOUNS),
                    ending,
                ]
                rows.writerow([" ".join(words * draw.randint(1, 3)), i % 2])
        paths.append(str(path))
    return paths[0], paths[1]


class World:
    """A backbone, data and a results folder below one temporary folder."""

    def __init__(self, folder: Path, dropout: float = 0.1) -> None:
        self.backbone = make_backbone(folder / "backbone", dropout)
        self.train_file, self.dev_file = make_data(folder / "data")
        self.results = folder / "results"

    def config(self, method: str = "lora", **changes: Any) -> RunConfig:
        """A run of 2 epochs of 11 steps, its run id `method`; changes by key, `__` for the dot."""
        tree: dict[str, Any] = {
            "run_id": method,
            "method": method,
            "results_dir": str(self.results),
            "model": {
                "name": "tiny",
                "pretrained_id": self.backbone,
                "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
            },
            "dataset": {
                "name": "csv",
                "train_file": self.train_file,
                "eval_file": self.dev_file,
                "text_column": "text",
                "label_column": "label",
                "max_length": 32,
            },
            "training": {
                "engine": "peft",
                "epochs": 2,
                "batch_size": 4,
                "learning_rate": 5e-3,
                "mixed_precision": "no",
            },
            "fw_lora": {"warmup_steps": 6, "penalty_strength": 0.05},
        }
        for key, value in changes.items():
            *path, last = key.split("__")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        return RunConfig.model_validate(tree)
