"""`fwlora demo`: three methods x three seeds, offline, in minutes."""

from __future__ import annotations

from fwlora_lab.cli.compare import STUDY_ARGUMENTS, run_planned, study_words
from fwlora_lab.cli.grammar import WORKERS, Arguments, Command, cpu_cores


def _run(arguments: Arguments) -> int:
    # On a few cores two processes of one thread do more than one of two.
    alone = arguments.get("timing") == "exclusive"
    workers = arguments.whole_number("workers", 1 if alone else min(2, cpu_cores()))
    from fwlora_lab.study.plan import parse_request, plan_study

    return run_planned(plan_study(parse_request(["study=demo", *study_words(arguments)])), workers)


COMMAND = Command(
    name="demo",
    summary="three methods x three seeds, offline, in minutes",
    description="Trains LoRA, AdaLoRA and FW-LoRA with 3 seeds each on the packaged MiniLM encoder and a small "
    "synthetic task, and ends in a page with verdicts: fwlora compare study=demo. Needs no network.",
    run=_run,
    arguments=(*STUDY_ARGUMENTS, WORKERS),
    overrides=True,
    examples=(("demo", ""), ("demo seeds=0..5 results_dir=results/my-demo", "")),
)
