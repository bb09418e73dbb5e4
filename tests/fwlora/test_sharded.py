"""FSDP on two gloo processes trains what one process trains on the whole batch.

pytest tests/fwlora/test_sharded.py
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import batches, lora_net, trainable
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import fwlora
from fwlora import FWLoraConfig

STEPS = 8
WAYS = (
    "fsdp2",
    "fsdp2_one_unit",
    "accelerate_attach_last",
    "accelerate_attach_first",
    "fsdp1",
    "fsdp1_attach_first",
    "fsdp1_whole",
)


def config(estimator: str, mode: str) -> FWLoraConfig:
    return FWLoraConfig(
        warmup_steps=4,
        fisher_ema_decay=0.5,
        penalty_strength=0.1,
        estimator=estimator,
        penalty_mode=mode,  # type: ignore[arg-type]
    )


def is_layer(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def prepare(way: str, settings: FWLoraConfig) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = lora_net(r=3)  # three rows of A over two processes: pieces of different sizes
    if way.startswith("fsdp2"):
        if way == "fsdp2":
            for layer in filter(is_layer, model.modules()):
                fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, fwlora.attach(model, optimizer, settings)
    if way.startswith("accelerate"):
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        handle = fwlora.attach(model, optimizer, settings) if way.endswith("first") else None
        model, optimizer = accelerator.prepare(model, optimizer)
        return model, optimizer, handle or fwlora.attach(model, optimizer, settings)
    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_layer)
    first = way.endswith("first")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2) if first else None
    handle = fwlora.attach(model, optimizer, settings) if first else None
    strategy = ShardingStrategy.NO_SHARD if way.endswith("whole") else ShardingStrategy.FULL_SHARD
    wrapped = FSDP(
        model,
        use_orig_params=True,
        auto_wrap_policy=policy,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
    )
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        handle = fwlora.attach(wrapped, optimizer, settings)
    return wrapped, optimizer, handle


def full_parameters(model: nn.Module) -> list[torch.Tensor]:
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model, writeback=False):
            return [p.detach().clone() for p in trainable(model)]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in trainable(model)]


def worker(rank: int, way: str, estimator: str, mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    os.environ.update({k: str(v) for k, v in environment.items()})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, optimizer, handle = prepare(way, config(estimator, mode))
    for x, y in batches(STEPS):
        shard = slice(rank * 2, rank * 2 + 2)
        cross_entropy(model(x[shard]), y[shard]).backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = [p.clone() for p in full_parameters(model)]
    state = {"fisher": handle.fisher(), "penalty": float(handle.penalty()), "norms": handle.update_norms()}
    torch.save({**state, "parameters": parameters, "names": handle.names}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def single(estimator: str, mode: str) -> tuple[Any, list[torch.Tensor]]:
    model = lora_net(r=3)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    handle = fwlora.attach(model, optimizer, config(estimator, mode))
    for x, y in batches(STEPS):
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle, [p.detach() for p in trainable(model)]


def inner_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = lora_net()
    wrapped = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(ValueError, match="attach to the wrapped model"):
        fwlora.attach(model, optimizer)
    flat = FSDP(lora_net(modules_to_save=None).requires_grad_(True), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="use_orig_params=True"):
        fwlora.attach(flat, torch.optim.AdamW(flat.parameters(), lr=1e-2))
    dist.destroy_process_group()


def test_what_cannot_be_read_is_refused_with_the_cure(tmp_path):
    mp.spawn(inner_worker, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("way", "estimator", "mode"),
    [(way, "exact", "loss") for way in WAYS]
    + [
        ("fsdp2", "sketch", "decoupled"),
        ("fsdp2", "adapter", "loss"),
        ("fsdp1", "adapter", "decoupled"),
        ("fsdp1", "per_example", "loss"),
    ],
)
def test_two_sharded_processes_equal_one(way, estimator, mode, tmp_path):
    mp.spawn(worker, (way, estimator, mode, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    handle, parameters = single(estimator, mode)
    assert one["names"] == handle.names
    assert one["fisher"] == other["fisher"] == pytest.approx(handle.fisher(), rel=1e-9)
    assert one["penalty"] == pytest.approx(float(handle.penalty()), rel=1e-9)
    assert one["norms"] == pytest.approx(handle.update_norms(), rel=1e-9)
    assert len(parameters) == len(one["parameters"])
    for a, b, c in zip(one["parameters"], other["parameters"], parameters, strict=True):
        assert torch.equal(a, b)
        assert_close(a, c, rtol=1e-6, atol=1e-9)
