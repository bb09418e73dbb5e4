"""Records, predictions and a plan with known numbers, as if a study had been trained, for the tests of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.records.folder import RunDir
from fwlora_lab.records.record import MatrixRow, Record
from fwlora_lab.records.study_plan import StudyCell, StudyPlan, write_plan

METHODS = {
    "lora": "plain LoRA",
    "adalora": "PEFT's AdaLoRA",
    "fw_lora": "Fisher-weighted shrinkage",
    "uniform": "control: the same penalty, the same for every matrix",
}
METRIC = {"cola": "matthews_correlation", "sst2": "accuracy"}
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def run_id(task: str, method: str, budget: float = 0.2) -> str:
    return f"{task}-{budget:g}-{method}"


def config(
    folder: Path, task: str, method: str, budget: float = 0.2, engine: str = "peft", **changes: Any
) -> RunConfig:
    tree: dict[str, Any] = {
        "run_id": run_id(task, method, budget),
        "method": method if method in ("lora", "adalora") else "fw_lora",
        "results_dir": str(folder),
        "model": {"name": "all-MiniLM-L6-v2", "pretrained_id": "minilm", "parameter_budget_percent": budget},
        "dataset": {"name": "glue", "subset": task},
        "training": {"engine": engine, "learning_rate": 1e-3 if method == "lora" else 2e-3},
        "fw_lora": {"weighting": "uniform" if method == "uniform" else "importance", "warmup_steps": 0.25},
    }
    return RunConfig.model_validate(tree | changes)


def record(cfg: RunConfig, seed: int, score: float, seconds: float = 60.0, layers: int = 6, **changes: Any) -> Record:
    """A complete run with this final score of its task's primary metric (a fraction)."""
    task = cfg.dataset.subset or cfg.dataset.name
    metric = METRIC.get(task, "accuracy")
    rng = np.random.default_rng([seed, len(cfg.run_id)])
    epochs = [
        dict(
            epoch=e, step=100 * e, learning_rate=1e-4, train_loss=0.7 / e + 0.01 * rng.random() - 0.1 * score, loss=0.6,
            metrics={metric: score if e == 3 else score * (0.55 + 0.15 * e) + 0.01 * rng.random()},
        )
        for e in (1, 2, 3)
    ]  # fmt: skip
    fisher = 0.2 * seconds if cfg.method_name == "fw_lora" else 0.0
    fields: dict[str, Any] = dict(
        run_id=cfg.run_id,
        seed=seed,
        method=cfg.method_name,
        status="complete",
        started=START + timedelta(hours=seed, minutes=5 * sum(map(ord, cfg.run_id)) % 50),
        finished=START + timedelta(hours=seed, minutes=5 * sum(map(ord, cfg.run_id)) % 50, seconds=seconds),
        command=f"fwlora train run={cfg.run_id}",
        versions={"python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0", "fwlora": "0.1.0"},
        git_commit="0123456789abcdef",
        machine={"cpu": "some processor", "cores": 2, "threads": 1, "device": "cpu"},
        config=cfg.model_dump(mode="json"),
        config_fingerprint=fingerprint(cfg),
        data_fingerprint=task[0] * 64,
        data_source=f"nyu-mll/glue {task}",
        evaluated_on="dev",
        primary_metric=metric,
        backbone={"name": "all-MiniLM-L6-v2", "source": "the package", "commit": None, "parameters": 22_713_216},
        parameters=dict(
            asked_percent=cfg.model.parameter_budget_percent, backbone=22_713_216, adapters=45_312,
            adapters_trained=66_048 if cfg.method_name == "adalora" else 45_312, head=148_610, percent=0.1995,
        ),
        epochs=epochs,
        times=dict(
            train_seconds=seconds, warmup_seconds=fisher, steady_seconds=seconds - fisher, eval_seconds=3.0,
            phases={"warmup": fisher, "penalty": seconds - fisher},
        ),
        steps=300,
        total_steps=300,
        examples_per_second=400.0,
        tokens_per_second=5000.0,
        peak_memory_bytes=2**30,
        matrices=matrices(cfg, rng, layers),
    )  # fmt: skip
    return Record.model_validate(fields | changes)


def matrices(cfg: RunConfig, rng: np.random.Generator, layers: int = 6) -> list[MatrixRow]:
    kinds = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense", "output.dense"]
    names = [f"bert.encoder.layer.{i}.{kind}" for i in range(layers) for kind in kinds]
    fisher = np.exp(
        rng.normal(0, 0.3, len(names)) + np.tile([0, -1, 1, 1.5, 1], layers) + np.repeat(np.arange(layers), 5) / 3
    )
    share = fisher / fisher.sum()
    norms = np.sqrt(share) * 3 + 0.3
    rows = []
    for name, f, i, norm in zip(names, fisher, share, norms, strict=True):
        weighted = dict(fisher=f, importance=i, weight=1 - i) if cfg.method_name == "fw_lora" else {}
        rows.append(MatrixRow(name=name, rank=1, delta_norm=norm * (0.6 if weighted else 1), **weighted))
    return rows


def write(folder: Path, cfg: RunConfig, made: Record, predictions: tuple[np.ndarray, np.ndarray] | None = None) -> Path:
    """Write the record and, if given, the predictions and labels of a run; the run's folder."""
    run_dir = RunDir(folder, cfg.run_id, made.seed)
    logits, labels = (None, None) if predictions is None else predictions
    with run_dir.lock():
        run_dir.write(made, cfg, logits=logits, labels=labels)
    return run_dir.path


