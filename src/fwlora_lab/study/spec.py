"""A study as its file describes it, and the packaged studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from fwlora_lab.config.block import Block
from fwlora_lab.config.issues import issues_of
from fwlora_lab.config.schema import Dimension
from fwlora_lab.config.tree import CONF, available_studies
from fwlora_lab.config.yaml_reader import read_file
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, listing

Timing = Literal["shared", "exclusive"]


class TaskPart(Block):
    """What makes the base run one on this task.

    Attributes:
        set: overrides of the base run.
        n_trials: replaces the selection's n_trials for a task on which tuning costs more or less.
    """

    set: list[str] = []
    n_trials: Annotated[int, Field(ge=1)] | None = None


class MethodPart(Block):
    """What makes the base run one of this method.

    Attributes:
        about: the method in a few words, as the report describes it.
        set: overrides of the base run.
        space: added to the selection's space; a key of both is searched as it is given here.
    """

    about: str
    set: list[str]
    space: dict[str, Dimension] = {}


class Selection(Block):
    """How hyper-parameters are chosen.

    Attributes:
        policy: `fixed` takes those of the configs. `tuned` gives each method `n_trials` trials on each task and budget,
            scored on a part of the training data.
        seed: the training seed of the trials, which no compared run may have.
        set: overrides of the trials alone, for example fewer training examples than the compared runs have.
        space: what is searched for every method.
    """

    policy: Literal["fixed", "tuned"] = "fixed"
    n_trials: Annotated[int, Field(ge=1)] = 12
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1000
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = "none"
    set: list[str] = []
    space: dict[str, Dimension] = {}

    @model_validator(mode="after")
    def _check_space(self) -> Selection:
        if self.policy == "tuned" and not self.space:
            raise ValueError("tuned needs a space, for example {learning_rate: {type: loguniform, low: …, high: …}}")
        return self


class StudySpec(Block):
    """A study as its file describes it.

    Attributes:
        base: the id or file of the run config that all runs start from.
        set: overrides of every run.
        budgets: percent of the backbone's parameters.
        seeds: training seeds such as `0..9`.
        reference: the method that the others are compared with.
        timing: `shared` trains a few seeds at a time, whose seconds are one measurement. `exclusive` trains one run at
            a time, alone, so that the seconds of every seed are a measurement of their own; it takes longer.
        claims: what the report judges; `request` takes the claims of the written request.
    """

    about: str
    base: str
    set: list[str] = []
    tasks: Annotated[dict[str, TaskPart], Field(min_length=1)]
    methods: Annotated[dict[str, MethodPart], Field(min_length=1)]
    budgets: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=1)]
    seeds: str
    reference: str
    timing: Timing = "shared"
    selection: Selection = Selection()
    claims: Literal["request"] | list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _check_names(self) -> StudySpec:
        if self.reference not in self.methods:
            raise ValueError(f"reference: {self.reference!r} is not a method of the study: {', '.join(self.methods)}")
        for name in (*self.tasks, *self.methods):
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"{name!r} is part of a folder's name: use letters, digits, '_' and '-'")
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("budgets: one of them is given twice")
        return self


def load_study(name: str) -> StudySpec:
    """The study called `name`, or the one in that .yaml file; a UserError lists every fault with its file and key."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in available_studies():
        path = CONF / "study" / f"{name}.yaml"
    else:
        known = available_studies()
        raise UserError(
            f"unknown study {name!r}{did_you_mean(name, known)}: use one of {', '.join(known)}, or a .yaml file"
        )
    file = read_file(path, "study", "about")
    try:
        study = StudySpec.model_validate(file.values)
        base_file = path.parent / study.base  # a file is named relative to the study's folder
        return study.model_copy(update={"base": str(base_file)}) if base_file.is_file() else study
    except ValidationError as error:
        faults = []
        for issue in issues_of(error, file.values, lambda key: did_you_mean(key.rsplit(".", 1)[-1], _keys())):
            line = file.lines.get(issue.key)
            faults.append(f"{path}{f':{line}' if line else ''}: {issue.key + ': ' if issue.key else ''}{issue.text}")
        raise UserError(listing(faults)) from None


def is_study(path: str) -> bool:
    """Whether the YAML file at `path` describes a study and not a run; False for what cannot be read."""
    try:
        values = read_file(Path(path).expanduser(), "study", "about").values
    except UserError:
        return False
    return {"tasks", "methods"} <= values.keys()


def _keys() -> list[str]:
    return [k for block in (StudySpec, TaskPart, MethodPart, Selection) for k in block.model_fields]
