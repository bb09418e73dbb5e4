"""What in a design contradicts itself, or what is known: each contradiction with both places."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fwlora_lab.catalog.encoders import ROLES, EncoderInfo
from fwlora_lab.catalog.methods import METHODS
from fwlora_lab.catalog.tasks import GLUE
from fwlora_lab.config.keys import KEYS, search_key
from fwlora_lab.design.names import arm_of, label
from fwlora_lab.design.plan import DesignPlan, RunDraft, example_space, example_value
from fwlora_lab.design.prose import ProseNumber, around, texts
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, one_line


def find_contradictions(plan: DesignPlan) -> None:
    for check in (_budgets, _sizes, _examples, _tuning, _steps, _splits, _targets, _left_out, _disagreements, _outside):
        check(plan)


def _origin(plan: DesignPlan, draft: RunDraft, key: str) -> str:
    value = draft.values[key]
    if not value.place:
        return f"{plan.request.source}: run {draft.run_id}: {key} = {value.value} ({value.note})"
    return plan.request.place(value.place, value.value)


def _budgets(plan: DesignPlan) -> None:
    """Ranks, fixed or searched, against the budget: the percentage that they really spend."""
    for draft in plan.drafts:
        encoder = draft.model.encoder
        unit = encoder.parameters_per_rank(draft.get("model.lora.target_modules")) if encoder else None
        if draft.budget is None or encoder is None or not unit:
            continue
        said = next((s for s in plan.said_budgets if s.value == draft.budget), None)
        budget = _origin(plan, draft, "model.parameter_budget_percent")
        if said is not None:
            budget = plan.request.place(said.place, said.words)

        def spent(rank: int, unit: int = unit, encoder: EncoderInfo = encoder) -> str:
            return f"rank {rank} is {100 * rank * unit / encoder.parameters:.3f} %"

        rank = draft.get("model.lora.rank")
        target = draft.budget / 100 * encoder.parameters
        of = f"of {draft.model.name}'s {encoder.parameters:,} parameters"
        if isinstance(rank, int) and abs(rank * unit - target) > 0.01 * target:
            plan.contradict(
                "rank against budget",
                f"{spent(rank)} {of} ({rank * unit:,}), not {draft.budget:g} % ({int(target):,})",
                _origin(plan, draft, "model.lora.rank"),
                budget,
            )
        searched = draft.search.get("model.lora.rank")
        if searched is not None and searched[0].dimension is not None:
            d = searched[0].dimension
            ranks = [r for r in d.get("choices") or (d["low"], d["high"]) if isinstance(r, int)]
            off = [r for r in ranks if abs(r * unit - target) > 0.01 * target]
            if off:
                plan.contradict(
                    "rank against budget",
                    f"a search over ranks leaves the budget of {draft.budget:g} %: {', '.join(map(spent, off))} {of}",
                    plan.request.place(searched[2], ranks),
                    budget,
                )


def _sizes(plan: DesignPlan) -> None:
    for index, model in enumerate(plan.models):
        if model.encoder and model.stated and abs(model.stated / model.encoder.parameters - 1) > 0.05:
            plan.contradict(
                "model size",
                f"{model.name} has {model.encoder.parameters:,} parameters, not {model.stated / 1e6:g} M",
                plan.request.place(f"models.{index}", label(plan.design.models[index])),
                f"the encoder as {model.encoder.pretrained_id}'s own config builds it",
            )


def _examples(plan: DesignPlan) -> None:
    """The request's own example output against its design: methods and ranges."""
    for draft in plan.drafts:
        example = plan.request.examples.get(draft.run_id)
        if example is None:
            continue
        here = f"example:{draft.run_id}"
        method = example.get("method")
        arm = METHODS.get(str(method)) or arm_of(str(method))
        if method is not None and arm != draft.arm:
            plan.contradict(
                "method",
                f"{draft.run_id} is {draft.method} by the design, the example output makes it {one_line(method, 60)}",
                plan.request.place(f"{here}.method", method),
                plan.request.place(draft.method_key, one_line(_method_name(plan, draft), 60)),
            )
        for name, dimension in example_space(example).items():
            try:
                key = search_key(name)
            except UserError:
                continue
            named = plan.spaces | plan.own_spaces_of(draft)
            ours = named.get(key)
            if ours is None:
                plan.contradict(
                    "search space",
                    f"{name} is searched in the example output of {draft.run_id}, the design does not name it",
                    plan.request.place(f"{here}.optuna.search_space.{name}", _shown(dimension)),
                    plan.request.place("hyperparameters_to_search", ", ".join(n for _, n, _ in named.values())),
                )
            elif ours[0].dimension is not None and _ends(ours[0].dimension) != _ends(dimension):
                plan.contradict(
                    "search space",
                    f"{name} of {draft.run_id} is another range in the example output than in the design",
                    plan.request.place(f"{here}.optuna.search_space.{name}", _shown(dimension)),
                    plan.request.place(ours[2], _shown(ours[0].dimension)),
                )


