"""The parts of a design with every name resolved: methods, models, ranges, example output, and what the prose says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fwlora_lab.catalog.methods import MethodName
from fwlora_lab.catalog.tasks import TASKS
from fwlora_lab.config.former_names import with_present_names
from fwlora_lab.config.issues import issues_of
from fwlora_lab.config.keys import KEYS, search_key
from fwlora_lab.config.schema import Dimension
from fwlora_lab.design.draft import BUDGET, MethodEntry, SearchEntry, Sourced, UnknownMethod
from fwlora_lab.design.examples import example_space, example_value
from fwlora_lab.design.names import ResolvedModel, label, method_defined_in, method_in, resolve_model, subset_of
from fwlora_lab.design.prose import ProseNumber, budgets_in_prose, numbers_in_prose
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import DesignDataset, DesignMethod, ExperimentDesign
from fwlora_lab.design.spaces import ParsedSpace, parse_space
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, one_line

# AIRAS' learning-rate warm-up in steps. A run config gives it as a share of the run, training.warmup_ratio.
WARMUP_OF_LEARNING_RATE = "training.warmup_steps"
_SPACES = "hyperparameters_to_search"


@dataclass(frozen=True)
class ResolvedDesign:
    """A design, resolved once for all of its runs.

    Args:
        methods, unknown_methods: those that are known here, and those whose runs are left out.
        spaces: key -> the range that all methods search.
        examples: run id -> example config, its keys under their present names.
        example_spaces: key -> the range that an example config searches, if neither the design nor a method names one.
        prose_numbers: key -> what the prose says of it, in the order of the texts.
        prose_budgets: the parameter budgets in the prose, in percent.
        filled_settings, filled_spaces, filled_budgets: what a language model answered.
    """

    request: DesignRequest
    methods: list[MethodEntry]
    unknown_methods: list[UnknownMethod]
    models: list[ResolvedModel]
    spaces: dict[str, SearchEntry]
    examples: dict[str, dict[str, Any]]
    example_spaces: dict[str, SearchEntry]
    prose_numbers: dict[str, list[ProseNumber]]
    prose_budgets: list[ProseNumber]
    filled_settings: dict[str, Sourced[Any]]
    filled_spaces: dict[str, SearchEntry]
    filled_budgets: list[float]

    @property
    def design(self) -> ExperimentDesign:
        return self.request.design


def resolve_design(request: DesignRequest) -> ResolvedDesign:
    """Resolve all names of a design.

    Raises:
        UserError: a name means nothing, or a range cannot be read.
    """
    design = request.design
    methods, unknown_methods = _methods(request)
    spaces = _spaces(request, _SPACES, design.hyperparameters_to_search)
    examples = {run_id: with_present_names(example) for run_id, example in request.examples.items()}
    named = set(spaces).union(*(method.spaces for method in methods))
    example_spaces = _example_spaces(request, examples)
    has_example_budget = any(example_value(example, BUDGET) is not None for example in examples.values())
    return ResolvedDesign(
        request=request,
        methods=methods,
        unknown_methods=unknown_methods,
        models=[resolve_model(request, given, f"models.{n}") for n, given in enumerate(design.models)],
        spaces=spaces,
        examples=examples,
        example_spaces={key: entry for key, entry in example_spaces.items() if key not in named},
        prose_numbers=numbers_in_prose(request),
        prose_budgets=budgets_in_prose(request),
        filled_settings=parse_settings(request, "settings", _filled_block(request, "settings")),
        filled_spaces=_spaces(request, _SPACES, _filled_block(request, _SPACES)),
        filled_budgets=[] if has_example_budget else request.filled.get("budgets", []),
    )


def _methods(request: DesignRequest) -> tuple[list[MethodEntry], list[UnknownMethod]]:
    """The design's methods by their names, and those that are not known.

    A description never says which method is meant: most of them name others to compare with.
    """
    proposed = request.design.proposed_method
    given: list[tuple[str, str, DesignMethod, MethodName | None]] = []
    if isinstance(proposed, str):  # may be a description, which is longer than a name may be
        method = DesignMethod.model_construct(name=proposed)
        given.append(("proposed", "proposed_method", method, method_defined_in(proposed)))
    else:
        given.append(("proposed", "proposed_method", proposed, method_in(proposed.name)))
    for n, compared in enumerate(request.design.comparative_methods):
        method = DesignMethod(name=compared) if isinstance(compared, str) else compared
        given.append((f"comparative-{n + 1}", f"comparative_methods.{n}", method, method_in(method.name)))
    known, unknown = [], []
    for role, location, method, method_name in given:
        if method_name is None:
            unknown.append(UnknownMethod(role, location, method.name))
        else:
            known.append(_method(request, role, location, method, method_name))
    return known, unknown


def _method(
    request: DesignRequest, role: str, location: str, method: DesignMethod, method_name: MethodName
) -> MethodEntry:
    spaces = _spaces(request, f"{location}.{_SPACES}", method.hyperparameters_to_search)
    return MethodEntry(role, location, method, method_name, spaces)


def _spaces(request: DesignRequest, block: str, given: Mapping[str, Any]) -> dict[str, SearchEntry]:
    entries: dict[str, SearchEntry] = {}
    for name, written in given.items():
        location = f"{block}.{name}"
        try:
            space = parse_space(name, written)
        except UserError as error:
            raise request.error(location, one_line(error, 400)) from None
        if space.key in entries:
            raise request.error(location, f"means {space.key}, as {entries[space.key].name!r} does: keep one of them")
        entries[space.key] = SearchEntry(space, name, location, written)
    return entries


def _example_spaces(request: DesignRequest, examples: Mapping[str, Mapping[str, Any]]) -> dict[str, SearchEntry]:
    entries: dict[str, SearchEntry] = {}
    for run_id, example in examples.items():
        for name, dimension in example_space(example).items():
            location = f"example:{run_id}.optuna.search_space.{name}"
            key = setting_key(request, f"example:{run_id}.optuna.search_space", name)
            try:
                Dimension.model_validate(dimension)
            except ValidationError as error:
                text = "; ".join(issue.text for issue in issues_of(error, dimension))
                raise request.error(location, one_line(text, 400)) from None
            note = "the request's example output searches it in one run; here every method is tuned alike"
            entries.setdefault(key, SearchEntry(ParsedSpace(key, dimension, note=note), name, location, dimension))
    return entries


def _filled_block(request: DesignRequest, block: str) -> dict[str, Any]:
    prefix = f"{block}."
    return {key.removeprefix(prefix): v for key, v in request.filled.items() if key.startswith(prefix)}


def setting_key(request: DesignRequest, source_location: str, name: str) -> str:
    """The key of a run config that the name of a setting means."""
    try:
        return "training.seed" if name == "seed" else search_key(name)  # dataset.seed only by its whole name
    except UserError as error:
        raise request.error(source_location, one_line(error, 400)) from None


def parse_settings(request: DesignRequest, block: str, settings: Mapping[str, Any]) -> dict[str, Sourced[Any]]:
    """Settings under the keys that their names mean; of two names for one key the first counts.

    Raises:
        UserError: a name means no key, or several.
    """
    found: dict[str, Sourced[Any]] = {}
    for name, value in settings.items():
        if name != WARMUP_OF_LEARNING_RATE:  # contradictions/facts.py reports it
            location = f"{block}.{name}"
            found.setdefault(setting_key(request, location, name), Sourced(value, source_location=location))
    return found


def dataset_values(request: DesignRequest, dataset: DesignDataset, location: str) -> dict[str, Sourced[Any]]:
    """The keys of a run config's `dataset` block that a data set of the design sets.

    Raises:
        UserError: a setting is not a key of the block, or the name means no task.
    """
    values: dict[str, Sourced[Any]] = {}
    for name, value in dataset.settings.items():
        setting = f"{location}.settings.{name}"
        key = f"dataset.{name.removeprefix('dataset.')}"
        if key not in KEYS:
            near = did_you_mean(key, [k for k in KEYS if k.startswith("dataset.")])
            raise request.error(setting, f"{one_line(name, 60)!r} is not a key of a run config's dataset block{near}")
        values.setdefault(key, Sourced(value, source_location=setting))
    name = label(dataset)
    subset = subset_of(name)
    source = dataset.settings.get("name")
    if source is None:
        task = TASKS.get(subset or name.lower())
        if task is None:
            raise request.error(
                location,
                f"{one_line(name, 80)!r} is not a known data set{did_you_mean(name[:80], TASKS)}: name a GLUE task or "
                "offline, or give a block of name and settings (name: csv, train_file, eval_file, text_column, "
                "label_column)",
            )
        source = task.source.name
    values.setdefault("dataset.name", Sourced(source, source_location=location))
    if subset is not None and source == TASKS[subset].source.name:
        values.setdefault("dataset.subset", Sourced(subset, source_location=location))
    return values
