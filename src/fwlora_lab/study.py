"""Methods × budgets × tasks × seeds: what a study trains, in an order that makes its pairs comparable, resumable.

A study is the set of its records: it trains what is missing, leaves what is there, and refuses what was made with
another config or other data. Cells are trained a few seeds at a time, one method after the other, so that a pair's
two runs stand near each other in time, and every lane has a neighbour of its own method: their seconds compare.

results_dir/
    study.json                        the plan, a `records.StudyPlan`
    <task>-<budget>-<method>/         the runs of a cell, as `train` writes them
    <task>-<budget>-<method>/search/  how its hyper-parameters were chosen, as `search` writes it
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fwlora_lab.compose import CONF, load_run, parse_seeds, read_file
from fwlora_lab.errors import UserError
from fwlora_lab.launch import leave_with
from fwlora_lab.progress import StudyBoard
from fwlora_lab.records import Record, RunDir, StudyCell, StudyPlan, differences, load_record, status_of, write_plan
from fwlora_lab.runconfig import Dimension, RunConfig, issues_of, listing, nearest, with_values
from fwlora_lab.search import Search, best_of, run_search
from fwlora_lab.tasks import load_task
from fwlora_lab.train import Event, Planned, lanes_at_once, train_cohort
from fwlora_lab.trials import counts
from fwlora_lab.verdicts import Claim, read_claims, request_claims

_PROBE_STEPS = 12
_SELECTION_WORDS = ("selection.policy", "selection.n_trials")
_OWN = ("run_id", "results_dir", "model.parameter_budget_percent", "training.evaluate_on")


# --- what a study is ----------------------------------------------------------------------------


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TaskPart(_Block):
    """Overrides that make the base run one on this task; `n_trials` where tuning is dearer or cheaper here."""

    set: list[str] = []
    n_trials: Annotated[int, Field(ge=1)] | None = None


class MethodPart(_Block):
    """Overrides that make the base run this method; `space`: what is searched besides, or in place of, all methods'."""

    about: str
    set: list[str]
    space: dict[str, Dimension] = {}


class Selection(_Block):
    """How hyper-parameters are chosen.

    fixed: they are those of the configs. tuned: each method gets `n_trials` trials on each task and budget, scored on a
    part of the training data with training seed `seed`, which no run that is compared may have.
    """

    policy: Literal["fixed", "tuned"] = "fixed"
    n_trials: Annotated[int, Field(ge=1)] = 12
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1000
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = "none"
    space: dict[str, Dimension] = {}

    @model_validator(mode="after")
    def _has_a_space(self) -> Selection:
        if self.policy == "tuned" and not self.space:
            raise ValueError("tuned needs a space, for example {learning_rate: {type: loguniform, low: …, high: …}}")
        return self


class Study(_Block):
    """A study as its file describes it; `base` is a run's id or file, `set` overrides for every run."""

    about: str
    base: str
    set: list[str] = []
    tasks: Annotated[dict[str, TaskPart], Field(min_length=1)]
    methods: Annotated[dict[str, MethodPart], Field(min_length=1)]
    budgets: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=1)]
    seeds: str
    reference: str
    selection: Selection = Selection()
    claims: Literal["request"] | list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _names(self) -> Study:
        if self.reference not in self.methods:
            raise ValueError(f"reference: {self.reference!r} is no method of the study: {', '.join(self.methods)}")
        for name in (*self.tasks, *self.methods):
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"{name!r} is part of a folder's name: use letters, digits, '_' and '-'")
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("budgets: one of them stands twice")
        return self


def available_studies() -> list[str]:
    """The names of the packaged studies."""
    return sorted(path.stem for path in (CONF / "study").glob("*.yaml"))


