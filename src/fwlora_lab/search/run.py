"""Search the hyper-parameters of a run config with Optuna, from its search space to its best values.

A trial is scored on the validation split, a part of the training data that it does not train on; dev is never looked
at. Its score is the task's primary metric after the last epoch (not the best of the epochs), the mean over its seeds.
Trials whose configs allow it share one backbone in the lane engine; the sampler knows which trials are running.

results_dir/<run_id>/search/
    study.db          the study, unless optuna.storage names another database
    best.yaml         the best trial as a run config: all training data, scored on dev
    trials.csv        a row for each trial
    importances.csv   the share of the scores' variation that each parameter explains (PED-ANOVA)
    *.svg             the history, a slice through each parameter, the importances
    trials/           the records of the trials' runs, as `train` writes them
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.display.search_progress import SECONDS_BETWEEN_UPDATES, SearchProgress, search_display
from fwlora_lab.errors import UserError
from fwlora_lab.search.interrupts import Interrupts
from fwlora_lab.search.results import print_summary, write_results
from fwlora_lab.search.session import SearchSession, open_session
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.storage import ENVIRONMENT
from fwlora_lab.search.trials import best_of, finished
from fwlora_lab.search.worker import TrialWorker, run_worker
from fwlora_lab.text import without_secrets
from fwlora_lab.training.launch import launch


def run_search(cfg: RunConfig, workers: int = 1, launcher: Sequence[str] = ()) -> int:
    """Search a run config's space until the study has its n_trials, and write the results; returns the exit code.

    Args:
        workers: how many processes train trials. Several are started by a Hydra launcher.
        launcher: Hydra's overrides that choose and set up the launcher; default: joblib.

    Raises:
        UserError: the config has no search space, its data, model or storage cannot be used, or the stored study has
            another space, config or data.
        KeyboardInterrupt: the user stopped the search before its last trial; finished trials are kept.
    """
    return run_session(open_session(SearchSpec.of(cfg)), workers, launcher)


def run_session(session: SearchSession, workers: int = 1, launcher: Sequence[str] = ()) -> int:
    """The same for a search whose study is open already."""
    spec = session.spec
    with search_display() as bar:
        progress = SearchProgress(spec.cfg.run_id, spec.optuna.n_trials, session.status, bar)
        for text in spec.notes:
            progress.note(text)
        with Interrupts(progress.note) as interrupts:
            if workers > 1 or launcher:
                _launch_workers(spec, workers, launcher, progress, interrupts)
            else:
                TrialWorker(session, progress, interrupts).work()
            progress.update(force=True)
    trials = session.study.trials()
    write_results(session, trials)
    print_summary(session, trials)
    if interrupts.stop_requested and len(finished(trials)) < spec.optuna.n_trials:
        raise KeyboardInterrupt
    return 0 if best_of(trials, spec.optuna.direction) is not None else 1


def _launch_workers(
    spec: SearchSpec, workers: int, launcher: Sequence[str], progress: SearchProgress, interrupts: Interrupts
) -> None:
    """Let the launcher start the workers, and show the study's progress until they end.

    Raises:
        UserError: a launcher that writes the workers' settings to files would write the storage's password there.
    """
    on_this_machine = not any(
        word.startswith("hydra/launcher=") and word != "hydra/launcher=joblib" for word in launcher
    )
    if not on_this_machine and spec.optuna.storage and spec.optuna.storage != without_secrets(spec.optuna.storage):
        raise UserError(
            f"optuna.storage={without_secrets(spec.optuna.storage)}: this launcher would write the password to its "
            f"files. Set the environment's {ENVIRONMENT} to the URL, and leave optuna.storage out."
        )
    done = threading.Event()

    def show() -> None:
        while not done.wait(SECONDS_BETWEEN_UPDATES):
            with contextlib.suppress(UserError):  # the database may be unreachable for a moment
                progress.update()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        launch(functools.partial(run_worker, spec), workers, launcher, spec.folder / "workers")
    except UserError:
        raise
    except Exception as error:  # each launcher has its own exception for a worker that was killed
        if interrupts.stop_requested:  # as by Ctrl-C before the worker began
            raise KeyboardInterrupt from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"a worker process ended early: {reason}. Finished trials are kept; run the same command again to continue."
        ) from error
    finally:
        done.set()
        thread.join()
