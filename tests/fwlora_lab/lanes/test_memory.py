"""The memory estimate, and that steps leave nothing behind.

pytest tests/fwlora_lab/lanes/test_memory.py
"""

from __future__ import annotations

import gc

import pytest
import torch
from lane_runs import (
    F64,
    World,
    batch_of,
)
from torch import Tensor

from fwlora_lab.lanes.packing import pack


@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta-v3"])
def test_memory_is_that_of_the_lanes_and_does_not_grow_with_the_steps(kind, table):
    world = World(kind, table, dropout=0.1)
    table = world.table

    def alive() -> int:
        gc.collect()
        return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor)

    engine = world.lanes([0, 1])
    batch = pack(table, [batch_of(table, i, 0) for i in (0, 1)], F64)
    before = engine.memory(batch)
    state = engine.lanes[0].generator.get_state()
    assert engine.memory(batch) == before and torch.equal(engine.lanes[0].generator.get_state(), state)
    sizes = []
    for start, steps in ((0, 10), (10, 40)):  # over the end of the warm-up first
        world.train(engine, [0, 1], steps, start)
        engine.step(batch, [1e-3] * 2)
        assert engine.memory(batch) == before
        sizes.append(alive())
    assert sizes[1] <= sizes[0]
    more = world.lanes([0, 1, 2, 3])
    twice = more.memory(pack(table, [batch_of(table, i, 0) for i in (0, 1, 0, 1)], F64))
    assert 1.8 < twice / before < 2.2
