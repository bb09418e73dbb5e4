"""Reads AIRAS research histories, of both generations of its format, as designs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fwlora_lab.design.examples import named_dimensions
from fwlora_lab.design.parse import read_yaml
from fwlora_lab.design.schema import Hypothesis


@dataclass(frozen=True)
class AirasParts:
    """The parts of a research history that say what to run.

    Args:
        design: its `experimental_design`.
        runs: its `experiment_runs`.
        hypothesis: a text, or a dict of texts.
        method: the method in prose.
        environment: the machine in prose.
    """

    design: Mapping[str, Any]
    runs: list[Any]
    hypothesis: Any
    method: str | None
    environment: str | None


def airas_part(data: Any) -> AirasParts | None:
    """The part of a history that holds `experimental_design`; None if the data are not a history.

    It is at the top, under `new_method`, or in the last iteration or cycle.
    """
    if not isinstance(data, dict):
        return None
    candidates: list[Any] = [data, data.get("new_method")]
    session = data.get("research_session")
    for held, name in ((session, "iterations"), (data.get("experiment_history"), "cycles")):
        if isinstance(held, dict):
            tried = held.get(name)
            candidates += [held.get("current_iteration"), *(reversed(tried) if isinstance(tried, list) else ())]
    for part in candidates:
        design = part.get("experimental_design") if isinstance(part, dict) else None
        if isinstance(design, dict):
            runs = next((r for r in (part.get("experiment_runs"), design.get("experiment_runs")) if r), [])
            holders = (part, data, session if isinstance(session, dict) else {})
            names = ("research_hypothesis", "hypothesis")
            hypothesis = next((h[name] for h in holders for name in names if h.get(name)), None)
            method = part.get("method")
            resources = next((h["external_resources"] for h in (design, *holders) if h.get("external_resources")), None)
            return AirasParts(
                {**design, "external_resources": resources},
                runs if isinstance(runs, list) else [runs],
                hypothesis,
                method if isinstance(method, str) else None,
                environment_of(design),
            )
    return None


def environment_of(design: Mapping[str, Any]) -> str | None:
    """The machine, which histories of the second generation describe inside the design."""
    machine = design.get("runner_config") or design.get("compute_environment")
    return json.dumps(machine, ensure_ascii=False) if machine else None


AIRAS_NAMES = {
    "experiment_summary": "summary",
    "proposed_method": "proposed_method",
    "comparative_methods": "comparative_methods",
    "models_to_use": "models",
    "datasets_to_use": "datasets",
    "evaluation_metrics": "metrics",
    "hyperparameters_to_search": "hyperparameters_to_search",
}
# AIRAS' names of settings -> the names here. Its warmup_steps warm up the learning rate; here that name is FW-LoRA's K.
_AIRAS_SETTINGS = {
    "warmup_steps": "training.warmup_steps",
    "gradient_clip": "max_grad_norm",
    "scheduler": "lr_scheduler",
}
AIRAS_RUN = {"run_id": "run_id", "method_name": "method", "model_name": "model", "dataset_name": "dataset"}


def from_airas(found: AirasParts, prefix: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A design as plain values, and AIRAS' spelling of its keys, which begins with `prefix`."""
    plain: dict[str, Any] = {}
    spelling: dict[str, str] = {}
    for theirs, ours in AIRAS_NAMES.items():
        spelling[ours] = f"{prefix or 'experimental_design.'}{theirs}"
        if found.design.get(theirs) is not None:
            plain[ours] = found.design[theirs]
    if isinstance(plain.get("proposed_method"), dict):
        plain["proposed_method"] = _airas_method(plain["proposed_method"])
    if isinstance(plain.get("comparative_methods"), list):
        plain["comparative_methods"] = [
            _airas_method(m) if isinstance(m, dict) else m for m in plain["comparative_methods"]
        ]
    if isinstance(plain.get("metrics"), list):
        plain["metrics"] = [m.get("name") if isinstance(m, dict) else m for m in plain["metrics"]]
    space = plain.get("hyperparameters_to_search")
    if isinstance(space, list):  # `[{name, range}]`, an older spelling
        plain["hyperparameters_to_search"] = {str(d.get("name")): d.get("range") for d in space if isinstance(d, dict)}
    hypothesis = found.hypothesis
    if isinstance(hypothesis, dict):
        hypothesis = {k: hypothesis[k] for k in Hypothesis.model_fields if isinstance(hypothesis.get(k), str)}
        if found.method is not None:
            hypothesis.setdefault("method", found.method)
    plain["hypothesis"] = hypothesis if isinstance(hypothesis, dict | str) else found.method
    if found.environment:
        plain["environment"] = found.environment
    runs = []
    for run in found.runs:
        if not isinstance(run, dict):
            runs.append(run)
            continue
        runs.append({ours: run[theirs] for theirs, ours in AIRAS_RUN.items() if run.get(theirs) is not None})
    if runs:
        plain["runs"] = runs
    return plain, spelling


def _airas_method(method: dict[str, Any]) -> dict[str, Any]:
    """The second generation's MethodConfig; `optuna_config.search_spaces` is a list of named dimensions."""
    plain: dict[str, Any] = {"name": method.get("method_name", method.get("name"))}
    described = [method.get("description")]
    training = method.get("training_config") or method.get("hyperparameters")
    if isinstance(training, dict):
        settings = {_AIRAS_SETTINGS.get(k, k): v for k, v in training.items() if v is not None}
        described.append(settings.pop("additional_params", None))  # prose: "lambda_fw=1e-4, ..."
        for key in ("optimizer", "lr_scheduler"):
            if isinstance(settings.get(key), str):
                settings[key] = settings[key].lower()
        plain["settings"] = settings
    if any(described):
        plain["description"] = "\n".join(text for text in described if isinstance(text, str) and text)
    optuna = method.get("optuna_config")
    if isinstance(optuna, dict) and optuna.get("enabled", True):
        plain["hyperparameters_to_search"] = named_dimensions(optuna.get("search_spaces"))
        if optuna.get("n_trials"):
            plain["n_trials"] = optuna["n_trials"]
    return plain


def run_configs_of(found: AirasParts, where: str) -> dict[str, dict[str, Any]]:
    """The configs that a history already holds, as examples."""
    configs = {}
    for index, run in enumerate(found.runs):
        text = run.get("run_config") if isinstance(run, dict) else None
        if isinstance(text, str) and text.strip():
            configs[str(run.get("run_id"))] = read_yaml(text, f"{where}: experiment_runs[{index}].run_config")[0]
    return configs


def model_resources(design: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The ids of the models that the external resources list, and id (and its last part) -> their commits."""
    at: Any = design.get("external_resources")
    for key in ("hugging_face", "models"):
        at = at.get(key) if isinstance(at, dict) else None
    ids: dict[str, None] = {}
    commits: dict[str, str] = {}
    for model in at if isinstance(at, list) else ():
        name, sha = (model.get("id"), model.get("sha")) if isinstance(model, dict) else (None, None)
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            continue
        ids[name] = None
        if isinstance(sha, str) and re.fullmatch("[0-9a-f]{40}", sha):
            commits[name] = sha
            commits.setdefault(name.rsplit("/", 1)[-1], sha)
    return tuple(ids), commits