def load_study(name: str) -> Study:
    """The study called `name`, or the one in that .yaml file; a UserError lists every fault with its file and key."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in available_studies():
        path = CONF / "study" / f"{name}.yaml"
    else:
        known = available_studies()
        raise UserError(
            f"there is no study {name!r}{nearest(name, known)}: use one of {', '.join(known)}, or a .yaml file"
        )
    file = read_file(path, "study", "about")
    try:
        study = Study.model_validate(file.values)
        beside = path.parent / study.base  # a base named by its file stands beside the study
        return study.model_copy(update={"base": str(beside)}) if beside.is_file() else study
    except ValidationError as error:
        faults = []
        for key, text in issues_of(error, file.values):
            if text.startswith("is no key of a run config"):
                text = f"is no key of a study{nearest(key.rsplit('.', 1)[-1], _keys())}"
            line = file.lines.get(key)
            faults.append(f"{path}{f':{line}' if line else ''}: {key + ': ' if key else ''}{text}")
        raise UserError(listing(faults)) from None


def _keys() -> list[str]:
    return [k for block in (Study, TaskPart, MethodPart, Selection) for k in block.model_fields]


# --- what it trains -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
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


def read_words(words: Sequence[str]) -> Request:
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
    return Request(
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
class Cell:
    """One method on one task at one budget: its runs but for their seeds."""

    task: str
    budget: float
    method: str
    cfg: RunConfig
    search: Search | None

    def runs(self, seeds: Sequence[int]) -> list[Planned]:
        return [Planned(self.cfg, seed) for seed in seeds]

    @property
    def name(self) -> str:
        return f"{self.task} {self.budget:g} % {self.method}"


@dataclass(frozen=True)
class Plan:
    """The cells and seeds of a study, every config checked; nothing is trained or written yet."""

    request: Request
    study: Study
    cells: tuple[Cell, ...]
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


def plan_study(request: Request) -> Plan:
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
                    f"study {name}: claims: {what} {value!r} is none of the study's{nearest(value, known)}: "
                    f"{', '.join(known)}"
                )
    return Plan(request, study, tuple(cells), tuple(seeds), claims, Path(cells[0].cfg.results_dir))


def _chosen(what: str, asked: tuple[str, ...] | None, known: Mapping[str, object]) -> list[str]:
    if asked is None:
        return list(known)
    for name in asked:
        if name not in known:
            raise UserError(
                f"{what}={','.join(asked)}: {name!r} is none of the study's{nearest(name, known)}: {', '.join(known)}"
            )
    return [name for name in known if name in asked]


def _cell(study: Study, task: str, budget: float, method: str, words: Sequence[str]) -> Cell:
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
    return Cell(task, budget, method, cfg, search)


# --- the command --------------------------------------------------------------------------------


def run_study(plan: Plan, jobs: int = 1) -> list[Record]:
    """Tune where the study tunes, train what is missing, and return the records of all runs, in the plan's order.

    `jobs` processes train at once. A run that fails is kept as failed and the others go on.

    Raises:
        UserError: a record with another config or other data is in the way, a worker died, a cell's trials all failed,
            or results cannot be written.
        KeyboardInterrupt: what is finished is kept; the same call goes on.
    """
    data = {cell.task: load_task(cell.cfg.dataset).fingerprint for cell in plan.cells}
    write_plan(plan.results_dir, plan.as_record())
    plan = replace(plan, cells=tuple(_tuned(cell, jobs) for cell in plan.cells))
    cohorts = _cohorts(plan, data)
    board = StudyBoard({cell.cfg.run_id: cell.name for cell in plan.cells}, plan.seeds, sum(len(c) for c in cohorts))
    for cell in plan.cells:
        for seed in plan.seeds:
            if status_of(cell.cfg, seed, data[cell.task]) == "complete":
                board.there(load_record(_folder(cell, seed)))
    if cohorts:
        with board.live():
            if jobs == 1:
                for cohort in cohorts:
                    train_cohort(cohort, board.hear)
            else:
                _in_processes(cohorts, min(jobs, len(cohorts)), board.hear)
    return [load_record(_folder(cell, seed)) for cell in plan.cells for seed in plan.seeds]


def _folder(cell: Cell, seed: int) -> Path:
    return RunDir(cell.cfg.results_dir, cell.cfg.run_id, seed).path


def _cohorts(plan: Plan, data: Mapping[str, str]) -> list[list[Planned]]:
    """What is missing, as cohorts of one cell's runs: a few seeds of every method, then the next seeds.

    Raises:
        UserError: a finished run has another config or other data.
    """
    at_once = lanes_at_once()
    groups = dict.fromkeys((cell.task, cell.budget) for cell in plan.cells)
    cohorts = []
    for group in groups:
        cells = [cell for cell in plan.cells if (cell.task, cell.budget) == group]
        for start in range(0, len(plan.seeds), at_once):
            for cell in cells:
                missing = []
                for seed in plan.seeds[start : start + at_once]:
                    status = status_of(cell.cfg, seed, data[cell.task])
                    if status == "different":
                        path = _folder(cell, seed)
                        reasons = differences(cell.cfg, load_record(path), data[cell.task])
                        raise UserError(
                            f"{path} holds a finished run of another kind: {'; '.join(reasons)}. "
                            "Set another results_dir, or delete that folder."
                        )
                    if status != "complete":
                        missing.append(seed)
                if missing:
                    cohorts.append(cell.runs(missing))
    return cohorts


def _tuned(cell: Cell, jobs: int) -> Cell:
    """The cell with the best of its trials' values; its search goes on where it was stopped."""
    search = cell.search
    if search is None:
        return cell
    shared = search.shared_study()
    shared.bind(search.identity(load_task(search.base.dataset).fingerprint))
    done = sum(trial.state.is_finished() and counts(trial) for trial in shared.trials())
    if done < search.optuna.n_trials:
        print(f"tuning {cell.name}: {search.optuna.n_trials} trials", flush=True)
        run_search(search.given, jobs)
    best = best_of(shared.trials(), search.optuna.direction)
    if best is None:
        raise UserError(
            f"{cell.name}: none of its trials was completed, see {search.folder / 'trials.csv'}. "
            "Delete that folder to search anew, or leave the method out with methods=."
        )
    return replace(cell, cfg=with_values(cell.cfg, best.params))


