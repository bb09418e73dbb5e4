"""Claims about methods as data: what is compared, where, and by which margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import ValidationError, model_validator

from fwlora_lab.config.block import Block
from fwlora_lab.errors import UserError

Relation = Literal["greater", "not_worse", "equivalent", "at_most", "between"]


class Scope(Block):
    """Where a claim is made.

    Attributes:
        task: the task's name in the study.
        budget: percent of the backbone's parameters.
    """

    task: str
    budget: float


class Claim(Block):
    """One claim: a quantity θ of `method` is in a region.

    θ is the mean over seeds of metric(method) − metric(reference), with metrics as fractions. For a metric that ends
    in "seconds" it is the geometric mean of method / reference. Without a reference it is the method's own mean.

    Attributes:
        metric: as records name it, such as `accuracy` or `train_seconds`.
        reference: the method that `method` is compared with; None for a claim about `method` alone.
        relation: the region, by `margin`:
            greater: θ > margin;
            not_worse: θ > −margin (non-inferiority, "almost all of");
            equivalent: −margin < θ < margin;
            at_most: θ ≤ margin;
            between: margin[0] ≤ θ ≤ margin[1].
        margin: a fraction, a ratio or seconds, as θ is; two numbers for `between`.
        source: where the claim and its margin come from.
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
    def _margin_as_tuple(cls, data: object) -> object:
        # YAML and JSON have lists but no tuples.
        if isinstance(data, dict) and isinstance(data.get("margin"), list):
            return data | {"margin": tuple(data["margin"])}
        return data

    @model_validator(mode="after")
    def _check(self) -> Claim:
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
        """The θ for which the claim is true, from the lowest to the highest."""
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
        """The claim as a sentence, with metrics in points (hundredths)."""
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


def read_claims(rows: object, where: str) -> tuple[Claim, ...]:
    """Claims from a list of mappings, as YAML and JSON give them.

    Args:
        where: file and key, for messages.

    Raises:
        UserError: `rows` is not a list, a claim is not well formed, or one is made twice.
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
