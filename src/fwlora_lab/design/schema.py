"""The schema of a design: a hypothesis and the experiment that tests it."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from fwlora_lab.config.block import Block
from fwlora_lab.config.schema import Dimension, Positive, RunId, Text

Name = Annotated[Text, Field(max_length=200)]
Prose = Annotated[str, Field(max_length=500_000)]
Scalar = bool | int | float | str | None
Setting = Scalar | list[Scalar]
Percent = Annotated[float, Field(gt=0, le=100)]
# A range in text (`1e-4-3e-4`, `4,8,16`), one value, a list of choices, or a typed dimension.
SpaceText = str | int | float | list[Scalar] | Dimension


class Hypothesis(Block):
    """What the experiment is to show, in prose; numbers in it are read where no list states them."""

    open_problems: Prose | None = None
    method: Prose | None = None
    experimental_setup: Prose | None = None
    experimental_code: Prose | None = None
    expected_result: Prose | None = None
    expected_conclusion: Prose | None = None


class DesignMethod(Block):
    """A method; `settings` and `hyperparameters_to_search` are its own and win over the design's."""

    name: Name
    description: Prose | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)
    hyperparameters_to_search: dict[str, SpaceText] = Field(default_factory=dict)
    n_trials: Positive | None = None


class DesignModel(Block):
    """A backbone: its name, where it comes from, and the size that the design believes it has."""

    name: Name
    pretrained_id: Name | None = None
    revision: Text | None = None
    parameters: Positive | None = None


class DesignDataset(Block):
    """A data set; `settings` are keys of a run config's `dataset` block (name, subset, train_file, …)."""

    name: Name
    settings: dict[str, Setting] = Field(default_factory=dict)


class DesignRun(Block):
    """One run: `method` is `proposed`, `comparative-<i>` or a method's name.

    `model` and `dataset` may be left out where the design has one of them.
    """

    run_id: RunId | None = None
    method: Name
    model: Name | None = None
    dataset: Name | None = None
    budget: Percent | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)


class ExperimentDesign(Block):
    """A hypothesis and the experiment that tests it.

    Without `runs` there is one for every method × model × dataset × budget. `settings` maps keys of a run config
    (`learning_rate`, `lora_rank`, `dataset.max_length`) to values for all runs. `budgets` are percent of the backbone.
    """

    hypothesis: Prose | Hypothesis | None = None
    summary: Prose | None = None
    proposed_method: Prose | DesignMethod
    comparative_methods: list[Name | DesignMethod] = Field(default_factory=list, max_length=100)
    models: Annotated[list[Name | DesignModel], Field(min_length=1, max_length=100)]
    datasets: Annotated[list[Name | DesignDataset], Field(min_length=1, max_length=100)]
    metrics: list[Name] = Field(default_factory=list)
    hyperparameters_to_search: dict[str, SpaceText] = Field(default_factory=dict)
    n_trials: Positive | None = None
    budgets: list[Percent] = Field(default_factory=list, max_length=100)
    settings: dict[str, Setting] = Field(default_factory=dict)
    environment: Prose | None = None
    runs: list[DesignRun] = Field(default_factory=list, max_length=1000)


class PartialDesign(ExperimentDesign):
    """A design that does not say yet what is compared, with which models or on which data sets."""

    proposed_method: Prose | DesignMethod | None = None  # type: ignore[assignment]
    models: list[Name | DesignModel] = Field(default_factory=list, max_length=100)
    datasets: list[Name | DesignDataset] = Field(default_factory=list, max_length=100)


def design_schema() -> str:
    """The JSON Schema of a design file."""
    return json.dumps(ExperimentDesign.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


DESIGN_KEYS = sorted(
    {
        n
        for part in (ExperimentDesign, DesignMethod, DesignModel, DesignDataset, DesignRun, Hypothesis)
        for n in part.model_fields
    }
)
