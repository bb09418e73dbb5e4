"""TODO"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
Status = Literal["missing", "complete", "failed", "different"]


class RecordBlock(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Failure(RecordBlock):
    """Why a run failed."""

    type: str
    message: str
    traceback: str


class Machine(RecordBlock):
    """Where a run ran, and in which precision its encoder computed. `device` is the accelerator's name, or "cpu"."""

    cpu: str
    cores: int
    threads: int
    device: str
    precision: Literal["fp32", "bf16"] = "fp32"


class BackboneInfo(RecordBlock):
    """The pretrained encoder: where it came from and how many parameters it has."""

    name: str
    source: str
    commit: str | None
    parameters: int


class Parameters(RecordBlock):
    """Parameters asked for and used.

    `adapters` is what remains at the end of the run, `adapters_trained` the most that was trained
    at any time (AdaLoRA starts with more), `percent` is 100·adapters/backbone, `head` is counted
    apart.
    """

    asked_percent: float | None
    backbone: int
    adapters: int
    adapters_trained: int
    head: int
    percent: float


class Epoch(RecordBlock):
    """The end of an epoch: its mean training loss, and metrics and loss of the evaluation."""

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    metrics: dict[str, float]
    loss: float | None


class Times(RecordBlock):
    """Seconds. Training leaves evaluation out; it is `fisher` + `steady`, the sum of `phases`.

    With training.engine=lanes they are the run's even share of what all lanes took together: good for planning,
    no measure of one method against another.
    """

    train_seconds: float
    fisher_seconds: float
    steady_seconds: float
    eval_seconds: float
    phases: dict[str, float]


class MatrixRow(RecordBlock):
    """One frozen matrix: its adapter's rank, F, importance and penalty weight where the method has
    them, and `delta_norm` = ‖ΔW‖_F at the end of the run."""

    name: str
    rank: int
    fisher: float | None = None
    importance: float | None = None
    weight: float | None = None
    delta_norm: float | None = None


class Record(RecordBlock):
    """Everything known about one run (one config, one seed); `complete` or `failed`, never half."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    seed: int
    arm: str
    status: Literal["complete", "failed"]
    error: Failure | None = None
    started: datetime
    finished: datetime
    command: str
    versions: dict[str, str]
    git_commit: str | None
    machine: Machine
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
    steps: int = 0
    total_steps: int
    examples_per_second: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    matrices: list[MatrixRow] = []
    warnings: list[str] = []

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation; empty where there was none."""
        return self.epochs[-1].metrics if self.epochs else {}
