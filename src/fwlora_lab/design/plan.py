"""A design, taken apart: a draft of every run, in which each value says where it comes from.

A value comes from the first that has it: what the design states, its prose, the request's own example output, a
language model's answer where one was asked, the method's default, the task's convention. All but the first are said in
a comment beside the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from fwlora_lab.catalog.methods import MethodName
from fwlora_lab.catalog.tasks import TASKS, source_of
from fwlora_lab.config.checks import reads
from fwlora_lab.config.faults import InvalidRun
from fwlora_lab.config.former_names import present_leaf, with_present_names
from fwlora_lab.config.issues import issues_of
from fwlora_lab.config.keys import KEYS, get_key, schema_defaults, search_key
from fwlora_lab.config.schema import Dimension
from fwlora_lab.config.validation import validate_run
from fwlora_lab.design.airas import named_dimensions
from fwlora_lab.design.names import ResolvedModel, arm_named, arm_of, label, model_of, plain, slug, subset_of
from fwlora_lab.design.prose import budgets_in_prose, numbers_in_prose
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DesignDataset, DesignMethod, DesignRun
from fwlora_lab.design.spaces import ParsedSpace, parse_space
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, listing, one_line

MAX_RUNS = 1_000


class Contradiction(NamedTuple):
    """Two statements that cannot both hold: what kind, why, and the two places."""

    kind: str
    text: str
    places: tuple[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.kind}: {self.text}", *(f"    {place}" for place in self.places)])


class Value(NamedTuple):
    value: Any
    note: str  # "" where the design states the value
    place: str  # the design's key, or "" for a default


@dataclass
class RunDraft:
    """A run on its way to a config: the values of its keys, the first to come stays."""

    run_id: str
    title: str
    arm: MethodName
    method: str
    model: ResolvedModel
    model_key: str
    dataset_key: str
    method_key: str
    values: dict[str, Value] = field(default_factory=dict)
    search: dict[str, tuple[ParsedSpace, str, str]] = field(default_factory=dict)  # key -> space, name, place
    n_trials: Value = Value(20, "", "")
    budget: float | None = None
    id_note: str = ""

    def put(self, key: str, value: Any, note: str = "", place: str = "") -> None:
        self.values.setdefault(key, Value(value, one_line(note), place))

    def get(self, key: str) -> Any:
        return self.values[key].value if key in self.values else get_key(_DEFAULTS, key)

    def applies(self, key: str) -> bool:
        return reads(self.arm, key)


_DEFAULTS = schema_defaults()
_ALWAYS = (
    *(f"dataset.{k}" for k in ("max_length", "padding", "truncation")),
    *(
        f"training.{k}"
        for k in (
            "epochs batch_size learning_rate weight_decay optimizer lr_scheduler warmup_ratio "
            "gradient_accumulation_steps mixed_precision seed"
        ).split()
    ),
    *(f"fw_lora.{k}" for k in ("penalty_strength", "warmup_steps", "fisher_ema_decay")),
    *(f"adalora.{k}" for k in ("init_rank_factor", "tinit_ratio", "tfinal_ratio")),
)
_BLOCK_NOTE = {
    "fw_lora": "default of FW-LoRA",
    "adalora": "AdaLoRA's own schedule, as shares of this run's length",
    "training": "default of run configs",
    "dataset": "convention of the task",
    "model": "default of run configs",
}


def _setting(request: DesignRequest, place: str, name: str) -> str:
    try:
        return "training.seed" if name == "seed" else search_key(name)  # dataset.seed only by its whole name
    except UserError as error:
        raise UserError(f"{request.place(one_line(place))}: {one_line(error, 400)}") from None


class DesignPlan:
    """A design, taken apart once for all of its runs."""

    def __init__(self, request: DesignRequest) -> None:
        self.request = request
        self.design = request.design
        self.numbers = numbers_in_prose(request)
        self.said_budgets = budgets_in_prose(request)
        self.found: list[Contradiction] = []
        design = request.design
        proposed = design.proposed_method
        self.methods: list[tuple[str, str, DesignMethod, MethodName]] = []
        name = "proposed_method" if isinstance(proposed, str) else "proposed_method.name"
        method = DesignMethod.model_construct(name=proposed) if isinstance(proposed, str) else proposed
        arm = arm_of(method.name) or arm_of(method.description or "")
        arm = arm or arm_named(request, method.name, name)
        self.methods.append(("proposed", "proposed_method", method, arm))
        for index, given in enumerate(design.comparative_methods):
            key = f"comparative_methods.{index}"
            method = DesignMethod(name=given) if isinstance(given, str) else given
            self.methods.append((f"comparative-{index + 1}", key, method, arm_named(request, method.name, key)))
        self.models = [model_of(request, m) for m in design.models]
        self.spaces = self._spaces("hyperparameters_to_search", design.hyperparameters_to_search)
        self.own_spaces = [
            self._spaces(f"{key}.hyperparameters_to_search", m.hyperparameters_to_search)
            for _, key, m, _ in self.methods
        ]
        prefix = "hyperparameters_to_search."
        filled = {k.removeprefix(prefix): v for k, v in request.filled.items() if k.startswith(prefix)}
        self.filled_spaces = self._spaces("hyperparameters_to_search", filled)
        examples = [example_value(request, i, "model.parameter_budget_percent") for i in request.examples]
        self.filled_budgets = request.filled.get("budgets", []) if all(e is None for e in examples) else []
        self.drafts = self._drafts()

    def contradict(self, kind: str, text: str, first: str, second: str) -> None:
        item = Contradiction(kind, text, (first, second))
        if not any(c.kind == kind and c.text == text for c in self.found):
            self.found.append(item)

    def own_spaces_of(self, draft: RunDraft) -> dict[str, tuple[ParsedSpace, str, str]]:
        """What the draft's method searches beside what the design searches for all."""
        return next(
            s for s, (_, key, _, _) in zip(self.own_spaces, self.methods, strict=True) if key == draft.method_key
        )

    def _spaces(self, block: str, given: Mapping[str, Any]) -> dict[str, tuple[ParsedSpace, str, str]]:
        spaces: dict[str, tuple[ParsedSpace, str, str]] = {}
        for name, value in given.items():
            place = f"{block}.{name}"
            try:
                space = parse_space(name, value)
            except UserError as error:
                raise UserError(f"{self.request.place(one_line(place))}: {one_line(error, 400)}") from None
            if space.key in spaces:
                raise UserError(
                    f"{self.request.place(one_line(place))}: means {space.key}, as {spaces[space.key][1]!r} does: "
                    "keep one of them"
                )
            spaces[space.key] = (space, name, place)
            for fault in space.faults:
                here = self.request.place(one_line(place), value)
                self.contradict("range", f"{name}: {fault}", here, f"distribution of {space.key}")
        return spaces

    def _drafts(self) -> list[RunDraft]:
        design, request = self.design, self.request
        drafts: list[RunDraft] = []
        if design.runs:
            for index, run in enumerate(design.runs):
                drafts.append(self._given(index, run))
        else:
            budgets: list[tuple[float | None, str]] = [(b, f"budgets.{n}") for n, b in enumerate(design.budgets)]
            budgets = budgets or [(s.value, s.place) for s in self.said_budgets]
            budgets = budgets or [(b, f"budgets.{n}") for n, b in enumerate(self.filled_budgets)] or [(None, "")]
            if len(self.methods) * len(design.models) * len(design.datasets) * len(budgets) > MAX_RUNS:
                raise UserError(f"{request.source}: the design has more than {MAX_RUNS:,} runs: shorten its lists")
            for m in range(len(self.methods)):
                for b in range(len(design.models)):
                    for d in range(len(design.datasets)):
                        for budget, place in budgets:
                            suffix = f"-{budget:g}pct" if len(budgets) > 1 else ""
                            run_id = slug([self.methods[m][0], label(design.models[b]), label(design.datasets[d])])
                            drafts.append(self._draft(run_id[: 200 - len(suffix)] + suffix, m, b, d, budget, place))
        seen: dict[str, str] = {}
        for draft in drafts:
            name = draft.run_id.lower()  # some file systems know no capitals
            if name in seen:
                raise UserError(
                    f"{request.source}: two runs are called {draft.run_id!r} ({seen[name]} and "
                    f"{one_line(draft.title)}): give each a run_id of its own under runs"
                )
            seen[name] = one_line(draft.title)
        return drafts

    def _given(self, index: int, run: DesignRun) -> RunDraft:
        request, key = self.request, f"runs.{index}"

        def find(what: str, name: str | None, labels: Sequence[str]) -> int:
            if name is None and len(labels) == 1:
                return 0
            if name is None:
                raise UserError(
                    f"{request.place(f'{key}.{what}')}: is missing, and the design has {len(labels)}: add it"
                )
            same = [n for n, known in enumerate(labels) if known == name]
            same = same or [n for n, known in enumerate(labels) if plain(known) == plain(name)]
            if not same:
                raise UserError(
                    f"{request.place(f'{key}.{what}')}: {one_line(name, 80)!r} is not in the design's list"
                    f"{did_you_mean(name[:80], labels)}: it has {one_line(', '.join(labels), 300)}"
                )
            return same[0]

        models, datasets = [label(m) for m in self.design.models], [label(d) for d in self.design.datasets]
        model, data = find("model", run.model, models), find("dataset", run.dataset, datasets)
        roles = [role for role, _, _, _ in self.methods]
        names = [role if m.name == self.design.proposed_method else m.name for role, _, m, _ in self.methods]
        if run.method in roles:
            which = roles.index(run.method)
        elif run.method in names:
            which = names.index(run.method)
        else:
            arm = arm_of(run.method)
            arms = [a for _, _, _, a in self.methods]
            which = arms.index(arm) if arm in arms else find("method", run.method, [*roles, *names]) % len(roles)
        run_id = run.run_id or slug([roles[which], models[model], datasets[data]])[:200]
        said = re.match(r"(proposed|comparative-\d+)(?=-|$)", run_id)
        if said and said[1] != roles[which]:
            self.contradict(
                "method",
                f"the id {run_id} says {said[1]}, the run is {roles[which]} ({self.methods[which][3]})",
                request.place(f"{key}.run_id"),
                request.place(f"{key}.method", run.method),
            )
        draft = self._draft(run_id, which, model, data, run.budget, f"{key}.budget" if run.budget else "", run, key)
        return draft

    def _draft(
        self,
        run_id: str,
        which: int,
        model_at: int,
        data_at: int,
        budget: float | None,
        budget_place: str,
        run: DesignRun | None = None,
        run_key: str = "",
    ) -> RunDraft:
        role, method_key, method, arm = self.methods[which]
        model = self.models[model_at]
        name = {"lora": "baseline_lora", "adalora": "baseline_adalora", "fw_lora": "proposed_fw_lora"}.get(arm, arm)
        if role == "proposed" and arm != "fw_lora" or role != "proposed" and arm == "fw_lora":
            name = arm
        title = f"{role} on {model.name} and {label(self.design.datasets[data_at])}"
        model_key, data_key = f"models.{model_at}", f"datasets.{data_at}"
        draft = RunDraft(run_id, title, arm, name, model, model_key, data_key, method_key)
        if run is None or run.run_id is None:
            draft.id_note = "from the method, the model and the data set"
        stated: list[tuple[str, Mapping[str, Any]]] = [
            (f"{run_key}.settings", run.settings if run else {}),
            (f"{method_key}.settings", method.settings),
            ("settings", self.design.settings),
        ]
        for block, settings in stated:
            for given, value in settings.items():
                place = f"{block}.{given}"
                if given == "training.warmup_steps":
                    self.contradict(
                        "unsupported",
                        "the learning rate warms up over a share of the run, warmup_ratio, not over steps: left out",
                        self.request.place(place, value),
                        "run config: training.warmup_ratio",
                    )
                    continue
                key = _setting(self.request, place, given)
                if draft.applies(key) or block != "settings":
                    draft.put(key, value, place=place)
        self._model_and_data(draft, self.design.datasets[data_at])
        self._search(draft, which)
        self._budget(draft, budget, budget_place)
        self._fill(draft)
        return draft

    def _model_and_data(self, draft: RunDraft, given: str | DesignDataset) -> None:
        model = draft.model
        draft.put("model.name", model.name, place=draft.model_key)
        note = "" if model.given_id or model.pretrained_id == model.name else f"where {model.name} comes from"
        draft.put("model.pretrained_id", model.pretrained_id, note, draft.model_key)
        if model.revision is not None:
            draft.put("model.revision", model.revision, "commit of the request's external resources", draft.model_key)
        settings = {} if isinstance(given, str) else given.settings
        for name, value in settings.items():
            place = f"{draft.dataset_key}.settings.{name}"
            key = f"dataset.{name.removeprefix('dataset.')}"
            if key not in KEYS:
                raise UserError(
                    f"{self.request.place(one_line(place))}: {one_line(name, 60)!r} is no key of a run config's "
                    f"dataset block{did_you_mean(key, [k for k in KEYS if k.startswith('dataset.')])}"
                )
            draft.put(key, value, place=place)
        name = label(given)
        subset = subset_of(name)
        kind = settings.get("name")
        if kind is None:
            task = TASKS.get(subset or name.lower())
            kind = task.source.name if task is not None else None
        if kind is None:
            raise UserError(
                f"{self.request.place(draft.dataset_key)}: {one_line(name, 80)!r} is no data set known here"
                f"{did_you_mean(name[:80], TASKS)}: name a GLUE task or offline, or give a block of name and "
                "settings (name: csv, train_file, eval_file, text_column, label_column)"
            )
        draft.put("dataset.name", kind, place=draft.dataset_key)
        if kind == "glue" and subset is not None:
            draft.put("dataset.subset", subset, place=draft.dataset_key)

    def _search(self, draft: RunDraft, which: int) -> None:
        for key, (space, name, place) in (self.spaces | self.own_spaces[which]).items():
            if not draft.applies(key):
                continue
            if space.dimension is None:
                draft.put(key, space.value, place=place)
            else:
                draft.search[key] = (space, name, place)
        for run_id, example in self.request.examples.items():
            for name, dimension in example_space(example).items():
                key = _setting(self.request, f"example:{run_id}.optuna.search_space", name)
                try:
                    Dimension.model_validate(dimension)
                except ValidationError as error:
                    place = self.request.place(one_line(f"example:{run_id}.optuna.search_space.{name}"))
                    text = "; ".join(i.text for i in issues_of(error, dimension))
                    raise UserError(f"{place}: {one_line(text, 400)}") from None
                stated = key in self.spaces or any(key in own for own in self.own_spaces)
                if draft.applies(key) and key not in draft.search and not stated:
                    note = "the request's example output searches it in one run; here every method is tuned alike"
                    place = f"example:{run_id}.optuna.search_space.{name}"
                    draft.search[key] = (ParsedSpace(key, dimension, None, note, ()), name, place)
        for key, (space, name, place) in self.filled_spaces.items():
            if space.dimension is not None and draft.applies(key) and key not in draft.search | draft.values:
                draft.search[key] = (space, name, place)
        trials = [
            (e.get("optuna", {}).get("n_trials"), run_id)
            for run_id, e in self.request.examples.items()
            if isinstance(e.get("optuna"), dict)
        ]
        numbers = [(n, run_id) for n, run_id in trials if isinstance(n, int) and n > 0]
        own = self.methods[which][2].n_trials
        if own is not None:
            draft.n_trials = Value(own, "", f"{draft.method_key}.n_trials")
        elif self.design.n_trials is not None:
            draft.n_trials = Value(self.design.n_trials, "", "n_trials")
        elif numbers:
            most, run_id = max(numbers)
            note = "example output of the request"
            if len({n for n, _ in numbers}) > 1:
                note += f", the larger of {' and '.join(str(n) for n, _ in numbers)}: every method is tuned alike"
            draft.n_trials = Value(most, note, f"example:{run_id}.optuna.n_trials")
        elif "n_trials" in self.request.filled:
            draft.n_trials = Value(self.request.filled["n_trials"], "", "n_trials")
        else:
            draft.n_trials = Value(20, "default of run configs", "")

    def _budget(self, draft: RunDraft, budget: float | None, place: str) -> None:
        key, stated = "model.parameter_budget_percent", [s.value for s in self.said_budgets]
        example = example_value(self.request, draft.run_id, key)
        choices = self.design.budgets or stated or self.filled_budgets
        if budget is not None:
            note = "" if place.startswith(("budgets", "runs")) else f"{place.replace('_', ' ')}, in prose"
            draft.put(key, budget, note, place)
        elif isinstance(example, float | int) and not isinstance(example, bool) and (not choices or example in choices):
            draft.put(key, float(example), "example output of the request", f"example:{draft.run_id}.{key}")
        elif choices:
            shown = ", ".join(f"{c:g}" for c in choices)
            middle = sorted(choices)[len(choices) // 2]
            where = "budgets" if self.design.budgets or not stated else self.said_budgets[0].place
            draft.put(key, middle, f"the middle of {shown}; the run names none", where)
        value = draft.get(key)
        draft.budget = value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def _fill(self, draft: RunDraft) -> None:
        """Prose, then the example output, then a language model's answer, then defaults."""
        for key, said in self.numbers.items():
            if draft.applies(key):
                draft.put(key, said[0].value, f"{self._where(said[0].place)}, in prose", said[0].place)
        for key in KEYS:
            block = key.split(".")[0]
            if KEYS[key] or block not in ("model", "dataset", "training", "fw_lora", "adalora"):
                continue
            value = example_value(self.request, draft.run_id, key)
            if value is not None and draft.applies(key):
                draft.put(key, value, "example output of the request", f"example:{draft.run_id}.{key}")
        for place, value in self.request.filled.items():
            if place.startswith("settings."):
                key = _setting(self.request, place, place.removeprefix("settings."))
                if draft.applies(key):
                    draft.put(key, value, place=place)
        for key, (space, _, place) in self.filled_spaces.items():
            if space.dimension is None and draft.applies(key):
                draft.put(key, space.value, place=place)
        note = _BLOCK_NOTE["model"]
        draft.put("model.lora.enabled", True, "every method here trains LoRA adapters")
        if "model.lora.rank" not in draft.values:
            searched = draft.search.get("model.lora.rank")
            if draft.budget is not None:
                draft.put("model.lora.rank", None, "the parameter budget decides")
            elif searched is not None and searched[0].dimension is not None:
                ends = searched[0].dimension.get("choices") or [searched[0].dimension["low"]]
                draft.put("model.lora.rank", ends[len(ends) // 2], "one of the searched ranks", searched[2])
            else:
                draft.put("model.lora.rank", 8, "LoRA's custom; neither a rank nor a budget is given")
        if draft.get("model.lora.rank") is not None:
            rank = draft.get("model.lora.rank")
            draft.put("model.lora.alpha", 2 * rank if isinstance(rank, int) else 16, "twice the rank, LoRA's custom")
        draft.put("model.lora.dropout", get_key(_DEFAULTS, "model.lora.dropout"), note)
        draft.put("model.lora.target_modules", get_key(_DEFAULTS, "model.lora.target_modules"), note)
        source = source_of(str(draft.get("dataset.name")))
        if source is not None and "split" in source.keys:
            draft.put("dataset.split", "train", _BLOCK_NOTE["dataset"])
            dev = "validation_matched" if draft.get("dataset.subset") == "mnli" else "validation"
            draft.put("dataset.eval_split", dev, _BLOCK_NOTE["dataset"])
        if draft.search:
            note = "the search is scored on this part of train, never on the split that is reported"
            draft.put("dataset.validation_fraction", 0.1, note)
        lanes = "several runs at once on one backbone, where it is a BERT or RoBERTa; dataset.padding changes nothing"
        draft.put("training.engine", get_key(_DEFAULTS, "training.engine"), lanes)
        for key in _ALWAYS:
            if draft.applies(key):
                draft.put(key, get_key(_DEFAULTS, key), _BLOCK_NOTE[key.split(".")[0]])

    def _where(self, key: str) -> str:
        spelled = self.request.spelling.get(key.split(".")[0])
        return key if spelled is None else spelled.split(": ")[-1] + key[len(key.split(".")[0]) :]

    def _note(self, note: str, place: str) -> str:
        """The comment beside a value; that a language model filled it is never left out."""
        if not self.request.is_filled(place):
            return note
        filled = f"filled by {one_line(self.request.writer, 60)}, not stated by the request"
        return f"{filled}; {note}" if note else filled

    # -- the config ------------------------------------------------------------------------------

    def config(self, draft: RunDraft) -> tuple[dict[str, Any], dict[str, str]]:
        """Values and comments of one run, checked against the schema."""
        data: dict[str, Any] = {"run_id": draft.run_id, "method": draft.method}
        notes: dict[str, str] = {"run_id": draft.id_note}
        for key in KEYS:
            if key in draft.values:
                block = data
                *blocks, leaf = key.split(".")
                for name in blocks:
                    block = block.setdefault(name, {})
                block[leaf] = draft.values[key].value
                notes[key] = self._note(draft.values[key].note, draft.values[key].place)
        notes["method"] = self._note("", draft.method_key)
        if draft.search:
            notes["optuna.n_trials"] = self._note(draft.n_trials.note, draft.n_trials.place)
            notes["optuna.direction"] = "every metric here is better when it is larger"
            space = {}
            for found, given, place in draft.search.values():
                name = present_leaf(given)
                space[name] = found.dimension
                notes[f"optuna.search_space.{name}.type"] = self._note(one_line(found.note), place)
            data["optuna"] = {"n_trials": draft.n_trials.value, "direction": "maximize", "search_space": space}
        try:
            validate_run(data)
        except InvalidRun as error:
            messages = []
            for issue in error.issues:
                key, text = issue.key, issue.text
                value = draft.values.get(key)
                origin = value.place if value is not None else ""
                for _, name, place in draft.search.values():
                    if key.startswith(f"optuna.search_space.{present_leaf(name)}"):
                        origin = place
                where = f"{self.request.place(one_line(origin))}: " if origin else f"{self.request.source}: "
                messages.append(f"{where}run {draft.run_id}: {one_line(key)}: {one_line(text, 400)}")
            raise UserError(listing(messages)) from None
        return data, notes


def example_space(example: Mapping[str, Any]) -> dict[str, Any]:
    """The dimensions of an example config by name, in whichever of the two dialects it has them."""
    optuna = example.get("optuna")
    if not isinstance(optuna, dict):
        return {}
    space = optuna.get("search_space") or named_dimensions(optuna.get("search_spaces"))
    return {str(k): v for k, v in space.items() if isinstance(v, dict)} if isinstance(space, dict) else {}


def example_value(request: DesignRequest, run_id: str, key: str) -> Any:
    try:
        return get_key(with_present_names(request.examples[run_id]), key)
    except (KeyError, TypeError, IndexError):
        return None
