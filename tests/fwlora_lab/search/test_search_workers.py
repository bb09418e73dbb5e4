"""One study, several processes: killed with SIGKILL, stopped with Ctrl-C, started by Hydra's launchers.

pytest tests/fwlora_lab/search/test_search_workers.py

The PostgreSQL test starts a server of its own and is skipped where Debian's package is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from omegaconf import OmegaConf
from tiny import World

from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.validation import with_values
from fwlora_lab.records.folder import find_records
from fwlora_lab.search import results, storage
from fwlora_lab.search.run import run_search
from fwlora_lab.search.session import open_study
from fwlora_lab.search.shared_study import SharedStudy
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.search.storage import database_url
from fwlora_lab.search.trials import is_counted
from fwlora_lab.search.worker import TrialWorker
from fwlora_lab.training import launch
from fwlora_lab.training.events import Evaluated
from fwlora_lab.training.jobs import RunSpec
from fwlora_lab.training.scheduler import train_runs

# Debian keeps the server's programs out of PATH, a folder for each version.
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"), key=lambda p: float(p.parent.name))
# A server process that has imported everything: each worker is a fork of it, and starts at once.
multiprocessing.set_forkserver_preload(["fwlora_lab.search", "fwlora_lab.lanes"])
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setattr(results, "_plot", lambda *_, **__: None)  # they take longer than the training here
    return World(tmp_path)


def config(world: World, n_trials: int, **changes) -> RunConfig:
    space = {"learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-1}}
    block = {"n_trials": n_trials, "search_space": space, "n_jobs": 1, **changes}
    return world.config("lora", optuna=block, training__engine="lanes", training__epochs=1)


def work(config_json: str, hang: str | None = None) -> None:
    """A worker with frequent heartbeats; with `hang` it touches that file in its first trial and stops there."""
    storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS = 1, 10  # a busy machine may send none for some seconds
    results._plot = lambda *_, **__: None
    if hang is not None:
        on_event = TrialWorker.on_event

        def hanging(self, event) -> None:
            if isinstance(event, Evaluated):
                Path(hang).touch()
                time.sleep(600)  # the heartbeats go on
            on_event(self, event)

        TrialWorker.on_event = hanging  # type: ignore[method-assign]
    raise SystemExit(run_search(RunConfig.model_validate_json(config_json)))


def trials_of(cfg: RunConfig) -> list[optuna.trial.FrozenTrial]:
    return open_study(SearchSpec.of(cfg)).trials()


def wait_for(what, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def wait_for_a_trial(cfg: RunConfig, state: str) -> None:
    study = open_study(SearchSpec.of(cfg))
    wait_for(lambda: any(t.state.name == state for t in study.trials()))


def kill_one_of(workers: int, cfg: RunConfig, tmp_path: Path) -> None:
    """Run the search in some workers, kill one in the midst of a trial, and look at what the others make of it."""
    mark = tmp_path / "in-a-trial"
    victim = PROCESSES.Process(target=work, args=(cfg.model_dump_json(), str(mark)))
    others = [PROCESSES.Process(target=work, args=(cfg.model_dump_json(),)) for _ in range(workers - 1)]
    victim.start()
    wait_for(mark.exists)
    (lost,) = [t for t in trials_of(cfg) if t.state.name == "RUNNING"]
    for process in others:
        process.start()
    wait_for_a_trial(cfg, "COMPLETE")
    assert victim.pid is not None and victim.is_alive()
    os.kill(victim.pid, signal.SIGKILL)
    for process in (victim, *others):
        process.join(300)
    assert victim.exitcode == -signal.SIGKILL
    assert [process.exitcode for process in others] == [0] * len(others)

    found = trials_of(cfg)
    assert cfg.optuna is not None
    assert Counter(t.state.name for t in found) == {"COMPLETE": cfg.optuna.n_trials, "FAIL": 1}
    assert found[lost.number].state.name == "FAIL" and not is_counted(found[lost.number])
    (retried,) = [t for t in found if t.params == lost.params and t.state.name == "COMPLETE"]
    assert retried.system_attrs["failed_trial"] == lost.number
    assert len({str(t.params) for t in found}) == cfg.optuna.n_trials
    # Nothing is left to do, and the tables do not count the killed one.
    assert run_search(cfg) == 0 and len(trials_of(cfg)) == len(found)
    table = (Path(cfg.results_dir) / "lora" / "search" / "trials.csv").read_text().splitlines()
    assert sum(",interrupted," in line for line in table) == 1
    assert sum(",complete," in line for line in table) == cfg.optuna.n_trials


def test_sqlite_two_workers_one_killed(world, tmp_path):
    kill_one_of(2, config(world, 5), tmp_path)


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a server of our own on a free port, run by a user who is not root."""
    if not (POSTGRES / "initdb").exists():
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="pip install 'fwlora[postgres]'")
    user = None
    if os.geteuid() == 0:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
    # pytest's own folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="fwlora-postgres-"))
    as_user = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, name = folder / "data", "fwlora"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_user}
    command = [POSTGRES / "initdb", "-D", data, "-U", name, "--auth=trust", "--no-sync", "--encoding=UTF8"]
    subprocess.run(command, check=True, **quiet)
    server = subprocess.Popen(
        [POSTGRES / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"], **quiet
    )
    try:
        import psycopg

        def answers() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(host="127.0.0.1", port=port, user=name, dbname="postgres").close()
                return True
            return False

        wait_for(answers)
        yield f"postgresql://{name}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_postgres_four_workers_one_killed(world, tmp_path, postgres):
    kill_one_of(4, config(world, 7, storage=postgres), tmp_path)


def test_ctrl_c_once_finishes_the_running_trials_twice_stops_at_once(world, tmp_path):
    cfg = config(world, 4, n_jobs=2)
    path = tmp_path / "log"

    def start() -> BaseProcess:
        process = PROCESSES.Process(target=stoppable, args=(cfg.model_dump_json(), str(path)))
        process.start()
        wait_for_a_trial(cfg, "RUNNING")
        return process

    once = start()
    os.kill(once.pid or 0, signal.SIGINT)
    once.join(300)
    assert once.exitcode == 130
    found = trials_of(cfg)
    assert 1 <= len(found) <= 2 and {t.state.name for t in found} == {"COMPLETE"}
    assert (Path(cfg.results_dir) / "lora" / "search" / "best.yaml").exists()

    twice = start()
    os.kill(twice.pid or 0, signal.SIGINT)
    wait_for(lambda: "once more stops at once" in path.read_text())
    os.kill(twice.pid or 0, signal.SIGINT)
    twice.join(300)
    assert twice.exitcode == 130
    states = Counter(t.state.name for t in trials_of(cfg))
    assert not states["RUNNING"] and states["COMPLETE"] >= len(found)

    assert run_search(cfg) == 0
    finished = trials_of(cfg)
    assert Counter(t.state.name for t in finished if is_counted(t)) == {"COMPLETE": 4}


def interrupted(config_json: str) -> None:
    """The command, with Ctrl-C pressed twice just when its second trial was taken in the storage."""
    results._plot = lambda *_, **__: None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    claim = SharedStudy.claim

    def claiming(self, *args):
        trial = claim(self, *args)
        if trial is not None and trial.number == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return trial

    SharedStudy.claim = claiming  # type: ignore[method-assign]
    try:
        run_search(RunConfig.model_validate_json(config_json))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def test_no_trial_is_left_running_by_a_ctrl_c_that_meets_its_claim(world):
    cfg = config(world, 4, n_jobs=2)
    process = PROCESSES.Process(target=interrupted, args=(cfg.model_dump_json(),))
    process.start()
    process.join(300)
    assert process.exitcode == 130
    # Handed back: each is there once more, for whoever comes next.
    assert Counter(t.state.name for t in trials_of(cfg)) == {"FAIL": 2, "WAITING": 2}


def stoppable(config_json: str, log: str) -> None:
    """The command in a process of its own, slow enough to be interrupted, its screen in a file."""
    import sys

    from fwlora_lab.training.lane_trainer import LaneTrainer

    results._plot = lambda *_, **__: None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    step = LaneTrainer.step

    def slowly(self, *args) -> None:
        time.sleep(0.5)  # 11 steps: a trial outlasts whatever a busy machine does between its start and the signal
        step(self, *args)

    LaneTrainer.step = slowly  # type: ignore[method-assign]
    sys.stdout = open(log, "w", buffering=1)
    try:
        run_search(RunConfig.model_validate_json(config_json))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@pytest.mark.parametrize(("launcher", "workers"), [("joblib", 2), ("submitit_local", 1)])
def test_hydras_launchers_start_the_workers(world, launcher, workers, capsys):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'fwlora[workers]'")
    cfg = config(world, 4)
    assert run_search(cfg, workers, [f"hydra/launcher={launcher}"]) == 0
    found = trials_of(cfg)
    assert [t.state.name for t in found] == ["COMPLETE"] * 4
    assert "[4/4]" in capsys.readouterr().out


def launching(config_json: str) -> None:
    raise SystemExit(run_search(RunConfig.model_validate_json(config_json), 2))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="who whose child is, Linux tells in /proc")
