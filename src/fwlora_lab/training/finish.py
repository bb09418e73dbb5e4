"""TODO"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from datetime import UTC, datetime

import torch

from fwlora_lab.config.fingerprint import fingerprint
from fwlora_lab.records.environment import cpu_name, git_commit, versions
from fwlora_lab.records.record import BackboneInfo, Failure, Machine, Record, Times
from fwlora_lab.training.device import in_bf16, peak_memory
from fwlora_lab.training.events import EventCallback, RunFailed, RunFinished, StopRun
from fwlora_lab.training.jobs import Job
from fwlora_lab.training.run_state import RunState


def finish_run(
    job: Job,
    state: RunState | None,
    device: torch.device,
    started: datetime,
    failure: Exception | None,
    listen: EventCallback,
) -> Record | None:
    """Write the record of a run that is over, well or not, and say so; a run that was stopped has none."""
    if isinstance(failure, StopRun):
        return None
    if failure is None:
        assert state is not None
        try:
            record = make_record(job, state, device, started)
        except Exception as error:
            failure = error
    if failure is not None:
        told = Failure(
            type=type(failure).__name__,
            message=str(failure),
            traceback="".join(traceback.format_exception(failure)),
        )
        record = make_record(job, state, device, started, told)
        job.folder.write(record, job.cfg)
        listen(RunFailed(*job.key, record))
        return record
    assert state is not None
    job.folder.write(
        record,
        job.cfg,
        logits=state.logits,
        labels=job.evaluation.labels.numpy(),
        save_adapter=state.arm.export if job.cfg.training.save_adapter else None,
    )
    listen(RunFinished(*job.key, record, trained=True))
    return record


def make_record(
    job: Job,
    state: RunState | None,
    device: torch.device,
    started: datetime,
    failure: Failure | None = None,
) -> Record:
    """The record of a run as it stands: complete, or failed where it was when `failure` struck."""
    cuda = device.type == "cuda"
    record = Record(
        run_id=job.cfg.run_id,
        seed=job.seed,
        method=job.cfg.method_name,
        status="failed" if failure else "complete",
        error=failure,
        started=started,
        finished=datetime.now(UTC),
        command=shlex.join(sys.argv),
        versions=versions(),
        git_commit=git_commit(),
        machine=Machine(
            cpu=cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(device) if cuda else "cpu",
            precision="bf16" if in_bf16(job.cfg, device) else "fp32",
        ),
        config=job.cfg.model_dump(mode="json"),
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
        ),
        total_steps=job.total_steps,
        warnings=list(job.warnings),
    )
    if state is None:
        return record
    phases = state.training.seconds
    seconds = sum(phases.values())
    warmup = phases.get("warmup", 0.0)
    record.epochs = state.epochs
    record.steps = state.step
    record.times = Times(
        train_seconds=seconds,
        warmup_seconds=warmup,
        steady_seconds=seconds - warmup,
        eval_seconds=sum(state.evaluating.seconds.values()),
        phases=dict(phases),
    )
    record.peak_memory_bytes = peak_memory(device)
    if seconds > 0:
        record.examples_per_second = state.examples / seconds
        record.tokens_per_second = state.tokens / seconds
    if failure is None:
        record.parameters = state.arm.parameters()
        record.matrices = state.arm.report()
    return record
