"""Contradictions about searches: ranges, equal tuning of all methods, and the split that trials are scored on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from fwlora_lab.catalog.methods import METHODS
from fwlora_lab.config.keys import search_key
from fwlora_lab.design.contradictions.contradiction import Contradiction, in_json, origin
from fwlora_lab.design.draft import RunDraft, SearchEntry
from fwlora_lab.design.examples import example_space
from fwlora_lab.design.names import method_in
from fwlora_lab.design.plan import DesignPlan
from fwlora_lab.design.prose import around, texts
from fwlora_lab.design.request import Place
from fwlora_lab.errors import UserError
from fwlora_lab.text import one_line

_METHOD_BLOCKS = ("fw_lora.", "adalora.")


def ranges(plan: DesignPlan) -> Iterator[Contradiction]:
    """Ranges that cannot be searched as they are written."""
    design = plan.resolved
    for spaces in (design.spaces, *(method.spaces for method in design.methods), design.filled_spaces):
        for entry in spaces.values():
            for fault in entry.space.faults:
                here = plan.request.locate(one_line(entry.source_location), entry.written)
                places = here, Place(f"distribution of {entry.space.key}")
                yield Contradiction("range", f"{entry.name}: {fault}", places)


def examples(plan: DesignPlan) -> Iterator[Contradiction]:
    """Methods and ranges that differ between the request's own example output and its design."""
    for draft in plan.drafts:
        example = plan.resolved.examples.get(draft.run_id)
        if example is None:
            continue
        method = example.get("method")
        meant = METHODS.get(str(method)) or method_in(str(method))
        if method is not None and meant != draft.method_name:
            yield Contradiction(
                "method",
                f"{draft.run_id} is {draft.method.config_name} by the design, the example output makes it "
                f"{one_line(method, 60)}",
                (
                    plan.request.locate(f"example:{draft.run_id}.method", method),
                    plan.request.locate(draft.method.source_location, one_line(draft.method.method.name, 60)),
                ),
            )
        for name, dimension in example_space(example).items():
            yield from _example_dimension(plan, draft, name, dimension)


def _example_dimension(
    plan: DesignPlan, draft: RunDraft, name: str, dimension: Mapping[str, Any]
) -> Iterator[Contradiction]:
    try:
        key = search_key(name)
    except UserError:
        return
    named = {**plan.resolved.spaces, **draft.method.spaces}
    entry = named.get(key)
    here = plan.request.locate(f"example:{draft.run_id}.optuna.search_space.{name}", in_json(dimension))
    if entry is None:
        names = ", ".join(other.name for other in named.values())
        yield Contradiction(
            "search space",
            f"{name} is searched in the example output of {draft.run_id}, the design does not name it",
            (here, plan.request.locate("hyperparameters_to_search", names)),
        )
    elif entry.space.dimension is not None and _ends(entry.space.dimension) != _ends(dimension):
        yield Contradiction(
            "search space",
            f"{name} of {draft.run_id} is another range in the example output than in the design",
            (here, plan.request.locate(entry.source_location, in_json(entry.space.dimension))),
        )


def tuning_of_examples(plan: DesignPlan) -> Iterator[Contradiction]:
    """More trials or a wider search for one method than for another in the request's own example output."""
    examples = [(i, e) for i, e in plan.resolved.examples.items() if isinstance(e.get("optuna"), dict)]
    for (first_id, first), (second_id, second) in pairwise(examples):
        first_trials, second_trials = first["optuna"].get("n_trials"), second["optuna"].get("n_trials")
        if first_trials != second_trials:
            yield Contradiction(
                "unequal tuning",
                f"{first_trials} trials for {first_id}, {second_trials} for {second_id}",
                (
                    plan.request.locate(f"example:{first_id}.optuna.n_trials", first_trials),
                    plan.request.locate(f"example:{second_id}.optuna.n_trials", second_trials),
                ),
            )
        first_space, second_space = example_space(first), example_space(second)
        for name in dict.fromkeys([*first_space, *second_space]):
            one, two = first_space.get(name), second_space.get(name)
            is_alike = one is not None and two is not None and _ends(one) == _ends(two)
            if search_key(name).startswith(_METHOD_BLOCKS) or is_alike:
                continue
            how = "searched in one run only" if one is None or two is None else "searched more widely in one"
            yield Contradiction(
                "unequal tuning",
                f"{name} is {how}",
                (_searched_example(plan, first_id, name, one), _searched_example(plan, second_id, name, two)),
            )


