"""What a study consists of: from the words of the command to a checked run config for every cell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from pydantic import ValidationError

from fwlora_lab.analysis.claims import Claim, read_claims
from fwlora_lab.analysis.group_scores import SECONDS_METRICS
from fwlora_lab.catalog.tasks import metrics_of
from fwlora_lab.config.checks import warnings_of
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.tree import available_studies
from fwlora_lab.config.validation import with_values
from fwlora_lab.errors import UserError
from fwlora_lab.records.study_plan import StudyCell, StudyPlan
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.seeds import parse_seeds
from fwlora_lab.study.spec import Selection, StudySpec, Timing, load_study
from fwlora_lab.text import did_you_mean, without_secrets
from fwlora_lab.training.jobs import RunSpec

_ARGUMENTS = ("study", "seeds", "tasks", "methods", "budgets", "timing", "selection.policy", "selection.n_trials")
_SET_BY_THE_STUDY = ("run_id", "model.parameter_budget_percent", "training.evaluate_on")


@dataclass(frozen=True)
class StudyRequest:
    """A study as a user asks for it; None takes the value of the study's file.

    Attributes:
        study: a packaged study's name, or a .yaml file.
        seeds: training seeds such as `0..9` or `1,5`.
        tasks, methods, budgets: a part of the study's; budgets in percent of the backbone's parameters.
        timing: the study's `timing`.
        policy, n_trials: the study's `selection.policy` and `selection.n_trials`.
        overrides: Hydra's overrides of every run's config, such as `training.epochs=1`.
    """

    study: str
    seeds: str | None = None
    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    budgets: tuple[float, ...] | None = None
    timing: Timing | None = None
    policy: str | None = None
    n_trials: int | None = None
    overrides: tuple[str, ...] = ()

    def command(self) -> str:
        """The command that asks for the same study, without its seeds."""
        chosen = {
            "tasks": ",".join(self.tasks or ()),
            "methods": ",".join(self.methods or ()),
            "budgets": ",".join(f"{b:g}" for b in self.budgets or ()),
            "timing": self.timing or "",
            "selection.policy": self.policy or "",
            "selection.n_trials": str(self.n_trials or ""),
        }
        arguments = [f"{key}={value}" for key, value in chosen.items() if value]
        return without_secrets(f"fwlora compare {shlex.join([f'study={self.study}', *arguments, *self.overrides])}")


def parse_request(arguments: Sequence[str]) -> StudyRequest:
    """The request in the command's arguments; what is not a study's own argument overrides every run's config."""
    chosen: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in _ARGUMENTS:
            overrides.append(argument)
        elif key in chosen:
            raise UserError(f"{key}= is given twice: give it once.")
        elif not value:
            raise UserError(f"{key}= is empty: give a value, or leave it out.")
        else:
            chosen[key] = value
    if "study" not in chosen:
        raise UserError(f"say which study: study=NAME, one of {', '.join(available_studies())}, or a .yaml file.")
    try:
        budgets = tuple(float(b) for b in chosen["budgets"].split(",")) if "budgets" in chosen else None
    except ValueError:
        raise UserError(f"budgets={chosen['budgets']}: write percents such as budgets=0.1,0.2,0.5") from None
    n_trials = chosen.get("selection.n_trials")
    if n_trials is not None and not (n_trials.isdecimal() and int(n_trials) > 0):
        raise UserError(f"selection.n_trials={n_trials}: must be a whole number from 1 on.")
    timing = chosen.get("timing")
    if timing is not None and timing not in get_args(Timing):
        raise UserError(f"timing={timing}: must be {' or '.join(get_args(Timing))}.")
    policy = chosen.get("selection.policy")
    if policy not in (None, "fixed", "tuned"):
        raise UserError(f"selection.policy={policy}: must be fixed or tuned.")
    return StudyRequest(
        study=chosen["study"],
        seeds=chosen.get("seeds"),
        tasks=_names(chosen.get("tasks")),
        methods=_names(chosen.get("methods")),
        budgets=budgets,
        timing=cast(Timing | None, timing),
        policy=policy,
        n_trials=int(n_trials) if n_trials else None,
        overrides=tuple(overrides),
    )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


