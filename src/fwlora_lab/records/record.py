"""The record of one run: what was trained, on what, and what came out, as it is written to record.json."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from fwlora_lab.records.former_format import from_version_0_1

SCHEMA_VERSION = 1
Engine = Literal["lanes", "peft"]
Status = Literal["missing", "complete", "failed", "different"]


class RecordBlock(BaseModel):
    """Base of everything in a results folder's JSON files: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Failure(RecordBlock):
    """The exception that ended a run."""

    type: str
    message: str
    traceback: str


class Machine(RecordBlock):
    """The machine that a run was trained on.

    Attributes:
        cpu: the processor's name.
        cores: logical cores of the machine.
        threads: threads that the run's process computed with.
        device: the accelerator's name, or "cpu".
        precision: of the frozen encoder's computations.
    """

    cpu: str
    cores: int
    threads: int
    device: str
    precision: Literal["fp32", "bf16"] = "fp32"


class BackboneInfo(RecordBlock):
    """The pretrained encoder.

    Attributes:
        source: where its files came from.
        commit: the hub's commit; None for an encoder from a folder or the package.
        weights: sha256 of the files of an encoder from a folder or a package; None for one of the hub, and in records
            from before it was written.
        parameters: how many it has, all frozen.
    """

    name: str
    source: str
    commit: str | None
    parameters: int
    weights: str | None = None


class Parameters(RecordBlock):
    """Numbers of trainable parameters, asked for and used.

    Attributes:
        asked_percent: the budget in percent of the backbone's parameters; None if the config gives a rank.
        backbone: frozen parameters.
        adapters: adapter parameters at the end of the run.
        adapters_trained: the most that were trained at any time; AdaLoRA starts with more than it keeps.
        head: parameters of the classification head, which are not part of `adapters`.
        percent: 100 · adapters / backbone.
    """

    asked_percent: float | None
    backbone: int
    adapters: int
    adapters_trained: int
    head: int
    percent: float


class Epoch(RecordBlock):
    """The state at the end of one epoch.

    Attributes:
        epoch: counted from 1.
        step: optimizer steps since the start of the run.
        train_loss: mean over the epoch's steps.
        metrics: of the evaluation, as fractions.
        loss: of the evaluation; None if it is not finite.
    """

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    metrics: dict[str, float]
    loss: float | None


class Times(RecordBlock):
    """Seconds of a run.

    In the lane engine they are the run's equal share of what all lanes took together: `Record.measurement` says which
    runs' seconds belong together.

    Attributes:
        train_seconds: training without evaluation; warmup_seconds + steady_seconds, and the sum of `phases`.
        warmup_seconds: steps of FW-LoRA's warm-up, in which the Fisher proxy is gathered; 0 for other methods.
        steady_seconds: all other training steps.
        eval_seconds: evaluation after every epoch.
        phases: training seconds by the name of the method's phase.
    """

    train_seconds: float
    warmup_seconds: float
    steady_seconds: float
    eval_seconds: float
    phases: dict[str, float]


class Attempt(RecordBlock):
    """One of the times that a run was begun or continued from a checkpoint.

    An attempt that was killed counts up to its last checkpoint: what came after it was done again.

    Attributes:
        first_step: optimizer steps that were done before.
        steps: optimizer steps of this attempt.
    """

    started: datetime
    first_step: int
    steps: int
    train_seconds: float
    eval_seconds: float


class MatrixRow(RecordBlock):
    """One adapted matrix at the end of the run.

    Attributes:
        rank: of its adapter.
        fisher: Fisher proxy F; None if the method has none, as for `importance` and `weight`.
        importance: its share I of the sum of all F.
        weight: its weight in the penalty.
        delta_norm: Frobenius norm ‖ΔW‖_F of the learned update.
    """

    name: str
    rank: int
    fisher: float | None = None
    importance: float | None = None
    weight: float | None = None
    delta_norm: float | None = None


class Record(RecordBlock):
    """Everything known about one run (one config, one seed) that is over.

    Attributes:
        method: the method's short name.
        engine: the engine that trained the run, which is PEFT's if lanes do not support the config.
        error: why a failed run failed.
        command: the command line that trained the run.
        git_commit: of the source; ends in "-dirty" if tracked files were changed.
        measurement: names the call of a process that timed the run. Runs that it trained together, in shared lanes or
            one after another, have the same: their seconds are one measurement. None in records from before it was
            written.
        config: the resolved run config.
        config_fingerprint: sha256 of what in the config changes the result (`config.fingerprint`).
        data_fingerprint: sha256 of the texts, labels and splits.
        evaluated_on: the split of the metrics, "dev" or "validation".
        primary_metric: the metric that methods are compared by.
        epochs: those that were finished, in their order.
        attempts: the times that the run was begun or continued, whose seconds add up to those of `times`; `started`
            is the first one's.
        steps: optimizer steps that were made, out of `total_steps`.
        peak_memory_bytes: of the process, or of the GPU.
        files: sha256 of each file of the run beside the record, by its path in the run's folder; None in records from
            before it was written.
        sha256: of the record itself without this entry (`seal`); None likewise.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    seed: int
    method: str
    engine: Engine
    status: Literal["complete", "failed"]
    error: Failure | None = None
    started: datetime
    finished: datetime
    command: str
    versions: dict[str, str]
    git_commit: str | None
    machine: Machine
    measurement: str | None = None
    config: dict[str, Any]
    config_fingerprint: str
    data_fingerprint: str
    data_source: str
    evaluated_on: str
    primary_metric: str
    backbone: BackboneInfo
    parameters: Parameters | None = None
    epochs: list[Epoch] = []
    times: Times | None = None
    attempts: list[Attempt] = []
    steps: int = 0
    total_steps: int
    examples_per_second: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    matrices: list[MatrixRow] = []
    warnings: list[str] = []
    files: dict[str, str] | None = None
    sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_version_0_1(cls, data: Any) -> Any:
        return from_version_0_1(data) if isinstance(data, Mapping) and "arm" in data else data

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation; empty if there was none."""
        return self.epochs[-1].metrics if self.epochs else {}
