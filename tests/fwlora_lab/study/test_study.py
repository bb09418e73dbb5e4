"""Studies: what they consist of, what they train, and that being killed costs nothing but time.

pytest tests/fwlora_lab/study/test_study.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import World, make_data

from fwlora_lab.analysis.measurements import clusters, measurements_of
from fwlora_lab.cli.main import main
from fwlora_lab.config.tree import available_studies
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.data.csv_jsonl import load_files
from fwlora_lab.data.load import load_task
from fwlora_lab.errors import UserError
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.records.folder import find_records, load_predictions, load_record, status_of
from fwlora_lab.records.study_plan import load_plan
from fwlora_lab.search.spec import SearchSpec
from fwlora_lab.study import estimate as estimates
from fwlora_lab.study import run as studies
from fwlora_lab.study import workers
from fwlora_lab.study.estimate import dry_run_lines, estimate
from fwlora_lab.study.plan import PlannedCell, parse_request, plan_study
from fwlora_lab.study.run import run_study
from fwlora_lab.study.spec import load_study
from fwlora_lab.training.device import pick_device
from fwlora_lab.training.events import RunFinished
from fwlora_lab.training.resources import ResourceCache
from fwlora_lab.training.scheduler import train_runs

# A server process that has imported everything: each study is a fork of it, and starts at once.
multiprocessing.set_forkserver_preload(["fwlora_lab.study", "fwlora_lab.lanes"])
PROCESSES = multiprocessing.get_context("forkserver")
SPACE = {"learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-1}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def write_study(world: World, **changes) -> str:
    """A study of LoRA and FW-LoRA at 7 % on the tiny world, its base beside it; the file's path."""
    folder = world.results.parent
    base = world.config("lora", training__engine="lanes", results_dir=str(world.results))
    (folder / "base.yaml").write_text(to_yaml(base))
    study = {
        "about": "tiny",
        "base": "base.yaml",
        "tasks": {"csv": {}},
        "methods": {
            "lora": {"about": "plain", "set": ["method=lora"]},
            "fw_lora": {"about": "weighted", "set": ["method=fw_lora"]},
        },
        "budgets": [7.0],
        "seeds": "0..1",
        "reference": "lora",
        **changes,
    }
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return str(file)


def plan(world: World, *words: str, **changes):
    return plan_study(parse_request([f"study={write_study(world, **changes)}", f"results_dir={world.results}", *words]))


def search_of(cell: PlannedCell) -> SearchSpec:
    assert cell.search is not None
    return cell.search


# --- what a study consists of -------------------------------------------------------------------


@pytest.mark.parametrize("name", available_studies())
def test_packaged_studies_are_valid(name):
    found = plan_study(parse_request([f"study={name}"]))
    study = load_study(name)
    assert len(found.cells) == len(study.tasks) * len(study.methods) * len(study.budgets)
    assert len({cell.cfg.run_id for cell in found.cells}) == len(found.cells)
    assert found.as_record().command == f"fwlora compare study={name}"
    for cell in found.cells:
        assert cell.cfg.model.parameter_budget_percent == cell.budget
        assert cell.cfg.model.lora.rank is None
        assert cell.cfg.results_dir == f"results/{name}"
    searches = [cell.search for cell in found.cells]
    assert all(searches) if study.selection.policy == "tuned" else not any(searches)


def test_the_requests_study_is_the_request():
    found = plan_study(parse_request(["study=request"]))
    assert {c.cfg.model.pretrained_id for c in found.cells} == {"roberta-base"}
    assert {c.budget for c in found.cells} == {0.1, 0.2, 0.5} and len(found.seeds) == 10
    for cell in found.cells:
        t = cell.cfg.training
        assert (t.epochs, t.batch_size, t.learning_rate, t.warmup_ratio) == (3, 32, 2e-4, 0.06)
        assert (cell.cfg.fw_lora.penalty_strength, cell.cfg.fw_lora.warmup_steps) == (1e-4, 500)
        assert cell.cfg.fw_lora.estimator == "exact" and cell.cfg.model.lora.scale == 2.0
    assert len(found.claims) == 16


