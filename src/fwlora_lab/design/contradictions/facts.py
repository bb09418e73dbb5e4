"""Contradictions between what a run states and what is known: sizes, budgets, layers, and numbers of steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from fwlora_lab.catalog.encoders import ROLES
from fwlora_lab.catalog.tasks import TASKS
from fwlora_lab.design.contradictions.contradiction import Contradiction, locate_number, origin, task_name
from fwlora_lab.design.draft import BUDGET, RunDraft
from fwlora_lab.design.names import label, unknown_text
from fwlora_lab.design.plan import DesignPlan
from fwlora_lab.design.prose import Quote, tasks_in_prose
from fwlora_lab.design.request import Place
from fwlora_lab.design.resolve import WARMUP_OF_LEARNING_RATE
from fwlora_lab.text import did_you_mean

_RANK = "model.lora.rank"
_WARMUP = "fw_lora.warmup_steps"
_TARGETS = "model.lora.target_modules"


def unknown_methods(plan: DesignPlan) -> Iterator[Contradiction]:
    """Methods that are not known here, whose runs are left out."""
    for method in plan.resolved.unknown_methods:
        known = Place("known methods: those of this package and of the modules in FWLORA_EXTENSIONS (CONTRIBUTING.md)")
        yield Contradiction(
            "unknown method",
            unknown_text(method.name),
            (plan.request.locate(method.source_location, method.name), known),
        )


def runs(plan: DesignPlan) -> Iterator[Contradiction]:
    """Run ids that name another method than the run's, and settings that no run config can express."""
    for draft in plan.drafts:
        yield from _run_id(plan, draft)
        for block, settings in [*draft.own_settings, ("settings", plan.design.settings)]:
            if WARMUP_OF_LEARNING_RATE in settings:
                location = f"{block}.{WARMUP_OF_LEARNING_RATE}"
                yield Contradiction(
                    "unsupported",
                    "the learning rate warms up over a share of the run, warmup_ratio, not over steps: left out",
                    (
                        plan.request.locate(location, settings[WARMUP_OF_LEARNING_RATE]),
                        Place("run config: training.warmup_ratio"),
                    ),
                )


def _run_id(plan: DesignPlan, draft: RunDraft) -> Iterator[Contradiction]:
    role = re.match(r"(proposed|comparative-\d+)(?=-|$)", draft.run_id)
    if draft.run is not None and role and role[1] != draft.method.role:
        yield Contradiction(
            "method",
            f"the id {draft.run_id} says {role[1]}, the run is {draft.method.role} ({draft.method_name})",
            (
                plan.request.locate(f"{draft.run_location}.run_id"),
                plan.request.locate(f"{draft.run_location}.method", draft.run.method),
            ),
        )


def budgets(plan: DesignPlan) -> Iterator[Contradiction]:
    """Ranks, fixed or searched, that spend another share of the parameters than the budget."""
    for draft in plan.drafts:
        encoder, budget = draft.model.encoder, draft.budget
        per_rank = encoder.parameters_per_rank(draft.get(_TARGETS)) if encoder else None
        if budget is None or encoder is None or not per_rank:
            continue
        total, target = encoder.parameters, budget / 100 * encoder.parameters
        of_model = f"of {draft.model.name}'s {total:,} parameters"
        in_prose = next((b for b in plan.resolved.prose_budgets if b.value == budget), None)
        stated = origin(plan, draft, BUDGET) if in_prose is None else locate_number(plan, in_prose)
        rank = draft.get(_RANK)
        if isinstance(rank, int) and abs(rank * per_rank - target) > 0.01 * target:
            yield Contradiction(
                "rank against budget",
                f"{_percentage(rank, per_rank, total)} {of_model} ({rank * per_rank:,}), "
                f"not {budget:g} % ({int(target):,})",
                (origin(plan, draft, _RANK), stated),
            )
        searched = draft.search.get(_RANK)
        if searched is not None:
            ranks = [r for r in searched.space.ends() if isinstance(r, int)]
            outside = [r for r in ranks if abs(r * per_rank - target) > 0.01 * target]
            if outside:
                percentages = ", ".join(_percentage(r, per_rank, total) for r in outside)
                yield Contradiction(
                    "rank against budget",
                    f"a search over ranks leaves the budget of {budget:g} %: {percentages} {of_model}",
                    (plan.request.locate(searched.source_location, ranks), stated),
                )


