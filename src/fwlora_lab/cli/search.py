"""`fwlora search`: search hyper-parameters with Optuna."""

from __future__ import annotations

from fwlora_lab.cli.grammar import CONFIG_DIR, WORKERS, Argument, Arguments, Command
from fwlora_lab.cli.train import RUN, named_run, packaged_runs
from fwlora_lab.errors import UserError

_LAUNCHER = "hydra/launcher"
_LAUNCHER_OVERRIDES = (f"{_LAUNCHER}=", "hydra.launcher.")


def _run(arguments: Arguments) -> int:
    run = named_run(arguments)
    workers = arguments.whole_number("workers", 1)
    launcher = [word for word in arguments.overrides if word.lstrip("+").startswith(_LAUNCHER_OVERRIDES)]
    overrides = [word for word in arguments.overrides if word not in launcher]
    if (name := arguments.get(_LAUNCHER)) is not None:
        launcher.insert(0, f"{_LAUNCHER}={name}")
    if launcher and arguments.get("workers") is None:
        raise UserError(f"{launcher[0]}: say how many workers it is to start, as in workers=4.")
    from fwlora_lab.config.load import expand_runs

    configs = expand_runs(run, overrides, config_dir=arguments.get("config_dir"))
    from fwlora_lab.search.run import run_search

    return max([run_search(cfg, workers, launcher) for cfg in configs])


COMMAND = Command(
    name="search",
    summary="search hyper-parameters with Optuna",
    description="Searches the hyper-parameters that the run config's block `optuna` names, and writes the best as a "
    "run config. Trials are scored on a part of the training data that they do not train on, never on dev.\n\n"
    "optuna.n_trials is the search's total, whatever the number of workers: the same command goes on where it was "
    "stopped, and with more trials continues the search. The first Ctrl-C finishes the running trials, the second "
    "stops at once.",
    run=_run,
    arguments=(
        RUN,
        WORKERS,
        Argument(_LAUNCHER, "what starts the workers: joblib, submitit_local, submitit_slurm", "NAME"),
        CONFIG_DIR,
    ),
    overrides=True,
    examples=(
        ("search run=minilm-cola-lora dataset.root=DIR", ""),
        ("search run=minilm-cola-lora dataset.root=DIR optuna.n_trials=30 optuna.pruner=median", ""),
        ("search run=my-run.yaml workers=4", "four processes on this machine (joblib)"),
        (
            "search run=my-run.yaml workers=8 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu",
            "eight jobs of a SLURM cluster; hydra.launcher.KEY=VALUE are the launcher's settings",
        ),
        (
            "search run=my-run.yaml optuna.storage=postgresql://USER@HOST/DATABASE",
            "the same search on any number of machines",
        ),
    ),
    more=packaged_runs,
)