def test_every_method_is_tuned_with_the_same_effort():
    cells = plan_study(parse_request(["study=offline"])).cells
    for task in ("cola", "sst2"):
        searches = [search_of(c) for c in cells if c.task == task]
        assert len({s.optuna.n_trials for s in searches}) == 1
        assert len({(s.optuna.sampler, s.optuna.pruner, tuple(s.seeds)) for s in searches}) == 1
        # One width for all; AdaLoRA's lies higher.
        rates = [s.dimensions["training.learning_rate"] for s in searches]
        assert [d.high / d.low for d in rates if d.high and d.low] == pytest.approx([33] * 4, rel=0.02)
        assert [d.low for d in rates] == [3e-4, 1e-3, 3e-4, 3e-4]
    assert all(search_of(c).base.training.evaluate_on == "validation" for c in cells)


def test_words_choose_a_part_and_overrides_reach_every_run(world):
    found = plan(world, "methods=fw_lora", "seeds=3,5", "budgets=5,7", "training.epochs=1")
    assert [c.cfg.run_id for c in found.cells] == ["csv-5-fw_lora", "csv-7-fw_lora"]
    assert found.seeds == (3, 5) and {c.cfg.training.epochs for c in found.cells} == {1}
    command = found.request.command()
    assert "seeds" not in command and "methods=fw_lora budgets=5,7" in command and "training.epochs=1" in command
    assert plan_study(parse_request(command.split()[2:] + ["seeds=3,5"])) == found


def test_the_example_in_the_docs_is_a_study(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "compare.md").read_text()
    file = tmp_path / "my-study.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0])
    found = plan_study(parse_request([f"study={file}"]))
    assert [cell.method for cell in found.cells] == ["lora", "power"] and len(found.claims) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "say which study"),
        (["study=ofline"], "did you mean 'offline'"),
        (["study=offline", "study=demo"], "is given twice"),
        (["study=offline", "seeds="], "empty"),
        (["study=offline", "seeds=3..1"], "runs backwards"),
        (["study=offline", "seeds=0,1000"], "1000 is the seed that hyper-parameters are tuned with"),
        (["study=offline", "tasks=colla"], "did you mean 'cola'"),
        (["study=offline", "methods=lora,adalorra"], "did you mean 'adalora'"),
        (["study=offline", "budgets=much"], "budgets=0.1,0.2,0.5"),
        (["study=offline", "budgets=-1"], "parameter_budget_percent"),
        (["study=offline", "selection.n_trials=0"], "whole number"),
        (["study=offline", "selection.policy=best"], "fixed or tuned"),
        (["study=demo", "selection.policy=tuned"], "needs a space"),
        (["study=offline", "training.learning_rte=1"], "did you mean 'training.learning_rate'"),
        (["study=offline", "run_id=x"], "set by the study itself"),
        (["study=offline", "training.evaluate_on=selection"], "set by the study itself"),
        (["study=nothing.yaml"], "no such file"),
    ],
)
def test_words_that_are_refused(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reference": "full"}, "'full' is not a method of the study"),
        ({"budgets": []}, "budgets"),
        ({"budgets": [7.0, 7.0]}, "is given twice"),
        ({"budgets": [".nan"]}, "budgets"),
        ({"tasks": {}}, "tasks"),
        ({"tasks": {"a/b": {}}}, "part of a folder's name"),
        ({"methods": {"lora": {"about": "x", "set": ["method=lorra"]}}}, "did you mean 'lora'"),
        ({"methods": {"lora": {"about": "x", "sett": []}}}, "mine.yaml:"),
        ({"selection": {"policy": "tuned"}}, "needs a space"),
        ({"selection": {"policy": "tuned", "space": {"learning_rte": SPACE["learning_rate"]}}}, "learning_rate"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"base": "nothing.yaml"}, "nothing.yaml"),
        ({"claims": [{"metric": "accuracy"}]}, "claims.0.method"),
    ],
)
def test_broken_studies(world, changes, says):
    with pytest.raises(UserError) as caught:
        plan(world, **changes)
    assert says in str(caught.value)


