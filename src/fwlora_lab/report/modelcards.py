"""Model cards for the adapters that runs kept: the hub's metadata, the record's numbers, how to load them, limits."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fwlora_lab.analysis.study import Analysis, Cell
from fwlora_lab.catalog.encoders import packaged_encoder
from fwlora_lab.catalog.tasks import GLUE_REPOSITORY
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import RunFolder, load_predictions
from fwlora_lab.records.record import Record
from fwlora_lab.report.templates import render

_SIGNATURE = "written by fwlora report; it writes this card again as long as nobody changed it: sha256 "


def model_cards(analysis: Analysis) -> dict[Path, str]:
    """The path and text of a card for each adapter that has no card written by a person."""
    cards = {}
    for cell in analysis.cells:
        for record in cell.records:
            run = RunFolder(analysis.study.folder, record.run_id, record.seed).path
            card = run / "adapter" / "README.md"
            if (run / "adapter" / "adapter_config.json").is_file() and _may_be_written(card):
                text = _card(analysis, cell, record, run)
                cards[card] = f"{text}\n<!-- {_SIGNATURE}{_digest(text)} -->\n"
    return cards


def _may_be_written(card: Path) -> bool:
    """Whether there is no card, or one that no person has written or changed."""
    try:
        existing = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    text, _, signature = existing.rpartition(f"\n<!-- {_SIGNATURE}")
    return signature == f"{_digest(text)} -->\n" or _is_peft_template(existing)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_peft_template(text: str) -> bool:
    """Whether the card is the empty template that PEFT writes."""
    from huggingface_hub import ModelCard, ModelCardData

    found = re.match(r"---\n(.*?\n)---\n(.*)\Z", text, re.DOTALL)
    with suppress(yaml.YAMLError, OSError):
        header = yaml.safe_load(found[1]) if found else None
        if isinstance(header, dict) and set(header) <= {"base_model", "library_name", "tags", "pipeline_tag"}:
            body = re.sub(r"\n### Framework versions\n+- PEFT [^\n]*", "", found[2]) if found else ""
            return body.split() == ModelCard.from_template(ModelCardData()).text.split()
    return False


def _card(analysis: Analysis, cell: Cell, record: Record, run: Path) -> str:
    data = record.config.get("dataset", {})
    is_glue, hub_id = data.get("name") == "glue", _hub_id(record)
    dataset = {
        "name": f"GLUE {cell.task}" if is_glue else cell.task,
        "type": GLUE_REPOSITORY if is_glue else str(data.get("name")),
        "split": data.get("eval_split") if record.evaluated_on == "dev" else "train",
    } | ({"config": data.get("subset")} if is_glue else {})
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
    header |= {"base_model": hub_id} if hub_id else {}
    header |= {"datasets": [GLUE_REPOSITORY]} if is_glue else {}
    return render(
        "card.md",
        header=yaml.safe_dump(header, sort_keys=True, allow_unicode=True).strip(),
        record=record,
        method=cell.method,
        task=cell.task,
        summary=cell.summary,
        base=hub_id or "FOLDER_OF_THE_BASE_MODEL",
        classes=_classes(run),
        about=analysis.study.plan.methods.get(cell.method, ""),
    )


def _hub_id(record: Record) -> str | None:
    """The base model on the hub; None for one from a folder."""
    pretrained_id = str(record.config.get("model", {}).get("pretrained_id"))
    if packaged := packaged_encoder(pretrained_id):
        return packaged.hub_id
    return pretrained_id if record.backbone.commit else None


def _classes(run: Path) -> int | None:
    """The width of the head; None without predictions."""
    with suppress(UserError):
        return load_predictions(run)[0].shape[1]
    return None
