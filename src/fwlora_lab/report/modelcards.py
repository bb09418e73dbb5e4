"""Model cards for the adapters that runs kept: the hub's metadata, the record's numbers, how to load it, limits."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fwlora_lab.analysis.study import Analysis, Group
from fwlora_lab.catalog.encoders import MINILM
from fwlora_lab.catalog.tasks import GLUE_REPOSITORY
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import RunDir, load_predictions
from fwlora_lab.records.record import Record
from fwlora_lab.report.templates import render

_SIGNATURE = "written by fwlora report; it writes this card again as long as nobody changed it: sha256 "


def model_cards(analysis: Analysis) -> dict[Path, str]:
    """A card's path and text for each adapter that has none by a person."""
    out = {}
    for g, method, records in analysis.cells():
        for record in records:
            run = RunDir(analysis.study.folder, record.run_id, record.seed).path
            card = run / "adapter" / "README.md"
            if (run / "adapter" / "adapter_config.json").is_file() and _is_free(card):
                text = _card(analysis, g, method, record, run)
                out[card] = f"{text}\n<!-- {_SIGNATURE}{_digest(text)} -->\n"
    return out


def _is_free(card: Path) -> bool:
    """Whether there is no card, or one that no person had a hand in."""
    try:
        there = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    text, _, signature = there.rpartition(f"\n<!-- {_SIGNATURE}")
    return signature == f"{_digest(text)} -->\n" or _is_pefts(there)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_pefts(text: str) -> bool:
    """Whether the card is the form that PEFT leaves, with nothing filled in."""
    from huggingface_hub import ModelCard, ModelCardData

    found = re.match(r"---\n(.*?\n)---\n(.*)\Z", text, re.DOTALL)
    with suppress(yaml.YAMLError, OSError):
        header = yaml.safe_load(found[1]) if found else None
        if isinstance(header, dict) and set(header) <= {"base_model", "library_name", "tags", "pipeline_tag"}:
            body = re.sub(r"\n### Framework versions\n+- PEFT [^\n]*", "", found[2]) if found else ""
            return body.split() == ModelCard.from_template(ModelCardData()).text.split()
    return False


def _card(analysis: Analysis, g: Group, method: str, record: Record, run: Path) -> str:
    model, data = record.config.get("model", {}), record.config.get("dataset", {})
    asked, glue = str(model.get("pretrained_id")), data.get("name") == "glue"
    on_hub = MINILM.hub_id if asked == MINILM.pretrained_id else asked if record.backbone.commit else None
    dataset = {
        "name": f"GLUE {g.task}" if glue else g.task,
        "type": GLUE_REPOSITORY if glue else str(data.get("name")),
        "split": data.get("eval_split") if record.evaluated_on == "dev" else "train",
    } | ({"config": data.get("subset")} if glue else {})
    result = {
        "task": {"type": "text-classification"},
        "dataset": dataset,
        "metrics": [{"type": name, "value": value} for name, value in record.metrics.items()],
    }
    header: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["fwlora", record.method],
        "metrics": list(record.metrics),
        "model-index": [{"name": f"{record.run_id}-seed-{record.seed}", "results": [result]}],
    }
    header |= {"base_model": on_hub} if on_hub else {}
    header |= {"datasets": [GLUE_REPOSITORY]} if glue else {}
    return render(
        "card.md",
        header=yaml.safe_dump(header, sort_keys=True, allow_unicode=True).strip(),
        record=record,
        method=method,
        task=g.task,
        mean=g.summaries[method],
        base=on_hub or "FOLDER_OF_THE_BASE_MODEL",
        classes=_classes(run),
        about=analysis.study.plan.methods.get(method, ""),
    )


def _classes(run: Path) -> int | None:
    with suppress(UserError):
        return load_predictions(run)[0].shape[1]
    return None
