"""Contradictions between the prose of a design and its lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fwlora_lab.design.contradictions.contradiction import Contradiction, locate_number, origin, task_name
from fwlora_lab.design.examples import example_value
from fwlora_lab.design.names import label
from fwlora_lab.design.plan import DesignPlan
from fwlora_lab.design.prose import around, tasks_in_prose, texts
from fwlora_lab.design.request import Place
from fwlora_lab.text import one_line


def left_out_tasks(plan: DesignPlan) -> Iterator[Contradiction]:
    """Tasks that the prose demands and no run has."""
    used = {task_name(draft) for draft in plan.drafts}
    for name, quote in tasks_in_prose(plan.request).items():
        if name not in used:
            yield Contradiction(
                "left out",
                f"data set {name} is demanded by the prose, no run has it",
                (plan.request.locate(quote.source_location, quote.words), _listed_datasets(plan)),
            )


def left_out_budgets(plan: DesignPlan) -> Iterator[Contradiction]:
    """Budgets that the prose demands and no run has."""
    budgets = {draft.budget for draft in plan.drafts}
    listed = ", ".join(f"{budget:g} %" for budget in budgets if budget is not None) or "no budget"
    for budget in plan.resolved.prose_budgets:
        if budget.value not in budgets:
            yield Contradiction(
                "left out",
                f"the budget {budget.value:g} % is demanded by the prose, the runs have {listed}",
                (locate_number(plan, budget), plan.request.locate("runs" if plan.design.runs else "datasets")),
            )


def left_out_baselines(plan: DesignPlan) -> Iterator[Contradiction]:
    """Baselines that the prose demands and no run trains."""
    used = {draft.method_name for draft in plan.drafts}
    listed = ", ".join(map(_name_of, plan.design.comparative_methods)) or "none"
    for source_location, text in texts(plan.request):
        match = re.search(r"\b[Bb]aselines?\b", text)
        after = text[match.start() : match.start() + 300] if match else ""
        for method, pattern in (
            ("lora", r"\b(?:[Pp]lain|[Vv]anilla|[Ss]tandard) LoRA\b"),
            ("adalora", r"\bAdaLoRA\b"),
        ):
            found = re.search(pattern, after)
            if found and method not in used:
                yield Contradiction(
                    "left out",
                    f"the baseline {found[0].replace('Plain', 'plain')} is demanded by the prose, no run trains it",
                    (
                        plan.request.locate(source_location, around(after, *found.span())),
                        plan.request.locate("comparative_methods", listed),
                    ),
                )


def left_out_metrics(plan: DesignPlan) -> Iterator[Contradiction]:
    """Metrics of a task that no run has."""
    used = {task_name(draft) for draft in plan.drafts}
    for index, metric in enumerate(plan.design.metrics):
        if "matthews" in metric.lower() and "cola" not in used:
            yield Contradiction(
                "left out",
                f"the metric {one_line(metric, 40)} belongs to CoLA, no run has it",
                (plan.request.locate(f"metrics.{index}", metric), _listed_datasets(plan)),
            )


def two_values(plan: DesignPlan) -> Iterator[Contradiction]:
    """Keys to which the prose gives two values, or another one than the design or the example output."""
    for key, numbers in plan.resolved.prose_numbers.items():
        first = numbers[0]
        others = [(locate_number(plan, other), other.value) for other in numbers[1:]]
        for draft in plan.drafts:
            value = draft.values.get(key)
            if value is not None and value.source_location not in ("", first.source_location):
                others.append((origin(plan, draft, key), value.value))
            example = example_value(plan.resolved.examples.get(draft.run_id), key)
            if example is not None:
                others.append((plan.request.locate(f"example:{draft.run_id}.{key}", example), example))
        for place, value in others:
            if value != first.value:
                yield Contradiction(
                    "two values", f"{key} is {first.value} and {value}", (locate_number(plan, first), place)
                )


def _name_of(method: Any) -> str:
    return method if isinstance(method, str) else method.name


def _listed_datasets(plan: DesignPlan) -> Place:
    return plan.request.locate("datasets", ", ".join(label(dataset) for dataset in plan.design.datasets))