@dataclass(frozen=True)
class PlannedCell:
    """One method on one task at one budget: a run for each seed.

    Attributes:
        budget: percent of the backbone's parameters.
        cfg: the config of the cell's runs, apart from their seeds.
        search: how the cell is tuned; None if its hyper-parameters are those of the config.
    """

    task: str
    budget: float
    method: str
    cfg: RunConfig
    search: SearchSpec | None

    def runs(self, seeds: Sequence[int]) -> list[RunSpec]:
        return [RunSpec(self.cfg, seed) for seed in seeds]

    @property
    def name(self) -> str:
        """The cell as it is shown, such as `cola 0.2 % fw_lora`."""
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

    def check_workers(self, workers: int) -> None:
        """Refuse several processes for runs that are timed alone.

        Raises:
            UserError: `timing` is exclusive and `workers` is more than one.
        """
        if self.study.timing == "exclusive" and workers > 1:
            raise UserError(
                f"timing=exclusive trains one run at a time, alone, and workers={workers} trains {workers} at once: "
                "set workers=1, or timing=shared."
            )

    def as_record(self) -> StudyPlan:
        """The plan as it is written to study.json."""
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
        UserError: the study, a task, a method or a budget does not exist; a run's config is not valid; a claim is about
            something that the study does not have; or one of the seeds is used for tuning.
    """
    study = _as_requested(load_study(request.study), request)
    seeds = parse_seeds(request.seeds or study.seeds)
    if study.selection.policy == "tuned" and study.selection.seed in seeds:
        raise UserError(
            f"seeds: {study.selection.seed} is the seed that hyper-parameters are tuned with: leave it out, "
            "so that every compared run is fresh"
        )
    for override in request.overrides:
        if (key := override.partition("=")[0].lstrip("+~")) in _SET_BY_THE_STUDY:
            raise UserError(f"override `{override}`: {key} is set by the study itself; leave it out")
    name = Path(request.study).stem
    folder = [override for override in request.overrides if override.startswith("results_dir=")]
    overrides = [*request.overrides, *(folder or [f"results_dir=results/{name}"])]
    cells = [
        _cell(study, task, budget, method, overrides)
        for task in _chosen("tasks", request.tasks, study.tasks)
        for budget in request.budgets or study.budgets
        for method in _chosen("methods", request.methods, study.methods)
    ]
    # The word `request` stands for the claims of the packaged study of that name.
    rows = load_study("request").claims if study.claims == "request" else study.claims
    claims = read_claims(rows, f"study {name}: claims")
    _check_claims(name, study, claims)
    for claim in claims:
        _check_metric(name, claim, cells)
    return PlannedStudy(request, study, tuple(cells), tuple(seeds), claims, Path(cells[0].cfg.results_dir))


def validate_study(path: str) -> list[str]:
    """Check a study's file and every run of it, and return their warnings; raises UserError as `plan_study`."""
    plan = plan_study(StudyRequest(study=path))
    return list(dict.fromkeys(warning for cell in plan.cells for warning in warnings_of(cell.cfg)))


def _as_requested(study: StudySpec, request: StudyRequest) -> StudySpec:
    asked = {"policy": request.policy, "n_trials": request.n_trials}
    changes = {key: value for key, value in asked.items() if value is not None}
    try:
        selection = Selection.model_validate(study.selection.model_dump(exclude_none=True) | changes)
    except ValidationError as error:
        raise UserError(f"selection: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return study.model_copy(update={"selection": selection, "timing": request.timing or study.timing})


def _check_claims(name: str, study: StudySpec, claims: Sequence[Claim]) -> None:
    """Refuse a claim about a task or method that the study does not have."""
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


def _check_metric(name: str, claim: Claim, cells: Sequence[PlannedCell]) -> None:
    """Refuse a claim about a metric that no run of its task records.

    It is known without reading data: every task of the catalog says its metrics, and CSV and JSONL files have the same.
    """
    for cell in cells:
        of_task = metrics_of(cell.cfg.dataset.name, cell.cfg.dataset.subset)
        known = (*of_task, *SECONDS_METRICS)
        if cell.task == claim.scope.task and of_task and claim.metric not in known:
            raise UserError(
                f"study {name}: claims: no run on {claim.scope.task} records {claim.metric!r}"
                f"{did_you_mean(claim.metric, known)}: claim one of {', '.join(known)}"
            )


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


def _cell(study: StudySpec, task: str, budget: float, method: str, overrides: Sequence[str]) -> PlannedCell:
    task_part, method_part = study.tasks[task], study.methods[method]
    own = [
        *study.set,
        *task_part.set,
        *method_part.set,
        "model.lora.rank=null",  # the budget decides
        "model.lora.alpha=null",
        f"model.parameter_budget_percent={float(budget)}",
        f"run_id={task}-{budget:g}-{method}",
        "optuna=null",
    ]
    cfg = load_run(study.base, [*own, *overrides])
    selection, search = study.selection, None
    if selection.policy == "tuned":
        block = {
            "n_trials": task_part.n_trials or selection.n_trials,
            "sampler": selection.sampler,
            "pruner": selection.pruner,
            "search_space": {
                name: dimension.model_dump(exclude_none=True)
                for name, dimension in (selection.space | method_part.space).items()
            },
        }
        trials = load_run(study.base, [*own, *overrides, *selection.set]) if selection.set else cfg
        search = SearchSpec.of(with_values(trials, {"optuna": block, "training.seed": selection.seed}))
    return PlannedCell(task, budget, method, cfg, search)
