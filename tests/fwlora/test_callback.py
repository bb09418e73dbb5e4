"""The Hugging Face Trainer with FWLoraCallback trains what a plain loop trains, and resumes from any folder.

pytest tests/fwlora/test_callback.py
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from trainer_runs import BATCH, CONFIG, STEPS, InOrder, adapters, bert, hooks, rows, trainer_of
from transformers import TrainerCallback

import fwlora
from fwlora import FisherWeightedLoRA, FWLoraCallback, FWLoraConfig
from fwlora.callback import _from_json, _to_json

STATE = "trainer_state.json"


def plain_loop(model: nn.Module, passes: int = 1, clip: float = 0.0, smoothing: float = 0.0) -> FisherWeightedLoRA:
    """What the Trainer should do, without it; each pass attaches anew and keeps the optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    data = rows()
    model.train()
    for _ in range(passes):
        handle = fwlora.attach(model, optimizer, CONFIG)
        for i in range(0, len(data), BATCH):
            part = data[i : i + BATCH]
            logits = model(input_ids=torch.stack([r["input_ids"] for r in part])).logits
            cross_entropy(logits, torch.tensor([r["labels"] for r in part]), label_smoothing=smoothing).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        handle.detach()
    return handle


@pytest.mark.parametrize(
    ("settings", "loop"),
    [
        pytest.param({}, {}, id="defaults"),
        pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}, id="accumulation"),
        pytest.param({"max_grad_norm": 0.05}, {"clip": 0.05}, id="clipping"),
        pytest.param({"label_smoothing_factor": 0.2}, {"smoothing": 0.2}, id="label smoothing"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}, {}, id="evaluation"),
    ],
)
def test_the_trainer_equals_a_plain_loop(tmp_path, settings, loop):
    model, plain = bert(), bert()
    callback = FWLoraCallback(CONFIG)
    trainer_of(tmp_path, model, callback, **settings).train()
    want = plain_loop(plain, **loop)
    assert callback.handle.fisher() == pytest.approx(want.fisher(), rel=1e-4)
    assert callback.handle.weights() == pytest.approx(want.weights(), rel=1e-4)  # readable after training
    for name, value in adapters(plain).items():
        torch.testing.assert_close(adapters(model)[name], value, rtol=1e-3, atol=1e-5)


def test_a_second_train_starts_anew(tmp_path):
    model, plain = bert(), bert()
    callback = FWLoraCallback(CONFIG)
    trainer = trainer_of(tmp_path, model, callback)
    trainer.train()
    first = callback.handle
    trainer.train()
    want = plain_loop(plain, passes=2)
    assert callback.handle is not first
    assert callback.handle.fisher() == pytest.approx(want.fisher(), rel=1e-3)
    for name, value in adapters(plain).items():
        torch.testing.assert_close(adapters(model)[name], value, rtol=1e-3, atol=1e-4)


def test_no_hook_is_left_after_training(tmp_path):
    model = bert()
    before = hooks(model)
    callback = FWLoraCallback(CONFIG)
    during = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            during.append(hooks(model) - before)

    trainer = trainer_of(tmp_path, model, callback, max_steps=CONFIG.warmup_steps + 1)
    trainer.add_callback(Count())
    trainer.train()
    assert during == [4] * CONFIG.warmup_steps + [0]
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="stop here"):
        trainer_of(tmp_path, model, callback, kind=FailsInTheWarmup, max_steps=5).train()
    trainer_of(tmp_path, model, callback, max_steps=5).train()
    assert hooks(model) == before and callback.handle.phase == "detached"
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


class FailsInTheWarmup(InOrder):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise RuntimeError("stop here")
        return super().training_step(*args, **kwargs)


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_who_stops_in_the_warmup_is_told_once(tmp_path):
    callback = FWLoraCallback(CONFIG)
    trainer = trainer_of(tmp_path, bert(), callback)
    trainer.add_callback(StopsAt(3))
    with pytest.warns(UserWarning, match="training ended after 3 steps, within the warm-up of 4") as told:
        trainer.train()
    assert len([w for w in told if "fwlora" in str(w.message)]) == 1
    assert set(callback.handle.weights()) == set(callback.handle.names)