def test_claims_about_what_the_study_lacks(world):
    claim = {
        "metric": "accuracy",
        "method": "fw_lora",
        "reference": "adalora",
        "relation": "greater",
        "margin": 0.0,
        "scope": {"task": "csv", "budget": 7.0},
    }
    with pytest.raises(UserError, match="reference 'adalora' is none of the study's"):
        plan(world, claims=[claim])
    with pytest.raises(UserError, match="task 'cvs' is none of the study's.*did you mean 'csv'"):
        plan(world, claims=[claim | {"reference": "lora", "scope": {"task": "cvs", "budget": 7.0}}])


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("acuracy", "no run on csv records 'acuracy' (did you mean 'accuracy'?)"),
        ("f1", "claim one of accuracy, matthews_correlation, train_seconds"),
        ("trian_seconds", "did you mean 'train_seconds'"),
    ],
)
def test_claims_about_metrics_that_no_run_records_are_refused_before_anything_trains(world, capsys, metric, says):
    row = {"metric": metric, "method": "fw_lora", "reference": "lora", "relation": "greater", "margin": 0.5}
    claims = [row | {"scope": {"task": "csv", "budget": 7.0}}]
    study = write_study(world, claims=claims)
    words = [f"study={study}", f"results_dir={world.results}"]
    for command in (["compare", *words], ["compare", *words, "--dry-run"], ["validate", study]):
        assert main(command) == 2
        assert says in capsys.readouterr().err
    assert not world.results.exists() or not list(world.results.iterdir())
    write_study(world, claims=[claims[0] | {"metric": "steady_step_seconds"}])
    assert main(["validate", study]) == 0
    assert f"{study}: valid" in capsys.readouterr().out


def test_runs_timed_alone_are_refused_in_several_processes(world, capsys):
    study = write_study(world, timing="exclusive")
    for more in (["workers=2"], ["workers=2", "--dry-run"]):
        assert main(["compare", f"study={study}", f"results_dir={world.results}", *more]) == 2
        assert "set workers=1, or timing=shared" in capsys.readouterr().err
    assert main(["compare", f"study={study}", "timing=alone"]) == 2
    assert "timing=alone: must be shared or exclusive" in capsys.readouterr().err
    with pytest.raises(UserError, match="workers=1"):
        run_study(plan(world, "timing=exclusive"), workers=2)
    plan(world, "timing=shared", timing="exclusive").check_workers(2)


# --- what it trains -----------------------------------------------------------------------------


