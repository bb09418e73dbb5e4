"""TODO"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import ValidationError, model_validator

from fwlora_lab.config.block import Block
from fwlora_lab.errors import UserError

Relation = Literal["greater", "not_worse", "equivalent", "at_most", "between"]


class Scope(Block):
    """Where a claim is made: the task's name and the budget in percent of the backbone's parameters."""

    task: str
    budget: float


class Claim(Block):
    """One claim: θ of `method` stands in `relation` to `margin`.

    θ is the mean over seeds of metric(method) − metric(reference), metrics as fractions; of a metric that ends in
    "seconds" it is the geometric mean of method/reference; without a reference it is the method's own mean.

    - greater: θ > margin
    - not_worse: θ > −margin (non-inferiority: "almost all of")
    - equivalent: −margin < θ < margin
    - at_most: θ ≤ margin
    - between: margin[0] ≤ θ ≤ margin[1]

    `source` says where the claim and its margin come from.
    """

    metric: str
    method: str
    reference: str | None = None
    relation: Relation
    margin: float | tuple[float, float]
    scope: Scope
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, data: object) -> object:
        # YAML and JSON have lists only.
        if isinstance(data, dict) and isinstance(data.get("margin"), list):
            return data | {"margin": tuple(data["margin"])}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Claim:
        if (self.relation == "between") != isinstance(self.margin, tuple):
            raise ValueError("margin: two numbers for the relation `between`, one for every other")
        if isinstance(self.margin, tuple) and not self.margin[0] < self.margin[1]:
            raise ValueError("margin: the first number must be smaller than the second")
        if self.relation in ("not_worse", "equivalent"):
            if self.is_time or self.reference is None:
                raise ValueError(f"relation: {self.relation} compares a metric (not seconds) with a reference's")
            if isinstance(self.margin, float) and self.margin <= 0:
                raise ValueError("margin: must be above 0, no number of seeds shows that two methods are exactly equal")
        if self.is_ratio and min(self.margin if isinstance(self.margin, tuple) else (self.margin,)) <= 0:
            raise ValueError("margin: a ratio of seconds is compared with numbers above 0")
        if self.method == self.reference:
            raise ValueError("reference: is the method itself")
        return self

    @property
    def is_time(self) -> bool:
        return self.metric.endswith("seconds")

    @property
    def is_ratio(self) -> bool:
        return self.is_time and self.reference is not None

    @property
    def region(self) -> tuple[float, float]:
        """The θ for which the claim is true, from lowest to highest."""
        if isinstance(self.margin, tuple):
            return self.margin
        return {
            "greater": (self.margin, math.inf),
            "not_worse": (-self.margin, math.inf),
            "equivalent": (-self.margin, self.margin),
            "at_most": (-math.inf, self.margin),
        }[self.relation]

    @property
    def statement(self) -> str:
        """The claim in words, metrics in points (hundredths)."""
        low, high = (f"{(1 if self.is_time else 100) * bound:.4g}" for bound in self.region)
        subject = f"{self.method}'s {self.metric.replace('_', ' ')}"
        where = f"on {self.scope.task} at {self.scope.budget:g} %"
        if self.is_ratio or self.reference is None:
            words = {"greater": f"is above {low}", "at_most": f"is at most {high}", "between": f"is {low} to {high}"}
            times = f" x {self.reference}'s" if self.is_ratio else ""
            return f"{subject} {words[self.relation]}{times} {where}"
        words = {
            "greater": f"is more than {low} points above" if self.margin else "is above",
            "not_worse": f"is less than {low.removeprefix('-')} points below",
            "equivalent": f"is within {high} points of",
            "at_most": f"is at most {high} points above",
            "between": f"is {low} to {high} points above",
        }
        return f"{subject} {words[self.relation]} {self.reference}'s {where}"


def request_claims() -> tuple[Claim, ...]:
    """What the request claims at 0.2 %, with the margins that this house has put to its words."""
    claims = []
    expected = {
        # metric, {method: value}, margin of "almost all of", tolerance of a table row
        "sst2": ("accuracy", {"lora": 0.931, "adalora": 0.943, "fw_lora": 0.941}, 0.005, 0.005),
        "cola": ("matthews_correlation", {"lora": 0.550, "adalora": 0.578, "fw_lora": 0.575}, 0.01, 0.015),
    }
    for task, (metric, table, margin, tolerance) in expected.items():
        scope = Scope(task=task, budget=0.2)
        gain = table["adalora"] - table["lora"]
        claims += [
            Claim(
                metric=metric,
                method="fw_lora",
                reference="adalora",
                relation="not_worse",
                margin=margin,
                scope=scope,
                source="FW-LoRA matches or slightly exceeds AdaLoRA, by almost its entire gain; "
                f"the margin is {margin / gain:.0%} of the {100 * gain:.1f} points expected of AdaLoRA over LoRA",
            ),
            Claim(
                metric=metric,
                method="fw_lora",
                reference="lora",
                relation="greater",
                margin=0.0,
                scope=scope,
                source="the expected table puts FW-LoRA above LoRA",
            ),
        ]
        claims += [
            Claim(
                metric=metric,
                method=method,
                relation="between",
                margin=(round(value - tolerance, 4), round(value + tolerance, 4)),
                scope=scope,
                source=f"the expected table: {100 * value:.1f}; a row is met within {100 * tolerance:g} points, "
                "about what published results of one method differ by",
            )
            for method, value in table.items()
        ]
        claims += [
            Claim(
                metric="train_seconds",
                method="fw_lora",
                reference="lora",
                relation="at_most",
                margin=1.01,
                scope=scope,
                source="training time: FW-LoRA 1.01 x LoRA, less than 1 % slower",
            ),
            Claim(
                metric="train_seconds",
                method="adalora",
                reference="lora",
                relation="between",
                margin=(1.10, 1.20),
                scope=scope,
                source="training time: AdaLoRA 1.12 x LoRA, 10 to 20 % extra run time",
            ),
            Claim(
                metric="train_seconds",
                method="fw_lora",
                reference="adalora",
                relation="between",
                margin=(0.8696, 0.9091),
                scope=scope,
                source="FW-LoRA is 10 to 15 % faster than AdaLoRA, read as speed: 1/1.15 to 1/1.10 of its time",
            ),
        ]
    return tuple(claims)


def read_claims(rows: object, where: str) -> tuple[Claim, ...]:
    """Claims from a list of mappings, as YAML gives them; `where` (file and key) goes into the messages.

    Raises:
        UserError: it is no list, a claim is not well formed, or one is made twice.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise UserError(f"{where}: a list of claims is needed, each with metric, method, relation, margin and scope.")
    claims = []
    for number, row in enumerate(rows):
        try:
            claim = Claim.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (number, *first["loc"])))
            raise UserError(f"{where}.{key}: {first['msg'].removeprefix('Value error, ')}.") from error
        if any(claim.model_copy(update={"source": c.source}) == c for c in claims):
            raise UserError(f"{where}.{number}: this claim is made twice ({claim.statement}); delete one.")
        claims.append(claim)
    return tuple(claims)
