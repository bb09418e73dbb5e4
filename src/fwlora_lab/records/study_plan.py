"""The plan of a study, as it is written to study.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fwlora_lab.errors import UserError
from fwlora_lab.files import json_text, write_atomic
from fwlora_lab.records.folder import ADVICE
from fwlora_lab.records.record import SCHEMA_VERSION, RecordBlock


class StudyCell(RecordBlock):
    """One method on one task at one budget; its runs have this run id, one for each seed of the study.

    Attributes:
        budget: percent of the backbone's parameters.
    """

    task: str
    budget: float
    method: str
    run_id: str


class StudyPlan(RecordBlock):
    """What a study consists of, trained or not.

    Attributes:
        study: its name; "" for a plan that was derived from the records of a folder.
        command: the command line that trains it, without seeds=.
        budgets: in percent of the backbone's parameters.
        methods: each method's description, in the study's order.
        reference: the method that the others are compared with.
        selection: how hyper-parameters were chosen.
        claims: as `analysis.claims` reads them.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    study: str
    command: str
    tasks: list[str]
    budgets: list[float]
    methods: dict[str, str]
    reference: str
    seeds: list[int]
    selection: dict[str, Any]
    cells: list[StudyCell]
    claims: list[dict[str, Any]] = []


def load_plan(results_dir: str | Path) -> StudyPlan | None:
    """The plan in `results_dir`; None if there is no study.json.

    Raises:
        UserError: study.json cannot be read.
    """
    file = Path(results_dir) / "study.json"
    try:
        return StudyPlan.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{file}: not a study's plan of this version ({str(error).splitlines()[0]}). Delete it, and "
            "`fwlora compare` writes it again."
        ) from error


def write_plan(results_dir: str | Path, plan: StudyPlan) -> None:
    """Write study.json in one piece.

    Raises:
        UserError: the file cannot be written.
    """
    file = Path(results_dir) / "study.json"
    write_atomic(file, json_text(plan.model_dump(mode="json")), ADVICE)
