"""`fwlora compare`: train a study and judge its claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwlora_lab.cli.grammar import WORKERS, Argument, Arguments, Command
from fwlora_lab.cli.train import report_failures
from fwlora_lab.config.tree import available_studies

if TYPE_CHECKING:
    from fwlora_lab.study.plan import PlannedStudy

STUDY_ARGUMENTS = (
    Argument("seeds", "training seeds; more of them continue a study", "0..9"),
    Argument("tasks", "a part of the study's tasks", "NAME[,NAME...]"),
    Argument("methods", "a part of the study's methods", "NAME[,NAME...]"),
    Argument("budgets", "percents of the encoder's parameters, in place of the study's", "X[,X...]"),
    Argument("timing", "exclusive trains one run at a time, alone, which claims about seconds need", "TIMING"),
    Argument(
        "selection.policy",
        "how hyper-parameters are chosen: fixed (the configs' values) or tuned (equally many trials for every method)",
        "POLICY",
    ),
    Argument("selection.n_trials", "trials for each method, task and budget", "N"),
)


def run_planned(plan: PlannedStudy, workers: int) -> int:
    """Train what is missing, write the page and say which runs failed; the exit code."""
    from fwlora_lab.report.page import write_report
    from fwlora_lab.study.run import run_study

    records = run_study(plan, workers=workers)
    print(f"the page: {write_report(plan.results_dir)}")
    return report_failures(records)


def study_words(arguments: Arguments) -> list[str]:
    """The arguments that a study reads, as it reads them, and the overrides."""
    own = [f"{name}={value}" for name, value in arguments.values.items() if name not in ("workers", "dry_run")]
    return [*own, *arguments.overrides]


def _run(arguments: Arguments) -> int:
    workers = arguments.whole_number("workers", 1)
    from fwlora_lab.study.plan import parse_request, plan_study

    plan = plan_study(parse_request(study_words(arguments)))
    plan.check_workers(workers)
    return _dry_run(plan) if arguments.switch("dry_run") else run_planned(plan, workers)


def _dry_run(plan: PlannedStudy) -> int:
    """List the runs and estimate their time."""
    from fwlora_lab.study.estimate import dry_run_lines

    for line in dry_run_lines(plan):
        print(line, flush=True)
    return 0


def _packaged_studies() -> str:
    return f"packaged studies: {', '.join(available_studies())}"


COMMAND = Command(
    name="compare",
    summary="train a study (methods x budgets x tasks x seeds) and judge its claims",
    description="A study trains methods x budgets x tasks x seeds and ends in a page with verdicts. It can be stopped "
    "and started again: it does only what is missing, and refuses records that were made with another config or other "
    "data.",
    run=_run,
    arguments=(
        Argument("study", "the study, or a .yaml file like those in the packaged tree conf/study", "NAME"),
        *STUDY_ARGUMENTS,
        WORKERS,
        Argument("dry_run", "list the runs and estimate their time; train nothing"),
    ),
    overrides=True,
    examples=(
        ("compare study=demo", ""),
        ("compare study=offline dataset.root=DIR_WITH_GLUE --dry-run", "the runs, and how long they will take"),
        ("compare study=offline dataset.root=DIR_WITH_GLUE seeds=0..9 workers=2", ""),
        ("compare study=offline dataset.root=DIR tasks=cola methods=lora,fw_lora budgets=0.1", ""),
        ("compare study=my-study.yaml", ""),
    ),
    more=_packaged_studies,
)
