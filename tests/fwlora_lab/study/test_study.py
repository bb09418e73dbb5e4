"""Studies: what they consist of, what they train, and that being killed costs nothing but time.

pytest tests/fwlora_lab/study/test_study.py
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import fake_study
import numpy as np
import pytest
import yaml
from rich.console import Console
from tiny import World

from fwlora_lab.cli.main import main
from fwlora_lab.config.yaml_writer import to_yaml
from fwlora_lab.display.study_table import StudyTable
from fwlora_lab.errors import UserError
from fwlora_lab.records.folder import find_records, load_predictions, load_record
from fwlora_lab.records.record import Failure
from fwlora_lab.records.study_plan import load_plan
from fwlora_lab.study import run as studies
from fwlora_lab.study.estimate import estimate
from fwlora_lab.study.plan import plan_study, read_words
from fwlora_lab.study.run import run_study
from fwlora_lab.study.spec import available_studies, load_study
from fwlora_lab.training.events import Note, RunFailed, RunFinished, RunStarted, StepDone
from fwlora_lab.training.scheduler import train_runs as really_train

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
    return plan_study(read_words([f"study={write_study(world, **changes)}", f"results_dir={world.results}", *words]))


# --- what a study consists of -------------------------------------------------------------------


@pytest.mark.parametrize("name", available_studies())
def test_packaged_studies_are_valid(name):
    found = plan_study(read_words([f"study={name}"]))
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
    found = plan_study(read_words(["study=request"]))
    assert {c.cfg.model.pretrained_id for c in found.cells} == {"roberta-base"}
    assert {c.budget for c in found.cells} == {0.1, 0.2, 0.5} and len(found.seeds) == 10
    for cell in found.cells:
        t = cell.cfg.training
        assert (t.epochs, t.batch_size, t.learning_rate, t.warmup_ratio) == (3, 32, 2e-4, 0.06)
        assert (cell.cfg.fw_lora.penalty_strength, cell.cfg.fw_lora.warmup_steps) == (1e-4, 500)
        assert cell.cfg.fw_lora.estimator == "exact" and cell.cfg.model.lora.scale == 2.0
    assert len(found.claims) == 16


def test_every_method_is_tuned_with_the_same_effort():
    cells = plan_study(read_words(["study=offline"])).cells
    for task in ("cola", "sst2"):
        searches = [c.search for c in cells if c.task == task]
        assert len({s.optuna.n_trials for s in searches}) == 1
        assert len({(s.optuna.sampler, s.optuna.pruner, tuple(s.seeds)) for s in searches}) == 1
        # One width for all; AdaLoRA's lies higher.
        rates = [s.dimensions["training.learning_rate"] for s in searches]
        assert [d.high / d.low for d in rates] == pytest.approx([33] * 4, rel=0.02)
        assert [d.low for d in rates] == [3e-4, 1e-3, 3e-4, 3e-4]
    assert all(c.search.base.training.evaluate_on == "validation" for c in cells)


def test_words_choose_a_part_and_overrides_reach_every_run(world):
    found = plan(world, "methods=fw_lora", "seeds=3,5", "budgets=5,7", "training.epochs=1")
    assert [c.cfg.run_id for c in found.cells] == ["csv-5-fw_lora", "csv-7-fw_lora"]
    assert found.seeds == (3, 5) and {c.cfg.training.epochs for c in found.cells} == {1}
    command = found.request.command()
    assert "seeds" not in command and "methods=fw_lora budgets=5,7" in command and "training.epochs=1" in command
    assert plan_study(read_words(command.split()[2:] + ["seeds=3,5"])) == found


def test_the_example_in_the_docs_is_a_study(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "compare.md").read_text()
    file = tmp_path / "my-study.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0])
    found = plan_study(read_words([f"study={file}"]))
    assert [cell.method for cell in found.cells] == ["lora", "power"] and len(found.claims) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "say which study"),
        (["study=ofline"], "did you mean 'offline'"),
        (["study=offline", "study=demo"], "stands twice"),
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
        ({"reference": "full"}, "'full' is no method of the study"),
        ({"budgets": []}, "budgets"),
        ({"budgets": [7.0, 7.0]}, "stands twice"),
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


# --- what it trains -----------------------------------------------------------------------------


def test_a_study_trains_what_is_missing_and_nothing_twice(world, monkeypatch):
    trained: list[list[tuple[str, int]]] = []

    def watch(runs, listen, **more):
        trained.append([(run.cfg.run_id, run.seed) for run in runs])
        return really_train(runs, listen, **more)

    monkeypatch.setattr(studies, "train_cohort", watch)
    monkeypatch.setattr(studies, "lanes_at_once", lambda: 2)
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
    by_cell = {(r.run_id, r.seed): r.status for r in find_records(world.results)}
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
        trials = [load_record(p) for p in cell.search.folder.glob("trials/trial-*/seed-77")]
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
    assert sorted(world.results.rglob("*")) == before
    record = find_records(world.results)[0]
    assert rows[1].seconds / 3 < 30 * (record.times.train_seconds + record.times.eval_seconds)


def test_the_board_shows_every_seed_and_running_means(tmp_path, capsys):
    cfg = fake_study.config(tmp_path, "cola", "lora")
    board = StudyTable({cfg.run_id: "cola 0.2 % lora"}, range(10), 9)
    board.there(fake_study.record(cfg, 0, 0.4))
    board.hear(RunStarted(cfg.run_id, 1, "lora", 100, 3, 0, 9))
    board.hear(StepDone(cfg.run_id, 1, 40, 100, 0.5, "steady", 10.0))
    board.hear(RunFinished(cfg.run_id, 2, fake_study.record(cfg, 2, 0.5), trained=True))
    failed = fake_study.record(cfg, 3, 0.0).model_copy(
        update={"error": Failure(type="E", message="diverged", traceback="")}
    )
    board.hear(RunFailed(cfg.run_id, 3, failed))
    board.hear(Note(cfg.run_id, 3, "once"))
    board.hear(Note(cfg.run_id, 4, "once"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("[1/9] cola 0.2 % lora seed 2: 0.5000 (mean of 2: 0.4500)")
    assert said[1].startswith("[2/9] cola 0.2 % lora seed 3: FAILED: diverged")
    assert said[2:] == ["  note: once"]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(board._render())
    head, row, note, state = (line.split() for line in console.export_text().splitlines())
    assert head[0] == "matthews_correlation" and head[-4:] == ["more", "mean", "±", "sd"]
    assert row[4:] == ["0.4000", "40%", "0.5000", "failed", "·", "·", "·", "·", "0/2", "0.4500", "±", "0.0707"]
    assert note == ["note:", "once"] and state[:5] == ["2", "of", "9", "runs", "trained,"]


# --- killed, stopped, in several processes ------------------------------------------------------


def work(file: str, results: str, jobs: int = 1) -> None:
    os.setpgid(0, 0)
    run_study(plan_study(read_words([f"study={file}", f"results_dir={results}", "seeds=0..2"])), jobs)


def comparable(results: Path) -> dict:
    """What must not depend on how often a study was killed."""
    found = {}
    for record in find_records(results):
        logits, labels = load_predictions(results / record.run_id / f"seed-{record.seed}")
        parts = record.model_dump(
            include={"status", "arm", "config_fingerprint", "data_fingerprint", "epochs", "steps"}
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
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        else:
            assert process.exitcode == 0
        kills += 1
        for record in find_records(world.results):
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
    while not find_records(world.results) and time.monotonic() < deadline:
        time.sleep(0.05)
    group = os.getpgid(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker outlived the process that started it")
    there = {(r.run_id, r.seed): r for r in find_records(world.results)}
    assert there
    process = PROCESSES.Process(target=work, args=(file, str(world.results), 2))
    process.start()
    process.join()
    assert process.exitcode == 0
    records = find_records(world.results)
    assert len(records) == 6 and {r.status for r in records} == {"complete"}
    assert all(there.get((r.run_id, r.seed), r) == r for r in records)


def test_one_process_or_two_give_the_same_records(world):
    file = write_study(world)
    other = world.results.parent / "other"
    words = [f"study={file}", "seeds=0..1"]
    one = run_study(plan_study(read_words([*words, f"results_dir={world.results}"])))
    two = run_study(plan_study(read_words([*words, f"results_dir={other}"])), jobs=2)
    assert [r.metrics for r in one] == [r.metrics for r in two]
    for record in one:
        place = f"{record.run_id}/seed-{record.seed}"
        np.testing.assert_allclose(
            *(load_predictions(r / place)[0] for r in (world.results, other)), rtol=1e-4, atol=1e-5
        )
    assert json.loads((other / "study.json").read_text())["cells"]