def predictions(seed: int, right: float, examples: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right for this share of the examples, and the labels, which are the same for every seed."""
    labels = np.random.default_rng(99).integers(2, size=examples)
    order = np.random.default_rng(seed).permutation(examples)
    guessed = labels.copy()
    wrong = order[: round((1 - right) * examples)]
    guessed[wrong] = 1 - guessed[wrong]
    return np.eye(2)[guessed], labels


def study(
    folder: Path,
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    budgets: Sequence[float] = (0.2,),
    seconds: Mapping[str, float] | None = None,
    claims: Sequence[dict[str, Any]] = (),
    planned: bool = True,
    seeds: int | None = None,
    examples: int = 0,
    layers: int = 6,
    **changes: Any,
) -> StudyPlan:
    """Write a run for every score of `scores[task][method][seed]` at every budget, and the plan."""
    methods = list(dict.fromkeys(m for by_method in scores.values() for m in by_method))
    cells = []
    for task, by_method in scores.items():
        for budget in budgets:
            for method, values in by_method.items():
                cfg = config(folder, task, method, budget)
                cells.append(StudyCell(task=task, budget=budget, method=method, run_id=cfg.run_id))
                for seed, score in enumerate(values):
                    time = (seconds or {}).get(method, 60.0) * (1 + 0.01 * seed)
                    made = record(cfg, seed, score, time, layers, **changes)
                    write(folder, cfg, made, predictions(seed, score, examples) if examples else None)
    plan = StudyPlan(
        study="made-up",
        command="fwlora compare study=made-up",
        tasks=list(scores),
        budgets=list(budgets),
        methods={m: METHODS.get(m, "") for m in methods},
        reference="lora",
        seeds=list(range(seeds or max(len(v) for by_method in scores.values() for v in by_method.values()))),
        selection={"rule": "tuned", "trials": 12, "split": "a tenth of the training data", "methods": "equal effort"},
        cells=cells,
        claims=list(claims),
    )
    if planned:
        write_plan(folder, plan)
    return plan


def claim(method: str, relation: str, margin: Any, task: str = "cola", **changes: Any) -> dict[str, Any]:
    row = dict(
        metric=METRIC[task], method=method, reference="lora", relation=relation, margin=margin,
        scope={"task": task, "budget": 0.2}, source="made up",
    )  # fmt: skip
    return row | changes


def full_study(folder: Path, seeds: int = 6, layers: int = 6, budgets: Sequence[float] = (0.2,)) -> StudyPlan:
    """A study like a real one: two tasks, four methods, claims of all kinds, scores computed from the predictions."""
    rng = np.random.default_rng(5)
    right = {
        "cola": {"lora": 0.70, "adalora": 0.66, "fw_lora": 0.702, "uniform": 0.701},
        "sst2": {"lora": 0.842, "adalora": 0.836, "fw_lora": 0.841, "uniform": 0.843},
    }
    labels = rng.integers(2, size=600)
    cells = []
    for task, by_method in right.items():
        luck = rng.random((seeds, len(labels))) / 3 + 2 * rng.random(len(labels)) / 3  # examples are hard or easy
        for budget in budgets:
            for method, share in by_method.items():
                cfg = config(folder, task, method, budget)
                cells.append(StudyCell(task=task, budget=budget, method=method, run_id=cfg.run_id))
                for seed in range(seeds):
                    hard = luck[seed] + 0.08 * rng.random(len(labels))
                    hit = hard < np.quantile(hard, share + 0.01 * np.log(budget / 0.2) + 0.006 * rng.normal())
                    guessed = np.where(hit, labels, 1 - labels)
                    score = np.corrcoef(guessed, labels)[0, 1] if task == "cola" else hit.mean()
                    time = {"adalora": 67.3, "fw_lora": 60.5}.get(method, 60.0) * np.exp(0.004 * rng.normal())
                    made = record(cfg, seed, float(score), time, layers, warnings=["training.mixed_precision=bf16 …"])
                    write(folder, cfg, made, (np.eye(2)[guessed], labels))
    claims = [
        claim(
            "fw_lora", "not_worse", 0.01, reference="adalora", source="FW-LoRA matches AdaLoRA: almost all of its gain"
        ),
        claim("fw_lora", "greater", 0.0, source="the expected table puts FW-LoRA above LoRA"),
        claim("adalora", "greater", 0.0, source="the expected table puts AdaLoRA above LoRA"),
        claim("lora", "between", [0.35, 0.45], reference=None, source="the expected table"),
        claim("fw_lora", "at_most", 1.01, metric="train_seconds", source="training time: 1.01 x LoRA"),
        claim("adalora", "between", [1.10, 1.20], metric="train_seconds", source="training time: 1.12 x LoRA"),
        claim("fw_lora", "greater", 0.0, task="sst2"),
        claim("fw_lora", "equivalent", 0.02, task="sst2", reference="uniform", source="the control"),
    ]
    plan = StudyPlan(
        study="made-up",
        command="fwlora compare study=made-up",
        tasks=list(right),
        budgets=list(budgets),
        methods=METHODS,
        reference="lora",
        seeds=list(range(seeds)),
        selection={"policy": "tuned", "n_trials": 12, "seed": 1000, "sampler": "tpe", "pruner": "median"},
        cells=cells,
        claims=claims,
    )
    write_plan(folder, plan)
    return plan
