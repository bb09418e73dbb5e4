"""TODO"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fwlora_lab.errors import UserError
from fwlora_lab.files import write_atomic
from fwlora_lab.records.folder import ADVICE, json_text
from fwlora_lab.records.record import SCHEMA_VERSION, RecordBlock


class StudyCell(RecordBlock):
    """The runs of one method on one task at one budget: those with this run_id, one for each seed."""

    task: str
    budget: float
    method: str
    run_id: str


class StudyPlan(RecordBlock):
    """What a study consists of, whether or not it has been trained yet.

    `command` trains it, seeds= left out. `budgets` are in percent of the backbone's
    parameters; `methods` gives each method's description, in the study's order; `reference` is the method that the
    others are compared with; `selection` says how hyper-parameters were chosen; `claims` are those of `verdicts`.
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
    """The plan of the study in `results_dir`; None where there is none. UserError where it is broken."""
    file = Path(results_dir) / "study.json"
    try:
        return StudyPlan.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{file}: not a study's plan of this version ({str(error).splitlines()[0]}). Delete it, and "
            "`fwlora compare` writes it anew."
        ) from error


def write_plan(results_dir: str | Path, plan: StudyPlan) -> None:
    """Write study.json in one piece; UserError where that cannot be done."""
    file = Path(results_dir) / "study.json"
    write_atomic(file, json_text(plan.model_dump(mode="json")), ADVICE)
