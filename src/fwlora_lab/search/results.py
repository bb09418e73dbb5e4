"""TODO"""

from __future__ import annotations

import csv
import io
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from fwlora_lab.config.former_names import stored_key
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.files import write_atomic
from fwlora_lab.records.folder import ADVICE
from fwlora_lab.search.spec import Search
from fwlora_lab.search.trials import SCORES, SharedStudy, cause_of, is_counted, params_of, redacted


def best_of(trials: Sequence[FrozenTrial], direction: str) -> FrozenTrial | None:
    """The complete trial with the best score, the earliest of equals; None where none is complete."""
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    sign = 1 if direction == "maximize" else -1
    return max(done, key=lambda t: (sign * t.values[0], -t.number), default=None)


def best_config(search: Search, trial: FrozenTrial) -> RunConfig:
    """The run config that a trial recommends: all training data again, scored on dev."""
    back = {
        "run_id": f"{search.given.run_id}-best",
        "dataset.validation_fraction": 0.0,
        "training.evaluate_on": "dev",
        "optuna": None,
    }
    return with_values(search.given, params_of(trial) | back)


def conclude(search: Search, shared: SharedStudy, metric: str, trials: Sequence[FrozenTrial]) -> None:
    done = [t for t in trials if t.state.is_finished() and is_counted(t)]
    failed = [t for t in done if t.state == TrialState.FAIL]
    pruned = sum(t.state == TrialState.PRUNED for t in done)
    print(f"{len(done)} of {search.optuna.n_trials} trials: {len(done) - pruned - len(failed)} complete, ", end="")
    print(f"{pruned} pruned, {len(failed)} failed")
    best = best_of(trials, search.optuna.direction)
    if best is not None:
        print(f"best: trial {best.number}, {metric} {best.value:.4f} on the validation split, after the last epoch")
        for key, value in params_of(best).items():
            print(f"  {key} = {value}")
        fresh = max(search.seeds) + 1
        print(f"train it: fwlora train run={search.folder / 'best.yaml'} seeds={fresh}..{fresh + 2}")
    print(f"results: {search.folder}")
    print(f"see the study: optuna-dashboard {redacted(shared.url)}")
    for trial in failed[:3] if best is None else ():
        print(f"fwlora: trial {trial.number} failed: {cause_of(trial)}", file=sys.stderr)


def write_results(search: Search, shared: SharedStudy, metric: str) -> None:
    """Write best.yaml, the tables and the plots of a study as it stands."""
    trials = shared.trials()
    best = best_of(trials, search.optuna.direction)
    write_atomic(search.folder / "trials.csv", _table(search, trials, metric), ADVICE)
    if best is None:
        return
    write_atomic(
        search.folder / "best.yaml", _header(search, best, trials, metric) + to_yaml(best_config(search, best)), ADVICE
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A slice through a parameter that had one value.
        warnings.filterwarnings("ignore", message="Attempting to set identical low and high")
        importances = _importances(shared.study)
        if importances:
            rows = [["parameter", "importance"], *([key, f"{value:.6g}"] for key, value in importances.items())]
            write_atomic(search.folder / "importances.csv", _csv(rows), ADVICE)
        _plot(search, shared.study, metric, with_importances=bool(importances))


def _header(search: Search, best: FrozenTrial, trials: Sequence[FrozenTrial], metric: str) -> str:
    fraction, direction = search.base.dataset.validation_fraction, search.optuna.direction
    done = sum(t.state.is_finished() and is_counted(t) for t in trials)
    lines = [
        f"The best of {done} trials of the search around {search.given.run_id}, found {datetime.now(UTC):%Y-%m-%d}:",
        f"trial {best.number}, {metric} {best.value:.6g} ({direction}), the mean over seeds "
        f"{', '.join(map(str, search.seeds))} after the last epoch,",
        f"on a validation split of {fraction:g} of the training data. Dev was not looked at. This config trains on all",
        "training data and is scored on dev: report it with seeds that the search did not use.",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _table(search: Search, trials: Sequence[FrozenTrial], metric: str) -> str:
    keys = list(search.dimensions)
    rows: list[list[Any]] = [
        ["trial", "state", metric, *(f"seed {s}" for s in search.seeds), *keys, "epochs", "seconds", "cause"]
    ]
    for t in trials:
        scores = t.user_attrs.get(SCORES, [None] * len(search.seeds))
        seconds = None if t.duration is None else round(t.duration.total_seconds(), 1)
        state = t.state.name.lower() if is_counted(t) else "interrupted"
        values = [t.params.get(stored_key(key)) for key in keys]
        rows.append([t.number, state, t.value, *scores, *values, len(t.intermediate_values), seconds, cause_of(t)])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _importances(study: optuna.Study) -> dict[str, float]:
    """Empty where there are too few trials to tell."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Parameter importances will be equal")
        try:
            return optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError, UserWarning):
            return {}


def _plot(search: Search, study: optuna.Study, metric: str, with_importances: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as drawings

    plots = {"history": drawings.plot_optimization_history, "slices": drawings.plot_slice}
    if with_importances:
        plots["importances"] = drawings.plot_param_importances
    with plt.rc_context({"svg.hashsalt": "fwlora"}):
        for name, draw in plots.items():
            axes = draw(study) if name == "importances" else draw(study, target_name=metric)
            figure = axes.figure if hasattr(axes, "figure") else axes.flat[0].figure
            file = io.StringIO()
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            write_atomic(search.folder / f"{name}.svg", file.getvalue(), ADVICE)
