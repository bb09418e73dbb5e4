"""TODO"""

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


class TaskPart(Block):
    """Overrides that make the base run one on this task; `n_trials` where tuning is dearer or cheaper here."""

    set: list[str] = []
    n_trials: Annotated[int, Field(ge=1)] | None = None


class MethodPart(Block):
    """Overrides that make the base run this method; `space`: what is searched besides, or in place of, all methods'."""

    about: str
    set: list[str]
    space: dict[str, Dimension] = {}


class Selection(Block):
    """How hyper-parameters are chosen.

    fixed: they are those of the configs. tuned: each method gets `n_trials` trials on each task and budget, scored on a
    part of the training data with training seed `seed`, which no run that is compared may have.
    """

    policy: Literal["fixed", "tuned"] = "fixed"
    n_trials: Annotated[int, Field(ge=1)] = 12
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1000
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = "none"
    space: dict[str, Dimension] = {}

    @model_validator(mode="after")
    def _has_a_space(self) -> Selection:
        if self.policy == "tuned" and not self.space:
            raise ValueError("tuned needs a space, for example {learning_rate: {type: loguniform, low: …, high: …}}")
        return self


class StudySpec(Block):
    """A study as its file describes it; `base` is a run's id or file, `set` overrides for every run."""

    about: str
    base: str
    set: list[str] = []
    tasks: Annotated[dict[str, TaskPart], Field(min_length=1)]
    methods: Annotated[dict[str, MethodPart], Field(min_length=1)]
    budgets: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=1)]
    seeds: str
    reference: str
    selection: Selection = Selection()
    claims: Literal["request"] | list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _names(self) -> StudySpec:
        if self.reference not in self.methods:
            raise ValueError(f"reference: {self.reference!r} is no method of the study: {', '.join(self.methods)}")
        for name in (*self.tasks, *self.methods):
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"{name!r} is part of a folder's name: use letters, digits, '_' and '-'")
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("budgets: one of them stands twice")
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
            f"there is no study {name!r}{did_you_mean(name, known)}: use one of {', '.join(known)}, or a .yaml file"
        )
    file = read_file(path, "study", "about")
    try:
        study = StudySpec.model_validate(file.values)
        beside = path.parent / study.base  # a base named by its file stands beside the study
        return study.model_copy(update={"base": str(beside)}) if beside.is_file() else study
    except ValidationError as error:
        faults = []
        for issue in issues_of(error, file.values, lambda key: did_you_mean(key.rsplit(".", 1)[-1], _keys())):
            line = file.lines.get(issue.key)
            faults.append(f"{path}{f':{line}' if line else ''}: {issue.key + ': ' if issue.key else ''}{issue.text}")
        raise UserError(listing(faults)) from None


def _keys() -> list[str]:
    return [k for block in (StudySpec, TaskPart, MethodPart, Selection) for k in block.model_fields]
