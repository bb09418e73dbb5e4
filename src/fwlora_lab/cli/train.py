"""`fwlora train`: train runs and write their records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fwlora_lab.cli.grammar import CONFIG_DIR, Argument, Arguments, Command
from fwlora_lab.config.tree import available_runs
from fwlora_lab.errors import UserError
from fwlora_lab.seeds import parse_seeds

if TYPE_CHECKING:
    from fwlora_lab.records.record import Record

RUN = Argument("run", "the run or runs", "ID[,ID...]")


def named_run(arguments: Arguments) -> str:
    """The value of run=.

    Raises:
        UserError: it is missing.
    """
    run = arguments.get("run")
    if run is None:
        raise UserError("say which run: run=ID. `fwlora train --help` lists the packaged ones.")
    return run


def packaged_runs() -> str:
    """The ids of the packaged runs, for the help."""
    return "\n".join(["packaged runs:", *(f"  {run}" for run in available_runs())])


def report_failures(records: Sequence[Record]) -> int:
    """Say which runs failed and where their tracebacks are; the exit code."""
    failed = [r for r in records if r.status == "failed"]
    for record in failed:
        assert record.error is not None
        folder = f"{record.config['results_dir']}/{record.run_id}/seed-{record.seed}"
        print(
            f"fwlora: {record.run_id} seed {record.seed} failed: {record.error.message}\n"
            f"  the traceback is in {folder}/record.json",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _run(arguments: Arguments) -> int:
    run = named_run(arguments)
    given = arguments.get("seeds")
    seeds = None if given is None else parse_seeds(given)
    from fwlora_lab.config.load import expand_runs

    configs = expand_runs(
        run, arguments.overrides, multirun=arguments.switch("multirun"), config_dir=arguments.get("config_dir")
    )
    # torch and all of transformers: only once the words are right
    from fwlora_lab.display.progress import show, summary
    from fwlora_lab.training.jobs import RunSpec
    from fwlora_lab.training.scheduler import train_runs

    runs = [RunSpec(cfg, seed) for cfg in configs for seed in (seeds or [cfg.training.seed])]
    with show(len(runs)) as on_event:
        records = train_runs(runs, on_event, overwrite=arguments.switch("overwrite"))
    print(summary(records))
    return report_failures(records)


COMMAND = Command(
    name="train",
    summary="train runs and write their records",
    description="A run is a YAML file: its id in the packaged tree (see below), in config_dir, or a path ending in "
    ".yaml. Anything in it can be overridden with Hydra's syntax. Finished runs are kept and not trained twice; the "
    "same command does what is missing.",
    run=_run,
    arguments=(
        RUN,
        Argument("seeds", "training seeds, also 1,5,7; without it the config's training.seed", "0..2"),
        Argument("overwrite", "train again what is there already", also=("again",)),
        Argument("multirun", "sweep over KEY=A,B,C", short="m"),
        CONFIG_DIR,
    ),
    overrides=True,
    examples=(
        ("train run=demo-fw_lora", ""),
        ("train run=demo-lora,demo-adalora,demo-fw_lora seeds=0..2", ""),
        ("train run=minilm-cola-fw_lora dataset.root=DIR training.learning_rate=5e-4", ""),
        ("train -m run=demo-fw_lora fw_lora.penalty_strength=1e-5,1e-4,1e-3", ""),
        ("train run=my-run.yaml --overwrite", ""),
    ),
    more=packaged_runs,
)
