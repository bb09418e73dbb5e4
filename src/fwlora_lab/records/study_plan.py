"""The plan of a study, as it is written to study.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fwlora_lab.errors import UserError
from fwlora_lab.files import is_unchanged, json_text, seal, write_atomic
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
        sha256: of the plan itself without this entry; None in plans from before it was written.
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
    sha256: str | None = None


def load_plan(results_dir: str | Path) -> StudyPlan | None:
    """The plan in `results_dir`; None if there is no study.json.

    Raises:
        UserError: study.json cannot be read.
    """
    file = Path(results_dir) / "study.json"
    try:
        content = file.read_bytes()
        plan = StudyPlan.model_validate_json(content)
        if not is_unchanged(json.loads(content)):
            raise UserError(
                f"{file}: was changed after it was written (its sha256 is another). Put the original back, or delete "
                "it, and `fwlora compare` writes it again."
            )
        return plan.model_copy(update={"sha256": None})
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
    write_atomic(file, json_text(seal(plan.model_dump(mode="json"))), ADVICE)