def test_a_study_trains_what_is_missing_and_nothing_twice(world, monkeypatch):
    trained: list[list[tuple[str, int]]] = []

    def noted(runs, on_event, **more):
        trained.append([(run.cfg.run_id, run.seed) for run in runs])
        return train_runs(runs, on_event, **more)

    monkeypatch.setattr(studies, "train_runs", noted)
    monkeypatch.setattr(studies, "max_lanes", lambda: 2)
    first = run_study(plan(world, "seeds=0"))
    assert [(r.run_id, r.seed, r.status) for r in first] == [
        ("csv-7-lora", 0, "complete"),
        ("csv-7-fw_lora", 0, "complete"),
    ]
    trained.clear()
    records = run_study(plan(world, "seeds=0..2"))
    # Method after method, two seeds at a time: what is compared stands near in time, each among its own kind.
    assert trained == [
        [("csv-7-lora", 1)],
        [("csv-7-fw_lora", 1)],
        [("csv-7-lora", 2)],
        [("csv-7-fw_lora", 2)],
    ]
    assert [r.seed for r in records] == [0, 1, 2] * 2 and {r.status for r in records} == {"complete"}
    assert records[0] == first[0]
    trained.clear()
    assert run_study(plan(world, "seeds=0..2")) == records and trained == []
    found = load_plan(world.results)
    assert found is not None and found.seeds == [0, 1, 2] and found.reference == "lora"
    assert {cell.run_id for cell in found.cells} == {r.run_id for r in records}
    # Paired: the same head, the same order of the data.
    losses = [r.epochs[0].train_loss for r in records if r.seed == 1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != records[2].epochs[0].train_loss


def test_runs_timed_alone_train_one_at_a_time_in_alternating_order(world, monkeypatch):
    """A real A/A study: one method under two names, each seed a measurement of its own."""
    trained: list[list[tuple[str, int]]] = []

    def noted(runs, on_event, **more):
        trained.append([(run.cfg.run_id.rpartition("-")[2], run.seed) for run in runs])
        return train_runs(runs, on_event, **more)

    monkeypatch.setattr(studies, "train_runs", noted)
    methods = {name: {"about": "the same", "set": ["method=lora", "training.epochs=1"]} for name in ("lora", "twin")}
    words = {"timing": "exclusive", "methods": methods}
    alone = run_study(plan(world, "seeds=0..2", **words))
    assert trained == [
        [(name, seed)]
        for seed, names in enumerate(("lt", "tl", "lt"))
        for name in ({"l": "lora", "t": "twin"}[letter] for letter in names)
    ]
    assert len({record.measurement for record in alone}) == 6 and None not in {r.measurement for r in alone}
    assert [r.metrics for r in alone[:3]] == [r.metrics for r in alone[3:]], "the same scores under both names"
    found = measurements_of({"lora": alone[:3], "twin": alone[3:]})
    assert clusters(range(3), ["lora", "twin"], found) == ((0,), (1,), (2,))
    monkeypatch.setattr(studies, "max_lanes", lambda: 3)  # otherwise the machine's cores and memory decide
    shared = run_study(plan(world, "seeds=0..5", **words | {"timing": "shared"}))
    by_method = {"lora": shared[:6], "twin": shared[6:]}
    assert len({record.measurement for record in shared[3:6]}) == 1, "seeds that trained in one turn"
    assert clusters(range(6), ["lora", "twin"], measurements_of(by_method)) == ((0,), (1,), (2,), (3, 4, 5))
    command = plan(world, "timing=exclusive", **words).request.command()
    assert "timing=exclusive" in command


def test_records_of_another_config_or_other_data_are_refused(world):
    run_study(plan(world, "seeds=0", "methods=lora"))
    with pytest.raises(UserError, match="training.epochs: 2 there, 1 asked for"):
        run_study(plan(world, "seeds=0", "methods=lora", "training.epochs=1"))
    train = Path(world.train_file)
    train.write_text(train.read_text().replace("the dog", "the cat"))
    with pytest.raises(UserError, match="the data"):
        run_study(plan(world, "seeds=0", "methods=lora"))


def test_a_failed_run_is_kept_and_the_rest_goes_on(world, capsys):
    broken = {"about": "diverges", "set": ["method=lora", "training.learning_rate=1e38"]}
    methods = {"lora": {"about": "plain", "set": ["method=lora"]}, "broken": broken}
    words = [f"study={write_study(world, methods=methods)}", f"results_dir={world.results}"]
    assert main(["compare", *words]) == 1
    out, err = capsys.readouterr()
    assert "csv-7-broken seed 0 failed: " in err and "diverged" in err
    assert "report.html" in out
    by_cell = {(r.run_id, r.seed): r.status for r in find_records(world.results).records}
    assert by_cell == {("csv-7-lora", s): "complete" for s in (0, 1)} | {("csv-7-broken", s): "failed" for s in (0, 1)}


def test_tuned_methods_train_with_their_best_trials_values(world):
    selection = {"policy": "tuned", "n_trials": 3, "seed": 77, "space": SPACE}
    methods = {
        "lora": {"about": "plain", "set": ["method=lora"]},
        "fw_lora": {
            "about": "weighted",
            "set": ["method=fw_lora"],
            "space": {"penalty_strength": {"type": "loguniform", "low": 1e-6, "high": 1e-2}},
        },
    }
    found = plan(world, "seeds=0", selection=selection, methods=methods)
    records = run_study(found)
    for record, cell in zip(records, found.cells, strict=True):
        trials = [load_record(p) for p in search_of(cell).folder.glob("trials/trial-*/seed-77")]
        assert len(trials) == 3 and {t.evaluated_on for t in trials} == {"validation"}
        scores = {t.config["training"]["learning_rate"]: t.metrics[t.primary_metric] for t in trials}
        assert scores[record.config["training"]["learning_rate"]] == max(scores.values())
        assert record.evaluated_on == "dev" and record.config["dataset"]["validation_fraction"] == 0.0
        lambdas = {t.config["fw_lora"]["penalty_strength"] for t in trials}
        assert (record.config["fw_lora"]["penalty_strength"] in lambdas) and len(lambdas) == (
            3 if cell.method == "fw_lora" else 1
        )
    again = run_study(found)
    assert again == records


def test_the_dry_run_says_what_is_left_and_trains_nothing(world, capsys):
    run_study(plan(world, "seeds=0"))
    before = sorted(world.results.rglob("*"))
    capsys.readouterr()
    rows = list(estimate(plan(world, "seeds=0..3")))
    assert [(row.done, row.runs, row.trials) for row in rows] == [(1, 3, 0)] * 2
    assert all(row.seconds > 0 for row in rows)
    lines = list(dry_run_lines(plan(world, "seeds=0..30", budgets=[7.0, 8.0])))
    assert max(map(len, lines)) <= 80
    assert [line.split()[-4:-1] for line in lines[1:5]] == [["1", "30", "0"]] * 2 + [["0", "31", "0"]] * 2
    assert " ".join(lines[5:]).endswith("28, 29, 30; nothing was trained")
    assert sorted(world.results.rglob("*")) == before
    record = find_records(world.results).records[0]
    assert record.times is not None
    assert rows[1].seconds / 3 < 30 * (record.times.train_seconds + record.times.eval_seconds)


def write_two_tasks(world: World) -> str:
    """A study of two tasks and two methods whose learning rate is tuned; the file's path."""
    other, _ = make_data(world.results.parent / "other", train=48)
    tasks = {"first": {}, "second": {"set": [f"dataset.train_file={other}"]}}
    selection = {"policy": "tuned", "n_trials": 2, "seed": 77, "space": SPACE}
    return write_study(world, tasks=tasks, selection=selection)


def count_calls(monkeypatch, function) -> list[tuple]:
    """The arguments of each call of the function from now on, whichever module it is called from."""
    calls: list[tuple] = []

    def counted(*args, **more):
        calls.append(args)
        return function(*args, **more)

    for name, module in list(sys.modules.items()):
        if name.startswith("fwlora_lab") and getattr(module, function.__name__, None) is function:
            monkeypatch.setattr(module, function.__name__, counted)
    return calls


def test_data_and_backbone_are_read_once_in_a_whole_study(world, monkeypatch):
    found = plan_study(
        parse_request([f"study={write_two_tasks(world)}", f"results_dir={world.results}", "training.epochs=1"])
    )
    loaded, backbones = count_calls(monkeypatch, load_task), count_calls(monkeypatch, load_backbone)
    read = count_calls(monkeypatch, load_files)
    resources = ResourceCache(pick_device())
    assert [row.trials for row in estimate(found, resources)] == [2] * 4
    records = run_study(found, resources=resources)
    assert len(records) == 8 and {r.status for r in records} == {"complete"}
    assert all(row.trials == row.runs == 0 for row in estimate(found, resources))
    files = sorted(cfg.train_file for (cfg,) in loaded)
    assert len(files) == 2 and len(set(files)) == 2, "tuning splits the same data in another way"
    assert len(read) == 2 and len(backbones) == 1
    loaded.clear()
    backbones.clear()
    # Also where nothing is passed from one call to the next.
    assert run_study(found) == records
    assert len(loaded) == 2 and not backbones


def test_a_worker_process_reads_data_and_backbone_once_for_all_batches(world, monkeypatch):
    found = plan(world, "seeds=0", "training.epochs=1")
    loaded, backbones = count_calls(monkeypatch, load_task), count_calls(monkeypatch, load_backbone)
    monkeypatch.setattr(workers, "leave_with", lambda parent: None)  # this process is not a worker
    ours, theirs = multiprocessing.Pipe()
    for cell in found.cells:
        ours.send([(cell.cfg.model_dump_json(), 0)])
    ours.send(None)
    former = signal.getsignal(signal.SIGINT)
    workers.work(theirs, 1, os.getpid())
    signal.signal(signal.SIGINT, former)
    messages = []
    while ours.poll():
        messages.append(ours.recv())
    assert len(loaded) == len(backbones) == 1
    trained = [message.run_id for message in messages if isinstance(message, RunFinished)]
    assert trained == [cell.cfg.run_id for cell in found.cells]


def test_trials_may_be_shorter_than_the_compared_runs(world):
    selection = {"policy": "tuned", "n_trials": 1, "space": SPACE, "set": ["training.epochs=1"]}
    found = plan(world, "seeds=0", "methods=lora", selection=selection)
    (cell,) = found.cells
    assert cell.search is not None and cell.search.cfg.training.epochs == 1 and cell.cfg.training.epochs == 2
    (record,) = run_study(found)
    (trial,) = find_records(cell.search.folder / "trials").records
    assert (len(trial.epochs), len(record.epochs)) == (1, 2)
    rate = trial.config["training"]["learning_rate"]
    assert record.config["training"]["learning_rate"] == rate


def test_each_run_is_looked_up_once(world, monkeypatch):
    run_study(plan(world, "seeds=0"))
    looked_up = count_calls(monkeypatch, status_of)
    run_study(plan(world, "seeds=0..1", "methods=lora"))
    # The run that is left to train is looked up again by `train_runs`, which another process may have overtaken.
    assert [(cfg.run_id, seed) for cfg, seed, *_ in looked_up if seed == 0] == [("csv-7-lora", 0)]


def test_a_busy_moment_does_not_make_a_method_look_slow(world, monkeypatch):
    """The machine is busy in the first probe of the first cell, and in the second one of the second."""
    found = plan(world, "seeds=0..2")
    seconds = iter([500.0, 10.0, 10.5, 400.0])
    monkeypatch.setattr(estimates, "_seconds_of_a_run", lambda *_: next(seconds))
    assert [row.seconds for row in estimate(found)] == [3 * 10.5, 3 * 10.0]


# --- killed, stopped, in several processes ------------------------------------------------------


def work(file: str, results: str, workers: int = 1) -> None:
    os.setpgid(0, 0)
    run_study(plan_study(parse_request([f"study={file}", f"results_dir={results}", "seeds=0..2"])), workers)


def comparable(results: Path) -> dict:
    """What must not depend on how often a study was killed."""
    found = {}
    for record in find_records(results).records:
        logits, labels = load_predictions(results / record.run_id / f"seed-{record.seed}")
        parts = record.model_dump(
            include={"status", "method", "config_fingerprint", "data_fingerprint", "epochs", "steps"}
        )
        found[record.run_id, record.seed] = parts | {"logits": logits.tobytes(), "labels": labels.tobytes()}
    return found


def test_killed_at_ten_random_moments_it_ends_with_the_same_records(world, monkeypatch):
    file = write_study(world)
    undisturbed = world.results.parent / "undisturbed"
    began = time.monotonic()
    process = PROCESSES.Process(target=work, args=(file, str(undisturbed)))
    process.start()
    process.join()
    whole = time.monotonic() - began
    assert process.exitcode == 0
    draw = random.Random(0)
    kills, finished = 0, {}
    while kills < 10:
        process = PROCESSES.Process(target=work, args=(file, str(world.results)))
        process.start()
        process.join(draw.uniform(0.1, 0.6) * whole)
        if process.exitcode is None:
            process.kill()
            process.join()
        else:
            assert process.exitcode == 0
        kills += 1
        for record in find_records(world.results).records:
            # What was finished once is never done again.
            assert finished.setdefault((record.run_id, record.seed), record) == record
    process = PROCESSES.Process(target=work, args=(file, str(world.results)))
    process.start()
    process.join()
    assert process.exitcode == 0
    last = comparable(world.results)
    assert len(last) == 6 and last == comparable(undisturbed)
    for key, record in finished.items():
        assert load_record(world.results / key[0] / f"seed-{key[1]}") == record
    leftovers = [p.name for p in world.results.rglob(".*") if not p.name.endswith(".lock")]
    assert leftovers == []


def test_workers_share_the_runs_and_end_with_their_parent(world):
    file = write_study(world)
    process = PROCESSES.Process(target=work, args=(file, str(world.results), 2))
    process.start()
    deadline = time.monotonic() + 120
    while not find_records(world.results).records and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid is not None
    group = os.getpgid(process.pid)
    process.kill()
    process.join()
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker outlived the process that started it")
    there = {(r.run_id, r.seed): r for r in find_records(world.results).records}
    assert there
    process = PROCESSES.Process(target=work, args=(file, str(world.results), 2))
    process.start()
    process.join()
    assert process.exitcode == 0
    records = find_records(world.results).records
    assert len(records) == 6 and {r.status for r in records} == {"complete"}
    assert all(there.get((r.run_id, r.seed), r) == r for r in records)


def test_one_process_or_two_give_the_same_records(world):
    file = write_study(world)
    other = world.results.parent / "other"
    words = [f"study={file}", "seeds=0..1"]
    one = run_study(plan_study(parse_request([*words, f"results_dir={world.results}"])))
    two = run_study(plan_study(parse_request([*words, f"results_dir={other}"])), workers=2)
    assert [r.metrics for r in one] == [r.metrics for r in two]
    for record in one:
        place = f"{record.run_id}/seed-{record.seed}"
        np.testing.assert_allclose(
            *(load_predictions(r / place)[0] for r in (world.results, other)), rtol=1e-4, atol=1e-5
        )
    assert json.loads((other / "study.json").read_text())["cells"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_signal_to_the_parent_lets_every_worker_write_its_checkpoints(world, number):
    """Two cells of long runs in two processes; the signal reaches the parent alone."""
    file = write_study(world)
    command = [sys.executable, "-m", "fwlora_lab.cli", "compare", f"study={file}", f"results_dir={world.results}"]
    process = subprocess.Popen(
        [*command, "seeds=0..1", "training.epochs=3000", "workers=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    def newest() -> list[int]:
        return [
            max(int(file.stem[5:]) for file in folder.glob("step-*.pt"))
            for folder in sorted(world.results.glob("*/seed-*/checkpoints"))
            if any(folder.glob("step-*.pt"))
        ]

    deadline = time.monotonic() + 120
    while len(newest()) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else 130), err
    assert len(newest()) == 4 and "Traceback" not in err


def kill_workers(world: World, how_many: int) -> threading.Thread:
    """Kill so many workers of this process as soon as each has written a checkpoint."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        written = world.results.glob
        while len({f.parent for f in written("*/seed-*/checkpoints/step-*.pt")}) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in multiprocessing.active_children()[:how_many]:
            process.kill()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_another_worker_goes_on_with_the_runs_of_one_that_was_killed(world, capsys):
    words = [f"study={write_study(world)}", "seeds=0", "training.epochs=60"]
    undisturbed = run_study(plan_study(parse_request([*words, f"results_dir={world.results.parent / 'other'}"])))
    thread = kill_workers(world, 1)
    records = run_study(plan_study(parse_request([*words, f"results_dir={world.results}"])), workers=2)
    thread.join()
    # Two processes share the cores, and other thread counts round sums in another way.
    for mine, other in zip(records, undisturbed, strict=True):
        assert mine.metrics == pytest.approx(other.metrics, abs=0.1)
    assert sorted(len(r.attempts) for r in records) == [1, 2]
    assert capsys.readouterr().out.count("its runs are trained by another one") == 1


def test_without_workers_left_the_study_says_what_to_do(world):
    words = [f"study={write_study(world)}", "seeds=0", "training.epochs=3000", f"results_dir={world.results}"]
    thread = kill_workers(world, 2)
    with pytest.raises(UserError, match="smaller workers="):
        run_study(plan_study(parse_request(words)), workers=2)
    thread.join()


def test_an_error_in_a_worker_is_raised_when_the_others_are_done(world, monkeypatch):
    found = plan(world, "seeds=0", "training.epochs=1")
    (found.results_dir / found.cells[0].cfg.run_id).parent.mkdir(parents=True, exist_ok=True)
    (found.results_dir / found.cells[0].cfg.run_id).write_text("a file where the runs' folder should be")
    batches = [cell.runs([0]) for cell in found.cells]
    events: list = []
    with pytest.raises(UserError, match=found.cells[0].cfg.run_id):
        workers.train_in_processes(batches, 2, events.append)
    assert [e.run_id for e in events if isinstance(e, RunFinished)] in ([], [found.cells[1].cfg.run_id])
    assert multiprocessing.active_children() == []
