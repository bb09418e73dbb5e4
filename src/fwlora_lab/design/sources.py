"""Where the value of a key can come from, in the order in which the sources are asked.

What the design states comes first; then its prose, the request's own example output, a language model's answer if one
was asked, and the default of the method or of the task. Every value but those that are stated gets a comment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from fwlora_lab.catalog.tasks import source_of
from fwlora_lab.config.keys import get_key
from fwlora_lab.design.draft import BUDGET, DEFAULTS, N_TRIALS, SETTABLE_KEYS, RunDraft, SearchEntry, Sourced
from fwlora_lab.design.examples import example_value
from fwlora_lab.design.resolve import ResolvedDesign

RANK = "model.lora.rank"


class ValueSource(Protocol):
    """One place that values come from."""

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        """The value of a key for this run, or None if this source has none."""
        ...


def fill(draft: RunDraft, sources: Iterable[ValueSource]) -> None:
    """Give every key that has no value yet the value of the first source that has one."""
    for source in sources:
        for key in [*SETTABLE_KEYS, N_TRIALS]:
            if key not in draft.values:
                value = source.value_for(key, draft)
                if value is not None:
                    draft.values[key] = value


def stated_sources(design: ResolvedDesign) -> list[ValueSource]:
    """The sources of what the design states."""
    return [StatedSettings(design), NamedModel(), FixedRanges(design)]


def inferred_sources(design: ResolvedDesign) -> list[ValueSource]:
    """The sources of all other values, in their order."""
    return [ListedBudgets(design), ProseValues(design), ExampleOutput(design), LanguageModelAnswer(design), Defaults()]


def search_space(design: ResolvedDesign, draft: RunDraft) -> dict[str, SearchEntry]:
    """What the run searches, once the stated values are known: of those, a language model may search none."""
    spaces = {**design.spaces, **draft.method.spaces}
    found = {key: entry for key, entry in spaces.items() if entry.space.dimension is not None}
    found |= design.example_spaces
    for key, entry in design.filled_spaces.items():
        if entry.space.dimension is not None and key not in draft.values:
            found.setdefault(key, entry)
    return {key: entry for key, entry in found.items() if draft.applies(key)}


class StatedSettings:
    """The settings of the run, its method, its data set and the whole design."""

    def __init__(self, design: ResolvedDesign) -> None:
        self.n_trials = design.design.n_trials

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        if key != N_TRIALS:
            return draft.settings.get(key)
        own = draft.method.method.n_trials
        if own is not None:
            return Sourced(own, source_location=f"{draft.method.source_location}.n_trials")
        return Sourced(self.n_trials, source_location="n_trials") if self.n_trials is not None else None


class NamedModel:
    """The model that the run names."""

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        model = draft.model
        if key == "model.name":
            return Sourced(model.name, "", model.source_location)
        if key == "model.pretrained_id":
            is_stated = model.states_id or model.pretrained_id == model.name
            origin = "id in the request's external resources" if model.is_listed else f"where {model.name} comes from"
            note = "" if is_stated else origin
            return Sourced(model.pretrained_id, note, model.source_location)
        if key == "model.revision" and model.revision is not None:
            return Sourced(model.revision, "commit of the request's external resources", model.source_location)
        return None


class FixedRanges:
    """Hyper-parameters to search for which one value is given."""

    def __init__(self, design: ResolvedDesign) -> None:
        self.spaces = design.spaces

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        return _fixed(draft.method.spaces.get(key) or self.spaces.get(key), draft)


class ListedBudgets:
    """The parameter budget: the run's own, that of its example output, or the middle of those the design lists."""

    def __init__(self, design: ResolvedDesign) -> None:
        in_prose = design.prose_budgets
        self.choices = design.design.budgets or [b.value for b in in_prose] or design.filled_budgets
        self.source_location = in_prose[0].source_location if in_prose and not design.design.budgets else "budgets"
        self.examples = design.examples

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        if key != BUDGET:
            return None
        if draft.listed_budget is not None:
            return draft.listed_budget
        example = example_value(self.examples.get(draft.run_id), key)
        is_number = isinstance(example, int | float) and not isinstance(example, bool)
        if is_number and (not self.choices or example in self.choices):
            return _from_example(draft.run_id, key, float(example))
        if not self.choices:
            return None
        listed = ", ".join(f"{choice:g}" for choice in self.choices)
        middle = sorted(self.choices)[len(self.choices) // 2]
        return Sourced(middle, f"the middle of {listed}; the run names none", self.source_location)


class ProseValues:
    """Numbers in the design's prose; of several for one key the first."""

    def __init__(self, design: ResolvedDesign) -> None:
        self.numbers = design.prose_numbers
        self.spelling = design.request.spelling

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        if key not in self.numbers or not draft.applies(key):
            return None
        first = self.numbers[key][0]
        return Sourced(first.value, f"{self._spelled(first.source_location)}, in prose", first.source_location)

    def _spelled(self, source_location: str) -> str:
        block, dot, rest = source_location.partition(".")
        return self.spelling.get(block, block).split(": ")[-1] + dot + rest


class ExampleOutput:
    """The example config that the request gives for this run; of the numbers of trials the largest of all runs."""

    def __init__(self, design: ResolvedDesign) -> None:
        self.examples = design.examples
        trials = [(example_value(example, N_TRIALS), run_id) for run_id, example in self.examples.items()]
        self.trials = [(n, run_id) for n, run_id in trials if isinstance(n, int) and n > 0]

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        if key == N_TRIALS:
            return self._trials()
        value = example_value(self.examples.get(draft.run_id), key)
        return _from_example(draft.run_id, key, value) if value is not None and draft.applies(key) else None

    def _trials(self) -> Sourced[int] | None:
        if not self.trials:
            return None
        largest, run_id = max(self.trials)
        note = ""
        if len({n for n, _ in self.trials}) > 1:
            given = " and ".join(str(n) for n, _ in self.trials)
            note = f", the larger of {given}: every method is tuned alike"
        return _from_example(run_id, N_TRIALS, largest, note)


class LanguageModelAnswer:
    """What a language model answered where the request states nothing."""

    def __init__(self, design: ResolvedDesign) -> None:
        self.settings = design.filled_settings
        self.spaces = design.filled_spaces
        self.n_trials = design.request.filled.get("n_trials")

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        if key == N_TRIALS:
            return Sourced(self.n_trials, source_location="n_trials") if self.n_trials is not None else None
        if key in self.settings:
            return self.settings[key] if draft.applies(key) else None
        return _fixed(self.spaces.get(key), draft)


class Defaults:
    """The defaults of the methods, of the tasks and of run configs, for the keys that a config always holds."""

    keys = (
        *(f"model.lora.{name}" for name in ("dropout", "target_modules")),
        *(f"dataset.{name}" for name in ("max_length", "padding", "truncation")),
        *(
            f"training.{name}"
            for name in (
                "epochs", "batch_size", "learning_rate", "weight_decay", "optimizer", "lr_scheduler", "warmup_ratio",
                "gradient_accumulation_steps", "mixed_precision", "seed",
            )
        ),
        *(f"fw_lora.{name}" for name in ("penalty_strength", "warmup_steps", "fisher_ema_decay")),
        *(f"adalora.{name}" for name in ("init_rank_factor", "tinit_ratio", "tfinal_ratio")),
    )  # fmt: skip
    block_notes = {
        "fw_lora": "default of FW-LoRA",
        "adalora": "AdaLoRA's own schedule, as shares of this run's length",
        "training": "default of run configs",
        "dataset": "convention of the task",
        "model": "default of run configs",
    }
    lanes_note = "several runs at once on one backbone, where it is a BERT or RoBERTa; dataset.padding changes nothing"

    def value_for(self, key: str, draft: RunDraft) -> Sourced[Any] | None:
        match key:
            case "model.lora.enabled":
                return Sourced(True, "every method here trains LoRA adapters")
            case "model.lora.rank":
                return self._rank(draft)
            case "model.lora.alpha":
                return self._alpha(draft)
            case "dataset.split" | "dataset.eval_split":
                return self._split(key, draft)
            case "dataset.validation_fraction" if draft.search:
                return Sourced(0.1, "the search is scored on this part of train, never on the split that is reported")
            case "training.engine":
                return Sourced(get_key(DEFAULTS, key), self.lanes_note)
            case "optuna.n_trials":
                return Sourced(20, "default of run configs")
            case "fw_lora.warmup_steps" if draft.applies(key) and key not in draft.search:
                return self._warmup(draft)
        if key in self.keys and draft.applies(key):
            default = get_key(DEFAULTS, key)
            if key in draft.search and not draft.search[key].space.holds(default):
                entry = draft.search[key]
                return Sourced(entry.space.middle(), "the middle of the searched range", entry.source_location)
            return Sourced(default, self.block_notes[key.split(".")[0]])
        return None

    def _warmup(self, draft: RunDraft) -> Sourced[int | float]:
        """K = 500, as the request has it, where at least three quarters of the run are left; else a quarter of it."""
        default, note = get_key(DEFAULTS, "fw_lora.warmup_steps"), self.block_notes["fw_lora"]
        steps, start = draft.fewest_steps(), draft.get("fw_lora.fisher_start")
        if isinstance(start, int) and start > 0 and steps is not None:
            return Sourced(
                min(max(default, start + 1), start + max(1, (steps - start) // 4)), f"{note}, after fisher_start"
            )
        if steps is not None and 4 * default <= steps:
            return Sourced(default, note)
        of_steps = (
            f"of the run's {steps:,} steps" if steps is not None else "of the run, whose steps are not known here"
        )
        return Sourced(0.25, f"a quarter {of_steps}; {note}: {default} steps where they are at most that")

    def _rank(self, draft: RunDraft) -> Sourced[int | None]:
        searched = draft.search.get(RANK)
        if draft.budget is not None:
            return Sourced(None, "the parameter budget decides")
        if searched is None:
            return Sourced(8, "LoRA's custom; neither a rank nor a budget is given")
        dimension = searched.space.dimension or {}
        ranks = dimension.get("choices") or [dimension["low"]]
        return Sourced(ranks[len(ranks) // 2], "one of the searched ranks", searched.source_location)

    def _alpha(self, draft: RunDraft) -> Sourced[int] | None:
        rank = draft.get(RANK)  # filled before: keys are asked for in the order of the schema
        if rank is None:
            return None
        return Sourced(2 * rank if isinstance(rank, int) else 16, "twice the rank, LoRA's custom")

    def _split(self, key: str, draft: RunDraft) -> Sourced[str] | None:
        source = source_of(str(draft.get("dataset.name")))
        if source is None or "split" not in source.keys:
            return None
        split = "train"
        if key == "dataset.eval_split":  # MNLI has two development sets; the matched one is reported by convention
            split = "validation_matched" if draft.get("dataset.subset") == "mnli" else "validation"
        return Sourced(split, self.block_notes["dataset"])


def _fixed(entry: SearchEntry | None, draft: RunDraft) -> Sourced[Any] | None:
    """The value of a range that holds one value only."""
    if entry is None or entry.space.dimension is not None or not draft.applies(entry.space.key):
        return None
    return Sourced(entry.space.value, source_location=entry.source_location)


def _from_example(run_id: str, key: str, value: Any, more: str = "") -> Sourced[Any]:
    return Sourced(value, f"example output of the request{more}", f"example:{run_id}.{key}")
