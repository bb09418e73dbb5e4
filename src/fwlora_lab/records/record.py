"""TODO"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from fwlora_lab.config.former_names import with_present_names

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
    warmup_seconds: float
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
    method: str
    engine: Literal["lanes", "peft"] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, data: Any) -> Any:
        """Read what version 0.1 wrote under other names."""
        if not isinstance(data, Mapping) or "arm" not in data:
            return data
        data = {("method" if key == "arm" else key): value for key, value in data.items()}
        if data.get("evaluated_on") == "selection":
            data["evaluated_on"] = "validation"
        if isinstance(data.get("config"), Mapping):
            data["config"] = with_present_names(data["config"])
        if isinstance(data.get("times"), Mapping):
            watches = data["method"] == "fw_lora"
            phases = {"fisher": "warmup", "steady": "penalty" if watches else "training"}
            times = {("warmup_seconds" if key == "fisher_seconds" else key): v for key, v in data["times"].items()}
            if isinstance(times.get("phases"), Mapping):
                times["phases"] = {phases.get(name, name): seconds for name, seconds in times["phases"].items()}
            data["times"] = times
        return data

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation; empty where there was none."""
        return self.epochs[-1].metrics if self.epochs else {}
