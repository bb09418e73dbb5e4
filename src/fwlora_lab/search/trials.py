"""Facts about the trials of a search as Optuna stores them: which count, why one failed, and which is best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from optuna.trial import FrozenTrial, Trial, TrialState

from fwlora_lab.config.former_names import present_key

Direction = Literal["maximize", "minimize"]
MAX_RETRIES = 2  # of a trial whose worker died: the third time the trial itself may be what kills workers
# Attributes of a stored trial. Studies on disk hold these names: do not change them.
SCORES = "scores"  # one for each seed
CAUSE = "cause"
REQUEUED = "handed_back"
EARLIER = "earlier_attempts"  # the numbers of the requeued trials that this one tries again


def cause_of(trial: FrozenTrial) -> str | None:
    """Why a trial failed; None if it did not fail, or was only interrupted and is tried again."""
    if trial.state != TrialState.FAIL or REQUEUED in trial.user_attrs:
        return None
    if CAUSE in trial.user_attrs:
        return trial.user_attrs[CAUSE]
    if len(trial.system_attrs.get("retry_history", [])) >= MAX_RETRIES:  # written by RetryHeartbeatStaleTrialCallback
        return f"its worker died {MAX_RETRIES + 1} times in this trial"
    return None


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the n_trials: an interrupted one is not, the one that tries it again is."""
    return trial.state != TrialState.FAIL or cause_of(trial) is not None


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The counted trials that are complete, pruned or failed."""
    return [trial for trial in trials if trial.state.is_finished() and is_counted(trial)]


def best_of(trials: Sequence[FrozenTrial], direction: Direction) -> FrozenTrial | None:
    """The complete trial with the best score, the earliest of equals; None if no trial is complete."""
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    sign = 1 if direction == "maximize" else -1
    return max(done, key=lambda t: (sign * t.values[0], -t.number), default=None)


def earlier_attempts(trial: FrozenTrial) -> list[int]:
    """The numbers of the trials that this one tries again, the latest first: stopped, or of a worker that died."""
    of_dead_workers = trial.system_attrs.get("retry_history", [])  # written by RetryHeartbeatStaleTrialCallback
    return sorted({*trial.user_attrs.get(EARLIER, []), *of_dead_workers}, reverse=True)


def params_of(trial: FrozenTrial | Trial) -> dict[str, Any]:
    """A trial's values by the run config's present keys, whatever the storage calls them."""
    return {present_key(name): value for name, value in trial.params.items()}
