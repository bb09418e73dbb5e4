"""From a design to a draft of every run: the runs it lists, or one for every method, model, data set and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fwlora_lab.design.draft import MethodEntry, RunDraft, Sourced, UnknownMethod
from fwlora_lab.design.names import label, method_in, plain, slug, unknown_text
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.resolve import ResolvedDesign, dataset_values, parse_settings, resolve_design
from fwlora_lab.design.schema import DesignDataset, DesignRun, ExperimentDesign
from fwlora_lab.design.sources import fill, inferred_sources, search_space, stated_sources
from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean, listing, one_line

MAX_RUNS = 1_000
MAX_RUN_ID = 200  # characters


@dataclass(frozen=True)
class DesignPlan:
    """A resolved design and a draft of each of its runs, in the order of the design."""

    resolved: ResolvedDesign
    drafts: list[RunDraft]

    @property
    def request(self) -> DesignRequest:
        return self.resolved.request

    @property
    def design(self) -> ExperimentDesign:
        return self.resolved.design


def plan_design(request: DesignRequest) -> DesignPlan:
    """Resolve a design and draft its runs.

    Raises:
        UserError: a name means nothing, two runs have the same id, or there are too many runs.
    """
    resolved = resolve_design(request)
    drafter = _Drafter(resolved)
    drafts = drafter.listed_runs() if request.design.runs else drafter.all_combinations()
    if not drafts:
        raise UserError(
            listing([f"{request.locate(m.source_location)}: {unknown_text(m.name)}" for m in resolved.unknown_methods])
        )
    seen: dict[str, RunDraft] = {}
    for draft in drafts:
        name = draft.run_id.lower()  # some file systems do not distinguish capitals
        if name in seen:
            raise UserError(
                f"{request.source}: two runs are called {draft.run_id!r} ({one_line(seen[name].title)} and "
                f"{one_line(draft.title)}): give each a run_id of its own under runs"
            )
        seen[name] = draft
    return DesignPlan(resolved, drafts)


class _Drafter:
    """Drafts the runs of one design."""

    def __init__(self, resolved: ResolvedDesign) -> None:
        self.resolved, self.request, self.design = resolved, resolved.request, resolved.design
        self.stated, self.inferred = stated_sources(resolved), inferred_sources(resolved)
        self.model_names = [label(model) for model in self.design.models]
        self.datasets = [DesignDataset(name=d) if isinstance(d, str) else d for d in self.design.datasets]
        self.dataset_names = [label(dataset) for dataset in self.datasets]

    def all_combinations(self) -> list[RunDraft]:
        """One run for every method × model × data set × budget."""
        methods, budgets = self.resolved.methods, self._budgets()
        if len(methods) * len(self.model_names) * len(self.datasets) * len(budgets) > MAX_RUNS:
            raise UserError(f"{self.request.source}: the design has more than {MAX_RUNS:,} runs: shorten its lists")
        drafts = []
        for method in methods:
            for model, model_name in enumerate(self.model_names):
                for dataset, dataset_name in enumerate(self.dataset_names):
                    for budget in budgets:
                        suffix = f"-{budget.value:g}pct" if budget is not None and len(budgets) > 1 else ""
                        run_id = slug([method.role, model_name, dataset_name])[: MAX_RUN_ID - len(suffix)] + suffix
                        drafts.append(self._draft(run_id, method, model, dataset, budget))
        return drafts

    def _budgets(self) -> Sequence[Sourced[float] | None]:
        """The budgets that the design lists, else those in its prose, else a language model's."""
        found = [Sourced(b, source_location=f"budgets.{n}") for n, b in enumerate(self.design.budgets)]
        found = found or [
            Sourced(b.value, f"{b.source_location.replace('_', ' ')}, in prose", b.source_location)
            for b in self.resolved.prose_budgets
        ]
        found = found or [
            Sourced(b, source_location=f"budgets.{n}") for n, b in enumerate(self.resolved.filled_budgets)
        ]
        return found or [None]

    def listed_runs(self) -> list[RunDraft]:
        """One run for each that the design lists, but for those of a method that is not known."""
        drafts = [self._listed_run(run, f"runs.{n}") for n, run in enumerate(self.design.runs)]
        return [draft for draft in drafts if draft is not None]

    def _listed_run(self, run: DesignRun, location: str) -> RunDraft | None:
        model = self._position(run.model, self.model_names, f"{location}.model")
        dataset = self._position(run.dataset, self.dataset_names, f"{location}.dataset")
        method = self._method_of(run, f"{location}.method")
        if isinstance(method, UnknownMethod):
            return None
        run_id = run.run_id or slug([method.role, self.model_names[model], self.dataset_names[dataset]])[:MAX_RUN_ID]
        budget = Sourced(run.budget, source_location=f"{location}.budget") if run.budget is not None else None
        return self._draft(run_id, method, model, dataset, budget, run, location)

    def _position(self, name: str | None, names: Sequence[str], location: str) -> int:
        """The position of a name in the design's list; a list of one needs no name."""
        if name is None and len(names) == 1:
            return 0
        if name is None:
            raise UserError(f"{self.request.locate(location)}: is missing, and the design has {len(names)}: add it")
        same = [n for n, known in enumerate(names) if known == name]
        same = same or [n for n, known in enumerate(names) if plain(known) == plain(name)]
        if not same:
            raise self.request.error(
                location,
                f"{one_line(name, 80)!r} is not in the design's list{did_you_mean(name[:80], names)}: "
                f"it has {one_line(', '.join(names), 300)}",
            )
        return same[0]

    def _method_of(self, run: DesignRun, location: str) -> MethodEntry | UnknownMethod:
        """The method that a run names by its role, by its name in the design, or by any name of the same method."""
        methods = [*self.resolved.methods, *self.resolved.unknown_methods]
        roles = [method.role for method in methods]
        # A proposed method that is a text may be a whole description, which is no use in a message.
        written = [m.name if isinstance(m, UnknownMethod) else m.method.name for m in methods]
        names = [
            m.role if name == self.design.proposed_method else name for m, name in zip(methods, written, strict=True)
        ]
        if run.method in roles:
            return methods[roles.index(run.method)]
        if run.method in written:
            return methods[written.index(run.method)]
        meant = method_in(run.method)
        same = [method for method in self.resolved.methods if meant is not None and method.method_name == meant]
        return same[0] if same else methods[self._position(run.method, [*roles, *names], location) % len(roles)]

    def _draft(
        self,
        run_id: str,
        method: MethodEntry,
        model: int,
        dataset: int,
        budget: Sourced[float] | None,
        run: DesignRun | None = None,
        location: str = "",
    ) -> RunDraft:
        """The draft of a run on the `model`-th model and the `dataset`-th data set of the design."""
        has_own_id = run is not None and run.run_id is not None
        draft = RunDraft(
            run_id=run_id,
            id_note="" if has_own_id else "from the method, the model and the data set",
            run=run,
            run_location=location,
            method=method,
            model=self.resolved.models[model],
            dataset_name=self.dataset_names[dataset],
            dataset_location=f"datasets.{dataset}",
            listed_budget=budget,
        )
        self._add_settings(draft, self.datasets[dataset])
        fill(draft, self.stated)
        draft.search |= search_space(self.resolved, draft)
        fill(draft, self.inferred)
        return draft

    def _add_settings(self, draft: RunDraft, dataset: DesignDataset) -> None:
        """The run's own settings win over its method's, and those over the design's, which are for all methods."""
        for block, settings in draft.own_settings:
            draft.settings = parse_settings(self.request, block, settings) | draft.settings
        common = parse_settings(self.request, "settings", self.design.settings)
        draft.settings = {key: value for key, value in common.items() if draft.applies(key)} | draft.settings
        draft.settings = dataset_values(self.request, dataset, draft.dataset_location) | draft.settings
