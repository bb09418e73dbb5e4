"""A weighting and an estimator of one's own in a run config: one file that FWLORA_EXTENSIONS names, nothing else.

pytest tests/fwlora_lab/training/test_registered.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import World

from fwlora import choices, estimators, weighting
from fwlora_lab.catalog import extensions
from fwlora_lab.config.checks import warnings_of
from fwlora_lab.training import scheduler
from fwlora_lab.training.events import Note
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_runs

MINE = '''
"""The inverse square root as a weighting, and the max-norm of the weight gradient as an estimator."""

import torch

import fwlora


def inverse_square_root(fisher):
    return fisher.rsqrt()


class MaxNorm(fwlora.HookedEstimator):
    def measure(self, statistics, loss_scale):
        return torch.stack([s.abs().max() for s in statistics]) / loss_scale


fwlora.register_weighting("inverse_square_root", inverse_square_root)
fwlora.register_estimator("max_norm", MaxNorm)
'''


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(choices, "_ADDED", {"estimator": [], "weighting": []})
    monkeypatch.setattr(weighting, "_REGISTERED", {})
    monkeypatch.setattr(estimators, "_HOOKED", dict(estimators._HOOKED))
    monkeypatch.setattr(scheduler, "pick_device", lambda: torch.device("cpu"))
    yield
    extensions._load.cache_clear()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world with the extension on the path."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_fisher.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setenv("FWLORA_EXTENSIONS", "my_fisher")
    monkeypatch.delitem(sys.modules, "my_fisher", raising=False)
    return World(tmp_path / "world")


@pytest.mark.parametrize("engine", ["lanes", "peft"])
def test_a_registered_weighting_is_trained_by_both_engines(world: World, engine: str) -> None:
    cfg = world.config("fw_lora", training__engine=engine, fw_lora__weighting="inverse_square_root")
    (record,) = train_runs([RunSpec(cfg, 0)])
    assert (record.status, record.engine) == ("complete", engine)
    for row in record.matrices:
        assert row.fisher and row.weight == pytest.approx(row.fisher**-0.5, rel=1e-5)


def test_a_registered_estimator_is_trained_with_pefts_layers(world: World) -> None:
    notes: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    own = {"training__engine": "lanes", "fw_lora__estimator": "max_norm", "fw_lora__sketch_columns": 2}
    cfg = world.config("fw_lora", **own)
    assert warnings_of(cfg) == []  # a registered estimator may read sketch_columns
    (record,) = train_runs([RunSpec(cfg, 0)], on_event=listen)
    assert (record.status, record.engine) == ("complete", "peft")
    assert any("does not know the estimator max_norm" in text for text in notes)
    exact = world.config("fw_lora", run_id="exact")
    (other,) = train_runs([RunSpec(exact, 0)])
    for row, squared in zip(record.matrices, other.matrices, strict=True):
        # The largest entry is at most the Frobenius norm, at every step and so on average.
        assert row.fisher and squared.fisher and row.fisher**2 <= squared.fisher


def test_lanes_train_the_other_runs_of_a_batch(world: World) -> None:
    mine = world.config("fw_lora", training__engine="lanes", fw_lora__estimator="max_norm")
    plain = world.config("lora", training__engine="lanes")
    records = train_runs([RunSpec(mine, 0), RunSpec(plain, 0)])
    assert [(r.method, r.engine) for r in records] == [("fw_lora", "peft"), ("lora", "lanes")]


@pytest.mark.parametrize(("setting", "name"), [("weighting", "inverse_square_root"), ("estimator", "max_norm")])
def test_without_the_extension_its_names_are_unknown(
    world: World, monkeypatch: pytest.MonkeyPatch, setting: str, name: str
) -> None:
    monkeypatch.delenv("FWLORA_EXTENSIONS")
    with pytest.raises(ValueError, match=f"(?s)fw_lora.{setting}.*the text '{name}' is not allowed: use one of "):
        world.config("fw_lora", **{f"fw_lora__{setting}": name})