def _method_name(plan: DesignPlan, draft: RunDraft) -> str:
    return next(m.name for _, key, m, _ in plan.methods if key == draft.method_key)


def _ends(dimension: Mapping[str, Any]) -> list[Any]:
    choices = dimension.get("choices")
    return sorted(map(str, choices)) if isinstance(choices, list) else [dimension.get("low"), dimension.get("high")]


def _shown(dimension: Mapping[str, Any]) -> str:
    return one_line(json.dumps(dimension, ensure_ascii=False, default=str), 120)


def _tuning(plan: DesignPlan) -> None:
    """More trials or a wider space for one arm, in the example output or in the design itself."""
    examples = [(i, e) for i, e in plan.request.examples.items() if isinstance(e.get("optuna"), dict)]
    for (one, first), (two, second) in zip(examples, examples[1:], strict=False):
        n, m = first["optuna"].get("n_trials"), second["optuna"].get("n_trials")
        if n != m:
            plan.contradict(
                "unequal tuning",
                f"{n} trials for {one}, {m} for {two}",
                plan.request.place(f"example:{one}.optuna.n_trials", n),
                plan.request.place(f"example:{two}.optuna.n_trials", m),
            )
        a, b = example_space(first), example_space(second)
        own = {k.rsplit(".", 1)[-1] for k in KEYS if k.startswith(("fw_lora.", "adalora."))}
        for name in dict.fromkeys([*a, *b]):
            x, y = a.get(name), b.get(name)
            if name in own or (x is not None and y is not None and _ends(x) == _ends(y)):
                continue
            plan.contradict(
                "unequal tuning",
                f"{name} is "
                + ("searched in one run only" if x is None or y is None else "searched more widely in one"),
                plan.request.place(f"example:{one}.optuna.search_space.{name}", _shown(x) if x else "not searched"),
                plan.request.place(f"example:{two}.optuna.search_space.{name}", _shown(y) if y else "not searched"),
            )
    base = plan.drafts[0]
    for draft in plan.drafts[1:]:
        if not (base.search or draft.search):
            continue
        if draft.n_trials.value != base.n_trials.value:
            plan.contradict(
                "unequal tuning",
                f"{base.n_trials.value} trials for {base.arm}, {draft.n_trials.value} for {draft.arm}",
                plan.request.place(base.n_trials.place or "n_trials"),
                plan.request.place(draft.n_trials.place or "n_trials"),
            )
        for key in dict.fromkeys([*base.search, *draft.search]):
            if key.startswith(("fw_lora.", "adalora.")):
                continue
            x, y = base.search.get(key), draft.search.get(key)
            if x and y and x[0].dimension == y[0].dimension:
                continue
            places = [
                plan.request.place(s[2], _shown(s[0].dimension or {}))
                if s
                else f"{plan.request.place(d.method_key)}: {key} is not searched"
                for s, d in ((x, base), (y, draft))
            ]
            plan.contradict(
                "unequal tuning", f"{key} is searched differently by {base.arm} and {draft.arm}", places[0], places[1]
            )