def _searched_example(plan: DesignPlan, run_id: str, name: str, dimension: Mapping[str, Any] | None) -> Place:
    words = in_json(dimension) if dimension else "not searched"
    return plan.request.locate(f"example:{run_id}.optuna.search_space.{name}", words)


def tuning(plan: DesignPlan) -> Iterator[Contradiction]:
    """More trials or a wider search for one method than for another in the design."""
    first = plan.drafts[0]
    for draft in plan.drafts[1:]:
        if not (first.search or draft.search):
            continue
        if draft.n_trials.value != first.n_trials.value:
            yield Contradiction(
                "unequal tuning",
                f"{first.n_trials.value} trials for {first.method_name}, {draft.n_trials.value} for "
                f"{draft.method_name}",
                (
                    plan.request.locate(first.n_trials.source_location or "n_trials"),
                    plan.request.locate(draft.n_trials.source_location or "n_trials"),
                ),
            )
        for key in dict.fromkeys([*first.search, *draft.search]):
            one, two = first.search.get(key), draft.search.get(key)
            is_alike = one and two and one.space.dimension == two.space.dimension
            if key.startswith(_METHOD_BLOCKS) or is_alike:
                continue
            yield Contradiction(
                "unequal tuning",
                f"{key} is searched differently by {first.method_name} and {draft.method_name}",
                (_searched(plan, first, key, one), _searched(plan, draft, key, two)),
            )


def _searched(plan: DesignPlan, draft: RunDraft, key: str, entry: SearchEntry | None) -> Place:
    if entry is None:
        return Place(f"{plan.request.locate(draft.method.source_location)}: {key} is not searched")
    return plan.request.locate(entry.source_location, in_json(entry.space.dimension or {}))


def splits(plan: DesignPlan) -> Iterator[Contradiction]:
    """Searches that would be scored on the split that is reported."""
    for run_id, example in plan.resolved.examples.items():
        data = example.get("dataset")
        if example_space(example) and isinstance(data, dict) and not data.get("validation_fraction"):
            yield Contradiction(
                "one split",
                "the search and the result would both be scored on the dev split, so the result is the best of its "
                "trials; here a tenth of train is kept for the search",
                (
                    plan.request.locate(f"example:{run_id}.dataset.eval_split", data.get("eval_split")),
                    _dev_split_in_prose(plan) or plan.request.locate(f"example:{run_id}.optuna"),
                ),
            )
    for draft in plan.drafts:
        fraction = draft.values.get("dataset.validation_fraction")
        if draft.search and fraction is not None and fraction.value == 0:
            searched = next(iter(draft.search.values()))
            yield Contradiction(
                "one split",
                "a search without a validation split would be scored on what is reported",
                (
                    plan.request.locate(fraction.source_location, fraction.value),
                    plan.request.locate(searched.source_location),
                ),
            )


def _dev_split_in_prose(plan: DesignPlan) -> Place | None:
    for source_location, text in texts(plan.request):
        match = re.search(r"\bdev\b", text)
        if match:
            return plan.request.locate(source_location, around(text, *match.span()))
    return None


def values_outside(plan: DesignPlan) -> Iterator[Contradiction]:
    """Values outside of their own search range."""
    for draft in plan.drafts:
        for key, entry in draft.search.items():
            value, dimension = draft.get(key), entry.space.dimension or {}
            if value is None or isinstance(value, list) or key not in draft.values:
                continue
            if not entry.space.holds(value):
                yield Contradiction(
                    "range",
                    f"{entry.name} = {value} lies outside of its own search space",
                    (origin(plan, draft, key), plan.request.locate(entry.source_location, in_json(dimension))),
                )


def _ends(dimension: Mapping[str, Any]) -> list[Any]:
    """What makes two dimensions the same range: their choices, or their lowest and highest value."""
    choices = dimension.get("choices")
    return sorted(map(str, choices)) if isinstance(choices, list) else [dimension.get("low"), dimension.get("high")]
