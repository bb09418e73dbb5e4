"""`fwlora search`: what a trial is, what it is scored on, and what a search leaves behind.

pytest tests/fwlora_lab/search/test_search.py
"""

from __future__ import annotations

import csv
import shutil
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from tiny import World

from fwlora_lab.cli.main import main
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import load_record
from fwlora_lab.search import results, session, storage
from fwlora_lab.search.run import run_search
from fwlora_lab.search.samplers import distributions, make_pruner
from fwlora_lab.search.session import open_study
from fwlora_lab.search.shared_study import SharedStudy
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.storage import database_url
from fwlora_lab.search.trials import best_of, cause_of, is_counted
from fwlora_lab.training import lane_trainer
from fwlora_lab.training.events import Evaluated, StopRun
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_runs

RATE = {"type": "loguniform", "low": 1e-4, "high": 1e-1}
RANK = {"type": "categorical", "choices": [1, 2, 4]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(tiny, tmp_path) -> World:
    tiny.results = tmp_path / "results"
    return tiny


def config(world: World, method: str = "lora", space: dict | None = None, **changes: Any) -> RunConfig:
    """A search of 3 trials over learning rate and rank, in lanes, on runs of 2 epochs."""
    block = {"n_trials": 3, "search_space": space or {"learning_rate": RATE, "lora_rank": RANK}}
    block |= {key.removeprefix("optuna__"): changes.pop(key) for key in list(changes) if key.startswith("optuna__")}
    return with_values(world.config(method, **{"training__engine": "lanes", **changes}), {"optuna": block})


def trials_of(cfg: RunConfig) -> list[optuna.trial.FrozenTrial]:
    return open_study(SearchSpec.of(cfg)).trials()


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """They take longer than the training here; one test draws them."""
    if request.node.name != "test_a_search_and_what_it_leaves":
        monkeypatch.setattr(results, "_plot", lambda *_, **__: None)


def record_of(cfg: RunConfig, number: int, seed: int = 42):
    return load_record(
        Path(cfg.results_dir) / cfg.run_id / "search" / "trials" / f"trial-{number:04d}" / f"seed-{seed}"
    )


def states(cfg: RunConfig) -> list[str]:
    return [t.state.name for t in trials_of(cfg)]


# --- the whole of it ----------------------------------------------------------------------------


def test_a_search_and_what_it_leaves(world, capsys, monkeypatch):
    cfg = config(world, optuna__seeds_per_trial=2, optuna__n_trials=4)
    assert run_search(cfg) == 0
    folder = world.results / "lora" / "search"
    trials = trials_of(cfg)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 4
    for trial in trials:
        assert 1e-4 <= trial.params["training.learning_rate"] <= 1e-1 and trial.params["model.lora.rank"] in (1, 2, 4)
        records = [record_of(cfg, trial.number, seed) for seed in (42, 43)]
        for record in records:
            assert record.evaluated_on == "validation"
            assert record.config["training"]["learning_rate"] == trial.params["training.learning_rate"]
            assert record.config["model"]["lora"]["rank"] == trial.params["model.lora.rank"]
            assert record.total_steps == 20  # 40 of the 44 examples in batches of 4, two epochs
        assert trial.value == pytest.approx(statistics.fmean(r.epochs[-1].metrics["accuracy"] for r in records))
        for epoch in (1, 2):
            reported = statistics.fmean(r.epochs[epoch - 1].metrics["accuracy"] for r in records)
            assert trial.intermediate_values[epoch] == pytest.approx(reported)
    assert len({t.params["training.learning_rate"] for t in trials}) == 4

    best = max(trials, key=lambda t: (t.value, -t.number))
    text = (folder / "best.yaml").read_text(encoding="utf-8")
    assert text.startswith("# The best of 4 trials of the search around lora") and f"trial {best.number}," in text
    tuned = load_run(str(folder / "best.yaml"))
    assert tuned.run_id == "lora-best" and tuned.results_dir == cfg.results_dir and tuned.optuna is None
    assert tuned.dataset == cfg.dataset and tuned.dataset.validation_fraction == 0.0
    assert tuned.training.evaluate_on == "dev" and tuned.training.save_adapter
    assert tuned.training.learning_rate == best.params["training.learning_rate"]
    assert tuned.model.lora.rank == best.params["model.lora.rank"]

    rows = list(csv.DictReader((folder / "trials.csv").open(encoding="utf-8")))
    assert [row["state"] for row in rows] == ["complete"] * 4
    for row, trial in zip(rows, trials, strict=True):
        assert float(row["accuracy"]) == trial.value
        assert statistics.fmean([float(row["seed 42"]), float(row["seed 43"])]) == pytest.approx(trial.value)
        assert float(row["training.learning_rate"]) == trial.params["training.learning_rate"]
    for name in ("history.svg", "slices.svg"):
        assert "<svg" in (folder / name).read_text(encoding="utf-8")
    told = capsys.readouterr().out
    assert "[4/4]" in told and "0.1 of the training data is set aside" in told and "optuna-dashboard sqlite:///" in told
    assert not list((world.results / "lora").glob("seed-*")), "a trial is no record of the run itself"

    # The same command finds nothing to do; n_trials is the total.
    monkeypatch.setattr(results, "_plot", lambda *_, **__: None)
    assert run_search(cfg) == 0
    assert [t.value for t in trials_of(cfg)] == [t.value for t in trials]
    assert run_search(config(world, optuna__seeds_per_trial=2, optuna__n_trials=6)) == 0
    assert states(cfg) == ["COMPLETE"] * 6


def test_a_study_of_something_else_is_refused(world):
    cfg = config(world, optuna__n_trials=1)
    run_search(cfg)
    for other, reason in (
        (config(world, training__batch_size=8), "config training.batch_size: 4 there, 8 asked for"),
        (config(world, space={"learning_rate": RATE}), "space model.lora.rank"),
        (config(world, space={"learning_rate": RATE | {"high": 0.2}, "lora_rank": RANK}), "training.learning_rate"),
        (config(world, training__seed=1), r"optuna seeds: \[42\] there, \[1\] asked for"),
        (config(world, optuna__direction="minimize"), "optuna direction"),
        (config(world, dataset__seed=3), "the texts, labels or splits are others"),
    ):
        with pytest.raises(UserError, match=reason):
            run_search(other)
    assert states(cfg) == ["COMPLETE"]
    # What changes no score, and what is searched anyway, does not matter.
    run_search(config(world, optuna__n_trials=1, training__learning_rate=0.5, training__save_adapter=False))


def test_a_search_goes_on_where_its_data_were_moved(world, tmp_path):
    """As on another machine that shares the study: the data decide, not the folder that holds them."""
    assert run_search(config(world, optuna__n_trials=1)) == 0
    moved = shutil.copytree(Path(world.train_file).parent, tmp_path / "moved")
    train, dev = (moved / Path(name).name for name in (world.train_file, world.dev_file))
    there: dict[str, Any] = {"dataset__train_file": str(train), "dataset__eval_file": str(dev)}
    cfg = config(world, optuna__n_trials=2, **there)
    assert run_search(cfg) == 0
    assert states(cfg) == ["COMPLETE"] * 2
    shutil.copy(dev, train)
    with pytest.raises(UserError, match="texts, labels or splits are others"):
        run_search(config(world, optuna__n_trials=3, **there))


def test_the_search_is_the_same_every_time(world):
    """Also in its lanes' company: what a trial draws depends on its number and on what is known by then."""
    one = config(world, run_id="one", optuna__n_jobs=1, optuna__n_trials=5)
    two = config(world, run_id="two", optuna__n_jobs=1, optuna__n_trials=5)
    run_search(one)
    run_search(two)
    assert [(t.params, t.value) for t in trials_of(one)] == [(t.params, t.value) for t in trials_of(two)]


def test_a_list_of_search_spaces_is_the_same_search(world):
    named = [
        {"param_name": "learning_rate", "distribution_type": "loguniform", "low": 1e-4, "high": 1e-1},
        {"param_name": "lora_rank", "distribution_type": "categorical", "choices": [1, 2, 4]},
    ]
    block = {"n_trials": 3, "search_spaces": named}
    one = SearchSpec.of(config(world))
    two = SearchSpec.of(world.config("lora", optuna=block, training__engine="lanes"))
    assert distributions(one) == distributions(two) and one.identity("d") == two.identity("d")


def test_minimising_finds_the_least(world):
    cfg = config(world, optuna__direction="minimize", optuna__n_trials=4)
    run_search(cfg)
    least = min(trials_of(cfg), key=lambda t: (t.value, t.number))
    best = load_run(str(world.results / "lora" / "search" / "best.yaml"))
    assert best.training.learning_rate == least.params["training.learning_rate"]


# --- trials that do not go well -----------------------------------------------------------------

WILD = {"learning_rate": {"type": "categorical", "choices": [5e-3, 1e30]}}


@pytest.mark.parametrize("engine", ["lanes", "peft"])
def test_failed_trials_are_kept_with_their_cause(world, engine):
    cfg = config(
        world, space=WILD, training__engine=engine, training__max_grad_norm=None, optuna__sampler="random",
        optuna__n_trials=5, optuna__seeds_per_trial=2, training__epochs=1,
    )  # fmt: skip
    assert run_search(cfg) == 0
    trials = trials_of(cfg)
    assert {t.params["training.learning_rate"] for t in trials} == {5e-3, 1e30}
    for trial in trials:
        wild = trial.params["training.learning_rate"] == 1e30
        assert trial.state == (TrialState.FAIL if wild else TrialState.COMPLETE)
        assert ("diverged" in (cause_of(trial) or "")) == wild
    rows = list(csv.DictReader((world.results / "lora" / "search" / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["fail" if "diverged" in row["cause"] else "complete" for row in rows]


def test_values_that_do_not_go_together_fail_and_the_others_go_on(world):
    space = {"warmup_steps": {"type": "categorical", "choices": [6, 5000]}}
    cfg = config(world, "fw_lora", space=space, optuna__sampler="random", optuna__n_trials=5, training__epochs=1)
    assert run_search(cfg) == 0
    causes = {t.params["fw_lora.warmup_steps"]: cause_of(t) for t in trials_of(cfg)}
    assert causes[6] is None and "is not smaller than the 10 optimiser steps" in (causes[5000] or "")


def test_only_failures(world, capsys):
    cfg = config(world, space={"learning_rate": {"type": "categorical", "choices": [1e30]}}, optuna__n_trials=2)
    cfg = RunConfig.model_validate(cfg.model_dump() | {"training": cfg.training.model_dump() | {"max_grad_norm": None}})
    assert run_search(cfg) == 1
    assert "diverged" in capsys.readouterr().err
    assert not (world.results / "lora" / "search" / "best.yaml").exists()


class PruneOdd(optuna.pruners.BasePruner):
    def prune(self, study, trial) -> bool:
        return trial.number % 2 == 1


@pytest.mark.parametrize(("engine", "seeds"), [("lanes", 1), ("lanes", 2), ("peft", 1)])
def test_pruned_trials_stop_and_leave_no_record(world, monkeypatch, engine, seeds):
    monkeypatch.setattr(session, "make_pruner", lambda spec: PruneOdd())
    cfg = config(world, training__engine=engine, optuna__n_trials=4, optuna__n_jobs=2, optuna__seeds_per_trial=seeds)
    run_search(cfg)
    trials = trials_of(cfg)
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED"] * 2
    for trial in trials:
        pruned = trial.number % 2 == 1
        assert list(trial.intermediate_values) == ([1] if pruned else [1, 2])
        folder = world.results / "lora" / "search" / "trials" / f"trial-{trial.number:04d}"
        # A seed that is through before the last one comes to this epoch keeps its record.
        assert len(list(folder.glob("seed-*/record.json"))) == (0 if pruned else seeds)


def test_pruners_by_name(world):
    found = {
        name: type(make_pruner(SearchSpec.of(config(world, optuna__pruner=name)))).__name__
        for name in ("none", "median", "hyperband")
    }
    assert found == {"none": "NopPruner", "median": "MedianPruner", "hyperband": "HyperbandPruner"}
    cfg = config(world, optuna__pruner="hyperband", optuna__n_trials=3, training__epochs=3)
    run_search(cfg)
    assert set(states(cfg)) <= {"COMPLETE", "PRUNED"} and len(states(cfg)) == 3


# --- lanes --------------------------------------------------------------------------------------


def test_trials_share_one_backbone_and_a_free_lane_takes_the_next(world, monkeypatch):
    engines, running = [], []
    build, claim = lane_trainer.make_lanes, SharedStudy.claim
    monkeypatch.setattr(lane_trainer, "make_lanes", lambda *args: engines.append(build(*args)) or engines[-1])

    def counted(self, *args):
        trial = claim(self, *args)
        if trial is not None:
            running.append(sum(t.state == TrialState.RUNNING for t in self.trials()))
        return trial

    monkeypatch.setattr(SharedStudy, "claim", counted)
    space = {"lora_rank": RANK, "epochs": {"type": "int", "low": 1, "high": 3}}
    cfg = config(world, space=space, model__lora__rank=1, optuna__n_jobs=3, optuna__n_trials=7)
    run_search(cfg)
    assert states(cfg) == ["COMPLETE"] * 7
    assert len(engines) == 1, "one engine with room for the highest rank of the space"
    assert engines[0].buffers.layout.rank == 4 and engines[0].width == 3
    assert running[:3] == [1, 2, 3] and max(running) == 3


def test_what_cannot_share_lanes_gets_lanes_of_its_own(world, monkeypatch):
    engines = []
    build = lane_trainer.make_lanes
    monkeypatch.setattr(lane_trainer, "make_lanes", lambda *args: engines.append(build(*args)) or engines[-1])
    space = {"max_length": {"type": "categorical", "choices": [16, 32]}}
    cfg = config(world, space=space, optuna__n_jobs=2, optuna__n_trials=4, optuna__sampler="random", training__epochs=1)
    run_search(cfg)
    assert states(cfg) == ["COMPLETE"] * 4
    lengths = [t.params["dataset.max_length"] for t in trials_of(cfg)]
    assert set(lengths) == {16, 32} and len(engines) > 1
    assert [record_of(cfg, i).config["dataset"]["max_length"] for i in range(4)] == lengths


def test_a_trial_in_lanes_scores_what_the_run_scores_alone(world):
    cfg = config(world, optuna__n_trials=3, optuna__n_jobs=3)
    run_search(cfg)
    search, trial = SearchSpec.of(cfg), trials_of(cfg)[1]
    alone = search.trial_config(1, trial.params)
    (record,) = train_runs([RunSpec(alone, 42)], overwrite=True)
    assert record.metrics["accuracy"] == pytest.approx(trial.value)


def test_a_stopped_run_leaves_nothing_and_the_others_go_on(world):
    def stop_first(event) -> None:
        if isinstance(event, Evaluated) and event.seed == 0:
            raise StopRun

    for engine in ("lanes", "peft"):
        cfg = world.config("lora", run_id=engine, training__engine=engine)
        records = train_runs([RunSpec(cfg, seed) for seed in (0, 1)], stop_first)
        assert [(r.seed, r.status) for r in records] == [(1, "complete")]
        assert [p.name for p in (world.results / engine).glob("seed-*")] == ["seed-1"]


# --- what is refused before anything is trained -------------------------------------------------


def test_what_cannot_be_searched(world):
    with pytest.raises(UserError, match="no search space"):
        run_search(world.config("lora"))
    fraction = {"validation_fraction": {"type": "uniform", "low": 0.1, "high": 0.2}}
    with pytest.raises(UserError, match="dataset.validation_fraction cannot be searched"):
        run_search(config(world, space=fraction))
    with pytest.raises(UserError, match="target_modules"):
        run_search(config(world, model__lora__target_modules=["nothing"]))
    assert states(config(world)) == [], "a model that does not go costs no trial"
    with pytest.raises(UserError, match="must be a whole number, not 1.0"):
        config(world, space={"lora_rank": {"type": "uniform", "low": 1, "high": 8}})
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        config(world, space={"lerning_rate": RATE})


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://host/db", "mysql is not supported"),
        ("nonsense", "not a database URL"),
        ("sqlite:///:memory:", "lost when its worker ends"),
        (
            "postgresql://somebody:secret@127.0.0.1:1/none",
            r"somebody:\*\*\*@127.0.0.1:1/none: the study cannot be read",
        ),
    ],
)
def test_storages(world, url, reason):
    pytest.importorskip("psycopg")
    with pytest.raises(UserError, match=reason) as refused:
        run_search(config(world, optuna__storage=url))
    assert "secret" not in str(refused.value)


def test_the_storages_password_stays_out_of_the_files(world, tmp_path):
    cfg = config(world, optuna__n_trials=1, optuna__storage=f"sqlite:///{tmp_path}/secret.db", training__epochs=1)
    run_search(cfg)
    files = [p for p in world.results.rglob("*") if p.suffix in (".yaml", ".json", ".csv")]
    assert len(files) >= 4 and not any("secret.db" in p.read_text(encoding="utf-8") for p in files)


# --- claims -------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    def connect() -> SharedStudy:
        url = database_url(f"sqlite:///{tmp_path}/study.db")
        sampler = optuna.samplers.RandomSampler
        return SharedStudy(url, "s", "maximize", lambda n: sampler(seed=n), optuna.pruners.NopPruner())

    return connect


SPACE = {"x": optuna.distributions.FloatDistribution(0, 1)}


def test_a_dead_workers_trial_is_tried_again_with_its_parameters(study, monkeypatch):
    monkeypatch.setattr(storage, "GRACE_SECONDS", 1)
    dead, alive = study(), study()
    lost = dead.claim(2, SPACE)
    other = alive.claim(2, SPACE)
    assert lost.params != other.params
    assert alive.claim(2, SPACE) is None, "its worker may be alive"
    monkeypatch.setattr(alive._database, "grace_period", -1)  # silent for longer than that
    monkeypatch.setattr(alive.heartbeat, "_trial_ids", set())
    alive.finish(other, 1.0, [1.0])
    again = alive.claim(2, SPACE)
    assert again.params == lost.params and again.number == 2
    assert dead.finish(lost, 0.5, [0.5]) is False and dead.report(lost, 0.5, 1) is False
    assert alive.finish(again, 0.7, [0.7]) and alive.claim(2, SPACE) is None
    assert [(t.state.name, is_counted(t)) for t in alive.trials()] == [
        ("FAIL", False), ("COMPLETE", True), ("COMPLETE", True),
    ]  # fmt: skip


def test_a_trial_that_kills_every_worker_is_given_up(study, monkeypatch):
    shared = study()
    monkeypatch.setattr(shared._database, "grace_period", -1)
    claims = 0
    while shared.claim(1, SPACE) is not None:
        claims += 1
        assert claims <= 3
    assert claims == 3
    assert "its worker died 3 times" in (cause_of(shared.trials()[-1]) or "")
    assert [is_counted(t) for t in shared.trials()] == [False, False, True]


def test_an_interrupted_trial_is_requeued(study):
    shared = study()
    trial = shared.claim(1, SPACE)
    shared.requeue(trial)
    again = study().claim(1, SPACE)
    assert again.params == trial.params
    assert shared.claim(1, SPACE) is None
    # However often.
    for _ in range(5):
        shared.requeue(again)
        again = shared.claim(1, SPACE)
    assert shared.finish(again, 1.0, [1.0])
    assert sum(map(is_counted, shared.trials())) == 1


def test_fewer_trials_than_are_there(study):
    shared = study()
    for _ in range(3):
        shared.requeue(shared.claim(3, SPACE)) if _ == 2 else shared.finish(shared.claim(3, SPACE), 1.0, [1.0])
    assert shared.claim(2, SPACE) is None
    assert shared.claim(3, SPACE) is not None


def test_a_foreign_study_is_refused(study):
    shared = study()
    shared.study.enqueue_trial({"x": 0.5})
    with pytest.raises(UserError, match="was not made by fwlora search"):
        shared.bind({"space": {}})
    assert best_of(shared.trials(), "maximize") is None


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["+optuna.search_space.lerning_rate={type: loguniform, low: 1e-4, high: 1e-2}"],
            "did you mean 'learning_rate'",
        ),
        (["optuna.n_trails=4"], "did you mean 'optuna.n_trials'"),
        (["workers=0"], "workers=0: must be a whole number"),
        (["hydra/launcher=joblib"], "say how many workers"),
        (["workers=2", "hydra/launcher=slurm"], "hydra/launcher=slurm"),
        (["workers=2", "hydra.launcher._target_=os.system"], "_target_ and ${…} are refused"),
        (["optuna.pruner=medium"], "did you mean 'median'"),
        (["seeds=1..3"], "unknown key 'seeds'"),
    ],
)
def test_wrong_words(world, tmp_path, capsys, words, said):
    path = tmp_path / "lora.yaml"
    path.write_text(to_yaml(config(world)), encoding="utf-8")
    assert main(["search", f"run={path}", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert not (world.results / "lora" / "search" / "trials").exists()


def test_the_command_searches_several_runs(world, tmp_path, capsys):
    paths = []
    for method in ("lora", "fw_lora"):
        path = tmp_path / f"{method}.yaml"
        path.write_text(to_yaml(config(world, method)), encoding="utf-8")
        paths.append(str(path))
    assert main(["search", f"run={','.join(paths)}", "optuna.n_trials=1", "training.epochs=1"]) == 0
    assert [states(config(world, m, training__epochs=1)) for m in ("lora", "fw_lora")] == [["COMPLETE"]] * 2
