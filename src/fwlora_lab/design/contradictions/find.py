"""All contradictions of a design, in the order in which they are reported."""

from __future__ import annotations

from fwlora_lab.design.contradictions import facts, searches, texts
from fwlora_lab.design.contradictions.contradiction import Contradiction, ContradictionKind
from fwlora_lab.design.plan import DesignPlan

_CHECKS = (
    facts.unknown_methods,
    searches.ranges,
    facts.runs,
    facts.budgets,
    facts.sizes,
    searches.examples,
    searches.tuning_of_examples,
    searches.tuning,
    facts.steps_after_warmup,
    searches.splits,
    facts.targets,
    texts.left_out_tasks,
    texts.left_out_budgets,
    texts.left_out_baselines,
    texts.left_out_metrics,
    texts.two_values,
    searches.values_outside,
)


def find_contradictions(plan: DesignPlan) -> list[Contradiction]:
    """All contradictions of a design; of several with the same text the first."""
    found: dict[tuple[ContradictionKind, str], Contradiction] = {}
    for check in _CHECKS:
        for item in check(plan):
            found.setdefault((item.kind, item.text), item)
    return [*found.values()]