def _steps(plan: DesignPlan) -> None:
    """K against the number of optimiser steps, also on data sets that only the prose names."""
    for draft in plan.drafts:
        if draft.arm != "fw_lora":
            continue
        subset = draft.get("dataset.subset")
        others = [s for s in GLUE if s != subset and _prose_datasets(plan).get(s)]
        for name in [subset, *others] if subset in GLUE else []:
            examples = GLUE[name].train_examples
            limit, carved = draft.get("dataset.train_examples"), draft.get("dataset.validation_fraction")
            if isinstance(carved, int | float):
                examples = round(examples * (1 - carved))
            if isinstance(limit, int):
                examples = min(examples, limit)
            ks = _extremes(draft, "fw_lora.warmup_steps")
            batches = _extremes(draft, "training.batch_size")
            epochs = _extremes(draft, "training.epochs")
            over = draft.get("training.gradient_accumulation_steps")
            numbers = [*ks, *batches, *epochs, over]
            if not all(isinstance(v, int) and v > 0 for v in numbers):
                continue
            usual = draft.get("fw_lora.warmup_steps"), draft.get("training.batch_size"), draft.get("training.epochs")
            worst = max(ks), max(batches), min(epochs)
            for k, batch, e in dict.fromkeys([usual, worst]):
                steps = e * math.ceil(examples / (batch * over))
                if 2 * k < steps:
                    continue
                left = "no step" if k >= steps else f"{steps - k:,} steps"
                searched = (draft.search.get("fw_lora.warmup_steps"), draft.search.get("training.batch_size"))
                first = _origin(plan, draft, "fw_lora.warmup_steps")
                second = _origin(plan, draft, "training.batch_size")
                if (k, batch, e) == worst and (k, batch, e) != usual:
                    first = plan.request.place(searched[0][2], k) if searched[0] else first
                    second = plan.request.place(searched[1][2], batch) if searched[1] else second
                plan.contradict(
                    "K against steps",
                    f"K = {k} leaves {left} of the {steps:,} of {name} ({examples:,} examples, batch {batch}, "
                    f"{e} epoch{'s' if e > 1 else ''})",
                    first,
                    second if name == subset else plan.request.place(*_prose_datasets(plan)[name]),
                )


def _extremes(draft: RunDraft, key: str) -> list[Any]:
    found = draft.search.get(key)
    values = [draft.get(key)]
    if found is not None and found[0].dimension is not None:
        d = found[0].dimension
        values += d.get("choices") or [d["low"], d["high"]]
    return values


def _splits(plan: DesignPlan) -> None:
    """Tuning and reporting on one split."""
    dev = next(
        ((key, around(text, *m.span())) for key, text in texts(plan.request) if (m := re.search(r"\bdev\b", text))),
        None,
    )
    for run_id, example in plan.request.examples.items():
        data = example.get("dataset")
        if example_space(example) and isinstance(data, dict) and not data.get("validation_fraction"):
            second = plan.request.place(*dev) if dev else plan.request.place(f"example:{run_id}.optuna")
            plan.contradict(
                "one split",
                "the search and the result would both be scored on the dev split, so the result is the best of its "
                "trials; here a tenth of train is kept for the search",
                plan.request.place(f"example:{run_id}.dataset.eval_split", data.get("eval_split")),
                second,
            )
    for draft in plan.drafts:
        fraction = draft.values.get("dataset.validation_fraction")
        if draft.search and fraction is not None and fraction.value == 0:
            plan.contradict(
                "one split",
                "a search without a validation split would be scored on what is reported",
                plan.request.place(fraction.place, fraction.value),
                plan.request.place(next(iter(draft.search.values()))[2]),
            )


def _targets(plan: DesignPlan) -> None:
    """Targets that mean no Linear layer: in the model at all, or under PEFT's own reading of the names."""
    for draft in plan.drafts:
        names, encoder = draft.get("model.lora.target_modules"), draft.model.encoder
        if encoder is None or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            continue
        model = plan.request.place(draft.model_key, draft.model.name)
        wrong = [n for n in names if encoder.parameters_per_rank([n]) is None]
        if wrong:
            plan.contradict(
                "target modules",
                f"{', '.join(map(repr, wrong))} match no Linear layer of {draft.model.name}"
                f"{did_you_mean(wrong[0], [*ROLES, 'all-linear'])}",
                _origin(plan, draft, "model.lora.target_modules"),
                model,
            )
        blocks = [n for n in names if n in ("intermediate", "output")]
        if blocks and draft.values["model.lora.target_modules"].place:
            plan.contradict(
                "target modules",
                f"taken literally (as PEFT does) {' and '.join(blocks)} are blocks and no Linear layers, and "
                "output.dense would also match attention.output.dense; here they mean the feed-forward matrices",
                _origin(plan, draft, "model.lora.target_modules"),
                model,
            )


