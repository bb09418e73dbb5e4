"""Optuna around `train`: from a run config's search space to its best hyper-parameters.

A trial is scored on the validation split, a part of the training data that it does not train on: dev stays unseen. Its
score is the task's primary metric after the last epoch (not the best of the epochs), the mean over its seeds. Trials
that agree in what lanes must share train side by side on one backbone; the sampler is told of those that run.

results_dir/<run_id>/search/
    study.db          the study, where optuna.storage names no other place
    best.yaml         the best trial as a run config: all training data, scored on dev
    trials.csv        a row for each trial
    importances.csv   the share of the scores' variation that goes with each parameter (PED-ANOVA)
    *.svg             the history, a slice through each parameter, the importances
    trials/           the records of the trials' runs, as `train` writes them
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.data.load import load_task
from fwlora_lab.errors import UserError
from fwlora_lab.search.results import best_of, conclude, write_results
from fwlora_lab.search.spec import Search
from fwlora_lab.search.trials import is_counted
from fwlora_lab.search.watch import SECONDS_BETWEEN_LOOKS, SearchWatch, make_display
from fwlora_lab.search.worker import Interrupts, TrialWorker, run_worker
from fwlora_lab.training.launch import launch


def watch_workers(search: Search, workers: int, launcher: Sequence[str], watch: SearchWatch, stop: Interrupts) -> None:
    """Have the launcher start the workers and show the study while they work."""
    over = threading.Event()

    def show() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(UserError):  # a database that is away for a moment
                watch.look()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        work = functools.partial(run_worker, search.given.model_dump_json())
        launch(work, workers, launcher, search.folder / "workers")
    except UserError:
        raise
    except Exception as error:  # each launcher has words of its own for a worker that was killed
        if stop.asked:  # as by Ctrl-C before it began
            raise KeyboardInterrupt from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"a worker ended before its time: {reason}. What is finished is kept; the same command goes on."
        ) from error
    finally:
        over.set()
        thread.join()


def run_search(cfg: RunConfig, workers: int = 1, launcher: Sequence[str] = ()) -> int:
    """Search until the study has its n_trials and write what was found; returns the exit code.

    With several `workers` a Hydra launcher starts them (`launcher`: the words for it) and this process watches.

    Raises:
        UserError: the config has no search space, data, model or storage cannot be used, or the stored study is
            one of another space, config or data.
        KeyboardInterrupt: somebody stopped it before it was through; what is finished is kept.
    """
    search = Search.of(cfg)
    data = load_task(search.base.dataset)
    shared = search.shared_study()
    shared.bind(search.identity(data.fingerprint))
    with make_display() as progress:
        watch = SearchWatch(shared, search, progress)
        for text in search.notes:
            watch.note(text)
        with Interrupts(watch.note) as stop:
            if workers > 1 or launcher:
                watch_workers(search, workers, launcher, watch, stop)
            else:
                TrialWorker(search, shared, data.spec.primary, watch, stop).work()
            watch.look(at_once=True)
    trials = shared.trials()
    write_results(search, shared, data.spec.primary)
    conclude(search, shared, data.spec.primary, trials)
    left = search.optuna.n_trials - sum(t.state.is_finished() and is_counted(t) for t in trials)
    if left > 0 and stop.asked:
        raise KeyboardInterrupt
    return 0 if best_of(trials, search.optuna.direction) is not None else 1
