"""TODO"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fwlora_lab.analysis.claims import Claim, read_claims, request_claims
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.tree import available_studies
from fwlora_lab.config.validation import with_values
from fwlora_lab.errors import UserError
from fwlora_lab.records.study_plan import StudyCell, StudyPlan
from fwlora_lab.search.spec import Search
from fwlora_lab.seeds import parse_seeds
from fwlora_lab.study.spec import Selection, StudySpec, load_study
from fwlora_lab.text import did_you_mean
from fwlora_lab.training.jobs import RunSpec

_SELECTION_WORDS = ("selection.policy", "selection.n_trials")
_OWN = ("run_id", "results_dir", "model.parameter_budget_percent", "training.evaluate_on")


@dataclass(frozen=True)
class StudyRequest:
    """A study as it was asked for: `words` are overrides of every run's config; None takes the study's own."""

    study: str
    seeds: str | None = None
    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    budgets: tuple[float, ...] | None = None
    policy: str | None = None
    n_trials: int | None = None
    words: tuple[str, ...] = ()

    def command(self) -> str:
        """What asks for the same again, seeds left out."""
        own = {
            "tasks": ",".join(self.tasks or ()),
            "methods": ",".join(self.methods or ()),
            "budgets": ",".join(f"{b:g}" for b in self.budgets or ()),
            "selection.policy": self.policy or "",
            "selection.n_trials": str(self.n_trials or ""),
        }
        words = [f"study={self.study}", *(f"{key}={value}" for key, value in own.items() if value), *self.words]
        return f"fwlora compare {shlex.join(words)}"


def read_words(words: Sequence[str]) -> StudyRequest:
    """The words of the command: those of the study's own, the rest are overrides of every run's config."""
    own: dict[str, str] = {}
    rest = []
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or key not in ("study", "seeds", "tasks", "methods", "budgets", *_SELECTION_WORDS):
            rest.append(word)
        elif key in own:
            raise UserError(f"{key}= stands twice: give it once.")
        elif not value:
            raise UserError(f"{key}= is empty: give a value, or leave it out.")
        else:
            own[key] = value
    if "study" not in own:
        raise UserError(f"say which study: study=NAME, one of {', '.join(available_studies())}, or a .yaml file.")
    try:
        budgets = tuple(float(b) for b in own["budgets"].split(",")) if "budgets" in own else None
    except ValueError:
        raise UserError(f"budgets={own['budgets']}: write percents such as budgets=0.1,0.2,0.5") from None
    trials = own.get("selection.n_trials")
    if trials is not None and not (trials.isdecimal() and int(trials) > 0):
        raise UserError(f"selection.n_trials={trials}: must be a whole number from 1 on.")
    policy = own.get("selection.policy")
    if policy not in (None, "fixed", "tuned"):
        raise UserError(f"selection.policy={policy}: must be fixed or tuned.")
    return StudyRequest(
        study=own["study"],
        seeds=own.get("seeds"),
        tasks=_names(own.get("tasks")),
        methods=_names(own.get("methods")),
        budgets=budgets,
        policy=policy,
        n_trials=int(trials) if trials else None,
        words=tuple(rest),
    )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


@dataclass(frozen=True)
class PlannedCell:
    """One method on one task at one budget: its runs but for their seeds."""

    task: str
    budget: float
    method: str
    cfg: RunConfig
    search: Search | None

    def runs(self, seeds: Sequence[int]) -> list[RunSpec]:
        return [RunSpec(self.cfg, seed) for seed in seeds]

    @property
    def name(self) -> str:
        return f"{self.task} {self.budget:g} % {self.method}"


@dataclass(frozen=True)
class PlannedStudy:
    """The cells and seeds of a study, every config checked; nothing is trained or written yet."""

    request: StudyRequest
    study: StudySpec
    cells: tuple[PlannedCell, ...]
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]
    results_dir: Path

    def as_record(self) -> StudyPlan:
        methods = dict.fromkeys(cell.method for cell in self.cells)
        return StudyPlan(
            study=Path(self.request.study).stem,
            command=self.request.command(),
            tasks=list(dict.fromkeys(cell.task for cell in self.cells)),
            budgets=list(dict.fromkeys(cell.budget for cell in self.cells)),
            methods={name: self.study.methods[name].about for name in methods},
            reference=self.study.reference,
            seeds=list(self.seeds),
            selection=self.study.selection.model_dump(mode="json", exclude_none=True)
            if self.study.selection.policy == "tuned"
            else {"policy": "fixed"},
            cells=[StudyCell(task=c.task, budget=c.budget, method=c.method, run_id=c.cfg.run_id) for c in self.cells],
            claims=[claim.model_dump(mode="json") for claim in self.claims],
        )


def plan_study(request: StudyRequest) -> PlannedStudy:
    """Every run of the study, checked.

    Raises:
        UserError: no such study, task, method or budget; a run whose config is not valid; a claim about what the study
            does not have; or a seed that the tuning uses.
    """
    study = load_study(request.study)
    changes = {k: v for k, v in (("policy", request.policy), ("n_trials", request.n_trials)) if v is not None}
    try:
        selection = Selection.model_validate(study.selection.model_dump(exclude_none=True) | changes)
    except ValidationError as error:
        raise UserError(f"selection: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    study = study.model_copy(update={"selection": selection})
    tasks = _chosen("tasks", request.tasks, study.tasks)
    methods = _chosen("methods", request.methods, study.methods)
    budgets = list(request.budgets or study.budgets)
    seeds = parse_seeds(request.seeds or study.seeds)
    if selection.policy == "tuned" and selection.seed in seeds:
        raise UserError(
            f"seeds: {selection.seed} is the seed that hyper-parameters are tuned with: leave it out, "
            "so that every compared run is fresh"
        )
    for word in request.words:
        if (key := word.partition("=")[0].lstrip("+~")) in _OWN and key != "results_dir":
            raise UserError(f"override `{word}`: {key} is set by the study itself; leave it out")
    name = Path(request.study).stem
    results = [word for word in request.words if word.startswith("results_dir=")]
    folder = results or [f"results_dir=results/{name}"]
    cells = [
        _cell(study, task, budget, method, [*request.words, *folder])
        for task in tasks
        for budget in budgets
        for method in methods
    ]
    claims = request_claims() if study.claims == "request" else read_claims(study.claims, f"study {name}: claims")
    for claim in claims:
        for what, value, known in (
            ("task", claim.scope.task, study.tasks),
            ("method", claim.method, study.methods),
            ("reference", claim.reference or claim.method, study.methods),
        ):
            if value not in known:
                raise UserError(
                    f"study {name}: claims: {what} {value!r} is none of the study's{did_you_mean(value, known)}: "
                    f"{', '.join(known)}"
                )
    return PlannedStudy(request, study, tuple(cells), tuple(seeds), claims, Path(cells[0].cfg.results_dir))


def _chosen(what: str, asked: tuple[str, ...] | None, known: Mapping[str, object]) -> list[str]:
    if asked is None:
        return list(known)
    for name in asked:
        if name not in known:
            raise UserError(
                f"{what}={','.join(asked)}: {name!r} is none of the study's"
                f"{did_you_mean(name, known)}: {', '.join(known)}"
            )
    return [name for name in known if name in asked]


def _cell(study: StudySpec, task: str, budget: float, method: str, words: Sequence[str]) -> PlannedCell:
    part, how = study.tasks[task], study.methods[method]
    run_id = f"{task}-{budget:g}-{method}"
    overrides = [
        *study.set,
        *part.set,
        *how.set,
        "model.lora.rank=null",  # the budget decides
        "model.lora.alpha=null",
        f"model.parameter_budget_percent={float(budget)}",
        f"run_id={run_id}",
        "optuna=null",
    ]
    cfg = load_run(study.base, [*overrides, *words])
    selection, search = study.selection, None
    if selection.policy == "tuned":
        block = {
            "n_trials": part.n_trials or selection.n_trials,
            "sampler": selection.sampler,
            "pruner": selection.pruner,
            "search_space": {
                name: dimension.model_dump(exclude_none=True)
                for name, dimension in (selection.space | how.space).items()
            },
        }
        search = Search.of(with_values(cfg, {"optuna": block, "training.seed": selection.seed}))
    return PlannedCell(task, budget, method, cfg, search)
