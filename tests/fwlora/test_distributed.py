"""Two processes on gloo train what one process trains on the whole batch.

pytest tests/fwlora/test_distributed.py
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import batches, lora_net, trainable
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fwlora
from fwlora import FWLoraConfig

STEPS = 8


def config(estimator: str) -> FWLoraConfig:
    return FWLoraConfig(warmup_steps=4, fisher_ema_decay=0.5, penalty_strength=0.1, estimator=estimator)


def train(model, wrapped, optimizer, shard):
    for x, y in batches(STEPS):
        cross_entropy(wrapped(x[shard]), y[shard]).backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, estimator: str, first: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = lora_net()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    # Attached to the inner model, the processes must still agree.
    handle = fwlora.attach(model if first else wrapped, optimizer, config(estimator))
    train(model, wrapped, optimizer, slice(rank * 2, rank * 2 + 2))
    state = {"fisher": handle.fisher(), "parameters": [p.detach() for p in trainable(model)]}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("estimator", "inner"), [("exact", False), ("sketch", True), ("per_example", True)])
def test_two_processes_equal_one(tmp_path, estimator, inner):
    mp.spawn(worker, (estimator, inner, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = lora_net()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    handle = fwlora.attach(model, optimizer, config(estimator))
    train(model, model, optimizer, slice(0, 4))
    assert one["fisher"] == other["fisher"]
    assert one["fisher"] == pytest.approx(handle.fisher(), rel=1e-9)
    for a, b, c in zip(one["parameters"], other["parameters"], trainable(model), strict=True):
        assert torch.equal(a, b)
        assert_close(a, c.detach(), rtol=1e-8, atol=1e-10)
