"""The record of a run that is over, well or not."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime

import torch

from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.errors import is_out_of_memory
from fwlora_lab.records.environment import cpu_name, git_commit, versions
from fwlora_lab.records.record import BackboneInfo, Failure, Machine, Record, Times
from fwlora_lab.text import without_secrets
from fwlora_lab.training.active_run import ActiveRun
from fwlora_lab.training.device import TooLittleMemory, in_bf16, peak_memory
from fwlora_lab.training.events import EventCallback, RunFailed, RunFinished


def write_record(run: ActiveRun, fisher: Mapping[str, float] | None, on_event: EventCallback) -> Record:
    """Write the record of a run that is over and report it."""
    job, failure = run.job, run.failure
    if failure is None:
        try:
            record = make_record(run, fisher)
        except Exception as error:
            failure = error
    if failure is not None:
        record = job.folder.write(make_record(run, None, _as_failure(failure, run.device)), job.cfg)
        on_event(RunFailed(*job.key, record))
        return record
    assert run.state is not None
    record = job.folder.write(
        record,
        job.cfg,
        logits=run.logits,
        labels=job.evaluation.labels.numpy(),
        save_adapter=run.state.export if job.cfg.training.save_adapter else None,
    )
    on_event(RunFinished(*job.key, record, trained=True))
    return record


def _as_failure(error: Exception, device: torch.device) -> Failure:
    if is_out_of_memory(error) and not isinstance(error, TooLittleMemory):
        error = TooLittleMemory(error, None, device)
    return Failure(
        type=type(error).__name__,
        message=without_secrets(str(error)),
        traceback=without_secrets("".join(traceback.format_exception(error))),
    )


def make_record(run: ActiveRun, fisher: Mapping[str, float] | None, failure: Failure | None = None) -> Record:
    """The record of a run as it stands: complete, or failed where it was when `failure` struck."""
    job, device = run.job, run.device
    cuda = device.type == "cuda"
    record = Record(
        run_id=job.cfg.run_id,
        seed=job.seed,
        method=job.cfg.method_name,
        engine=job.engine,
        status="failed" if failure else "complete",
        error=failure,
        started=run.started,
        finished=datetime.now(UTC),
        command=without_secrets(shlex.join(sys.argv)),
        versions=versions(),
        git_commit=git_commit(),
        machine=Machine(
            cpu=cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(device) if cuda else "cpu",
            precision="bf16" if in_bf16(job.cfg, device) else "fp32",
        ),
        measurement=run.measurement,
        config=json.loads(without_secrets(job.cfg.model_dump_json())),
        config_fingerprint=fingerprint(job.cfg),
        data_fingerprint=job.data.fingerprint,
        data_source=job.data.source,
        evaluated_on=job.cfg.training.evaluate_on,
        primary_metric=job.spec.primary,
        backbone=BackboneInfo(
            name=job.backbone.name,
            source=job.backbone.source,
            commit=job.backbone.commit,
            parameters=job.backbone.parameters,
            weights=job.weights,
        ),
        total_steps=job.total_steps,
        warnings=list(job.warnings),
    )
    if run.state is None:
        return record
    phases = run.training.seconds
    seconds = sum(phases.values())
    warmup = phases.get("warmup", 0.0)
    record.epochs = run.epochs
    record.steps = run.step
    record.times = Times(
        train_seconds=seconds,
        warmup_seconds=warmup,
        steady_seconds=seconds - warmup,
        eval_seconds=sum(run.evaluating.seconds.values()),
        phases=dict(phases),
    )
    record.attempts = run.attempts()
    record.peak_memory_bytes = peak_memory(device)
    if seconds > 0:
        record.examples_per_second = run.examples / seconds
        record.tokens_per_second = run.tokens / seconds
    if failure is None:
        record.parameters = run.state.parameters()
        record.matrices = run.state.matrix_rows(fisher)
    return record
