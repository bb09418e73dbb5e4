"""Training in PEFT's own layers: padded batches, one model a run. The public reference for the lane engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwlora_lab.models.methods import Method, build_method
from fwlora_lab.seeds import derive
from fwlora_lab.training.active_run import ActiveRun
from fwlora_lab.training.device import autocast_for, forget_peak_memory
from fwlora_lab.training.jobs import Job

EVALUATION_BATCH = 128


class PeftEngine:
    """One run at a time, in a model of its own."""

    capacity = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._method: Method | None = None

    @property
    def method(self) -> Method:
        """The method of the run that is in."""
        assert self._method is not None
        return self._method

    def start(self, run: ActiveRun) -> None:
        job = run.job
        forget_peak_memory(self.device)
        self._method = build_method(job.cfg, job.backbone, job.spec, job.total_steps, self.device)
        run.state = self._method.state
        self._method.model.train()
        torch.manual_seed(derive(job.seed, "dropout"))

    def step(self, runs: Sequence[ActiveRun]) -> None:
        (run,) = runs
        job, method, group = run.job, self.method, run.batch
        phase = method.phase()
        run.training.enter(phase)
        loss = torch.zeros((), device=self.device)
        for micro in job.micro_batches(group):
            batch = _to(job.batch(job.train, micro), self.device)
            with autocast_for(job.cfg, self.device):
                # The mean over the step's examples, also where the last micro-batch is a short one.
                part = method.model(**batch).loss * (len(micro) / len(group))
            part.backward()
            loss += part.detach()
        if job.cfg.training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(method.trainable, job.cfg.training.max_grad_norm)
        method.optimizer.step()
        method.scheduler.step()
        method.optimizer.zero_grad()
        run.count_step(loss, phase)

    def evaluate(self, runs: Sequence[ActiveRun]) -> list[np.ndarray]:
        (run,) = runs
        run.training.enter(None)
        run.evaluating.enter("evaluation")
        logits = predict(run.job, self.method.model, self.device)
        self.method.model.train()
        run.evaluating.enter(None)
        return [logits]

    def finish(self, run: ActiveRun) -> Mapping[str, float] | None:
        run.training.enter(None)
        method, self._method = self._method, None
        return method.fisher() if method is not None and run.failure is None else None

    def shrink(self, capacity: int) -> None:
        pass  # it takes one run at a time anyway

    def memory(self, run: ActiveRun) -> float | None:
        return None

    def state_dict(self, run: ActiveRun) -> dict[str, Any]:
        method = self.method
        state = method.state
        return {
            "run": run.state_dict(),
            "adapters": {name: [t.clone() for t in factors] for name, factors in state.adapters().items()},
            "head": {name: value.clone() for name, value in state.head().items()},
            "optimizer": copy.deepcopy(method.optimizer.state_dict()),
            "scheduler": copy.deepcopy(method.scheduler.state_dict()),
            "method": method.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, run: ActiveRun, state: dict[str, Any]) -> None:
        method = self.method
        run.load_state_dict(state["run"])
        method.state.load(state["adapters"], state["head"])
        method.optimizer.load_state_dict(state["optimizer"])
        method.scheduler.load_state_dict(state["scheduler"])
        method.load_state_dict(state["method"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


@torch.inference_mode()
def predict(job: Job, model: torch.nn.Module, device: torch.device) -> np.ndarray:
    """Logits [n, classes] float32 of the evaluation split, in its order."""
    model.eval()
    # Long ones first: what does not fit into memory fails at once.
    order = job.evaluation.lengths().argsort(descending=True, stable=True)
    parts = []
    for index in order.split(EVALUATION_BATCH):
        batch = _to(job.batch(job.evaluation, index), device)
        del batch["labels"]
        with autocast_for(job.cfg, device):
            parts.append(model(**batch).logits.float())
    logits = torch.cat(parts).cpu()
    return torch.empty_like(logits).index_copy_(0, order, logits).numpy()


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