def _prose_datasets(plan: DesignPlan) -> dict[str, tuple[str, str]]:
    """Data sets that the setup or the summary names: subset -> place and words."""
    found: dict[str, tuple[str, str]] = {}
    for key, text in texts(plan.request):
        if key in ("hypothesis", "hypothesis.experimental_setup", "summary"):
            for subset, task in GLUE.items():
                match = re.search(task.prose_pattern, text)
                if match:
                    found.setdefault(subset, (key, around(text, *match.span())))
    return found


def _left_out(plan: DesignPlan) -> None:
    """Data sets, budgets, methods and metrics that the prose demands and the lists leave out."""
    request = plan.request
    lists = "runs" if plan.design.runs else "datasets"
    used = {d.get("dataset.subset") for d in plan.drafts}
    for subset, place in _prose_datasets(plan).items():
        if subset not in used:
            listed = ", ".join(label(d) for d in plan.design.datasets)
            text = f"data set {subset} is demanded by the prose, no run has it"
            plan.contradict("left out", text, request.place(*place), request.place("datasets", listed))
    budgets = {d.budget for d in plan.drafts}
    for said in plan.said_budgets:
        if said.value not in budgets:
            shown = ", ".join(f"{b:g} %" for b in budgets if b is not None) or "no budget"
            plan.contradict(
                "left out",
                f"the budget {said.value:g} % is demanded by the prose, the runs have {shown}",
                request.place(said.place, said.words),
                request.place(lists),
            )
    arms = {d.arm for d in plan.drafts}
    for key, text in texts(request):
        match = re.search(r"\b[Bb]aselines?\b", text)
        after = text[match.start() : match.start() + 300] if match else ""
        ordinary = re.search(r"\b(?:[Pp]lain|[Vv]anilla|[Ss]tandard) LoRA\b", after)
        for arm, found in (("lora", ordinary), ("adalora", re.search(r"\bAdaLoRA\b", after))):
            if found and arm not in arms:
                names = ", ".join(m if isinstance(m, str) else m.name for m in plan.design.comparative_methods)
                plan.contradict(
                    "left out",
                    f"the baseline {found[0].replace('Plain', 'plain')} is demanded by the prose, no run trains it",
                    request.place(key, around(after, *found.span())),
                    request.place("comparative_methods", names or "none"),
                )
    for index, metric in enumerate(plan.design.metrics):
        if "matthews" in metric.lower() and "cola" not in used:
            plan.contradict(
                "left out",
                f"the metric {one_line(metric, 40)} belongs to CoLA, no run has it",
                request.place(f"metrics.{index}", metric),
                request.place("datasets", ", ".join(label(d) for d in plan.design.datasets)),
            )


def _disagreements(plan: DesignPlan) -> None:
    """One key, two values: in the prose, against what is stated, or against the example output."""
    for key, said in plan.numbers.items():
        first = said[0]
        others = [(_said_place(plan, s), s.value) for s in said[1:]]
        for draft in plan.drafts:
            value = draft.values.get(key)
            if value is not None and value.place and value.place != first.place:
                others.append((_origin(plan, draft, key), value.value))
            example = example_value(plan.request, draft.run_id, key)
            if example is not None:
                others.append((plan.request.place(f"example:{draft.run_id}.{key}", example), example))
        for place, value in others:
            if value != first.value:
                plan.contradict("two values", f"{key} is {first.value} and {value}", _said_place(plan, first), place)


def _said_place(plan: DesignPlan, said: ProseNumber) -> str:
    return plan.request.place(said.place, said.words)


def _outside(plan: DesignPlan) -> None:
    """A value outside its own search range."""
    for draft in plan.drafts:
        for key, (space, name, place) in draft.search.items():
            value, d = draft.get(key), space.dimension or {}
            if value is None or isinstance(value, list):
                continue
            choices = d.get("choices")
            try:
                inside = value in choices if choices is not None else d["low"] <= value <= d["high"]
            except TypeError:
                continue  # of another type: refused where the config is checked
            if not inside and key in draft.values:
                plan.contradict(
                    "range",
                    f"{name} = {value} lies outside of its own search space",
                    _origin(plan, draft, key),
                    plan.request.place(place, _shown(d)),
                )
