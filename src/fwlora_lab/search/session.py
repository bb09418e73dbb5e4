"""A search whose study is open: what its workers, its display and its result files have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from fwlora_lab.display.search_progress import SearchStatus, TrialPhase, TrialStatus
from fwlora_lab.search.samplers import make_pruner, make_sampler
from fwlora_lab.search.shared_study import SharedStudy
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.storage import storage_url
from fwlora_lab.search.trials import best_of, cause_of, finished, params_of
from fwlora_lab.training.device import pick_device
from fwlora_lab.training.resources import ResourceCache

_PHASES: dict[TrialState, TrialPhase] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class SearchSession:
    """A search with its study open.

    Attributes:
        spec: what is searched.
        study: the trials, which other processes may share.
        metric: the task's primary metric, which is the score of a trial.
        resources: data, tokens and backbones that this process has loaded.
    """

    spec: SearchSpec
    study: SharedStudy
    metric: str
    resources: ResourceCache

    def best(self) -> FrozenTrial | None:
        """The complete trial with the best score."""
        return best_of(self.study.trials(), self.spec.optuna.direction)

    def missing(self) -> int:
        """How many of the n_trials are not finished."""
        return max(0, self.spec.optuna.n_trials - len(finished(self.study.trials())))

    def status(self) -> SearchStatus:
        """The trials as the display shows them, those that wait or were interrupted left out."""
        trials = self.study.trials()
        best = best_of(trials, self.spec.optuna.direction)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        return SearchStatus(
            running=len(running),
            finished=[_trial_status(trial) for trial in finished(trials)],
            best=None if best is None else _trial_status(best),
        )


def _trial_status(trial: FrozenTrial) -> TrialStatus:
    return TrialStatus(trial.number, _PHASES[trial.state], trial.value, params_of(trial), cause_of(trial))


def open_study(spec: SearchSpec) -> SharedStudy:
    """Connect to the search's study, which is made if it does not exist."""
    return SharedStudy(
        url=storage_url(spec),
        name=spec.cfg.run_id,
        direction=spec.optuna.direction,
        sampler=functools.partial(make_sampler, spec),
        pruner=make_pruner(spec),
    )


def open_session(spec: SearchSpec, resources: ResourceCache | None = None) -> SearchSession:
    """Read the search's data and connect to its study.

    Raises:
        UserError: the data or the storage cannot be used, or the stored study has another space, config or data.
    """
    resources = resources or ResourceCache(pick_device())
    data = resources.task(spec.base.dataset)
    study = open_study(spec)
    study.bind(spec.identity(data.fingerprint))
    return SearchSession(spec, study, data.spec.primary, resources)