def test_auto_find_batch_size_starts_anew(tmp_path):
    class Small(InOrder):
        """No more than BATCH sentences fit; the backward pass of the first batch still comes to its end."""

        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > BATCH:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return loss

    model, fresh = bert(), bert()
    callback = FWLoraCallback(CONFIG)
    trainer = trainer_of(
        tmp_path, model, callback, kind=Small, auto_find_batch_size=True, per_device_train_batch_size=BATCH + 2
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fwlora")
        trainer.train()
    alone = FWLoraCallback(CONFIG)
    trainer_of(tmp_path, fresh, alone).train()
    assert trainer.state.global_step == STEPS
    assert callback.handle.fisher() == alone.handle.fisher()
    assert all(torch.equal(a, b) for a, b in zip(adapters(model).values(), adapters(fresh).values(), strict=True))


def test_data_parallel_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, bert(), FWLoraCallback(CONFIG))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="over 2 GPUs in one process"):
        trainer.train()


def test_a_warmup_that_fills_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only 10 optimizer steps"):
        trainer_of(tmp_path, bert(), FWLoraCallback(FWLoraConfig(warmup_steps=500))).train()


# Checkpoints


class Whole:
    """An undisturbed run, which left a checkpoint every second step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.callback = FWLoraCallback(CONFIG)
        self.model = bert()
        self.trainer = trainer_of(folder, self.model, self.callback, save_strategy="steps", save_steps=2)
        self.trainer.train()
        self.log = [entry.get("fw_lora_penalty") for entry in self.trainer.state.log_history]

    def equals(self, model: nn.Module, handle: FisherWeightedLoRA) -> bool:
        """Bit by bit."""
        same = zip(adapters(model).values(), adapters(self.model).values(), strict=True)
        return (
            handle.fisher() == self.callback.handle.fisher()
            and handle.weights() == self.callback.handle.weights()
            and all(torch.equal(a, b) for a, b in same)
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"))


def scrambled() -> nn.Module:
    """A model whose adapters must come from the checkpoint."""
    model = bert()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    return model


def former(checkpoint: Path, handle_state: dict[str, Any]) -> None:
    """Make it a checkpoint as version 0.1 wrote it."""
    text = json.loads((checkpoint / STATE).read_text())
    del text["stateful_callbacks"]["FWLoraCallback"]
    (checkpoint / STATE).write_text(json.dumps(text))
    torch.save(handle_state, checkpoint / "fwlora.pt")


def state_in(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())["stateful_callbacks"]["FWLoraCallback"]


def saved_in(checkpoint: Path) -> dict[str, Any]:
    return _from_json(state_in(checkpoint)["attributes"]["saved_state"], torch.device("cpu"))


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_training_resumes_from_a_checkpoint_in_any_folder(tmp_path, whole, stop):
    elsewhere = tmp_path / "elsewhere" / "of another name"
    shutil.copytree(whole.folder / f"checkpoint-{stop}", elsewhere)
    # The output folder holds a checkpoint of this number too, of another run.
    decoy = tmp_path / "out" / f"checkpoint-{stop}"
    shutil.copytree(elsewhere, decoy)
    other = json.loads((decoy / STATE).read_text())
    fisher = other["stateful_callbacks"]["FWLoraCallback"]["attributes"]["saved_state"]["fisher"]
    fisher["tensor"] = [2.0 * f + 1.0 for f in fisher["tensor"]]
    (decoy / STATE).write_text(json.dumps(other))
    torch.save({**saved_in(elsewhere), "fisher": torch.tensor(fisher["tensor"])}, decoy / "fwlora.pt")

    model = scrambled()
    callback = FWLoraCallback(CONFIG)
    trainer = trainer_of(tmp_path / "out", model, callback)
    trainer.train(resume_from_checkpoint=str(elsewhere))
    assert whole.equals(model, callback.handle)
    assert [entry.get("fw_lora_penalty") for entry in trainer.state.log_history] == whole.log


def test_the_trainer_may_restore_the_callback_itself(tmp_path, whole):
    model = scrambled()
    trainer = trainer_of(tmp_path, model, FWLoraCallback(), restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(whole.folder / "checkpoint-2"))
    callback = trainer.pop_callback(FWLoraCallback)
    assert isinstance(callback, FWLoraCallback) and callback.config == CONFIG
    assert trainer.pop_callback(FWLoraCallback) is None
    assert whole.equals(model, callback.handle)


def test_checkpoints_of_version_0_1_are_read(tmp_path, whole):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(whole.folder / "checkpoint-2", checkpoint)
    values = saved_in(checkpoint)
    former(checkpoint, {name: values[name] for name in ("step", "fisher", "skipped", "names", "config")})
    model = scrambled()
    callback = FWLoraCallback(CONFIG)
    trainer = trainer_of(tmp_path, model, callback, save_strategy="steps", save_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert whole.equals(model, callback.handle)
    again, want = saved_in(tmp_path / "checkpoint-4"), saved_in(whole.folder / "checkpoint-4")
    assert again["step"] == want["step"] == 4 and torch.equal(again["fisher"], want["fisher"])

    # From elsewhere, the file in the output folder could be another run's.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, elsewhere)
    text = json.loads((elsewhere / STATE).read_text())
    text["log_history"][0]["loss"] += 1.0
    (elsewhere / STATE).write_text(json.dumps(text))
    with pytest.raises(ValueError, match="put it there"):
        trainer_of(tmp_path, bert(), FWLoraCallback(CONFIG)).train(resume_from_checkpoint=str(elsewhere))


def test_the_state_survives_json_bit_by_bit():
    state = {
        "step": 3,
        "names": ["a"],
        "fisher": torch.tensor([1.0 / 3.0, 1e-45, 3.4e38, 0.0]),
        "half": {"counted": 2, "fisher": torch.tensor([0.1, 5e-324], dtype=torch.float64), "none": None},
        "skipped": torch.tensor(2),
    }
    back = _from_json(json.loads(json.dumps(_to_json(state))), torch.device("cpu"))
    assert back["fisher"].dtype == torch.float32 and torch.equal(back["fisher"], state["fisher"])
    half = back["half"].pop("fisher")
    assert half.dtype == torch.float64 and torch.equal(half, state["half"]["fisher"])
    assert back["skipped"].dtype == torch.int64 and back["skipped"].shape == () and int(back["skipped"]) == 2
    assert back["half"] == {"counted": 2, "none": None} and back["names"] == ["a"] and back["step"] == 3


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    class Other(TrainerCallback):
        pass

    trainer_of(tmp_path, bert(), Other(), save_strategy="steps", save_steps=5, max_steps=5).train()
    trainer = trainer_of(tmp_path, bert(), FWLoraCallback(CONFIG))
    with pytest.raises(ValueError, match="step 5 from a checkpoint without the state of FWLoraCallback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_hyperparameter_search_saves_each_trial(tmp_path, whole):
    optuna = pytest.importorskip("optuna", reason="the core does not need it")
    rates = [3e-3, 1e-2]
    callback = FWLoraCallback(CONFIG)
    trainer = trainer_of(tmp_path, None, callback, model_init=lambda trial: bert(), save_strategy="steps", save_steps=2)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}, seed=0),
    )
    trials = {
        json.loads((run / "checkpoint-10" / STATE).read_text())["trial_params"]["learning_rate"]: run
        for run in tmp_path.glob("run-*")
    }
    assert set(trials) == set(rates)
    same, other = (trials[rate] for rate in (1e-2, 3e-3))
    for step in (2, 6, 10):
        ours, want = same / f"checkpoint-{step}", whole.folder / f"checkpoint-{step}"
        assert state_in(ours) == state_in(want)
        saved, expected = (load_file(f / "adapter_model.safetensors") for f in (ours, want))
        assert all(torch.equal(saved[name], expected[name]) for name in expected)
        assert state_in(other / f"checkpoint-{step}") != state_in(want)
    model = scrambled()
    again = FWLoraCallback(CONFIG)
    trainer_of(tmp_path, model, again).train(resume_from_checkpoint=str(same / "checkpoint-2"))
    assert whole.equals(model, again.handle)


@pytest.mark.skipif(transformers.__version__ < "5", reason="the hub's boundary is elsewhere in transformers 4")
@pytest.mark.parametrize(
    ("strategy", "folder"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-4")]
)
def test_what_is_pushed_to_a_hub_resumes(tmp_path, whole, monkeypatch, strategy, folder):
    """The hub is a folder here: HfApi is replaced at its boundary, and takes what lies in a folder at that moment."""
    hub = tmp_path / "hub"

    def upload_folder(self, *, folder_path, path_in_repo="", run_as_future=False, **kwargs):
        shutil.copytree(folder_path, hub / path_in_repo, dirs_exist_ok=True)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda self, name, **kwargs: huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name}"),
    )
    first = trainer_of(
        tmp_path / "out",
        bert(),
        FWLoraCallback(CONFIG),
        save_strategy="steps",
        save_steps=4,
        push_to_hub=True,
        hub_model_id="run",
        hub_strategy=strategy,
        hub_always_push=True,
        hub_token="no token",
    )

    first.add_callback(StopsAt(6))
    first.train()
    shutil.rmtree(tmp_path / "out")
    model = scrambled()
    callback = FWLoraCallback(CONFIG)
    trainer_of(tmp_path / "out", model, callback).train(resume_from_checkpoint=str(hub / folder))
    assert whole.equals(model, callback.handle)
