"""The files that a search leaves (best.yaml, tables, plots) and the summary that it prints."""

from __future__ import annotations

import io
import shlex
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from fwlora_lab.config.former_names import present_key, stored_key
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.files import csv_text, write_atomic
from fwlora_lab.records.folder import ADVICE
from fwlora_lab.search.session import SearchSession
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.storage import redacted
from fwlora_lab.search.trials import SCORES, best_of, cause_of, finished, is_counted, params_of


def best_config(spec: SearchSpec, trial: FrozenTrial) -> RunConfig:
    """The run config that a trial recommends: it trains on all training data and is scored on dev."""
    changes = {
        "run_id": f"{spec.cfg.run_id}-best",
        "dataset.validation_fraction": 0.0,
        "training.evaluate_on": "dev",
        "optuna": None,
    }
    return with_values(spec.cfg, params_of(trial) | changes)


def print_summary(session: SearchSession, trials: Sequence[FrozenTrial]) -> None:
    """Print how many trials ended in which way, the best one, and what to do next."""
    spec = session.spec
    done = finished(trials)
    failed = [t for t in done if t.state == TrialState.FAIL]
    pruned = sum(t.state == TrialState.PRUNED for t in done)
    print(
        f"{len(done)} of {spec.optuna.n_trials} trials: {len(done) - pruned - len(failed)} complete, "
        f"{pruned} pruned, {len(failed)} failed"
    )
    best = best_of(trials, spec.optuna.direction)
    if best is not None:
        score = f"{session.metric} {best.value:.4f}"
        print(f"best: trial {best.number}, {score} on the validation split, after the last epoch")
        for key, value in params_of(best).items():
            print(f"  {key} = {value}")
        fresh = max(spec.seeds) + 1
        words = ["fwlora", "train", f"run={spec.folder / 'best.yaml'}", f"seeds={fresh}..{fresh + 2}"]
        print(f"train it: {shlex.join(words)}")
    print(f"results: {spec.folder}")
    print(f"see the study: optuna-dashboard {shlex.quote(redacted(session.study.url))}")
    for trial in failed[:3] if best is None else ():
        print(f"fwlora: trial {trial.number} failed: {cause_of(trial)}", file=sys.stderr)


def write_results(session: SearchSession, trials: Sequence[FrozenTrial]) -> None:
    """Write trials.csv and, if a trial is complete, best.yaml, importances.csv and the plots."""
    folder = session.spec.folder
    best = best_of(trials, session.spec.optuna.direction)
    write_atomic(folder / "trials.csv", _trials_csv(session, trials), ADVICE)
    if best is None:
        return
    recommended = to_yaml(best_config(session.spec, best))
    write_atomic(folder / "best.yaml", _best_header(session, best, trials) + recommended, ADVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # matplotlib warns so about a slice through a parameter that had one value.
        warnings.filterwarnings("ignore", message="Attempting to set identical low and high")
        importances = _importances(session.study.study)
        if importances:
            rows = [
                ["parameter", "importance"],
                *([present_key(key), f"{value:.6g}"] for key, value in importances.items()),
            ]
            write_atomic(folder / "importances.csv", csv_text(rows), ADVICE)
        _plot(session, with_importances=bool(importances))


def _best_header(session: SearchSession, best: FrozenTrial, trials: Sequence[FrozenTrial]) -> str:
    spec = session.spec
    fraction = spec.base.dataset.validation_fraction
    lines = [
        f"The best of {len(finished(trials))} trials of the search around {spec.cfg.run_id}, "
        f"found {datetime.now(UTC):%Y-%m-%d}:",
        f"trial {best.number}, {session.metric} {best.value:.6g} ({spec.optuna.direction}), the mean over seeds "
        f"{', '.join(map(str, spec.seeds))} after the last epoch,",
        f"on a validation split of {fraction:g} of the training data. Dev was not looked at. This config trains on all",
        "training data and is scored on dev: report it with seeds that the search did not use.",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _trials_csv(session: SearchSession, trials: Sequence[FrozenTrial]) -> str:
    keys, seeds = list(session.spec.dimensions), session.spec.seeds
    seed_columns = [f"seed {seed}" for seed in seeds]
    rows: list[list[Any]] = [["trial", "state", session.metric, *seed_columns, *keys, "epochs", "seconds", "cause"]]
    for t in trials:
        scores = t.user_attrs.get(SCORES, [None] * len(seeds))
        seconds = None if t.duration is None else round(t.duration.total_seconds(), 1)
        state = t.state.name.lower() if is_counted(t) else "interrupted"
        values = [t.params.get(stored_key(key)) for key in keys]
        rows.append([t.number, state, t.value, *scores, *values, len(t.intermediate_values), seconds, cause_of(t)])
    return csv_text(rows)


def _importances(study: optuna.Study) -> dict[str, float]:
    """Each parameter's importance for the score (PED-ANOVA); empty if there are too few trials."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Parameter importances will be equal")
        try:
            return optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError, UserWarning):
            return {}


def _plot(session: SearchSession, with_importances: bool) -> None:
    """Draw the history of scores, a slice through each parameter, and the importances."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as optuna_plots

    study = session.study.study
    plots = {"history": optuna_plots.plot_optimization_history, "slices": optuna_plots.plot_slice}
    if with_importances:
        plots["importances"] = optuna_plots.plot_param_importances
    with plt.rc_context({"svg.hashsalt": "fwlora"}):
        for name, draw in plots.items():
            axes = draw(study) if name == "importances" else draw(study, target_name=session.metric)
            figure = axes.figure if hasattr(axes, "figure") else axes.flat[0].figure
            file = io.StringIO()
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            write_atomic(session.spec.folder / f"{name}.svg", file.getvalue(), ADVICE)