def test_workers_leave_with_the_one_that_launched_them(world):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'fwlora[workers]'")
    cfg = with_values(config(world, 4), {"training.epochs": 5000})
    process = PROCESSES.Process(target=launching, args=(cfg.model_dump_json(),))
    process.start()
    wait_for_a_trial(cfg, "RUNNING")
    of = Path(f"/proc/{process.pid}/task")
    children = [int(pid) for task in of.iterdir() for pid in (task / "children").read_text().split()]
    workers = [pid for pid in children if "LokyProcess" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert workers
    process.kill()
    process.join()

    def gone(pid: int) -> bool:
        try:
            return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return True

    wait_for(lambda: all(gone(pid) for pid in workers), 60)


def late(parent: int) -> None:
    pids = Path(tempfile.mkdtemp())
    launch._Task(functools.partial(time.sleep, 600), parent, pids)(OmegaConf.create())


def test_a_worker_that_begins_after_its_launcher_was_killed_leaves_at_once():
    gone = PROCESSES.Process(target=time.time)
    gone.start()
    gone.join()
    worker = PROCESSES.Process(target=late, args=(gone.pid,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 1


def claim_all(url: str, pipe) -> None:
    def sampler(number: int):
        return optuna.samplers.RandomSampler(seed=number)

    study = SharedStudy(database_url(url), "s", "maximize", sampler, optuna.pruners.NopPruner())
    pipe.send("ready")
    pipe.recv()
    got = []
    while (trial := study.claim(12, {"x": optuna.distributions.FloatDistribution(0, 1)})) is not None:
        got.append(trial.number)
        time.sleep(0.05)  # a trial takes its time: without, the first to hold the database makes them all
        study.finish(trial, 0.0, [0.0])
    pipe.send(got)


@pytest.mark.parametrize("storage", ["sqlite", "postgres"])
def test_racing_workers_never_claim_one_too_many(storage, tmp_path, request):
    url = f"sqlite:///{tmp_path}/s.db" if storage == "sqlite" else request.getfixturevalue("postgres")
    pipes = [PROCESSES.Pipe() for _ in range(4)]
    processes = [PROCESSES.Process(target=claim_all, args=(url, pipe)) for _, pipe in pipes]
    for process in processes:
        process.start()
    for here, _ in pipes:
        assert here.recv() == "ready"  # a study made by all at once
    for here, _ in pipes:
        here.send("go")
    claimed = [here.recv() for here, _ in pipes]
    for process in processes:
        process.join(300)
    assert sorted(sum(claimed, [])) == list(range(12))
    assert sum(bool(got) for got in claimed) > 1, "nobody raced"


def terminable(config_json: str, workers: int) -> None:
    """The command as a scheduler sees it that ends it by SIGTERM."""
    from fwlora_lab.training.stop_signals import sigterm_raises

    results._plot = lambda *_, **__: None
    with sigterm_raises():
        raise SystemExit(run_search(RunConfig.model_validate_json(config_json), workers))


@pytest.mark.parametrize("engine", ["lanes", "peft"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_goes_on_where_sigterm_stopped_it(world, tmp_path, workers, engine):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'fwlora[workers]'")
    if workers == 2 and engine == "peft":
        pytest.skip("the same code as with lanes")
    cfg = with_values(config(world, 2, n_jobs=1), {"training.epochs": 60, "training.engine": engine})
    whole = with_values(cfg, {"results_dir": str(tmp_path / "undisturbed")})
    process = PROCESSES.Process(target=terminable, args=(cfg.model_dump_json(), workers))
    process.start()
    trials = Path(cfg.results_dir) / cfg.run_id / "search" / "trials"
    wait_for(lambda: len(list(trials.glob("trial-*/*/checkpoints/*.pt"))) >= workers, 60)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    stopped = {file.parents[2].name: int(file.stem[5:]) for file in sorted(trials.glob("trial-*/*/checkpoints/*.pt"))}
    assert stopped, "the trials in training have left checkpoints"
    assert not any(t.state.name == "RUNNING" for t in trials_of(cfg))
    assert run_search(cfg, 1) == 0
    records = find_records(trials).records
    resumed = [record for record in records if len(record.attempts) == 2]
    assert len(resumed) == len(stopped) and sorted(trials.rglob("checkpoints")) == []
    for record in resumed:
        alone = with_values(RunConfig.model_validate(record.config), {"results_dir": str(tmp_path / "alone")})
        undisturbed = train_runs([RunSpec(alone, record.seed)])[0]
        assert undisturbed.metrics == record.metrics
        # The last bits depend on how many threads and lanes there are.
        losses = [[epoch.train_loss for epoch in r.epochs] for r in (record, undisturbed)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    if workers == 1:  # two workers draw the second trial while the first is in training
        assert run_search(whole, 1) == 0
        assert scores_by_number(cfg) == scores_by_number(whole)


def scores_by_number(cfg: RunConfig) -> list[tuple[dict, float | None]]:
    """The counted trials' parameters and scores, in the order of the parameters."""
    return sorted(((t.params, t.value) for t in trials_of(cfg) if is_counted(t)), key=str)
