"""The command line: `fwlora generate | validate | train | search | compare | report | bench | demo | doctor`.

Whatever a person got wrong ends in one message on standard error and exit code 2, never in a traceback. Exit code
1 says that runs failed, 130 that Ctrl-C stopped the work.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fwlora_lab.errors import UserError

if TYPE_CHECKING:
    from fwlora_lab.records.record import Record
    from fwlora_lab.study.plan import PlannedStudy
    from fwlora_lab.training.jobs import RunSpec

_ABOUT = """\
Train LoRA, AdaLoRA and Fisher-Weighted LoRA side by side, from run configs to records.

Start here:
  fwlora doctor                                 what can be used on this machine
  fwlora demo                                   three methods x three seeds, offline, in minutes
  fwlora train run=minilm-cola-fw_lora dataset.root=DIR_WITH_GLUE
"""
_TRAIN = """\
A run is a YAML file: its id in the packaged tree (see below), in --config-dir, or a path ending in .yaml.
Anything in it can be overridden with Hydra's syntax. Finished runs are kept and not trained twice; the
same command goes on where it was stopped.

  fwlora train run=demo-fw_lora
  fwlora train run=demo-lora,demo-adalora,demo-fw_lora seeds=0..2
  fwlora train run=minilm-cola-fw_lora dataset.root=DIR training.learning_rate=5e-4
  fwlora train -m run=demo-fw_lora fw_lora.lambda_fw=1e-5,1e-4,1e-3
  fwlora train run=my-run.yaml again=true

words of this command (all others are keys of the run config):
  run=ID[,ID...]   the run or runs
  seeds=0..2       training seeds, also 1,5,7; without it the config's training.seed
  again=true       train anew what is there already

packaged runs:
{runs}
"""
_SEARCH = """\
Searches the hyper-parameters that the run config's block `optuna` names, and writes the best as a run config. Trials
are scored on a part of the training data that they do not train on, never on dev.

  fwlora search run=minilm-cola-lora dataset.root=DIR
  fwlora search run=minilm-cola-lora dataset.root=DIR optuna.n_trials=30 optuna.pruner=median
  fwlora search run=my-run.yaml workers=4                           four processes on this machine (joblib)
  fwlora search run=my-run.yaml workers=8 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
  fwlora search run=my-run.yaml optuna.storage=postgresql://USER@HOST/DATABASE      the same on any number of machines

optuna.n_trials is the study's total, whatever the number of workers: the same command goes on where it was stopped,
and with more trials continues the study. The first Ctrl-C finishes the running trials, the second stops at once.

words of this command (all others are keys of the run config):
  run=ID[,ID...]                 the run or runs, searched one after another
  workers=N                      processes that share the study
  hydra/launcher=NAME            what starts them: joblib, submitit_local, submitit_slurm
  hydra.launcher.KEY=VALUE       the launcher's settings
"""
_COMPARE = """\
A study trains methods x budgets x tasks x seeds and ends in a page with verdicts. It can be stopped and started
again: it does only what is missing, and refuses records that were made with another config or other data.

  fwlora compare study=demo
  fwlora compare study=offline dataset.root=DIR_WITH_GLUE --dry-run       the runs, and how long they will take
  fwlora compare study=offline dataset.root=DIR_WITH_GLUE seeds=0..9 --jobs 2
  fwlora compare study=offline dataset.root=DIR_WITH_GLUE tasks=cola methods=lora,fw_lora budgets=0.1,0.2,0.5
  fwlora compare study=my-study.yaml

packaged studies: {studies}