# --- several processes --------------------------------------------------------------------------

_events: Any = None  # a worker's way to tell the process that shows


def _begin_worker(events: Any, threads: int, parent: int) -> None:
    import torch

    global _events
    _events = events
    torch.set_num_threads(threads)
    leave_with(parent)


def _train_in_worker(cohort: Sequence[tuple[str, int]]) -> None:
    runs = [Planned(RunConfig.model_validate_json(config), seed) for config, seed in cohort]
    train_cohort(runs, _events.put)


def _in_processes(cohorts: Sequence[Sequence[Planned]], jobs: int, hear: Callable[[Event], object]) -> None:
    """Train each cohort in one of `jobs` processes; the first error ends the others after their cohort."""
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def listen() -> None:
        while (event := events.get()) is not None:
            hear(event)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (events, threads, os.getpid()))
    try:
        plain = [[(run.cfg.model_dump_json(), run.seed) for run in cohort] for cohort in cohorts]
        for future in as_completed([pool.submit(_train_in_worker, cohort) for cohort in plain]):
            future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory?). What is finished is kept; the same command goes on; "
            "a smaller --jobs needs less memory."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        events.put(None)
        listener.join(timeout=10)


# --- how long it will take ----------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What of a cell is there, what is to do, and about how many seconds that takes one process."""

    cell: Cell
    done: int
    runs: int
    trials: int
    seconds: float


def estimate(plan: Plan) -> Iterator[Estimate]:
    """Each cell in turn, its seconds from a few real steps; writes nothing in the results folder."""
    for cell in plan.cells:
        task = load_task(cell.cfg.dataset)
        done = sum(status_of(cell.cfg, seed, None) == "complete" for seed in plan.seeds) if cell.search is None else 0
        trials = 0
        if cell.search is not None:
            # Tuned values are part of a run's config: what is there counts once the tuning is through.
            path = cell.search.folder / "study.db"
            finished = 0
            if path.exists():
                shared = cell.search.shared_study()
                finished = sum(t.state.is_finished() and counts(t) for t in shared.trials())
                if finished >= cell.search.optuna.n_trials:
                    tuned = _tuned(cell, 1)
                    done = sum(status_of(tuned.cfg, seed, task.fingerprint) == "complete" for seed in plan.seeds)
            trials = max(0, cell.search.optuna.n_trials - finished)
        runs = len(plan.seeds) - done
        seconds = 0.0
        if runs or trials:
            seconds = (runs + trials) * _seconds_of_a_run(cell.cfg, len(task.train), plan.seeds[0])
        yield Estimate(cell, done, runs, trials, seconds)


def _seconds_of_a_run(cfg: RunConfig, examples: int, seed: int) -> float:
    """From the same run over a few batches, alone: on a CPU neighbours hardly change its share, on a GPU it is less."""
    training = cfg.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    steps = -(-examples // per_step) * training.epochs
    few = min(examples, _PROBE_STEPS * per_step)
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {
            "results_dir": folder,
            "dataset.train_examples": max(few, 2),
            "training.epochs": 1,
            "training.save_adapter": False,
        }
        fisher = 0
        if cfg.arm == "fw_lora":
            k = cfg.fw_lora.warmup_steps
            fisher = k if isinstance(k, int) else max(1, round(k * steps))
            changes |= {"fw_lora.warmup_steps": 0.5, "fw_lora.start": 0}
        probe = with_values(cfg, changes)
        (record,) = train_cohort([Planned(probe, seed)])
    if record.times is None or record.error is not None:
        message = record.error.message if record.error else "no time was recorded"
        raise UserError(f"{cfg.run_id}: the probe failed: {message}")
    times = record.times
    of_fisher = round(0.5 * record.steps) if fisher else 0
    seconds = times.eval_seconds * training.epochs
    seconds += times.steady_seconds / max(1, record.steps - of_fisher) * (steps - fisher)
    if of_fisher:
        seconds += times.fisher_seconds / of_fisher * fisher
    return seconds