def _percentage(rank: int, per_rank: int, total: int) -> str:
    return f"rank {rank} is {100 * rank * per_rank / total:.3f} %"


def sizes(plan: DesignPlan) -> Iterator[Contradiction]:
    """Models whose number of parameters the design gets wrong by more than 5 %."""
    for model, given in zip(plan.resolved.models, plan.design.models, strict=True):
        if model.encoder and model.stated_size and abs(model.stated_size / model.encoder.parameters - 1) > 0.05:
            yield Contradiction(
                "model size",
                f"{model.name} has {model.encoder.parameters:,} parameters, not {model.stated_size / 1e6:g} M",
                (
                    plan.request.locate(model.source_location, label(given)),
                    Place(f"the encoder as {model.encoder.pretrained_id}'s own config builds it"),
                ),
            )


def targets(plan: DesignPlan) -> Iterator[Contradiction]:
    """Target modules that match no Linear layer: in the model at all, or in PEFT's reading of the names."""
    for draft in plan.drafts:
        names, encoder = draft.get(_TARGETS), draft.model.encoder
        if encoder is None or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            continue
        model = plan.request.locate(draft.model.source_location, draft.model.name)
        wrong = [name for name in names if encoder.parameters_per_rank([name]) is None]
        if wrong:
            yield Contradiction(
                "target modules",
                f"{', '.join(map(repr, wrong))} match no Linear layer of {draft.model.name}"
                f"{did_you_mean(wrong[0], [*ROLES, 'all-linear'])}",
                (origin(plan, draft, _TARGETS), model),
            )
        blocks = [name for name in names if name in ("intermediate", "output")]
        if blocks and draft.values[_TARGETS].source_location:
            yield Contradiction(
                "target modules",
                f"taken literally (as PEFT does) {' and '.join(blocks)} are blocks and no Linear layers, and "
                "output.dense would also match attention.output.dense; here they mean the feed-forward matrices",
                (origin(plan, draft, _TARGETS), model),
            )


def steps_after_warmup(plan: DesignPlan) -> Iterator[Contradiction]:
    """K that leaves less than half of the optimiser steps, also on data sets that only the prose names."""
    in_prose = tasks_in_prose(plan.request)
    for draft in plan.drafts:
        task = TASKS.get(task_name(draft))
        if draft.method_name != "fw_lora" or task is None or task.train_examples is None:
            continue
        if not draft.values[_WARMUP].source_location and _WARMUP not in draft.search:
            continue  # our own default, which fits the run
        others = [name for name in TASKS if name in in_prose and name != task.name]
        for name in [task.name, *others]:
            examples = TASKS[name].train_examples
            if examples is not None:
                yield from _steps_on(plan, draft, name, examples, in_prose.get(name))


def _steps_on(
    plan: DesignPlan, draft: RunDraft, task: str, examples: int, in_prose: Quote | None
) -> Iterator[Contradiction]:
    """The usual setting, and the worst of those that are searched, on one task."""
    examples = draft.trained_examples(examples)
    keys = _WARMUP, "training.batch_size", "training.epochs"
    warmups, batches, epochs = ([draft.get(key), *draft.searched_ends(key)] for key in keys)
    accumulation = draft.get("training.gradient_accumulation_steps")
    if not all(isinstance(v, int) and v > 0 for v in (*warmups, *batches, *epochs, accumulation)):
        return
    usual = draft.get(keys[0]), draft.get(keys[1]), draft.get(keys[2])
    worst = max(warmups), max(batches), min(epochs)
    for k, batch, n_epochs in dict.fromkeys([usual, worst]):
        steps = n_epochs * math.ceil(examples / (batch * accumulation))
        if 2 * k < steps:
            continue
        left = "no step" if k >= steps else f"{steps - k:,} steps"
        places = [origin(plan, draft, key) for key in keys[:2]]
        if (k, batch, n_epochs) != usual:
            for n, (key, value) in enumerate([(keys[0], k), (keys[1], batch)]):
                if key in draft.search:
                    places[n] = plan.request.locate(draft.search[key].source_location, value)
        if task != task_name(draft) and in_prose is not None:
            places[1] = plan.request.locate(in_prose.source_location, in_prose.words)
        yield Contradiction(
            "K against steps",
            f"K = {k} leaves {left} of the {steps:,} of {task} ({examples:,} examples, batch {batch}, "
            f"{n_epochs} epoch{'s' if n_epochs > 1 else ''})",
            (places[0], places[1]),
        )