words of this command (all others are keys of the run config, for every run):
  study=NAME                  the study, or a .yaml file like those in the packaged tree conf/study
  seeds=0..9                  training seeds; more of them continue a study
  tasks= methods= budgets=    a part of the study's
  selection.policy=           fixed (the configs' values) or tuned (equally many trials for every method)
  selection.n_trials=N        trials for each method, task and budget
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    # What libraries tell each other about their next versions is not for the reader of this screen.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        return options.command(options)
    except UserError as error:
        print(f"fwlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nfwlora: stopped. Finished runs are kept; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # `fwlora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fwlora", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train runs and write their records",
        usage="fwlora train run=ID[,ID...] [seeds=0..2] [KEY=VALUE ...] [-m] [--config-dir DIR]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.format_help = lambda: _train_help(train)  # type: ignore[method-assign]
    train.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides, as Hydra writes them")
    train.add_argument("-m", "--multirun", action="store_true", help="sweep over KEY=A,B,C")
    train.add_argument("--config-dir", metavar="DIR", help="a tree with run configs of your own")
    train.set_defaults(command=_train)

    search = commands.add_parser(
        "search",
        help="search hyper-parameters with Optuna",
        usage="fwlora search run=ID[,ID...] [optuna.n_trials=N] [workers=N] [KEY=VALUE ...] [--config-dir DIR]",
        description=_SEARCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    search.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides, as Hydra writes them")
    search.add_argument("--config-dir", metavar="DIR", help="a tree with run configs of your own")
    search.set_defaults(command=_search)

    compare = commands.add_parser(
        "compare",
        help="train a study: methods x budgets x tasks x seeds, and judge its claims",
        usage="fwlora compare study=NAME [seeds=0..9] [KEY=VALUE ...] [--jobs N] [--dry-run]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.format_help = lambda: _compare_help(compare)  # type: ignore[method-assign]
    compare.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides, as Hydra writes them")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that train at once (default: 1)")
    compare.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time, train nothing")
    compare.set_defaults(command=_compare)

    validate = commands.add_parser("validate", help="check run configs without training")
    validate.add_argument("files", nargs="+", metavar="FILE", help="YAML files")
    validate.set_defaults(command=_validate)

    generate = commands.add_parser(
        "generate",
        help="write run configs from a design or a written request",
        description="SOURCE is a design file (YAML or JSON, see --schema), a request's prompt text, or an AIRAS "
        "research history (JSON). Every value that the design did not state carries a comment that says where it "
        "came from; contradictions are listed on standard error.",
    )
    generate.add_argument("source", nargs="?", metavar="SOURCE", help="the file to read")
    generate.add_argument("-o", "--out", metavar="DIR", help="write one YAML file a run into DIR, not to the screen")
    generate.add_argument("--json", action="store_true", help="print one JSON object with all run configs")
    generate.add_argument("--check", action="store_true", help="exit with 1, writing nothing, on contradictions")
    generate.add_argument("--schema", action="store_true", help="print the JSON Schema of a design and exit")
    generate.add_argument("--llm", metavar="MODEL", help="let a language model fill what only the prose says")
    generate.add_argument(
        "--base-url", metavar="URL", help="its server, which speaks OpenAI's chat protocol; the key is OPENAI_API_KEY"
    )
    generate.set_defaults(command=_generate)

    report = commands.add_parser(
        "report",
        help="write one page about a folder of results",
        description="Writes RESULTS_DIR/report.html, one file that opens from disk and loads nothing, and beside it "
        "report.md, CSV and LaTeX tables, comparison/aggregated_metrics.json and a model card for each kept adapter. "
        "Reads records only: nothing is trained, and runs that are missing, failed or in training are told.",
    )
    report.add_argument("results_dir", metavar="RESULTS_DIR", help="the results_dir of a study or of runs")
    report.set_defaults(command=_report)

    demo = commands.add_parser(
        "demo",
        help="three methods x three seeds, offline, in minutes",
        description="Trains LoRA, AdaLoRA and FW-LoRA with 3 seeds each on the packaged MiniLM encoder and a small "
        "synthetic task, and ends in a page with verdicts: fwlora compare study=demo. Needs no network.",
    )
    demo.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides, as for compare")
    demo.set_defaults(command=_demo)

    bench = commands.add_parser(
        "bench",
        help="what a step costs: this against PEFT and the Trainer, side by side",
        description="Trains contestants on the same batches, block by block forwards and backwards, and prints the "
        "ratios of their times with intervals. Runs on the GPU where there is one. Needs no network and no data; about "
        "a quarter of an hour, or with --quick three minutes on two cores. Nothing else should run meanwhile.",
    )
    bench.add_argument("--task", choices=("cola", "sst2"), default="cola", help="whose sentence lengths (cola)")
    bench.add_argument(
        "--backbone", choices=("minilm", "roberta-base"), default="minilm", help="roberta-base: its shape"
    )
    bench.add_argument("--threads", metavar="N", help="of the CPU (as many as there are cores)")
    bench.add_argument("--cpu-time", action="store_true", help="of one thread, for a machine that others use meanwhile")
    bench.add_argument("--quick", action="store_true", help="fewer blocks, 4 lanes (16 on a GPU), not PEFT's AdaLoRA")
    bench.add_argument("--profile", action="store_true", help="what a step's time goes into, instead of the ratios")
    bench.add_argument("--json", action="store_true", help="one object a ratio and line; the table goes to stderr")
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser("doctor", help="what is installed and can be used here")
    doctor.set_defaults(command=_doctor)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser, *_) -> None:  # type: ignore[override]
        from importlib.metadata import version

        print(f"fwlora {version('fwlora')}")
        parser.exit()


def _train_help(parser: argparse.ArgumentParser) -> str:
    from fwlora_lab.config.tree import available_runs

    runs = textwrap.indent("\n".join(available_runs()), "  ")
    options = argparse.ArgumentParser.format_help(parser)
    return f"{options}\n{_TRAIN.format(runs=runs)}"


def _own_words(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The words that are a command's own, run= among them; the rest goes to Hydra as it is."""
    own: dict[str, str] = {}
    rest = []
    for word in words:
        key, sign, value = word.partition("=")
        if sign and key in ("run", *names):
            if key in own:
                raise UserError(f"{key}= stands twice: give it once, as in {key}={own[key]},{value}.")
            own[key] = value
        else:
            rest.append(word)
    if not own.get("run"):
        raise UserError("say which run: run=ID. `fwlora train --help` lists the packaged ones.")
    return own, rest


def _split_words(words: Sequence[str]) -> tuple[str, list[int] | None, bool, list[str]]:
    from fwlora_lab.seeds import parse_seeds

    own, rest = _own_words(words, ("seeds", "again"))
    again = own.get("again", "false").lower()
    if again not in ("true", "false"):
        raise UserError(f"again={own['again']}: must be true or false.")
    seeds = parse_seeds(own["seeds"]) if "seeds" in own else None
    return own["run"], seeds, again == "true", rest


def _train(options: argparse.Namespace) -> int:
    from fwlora_lab.config.load import expand_runs

    run, seeds, again, overrides = _split_words(options.words)
    configs = expand_runs(run, overrides, multirun=options.multirun, config_dir=options.config_dir)
    from fwlora_lab.training.jobs import RunSpec  # torch and all: only once the words are right

    return _train_and_tell([RunSpec(cfg, s) for cfg in configs for s in (seeds or [cfg.training.seed])], again)


def _train_and_tell(runs: Sequence[RunSpec], again: bool) -> int:
    from fwlora_lab.display.progress import show, summary
    from fwlora_lab.training.scheduler import train_runs

    with show(len(runs)) as listen:
        records = train_runs(runs, listen, overwrite=again)
    print(summary(records))
    return _tell_failures(records)


def _tell_failures(records: Sequence[Record]) -> int:
    failed = [r for r in records if r.status == "failed"]
    for record in failed:
        assert record.error is not None
        print(
            f"fwlora: {record.run_id} seed {record.seed} failed: {record.error.message}\n"
            f"  the traceback is in {_folder(record)}/record.json",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _folder(record: Record) -> str:
    return f"{record.config['results_dir']}/{record.run_id}/seed-{record.seed}"


def _search(options: argparse.Namespace) -> int:
    from fwlora_lab.config.load import expand_runs

    own, rest = _own_words(options.words, ("workers",))
    launcher = [word for word in rest if word.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher."))]
    if not own.get("workers", "1").isdecimal() or int(own.get("workers", "1")) < 1:
        raise UserError(f"workers={own['workers']}: must be a whole number from 1 on.")
    if launcher and "workers" not in own:
        raise UserError(f"{launcher[0]}: say how many workers it is to start, as in workers=4.")
    rest = [word for word in rest if word not in launcher]
    configs = expand_runs(own["run"], rest, config_dir=options.config_dir)
    try:
        from fwlora_lab.search.run import run_search
    except ModuleNotFoundError as error:
        raise UserError(f"search needs the package {error.name}: pip install 'fwlora[lab]'") from error

    return max([run_search(cfg, int(own.get("workers", "1")), launcher) for cfg in configs])


def _compare_help(parser: argparse.ArgumentParser) -> str:
    from fwlora_lab.study.spec import available_studies

    return f"{argparse.ArgumentParser.format_help(parser)}\n{_COMPARE.format(studies=', '.join(available_studies()))}"


def _compare(options: argparse.Namespace) -> int:
    from fwlora_lab.study.plan import plan_study, read_words

    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: must be 1 or more.")
    plan = plan_study(read_words(options.words))
    return _dry_run(plan) if options.dry_run else _study(plan, options.jobs)


def _study(plan: PlannedStudy, jobs: int) -> int:
    from fwlora_lab.report.page import write_report
    from fwlora_lab.study.run import run_study

    records = run_study(plan, jobs)
    print(f"the page: {write_report(plan.results_dir)}")
    return _tell_failures(records)


def _dry_run(plan: PlannedStudy) -> int:
    from fwlora_lab.study.estimate import estimate

    total = 0.0
    for row in estimate(plan):
        tuning = f"{row.trials} trials, " if row.trials else ""
        there = f" ({row.done} are there)" if row.done else ""
        print(f"{row.cell.name:32s} {tuning}{row.runs} runs{there}: about {row.seconds / 60:.1f} min", flush=True)
        total += row.seconds
    print(
        f"about {total / 60:.0f} minutes in one process, seeds {', '.join(map(str, plan.seeds))}; nothing was trained"
    )
    return 0


def _validate(options: argparse.Namespace) -> int:
    from fwlora_lab.config.load import validate_file

    wrong = 0
    for file in options.files:
        try:
            remarks = validate_file(file)
        except UserError as error:
            wrong += 1
            print(f"fwlora: {error}", file=sys.stderr)
        else:
            print(f"{file}: valid")
            for remark in remarks:
                print(f"  warning: {remark}")
    return 2 if wrong else 0


def _generate(options: argparse.Namespace) -> int:
    from fwlora_lab.design.generate import generate
    from fwlora_lab.design.read import read_request
    from fwlora_lab.design.schema import design_schema

    if options.schema:
        print(design_schema())
        return 0
    if options.source is None:
        raise UserError("say what to read: fwlora generate SOURCE; `fwlora generate --help` says which files it knows.")
    read = read_request
    if options.llm is not None:
        from fwlora_lab.design.llm import read_filled

        read = functools.partial(read_filled, model=options.llm, base_url=options.base_url)
    elif options.base_url is not None:
        raise UserError("--base-url is the server of a language model: say which one with --llm MODEL.")
    return generate(options.source, options.out, options.json, options.check, read)


def _report(options: argparse.Namespace) -> int:
    try:
        from fwlora_lab.report.page import write_report
    except ModuleNotFoundError as error:
        raise UserError(f"report needs the package {error.name}: pip install 'fwlora[lab]'") from error

    print(f"report: {write_report(options.results_dir)}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from fwlora_lab.study.plan import plan_study, read_words

    # On a few cores two processes of one thread do more than one of two.
    return _study(plan_study(read_words(["study=demo", *options.words])), jobs=min(2, os.cpu_count() or 1))


def _bench(options: argparse.Namespace) -> int:
    threads = options.threads
    cores = os.cpu_count() or 1
    if threads is not None and not (threads.isdecimal() and 0 < int(threads) <= cores):
        raise UserError(f"--threads {threads}: must be a whole number from 1 to {cores}, the cores of this machine.")
    from fwlora_lab.bench.run import bench

    threads = int(threads) if threads else None
    return bench(
        options.task, options.backbone, threads, options.quick, options.cpu_time, options.json, options.profile
    )


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from fwlora_lab.cli.doctor import doctor_lines

    table = Table(box=None, show_header=False, pad_edge=False)
    colour = {"ok": "green", "warn": "yellow", "no": "red"}
    for status, what, detail in doctor_lines():
        table.add_row(f"[{colour[status]}]{status}[/]", what, detail)
    Console(highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
