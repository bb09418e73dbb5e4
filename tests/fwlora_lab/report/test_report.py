"""The report: its numbers against values worked out by hand and against stats, what is missing, hostile text, files.

pytest tests/fwlora_lab/report/test_report.py
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import fake_study
import numpy as np
import pytest
import yaml
from fake_study import claim

from fwlora_lab.analysis import statistics
from fwlora_lab.analysis.results import read_study, seeds_text
from fwlora_lab.analysis.study import Analysis, analyse, seconds_doubt
from fwlora_lab.cli.main import main
from fwlora_lab.errors import UserError
from fwlora_lab.files import json_text, seal
from fwlora_lab.records.folder import RunFolder
from fwlora_lab.records.study_plan import load_plan, write_plan
from fwlora_lab.report import figures, pictures, svg
from fwlora_lab.report.aggregate import aggregated_metrics
from fwlora_lab.report.headline import headline
from fwlora_lab.report.latex import latex
from fwlora_lab.report.matrices import layer_and_kind, rank_correlation
from fwlora_lab.report.page import write_report

# Differences of 1, 0, 2 and 1 points: mean 1, sd 0.8165, se 0.4082, t = 2.4495 with 3 degrees of freedom.
LORA, FW = [0.50, 0.52, 0.54, 0.56], [0.51, 0.52, 0.56, 0.57]
ADALORA = [0.45, 0.46, 0.48, 0.52]


class Page(HTMLParser):
    """What a browser would see: tags, ids, the tables' rows by column key, texts."""

    VOID = {"meta", "link", "br", "path", "circle", "use", "rect"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[dict[str, str]]] = {}
        self.verdicts: list[dict[str, str]] = []
        self.texts: list[str] = []
        self._table: list[dict[str, str]] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if tag == "table":
            self._table = self.tables.setdefault(values["id"], [])
        if tag == "tr" and self._table is not None:
            self._table.append({})
        if tag == "td" and "data-key" in values and self._table is not None:
            self._table[-1][values["data-key"]] = values["data-value"]
        if "data-state" in values:
            self.verdicts.append(values)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        self.texts.append(data)

    def rows(self, table: str) -> list[dict[str, str]]:
        return [row for row in self.tables[table] if row]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Drawing takes most of a report's time: tests of numbers and files do without, unless they ask for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "_render", lambda draw, size: '<svg viewBox="0 0 1 1"></svg>')


@pytest.fixture
def drawn() -> None:
    pass


@pytest.fixture
def small(tmp_path) -> Path:
    fake_study.study(tmp_path, {"cola": {"lora": LORA, "fw_lora": FW, "adalora": ADALORA}})
    return tmp_path


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    fake_study.full_study(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def analysis(full) -> Analysis:
    return analyse(read_study(full))


# numbers


def test_differences_are_those_worked_out_by_hand(small):
    page = page_of(small)
    (row,) = [row for row in page.rows("comparisons-table") if row["method"] == "fw_lora"]
    expected = {
        "pairs": 4,
        "mean_difference_points": 1.0,
        "t_low_points": 1 - 3.182446 * 0.408248,
        "p": 0.091720,
        "sign_flip_p": 0.25,
        "hedges_g": 1.224745 * 0.723601,
    }
    for key, value in expected.items():
        assert float(row[key]) == pytest.approx(value, abs=2e-5), key
    # Two comparisons are the family; AdaLoRA's p is the smaller one, so this one is not multiplied.
    assert float(row["holm_p"]) == pytest.approx(0.091720, abs=2e-5)
    assert "+1.00" in page.text and "−0.30 to +2.30" in page.text
    assert [r["method"] for r in page.rows("comparisons-table")] == ["adalora", "fw_lora"], "losses first"
    (row,) = [row for row in page.rows("scores-table") if row["method"] == "lora"]
    assert float(row["mean_points"]) == pytest.approx(53.0) and float(row["sd_points"]) == pytest.approx(2.581989)


def test_the_page_and_the_files_say_what_stats_say(full):
    page, plan = Page((full / "report.html").read_text()), load_plan(full)
    assert plan is not None
    by_cell = {}
    for cell in plan.cells:
        for seed in plan.seeds:
            record = json.loads((full / cell.run_id / f"seed-{seed}" / "record.json").read_text())
            score = record["epochs"][-1]["metrics"][record["primary_metric"]]
            by_cell.setdefault((cell.task, cell.method), {})[seed] = score
    rng = np.random.default_rng(0)
    seen = {(r["task"], r["method"]): r for r in page.rows("comparisons-table")}
    p_values, keys = [], []
    for task in plan.tasks:
        for method in ("adalora", "fw_lora", "uniform"):
            scores = {m: by_cell[task, m] for m in ("lora", method)}
            expected, row = statistics.compare(scores, method, "lora", rng), seen[task, method]
            assert expected.mean is not None and expected.interval is not None and expected.sign_flip is not None
            assert float(row["mean_difference_points"]) == pytest.approx(100 * expected.mean)
            assert float(row["t_low_points"]) == pytest.approx(100 * expected.interval.low)
            assert float(row["p"]) == pytest.approx(expected.p)
            assert float(row["sign_flip_p"]) == pytest.approx(expected.sign_flip.p)
            assert float(row["hedges_g"]) == pytest.approx(expected.hedges_g)
            p_values.append(expected.p)
            keys.append((task, method))
    for key, p in zip(keys, statistics.holm(p_values), strict=True):
        assert float(seen[key]["holm_p"]) == pytest.approx(p)
    for row in rows_of(full / "comparison" / "comparisons.csv"):
        shown = seen[row["task"], row["method"]]
        assert {key: row[key] for key in shown} == shown
        assert (
            float(row["two_way_low_points"]) < float(row["mean_difference_points"]) < float(row["two_way_high_points"])
        )


def test_verdicts_stand_on_the_page_as_judged_losses_first(full, analysis):
    page = Page((full / "report.html").read_text())
    assert len(page.verdicts) == len(analysis.verdicts) == 8
    order = ["fails", "undecided", "holds"]
    assert [v["data-state"] for v in page.verdicts] == sorted((v["data-state"] for v in page.verdicts), key=order.index)
    assert {v["data-state"] for v in page.verdicts} == set(order)
    judged = {v.claim.statement: v for v in analysis.verdicts}
    for row in rows_of(full / "comparison" / "verdicts.csv"):
        verdict = judged.pop(row["claim"])
        assert row["verdict"] == verdict.state and int(row["seeds"]) == verdict.n
        assert float(row["estimate"]) == pytest.approx(verdict.estimate)
        assert verdict.interval is not None and float(row["high"]) == pytest.approx(verdict.interval.high)
        assert row["command"] == (verdict.command or "")
        assert row["claim"] in page.text and verdict.reason[1:].split(" crosses")[0] in page.text
    assert not judged


def test_the_headline_tells_losses_first_and_counts(analysis, small):
    words = headline(analysis)
    counts = [v.state for v in analysis.verdicts]
    assert words.startswith(f"Of 8 claims {counts.count('fails')} fail")
    assert "on cola at 0.2 % adalora ends 8.11 points below lora; " in words
    assert words.endswith("no other difference from lora can be told from chance.")
    told = (
        "On cola at 0.2 % adalora ends 5.25 points below lora; no other difference from lora can be told from chance."
    )
    assert headline(analyse(read_study(small))) == told


def test_ratios_of_seconds(tmp_path):
    scores = {"cola": {"lora": LORA, "fw_lora": FW, "adalora": ADALORA}}
    fake_study.study(tmp_path, scores, seconds={"lora": 50.0, "fw_lora": 60.0, "adalora": 55.0})
    page = page_of(tmp_path)
    found = {(r["method"], r["seconds_of"]): float(r["ratio"]) for r in page.rows("ratios-table")}
    assert found["fw_lora", "train_seconds"] == pytest.approx(1.2)
    # 300 steps, of which K = 25 % take a fifth of the time: 12 s for 75 steps, 48 s for 225, against 50 s for 300.
    assert found["fw_lora", "fisher_step_seconds"] == pytest.approx(12 / 75 / (50 / 300))
    assert found["fw_lora", "steady_step_seconds"] == pytest.approx(48 / 225 / (50 / 300))
    assert found["adalora", "train_seconds"] == pytest.approx(1.1) and ("adalora", "fisher_step_seconds") not in found
    (row,) = [row for row in page.rows("seconds-table") if row["method"] == "fw_lora"]
    assert float(row["warmup_seconds"]) == pytest.approx(0.2 * 60 * 1.015)
    assert float(row["warmup_seconds"]) + float(row["steady_seconds"]) == pytest.approx(float(row["train_seconds"]))


def test_parameters_and_matrices(small):
    page = page_of(small)
    (row,) = [row for row in page.rows("parameters-table") if row["method"] == "adalora"]
    assert row["asked_parameters"] == "45426" and float(row["adapters"]) == 45312 and row["adapters_trained"] == "66048"
    assert row["head"] == "148610" and float(row["percent_used"]) == pytest.approx(0.1995)
    (row,) = [row for row in page.rows("contrast-table") if row["method"] == "fw_lora"]
    assert float(row["rank_correlation"]) == pytest.approx(1.0)  # made so
    assert [r["fisher_span"] for r in page.rows("contrast-table") if r["method"] == "lora"] == [""]


def test_rank_correlation_is_spearmans_ties_and_all(small):
    record = read_study(small).runs[0].record
    assert record is not None
    row = record.matrices[0]
    pairs = [(1.0, 3.0), (2.0, 1.0), (2.0, 2.0), (4.0, 5.0), (5.0, 4.0)]
    rows = [row.model_copy(update={"importance": i, "delta_norm": d}) for i, d in pairs]
    # Ranks 1, 2.5, 2.5, 4, 5 and 3, 1, 2, 5, 4: Σ(a−ā)(b−b̄) = 5.5, Σ(a−ā)² = 9.5, Σ(b−b̄)² = 10.
    assert rank_correlation(record.model_copy(update={"matrices": rows})) == pytest.approx(5.5 / np.sqrt(95))
    same = [r.model_copy(update={"importance": 1.0}) for r in rows]
    assert rank_correlation(record.model_copy(update={"matrices": same})) is None


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query", ("3", "query")),
        ("roberta.encoder.layer.11.attention.output.dense", ("11", "attention.output")),
        ("bert.encoder.layer.0.intermediate.dense", ("0", "intermediate")),
        ("bert.encoder.layer.0.output.dense", ("0", "output")),
        ("model.layers.7.self_attn.q_proj", ("7", "self_attn.q_proj")),
        ("score", ("–", "score")),
    ],
)
def test_places_of_matrices(name, place):
    assert layer_and_kind(name) == place


@pytest.mark.parametrize(
    ("seeds", "text"), [([0, 1, 2, 5], "seeds 0–2, 5"), ([3], "seed 3"), ([4, 3], "seeds 3, 4"), ([], "no seed")]
)
def test_seeds_in_words(seeds, text):
    assert seeds_text(seeds) == text


def test_budgets_on_one_axis(tmp_path, drawn):
    fake_study.study(tmp_path, {"cola": {"lora": LORA, "fw_lora": FW}}, budgets=(0.1, 0.2, 0.5))
    page = page_of(tmp_path)
    assert "cola: matthews correlation against the budget" in page.text
    assert sorted({float(r["budget_percent"]) for r in page.rows("comparisons-table")}) == [0.1, 0.2, 0.5]
    assert len(read_study(tmp_path).runs) == 24


# what is not there


def test_every_state_of_a_run_is_told_and_none_becomes_a_number(small):
    plan = load_plan(small)
    assert plan is not None
    write_plan(small, plan.model_copy(update={"seeds": list(range(7))}))
    cfg = fake_study.config(small, "cola", "fw_lora")
    failure = {"type": "RuntimeError", "message": "out of memory", "traceback": "Traceback: somewhere"}
    fake_study.write(small, cfg, fake_study.record(cfg, 4, 0.99, status="failed", error=failure, epochs=[], times=None))
    broken = fake_study.write(small, cfg, fake_study.record(cfg, 5, 0.9)) / "record.json"
    broken.write_text(broken.read_text()[:100])
    with RunFolder(small, cfg.run_id, 6).lock():
        study = read_study(small)
        states = [run.state for run in study.runs if run.cell.method == "fw_lora"]
        assert states == ["complete"] * 4 + ["failed", "broken", "running"]
        page = page_of(small)
    for told in ("out of memory", "Traceback: somewhere", "not a record of this version", "cola-0.2-fw_lora seed 6"):
        assert told in page.text, told
    assert "cola-0.2-lora: seeds 4–6" in page.text
    assert "fwlora compare study=made-up seeds=0..6" in page.text
    assert headline(analyse(study)).startswith("So far, with 12 of 21 runs")
    (row,) = [row for row in page.rows("scores-table") if row["method"] == "fw_lora"]
    assert row["seeds"] == "4" and float(row["mean_points"]) == pytest.approx(54.0)
    found = [r for r in rows_of(small / "comparison" / "seeds.csv") if r["method"] == "fw_lora"]
    assert [r["matthews_correlation"] != "" for r in found] == [True] * 4 + [False] * 3
    assert read_study(small).count("running") == 0, "the lock was given back"


def test_looking_at_a_lock_leaves_it_and_its_folder_alone(small):
    cell = RunFolder(small, "cola-0.2-lora", 9)
    plan = load_plan(small)
    assert plan is not None
    write_plan(small, plan.model_copy(update={"seeds": [9]}))
    assert read_study(small).count("missing") == 3
    assert not list(small.glob("*/.seed-9.lock")), "none is made by looking"
    with cell.lock() as held:
        assert held and read_study(small).count("running") == 1
        with RunFolder(small, "cola-0.2-lora", 9).lock(wait=False) as second:
            assert not second, "looking did not free it"
    with cell.lock(wait=False) as held:
        assert held


def test_a_failed_run_that_is_trained_again_is_running(small):
    cfg = fake_study.config(small, "cola", "fw_lora")
    failure = {"type": "RuntimeError", "message": "out of memory", "traceback": ""}
    fake_study.write(small, cfg, fake_study.record(cfg, 3, 0.9, status="failed", error=failure))
    assert read_study(small).count("failed") == 1
    with RunFolder(small, cfg.run_id, 3).lock():
        assert (read_study(small).count("failed"), read_study(small).count("running")) == (0, 1)


def test_a_study_without_a_single_complete_run_has_a_page(tmp_path):
    plan = fake_study.study(
        tmp_path, {"cola": {"lora": LORA, "fw_lora": FW}}, claims=[claim("fw_lora", "greater", 0.0)]
    )
    for cell in plan.cells:
        for seed in plan.seeds:
            (tmp_path / cell.run_id / f"seed-{seed}" / "record.json").unlink()
    page = page_of(tmp_path)
    assert "No run is complete yet." in page.text
    assert [v["data-state"] for v in page.verdicts] == ["undecided"]
    assert json.loads((tmp_path / "comparison" / "aggregated_metrics.json").read_text())["best_proposed"] is None


def test_one_seed_and_equal_seeds_say_why_they_say_nothing(tmp_path):
    fake_study.study(tmp_path, {"cola": {"lora": [0.5], "fw_lora": [0.52]}, "sst2": {"lora": LORA, "fw_lora": LORA}})
    page = page_of(tmp_path)
    assert "one seed only: its spread is unknown" in page.text
    assert "all 4 seeds are equal: their spread is unknown" in page.text
    assert [r["p"] for r in page.rows("comparisons-table")] == ["", ""]


def test_runs_that_nobody_planned(tmp_path):
    fake_study.study(tmp_path, {"cola": {"lora": LORA, "fw_lora": FW[:3], "uniform": FW}}, planned=False)
    study = read_study(tmp_path)
    # fw_lora and its control are the same method: the run ids tell them apart.
    assert [cell.method for cell in analyse(study).groups[0].cells] == ["lora", "cola-0.2-fw_lora", "cola-0.2-uniform"]
    assert (study.plan.reference, study.plan.budgets, study.plan.tasks) == ("lora", [0.2], ["cola"])
    assert [(r.cell.run_id, r.seed) for r in study.runs if r.state == "missing"] == [("cola-0.2-fw_lora", 3)]
    page = page_of(tmp_path)
    assert "no study was planned here" in page.text and not page.verdicts
    assert rows_of(tmp_path / "comparison" / "verdicts.csv") == []


def test_an_unplanned_budget_is_the_true_one_where_none_was_asked_for(tmp_path):
    cfg = fake_study.config(tmp_path, "cola", "lora")
    model = cfg.model.model_copy(update={"parameter_budget_percent": None})
    made = fake_study.record(cfg.model_copy(update={"model": model}), 0, 0.5)
    assert made.parameters is not None
    used = made.parameters.model_copy(update={"percent": 1.2984, "asked_percent": None})
    fake_study.write(tmp_path, cfg, made.model_copy(update={"parameters": used}))
    assert read_study(tmp_path).plan.budgets == [1.3]


def test_seeds_and_runs_outside_the_plan_are_left_out_and_told(small):
    plan = load_plan(small)
    assert plan is not None
    write_plan(small, plan.model_copy(update={"seeds": [0, 1, 2]}))
    study = read_study(small)
    assert study.count("complete") == 9
    assert "cola-0.2-lora (seed 3)" in study.notes[0] and "left out" in page_of(small).text


def test_runs_on_different_data_are_not_compared(small):
    cfg = fake_study.config(small, "cola", "fw_lora")
    fake_study.write(small, cfg, fake_study.record(cfg, 3, 0.9, data_fingerprint="e" * 64))
    page = page_of(small)
    assert "is not compared" in page.text and "data_fingerprint differ" in page.text
    assert [r["mean_difference_points"] for r in page.rows("comparisons-table")] == ["", ""]


def test_broken_predictions_cost_the_interval_over_examples_only(tmp_path):
    fake_study.study(tmp_path, {"cola": {"lora": LORA, "fw_lora": FW}}, examples=50)
    assert all(r["two_way_low_points"] for r in page_of(tmp_path).rows("comparisons-table"))
    (tmp_path / "cola-0.2-lora" / "seed-0" / "predictions.npz").write_bytes(b"PK\x03\x04 broken")
    page = page_of(tmp_path)
    assert "No interval over examples is given here" in page.text
    assert [(r["two_way_low_points"], r["p"] != "") for r in page.rows("comparisons-table")] == [("", True)]


@pytest.mark.parametrize("content", [None, "nothing", "broken"])
def test_a_folder_without_records_is_one_message(tmp_path, content, capsys):
    folder = tmp_path / "results"
    if content is not None:
        (folder / "run" / "seed-0").mkdir(parents=True)
    if content == "broken":
        (folder / "run" / "seed-0" / "record.json").write_text("{")
    assert main(["report", str(folder)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fwlora: ") and told.count("\n") == 1 and str(folder) in told
    assert not (folder / "report.html").exists()


def test_the_command_says_where_the_page_is(small, capsys):
    assert main(["report", str(small)]) == 0
    assert capsys.readouterr().out == f"report: {small / 'report.html'}\n"


# seconds that do not compare


def doubt_of(tmp_path: Path, engine: str, shifts: dict[str, float]) -> tuple[str, Page]:
    """Two runs of 60 s each of lora and fw_lora, `shifts` the minutes at which a method's seeds start."""
    plan = fake_study.study(
        tmp_path,
        {"cola": {"lora": LORA[:2], "fw_lora": FW[:2]}},
        claims=[claim("fw_lora", "at_most", 1.01, metric="train_seconds"), claim("fw_lora", "greater", 0.0)],
    )
    for cell in plan.cells:
        for seed in (0, 1):
            cfg = fake_study.config(tmp_path, "cola", cell.method, engine=engine)
            start = fake_study.START + timedelta(minutes=shifts[f"{cell.method}{seed}"])
            made = fake_study.record(cfg, seed, (LORA if cell.method == "lora" else FW)[seed], 60.0 + seed)
            fake_study.write(
                tmp_path, cfg, made.model_copy(update={"started": start, "finished": start + timedelta(minutes=1)})
            )
    return analyse(read_study(tmp_path)).seconds_doubt, page_of(tmp_path)


def test_lanes_shared_by_methods_are_no_clock_and_the_claim_about_time_says_so(tmp_path):
    doubt, page = doubt_of(tmp_path, "lanes", {"lora0": 0, "fw_lora0": 0, "lora1": 5, "fw_lora1": 5})
    assert doubt.startswith("4 of 4 runs trained in lanes while runs of other methods or tasks trained too")
    assert page.text.count("Times not comparable:") == 2, "in the section on time, and at the claim about time"
    assert "Times not comparable" in (tmp_path / "report.md").read_text()


def test_a_claim_that_cannot_be_judged_does_not_refuse_the_folder(tmp_path):
    typo = claim("fw_lora", "greater", 0.0, metric="matthews_corelation")
    fake_study.study(tmp_path, {"cola": {"lora": LORA, "fw_lora": FW}}, claims=[typo, claim("fw_lora", "at_most", 0.5)])
    verdicts = {v.claim.metric: v for v in analyse(read_study(tmp_path)).verdicts}
    assert verdicts["matthews_corelation"].state == "undecided" and verdicts["matthews_corelation"].command is None
    page = page_of(tmp_path)
    assert "Cannot be judged: no run on cola at 0.2 % recorded 'matthews_corelation'" in page.text
    assert "did you mean 'matthews_correlation'" in page.text
    assert verdicts["matthews_correlation"].state == "holds"


def test_what_makes_a_comparison_unfair_stands_beside_its_verdict(tmp_path):
    about = [claim("fw_lora", "at_most", 0.5), claim("adalora", "at_most", 0.5), claim("lora", "at_most", 1.0)]
    about[2]["reference"] = None
    plan = fake_study.study(tmp_path, {"cola": {"lora": LORA, "fw_lora": FW, "adalora": FW}}, claims=about)
    for seed in range(len(FW)):
        cfg = fake_study.config(tmp_path, "cola", "adalora")
        made = fake_study.record(cfg, seed, FW[seed], 60 * (1 + 0.01 * seed))
        assert made.parameters is not None
        fewer = made.parameters.model_copy(update={"percent": 0.138})
        fake_study.write(tmp_path, cfg, made.model_copy(update={"parameters": fewer}))

    def doubts() -> dict[str, str]:
        return {v.claim.method: " ".join(v.doubts) for v in analyse(read_study(tmp_path)).verdicts}

    unequal = "Not at equal parameters: adalora ends with 0.14 % of the backbone's, lora with 0.20 %."
    assert doubts() == {"fw_lora": "", "adalora": unequal, "lora": ""}
    write_plan(tmp_path, plan.model_copy(update={"selection": {"policy": "fixed"}}))
    fixed = (
        "Settings were fixed (learning rate 0.002 for {}, 0.001 for lora), not tuned alike: another setting may "
        "reverse the verdict."
    )
    assert doubts() == {
        "fw_lora": fixed.format("fw_lora"),
        "adalora": f"{unequal} {fixed.format('adalora')}",
        "lora": "",
    }
    page = page_of(tmp_path)
    assert page.text.count("Read with care: Settings were fixed") == 1
    assert f"Read with care: {unequal}" in page.text
    assert f"Read with care: {unequal}" in (tmp_path / "report.md").read_text()


def test_the_headline_says_when_verdicts_about_time_have_no_fair_clock(full, analysis):
    assert sum(v.claim.is_ratio and v.state != "undecided" for v in analysis.verdicts) == 1
    assert "comparable" not in headline(analysis)
    told = headline(replace(analysis, seconds_doubt="the machine was shared"))
    assert "; 1 of these verdicts is about time, and the times are not comparable; " in told


@pytest.mark.parametrize(
    ("engine", "shifts", "told"),
    [
        ("lanes", {"lora0": 0, "lora1": 0, "fw_lora0": 5, "fw_lora1": 5}, ""),  # lanes of one method
        ("lanes", {"lora0": 0, "lora1": 0, "fw_lora0": 0.99, "fw_lora1": 0.99}, ""),  # a handover
        ("peft", {"lora0": 0, "lora1": 2, "fw_lora0": 4, "fw_lora1": 6}, ""),
        ("peft", {"lora0": 0, "lora1": 0.5, "fw_lora0": 4, "fw_lora1": 6}, "2 of 4 runs shared the machine"),
    ],
)
def test_what_makes_a_clock_unfair(tmp_path, engine, shifts, told):
    doubt, page = doubt_of(tmp_path, engine, shifts)
    assert doubt.startswith(told) and bool(doubt) == bool(told)
    assert ("Times not comparable" in page.text) == bool(told)


def test_the_engine_that_trained_a_run_counts_and_not_the_one_that_was_asked_for(tmp_path):
    cfg = fake_study.config(tmp_path, "cola", "lora", engine="lanes")
    together = {"started": fake_study.START, "finished": fake_study.START + timedelta(minutes=1)}
    in_lanes = [fake_study.record(cfg, seed, 0.5, **together) for seed in (0, 1)]
    assert seconds_doubt(in_lanes) == "", "lanes of one method"
    fell_back = [record.model_copy(update={"engine": "peft", "warnings": ["any words"]}) for record in in_lanes]
    assert seconds_doubt(fell_back).startswith("2 of 2 runs shared the machine")


def test_what_a_reader_should_know_first(tmp_path):
    fake_study.study(
        tmp_path, {"cola": {"lora": LORA, "fw_lora": FW}}, evaluated_on="validation", git_commit="0123-dirty"
    )
    cfg = fake_study.config(tmp_path, "cola", "lora", training={"learning_rate": 0.5})
    fake_study.write(tmp_path, cfg, fake_study.record(cfg, 0, 0.5, evaluated_on="validation"))
    notes = " ".join(analyse(read_study(tmp_path)).notes)
    assert "Scored on the validation split, not on dev: cola-0.2-fw_lora, cola-0.2-lora." in notes
    assert "7 of 8 runs were made from source with uncommitted changes" in notes
    assert "made with different run configs: cola-0.2-lora." in notes


# hostile text


EVIL = (
    "</textarea></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}{% x %}|`\\input{x}$_^\x00\x1b"
)


def test_hostile_text_stays_text(tmp_path, drawn):
    plan = fake_study.study(
        tmp_path,
        {"cola": {"lora": LORA, "fw_lora": FW}},
        claims=[claim("fw_lora", "greater", 0.0, source=EVIL)],
        warnings=[EVIL],
        data_source=EVIL,
        command=EVIL,
    )
    cells = [
        c.model_copy(update={"method": {"lora": "lora", "fw_lora": EVIL}[c.method], "task": EVIL}) for c in plan.cells
    ]
    evil_run = "x<img src=x onerror=alert(3)>"
    cells.append(cells[0].model_copy(update={"run_id": evil_run, "method": "$\\frac{"}))
    scope = {"task": EVIL, "budget": 0.2}
    changes = {
        "study": EVIL,
        "command": EVIL,
        "tasks": [EVIL],
        "methods": {"lora": EVIL, EVIL: EVIL},
        "selection": {EVIL: EVIL},
        "cells": cells,
        "claims": [claim(EVIL, "greater", 0.0, source=EVIL) | {"scope": scope}],
    }
    write_plan(tmp_path, plan.model_copy(update=changes))
    cfg = fake_study.config(tmp_path, "cola", "fw_lora")
    failure = {"type": EVIL, "message": EVIL, "traceback": EVIL}
    made = fake_study.record(cfg, 3, 0.5, status="failed", error=failure)
    fake_study.write(tmp_path, cfg, made)
    evil = cfg.model_copy(update={"run_id": evil_run})
    fake_study.write(tmp_path, evil, made.model_copy(update={"run_id": evil_run}))
    (tmp_path / "cola-0.2-lora" / "search").mkdir()
    (tmp_path / "cola-0.2-lora" / "search" / "history.svg").write_text(EVIL_SVG)
    page = page_of(tmp_path)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "49" not in page.text.replace("249", "") or "{{7*7}}" in page.text
    assert "alert(1)" in page.text, "it is shown"
    check_page_is_closed(page)
    assert "<script" not in (tmp_path / "report.md").read_text().replace("\\<script", "")
    tables = re.findall(r"(?:^\|.*\n)+", (tmp_path / "report.md").read_text(), re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert len(tables) == 4
    tex = (tmp_path / "comparison" / "table.tex").read_text()
    assert "\\input" not in tex and "\x00" not in tex
    assert [len(re.findall(r"(?<!\\)&", line)) for line in tex.splitlines() if line.endswith("\\\\")] == [7, 7, 7, 7]
    assert {r["method"] for r in rows_of(tmp_path / "comparison" / "comparisons.csv")} == {EVIL, "$\\frac{"}


EVIL_SVG = """<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
 onload="alert(4)" viewBox="0 0 9 9"><script>alert(5)</script><style>* {display: none}</style>
<foreignObject><iframe xmlns="http://www.w3.org/1999/xhtml" src="https://example.org"/></foreignObject>
<a xlink:href="https://example.org"><path d="M0 0"/></a><image xlink:href="https://example.org/x.png"/>
<rect id="r" fill="url(https://example.org/#x)" style="background:url(//example.org)" width="3" height="3"/>
<use xlink:href="#r"/><g clip-path="url(#r)"><text onclick="alert(6)">kept</text></g></svg>"""


def test_a_foreign_drawing_is_drawing_only():
    drawing = svg.foreign(EVIL_SVG)
    assert drawing is not None
    drawing = svg.with_ids(drawing, "p")
    for bad in ("alert", "example.org", "style>", "iframe", "onload", "<a", "script"):
        assert bad not in drawing, bad
    for good in ("kept", 'id="p-r"', 'href="#p-r"', "url(#p-r)", 'width="3"'):
        assert good in drawing, good
    assert svg.foreign("<html></html>") is None and svg.foreign("<svg") is None


def check_page_is_closed(page: Page) -> None:
    """Nothing on the page points outside it, ids are unique, and labels point to ids that exist."""
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), sorted(i for i in ids if ids.count(i) > 1)[:5]
    for tag, name, value in page.attributes:
        if name in ("href", "src", "action", "data"):
            assert value.startswith(("#", "data:")), (tag, name, value)
        if name in ("href", "data-copy", "aria-labelledby") and not value.startswith("data:"):
            assert value.removeprefix("#") in ids, (tag, name, value)
        if name != "content":
            assert not re.search(r"url\((?!#)", value), (tag, name, value)


def test_the_page_is_closed_and_follows_the_theme(full):
    text = (full / "report.html").read_text()
    page = Page(text)
    check_page_is_closed(page)
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
    assert "@import" not in text and "default-src 'none'" in text
    drawings = re.findall(r"<svg role=.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2 + 2 + 4 + 12 + 2
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b(?!\))", re.sub(r"(url\(|href=\")#[\w-]+", "", drawing)), (
            "no colour is fixed"
        )
        assert "var(--" in drawing and re.match(r'<svg role="img" aria-label="[^"]{40,}"', drawing)
    assert {f"--m{i}" for i in range(4)} <= set(re.findall(r"--m\d", " ".join(drawings)))
    style = text[text.index("<style>") : text.index("</style>")]
    assert all(style.count(f"--m{i}:") == 3 for i in range(figures.METHOD_COLOURS)), "light, dark and print"


def test_every_figure_says_its_numbers(analysis):
    group = analysis.groups[0]
    (picture, _) = pictures.score_pictures(analysis)
    cells = {cell.method: cell for cell in group.cells}
    mean = cells["adalora"].summary.mean
    assert mean is not None and f"adalora at 0.2 % {100 * mean:.2f} points (6 seeds" in picture.text
    rows = list(csv.DictReader(picture.csv.splitlines()))
    assert {r["method"]: pytest.approx(float(r["mean_points"])) for r in rows} == {
        method: 100 * (cell.summary.mean or 0) for method, cell in cells.items()
    }
    (picture, _) = pictures.difference_pictures(analysis)
    rows = [r for r in csv.DictReader(picture.csv.splitlines()) if r["method"] == "fw_lora"]
    comparison = cells["fw_lora"].comparison
    assert comparison is not None
    differences = comparison.differences
    assert {int(r["seed"]): float(r["difference_points"]) for r in rows} == pytest.approx(
        {seed: 100 * d for seed, d in differences.items()}
    )


def test_a_mean_curve_ends_where_a_seed_ends(small):
    """Over the epochs that all seeds have: a mean over fewer would jump."""
    cfg = fake_study.config(small, "cola", "fw_lora")
    made = fake_study.record(cfg, 3, 0.57)
    fake_study.write(small, cfg, made.model_copy(update={"epochs": made.epochs[:2]}))
    score, _ = pictures.curve_pictures(analyse(read_study(small)))
    told = {part.split()[0]: part for part in score.text.split(": ", 1)[1].replace("each epoch. ", "").split("; ")}
    assert "after epoch 2" in told["fw_lora"] and "after epoch 3" not in told["fw_lora"]
    assert "53.00 after epoch 3" in score.text, "LoRA's goes on"
    rows = [r for r in csv.DictReader(score.csv.splitlines()) if r["method"] == "fw_lora"]
    assert len(rows) == 3 + 3 + 3 + 2


def test_method_colours_are_the_same_everywhere(full, analysis, drawn):
    """By the order of the plan's cells: lora --m0, adalora --m1, fw_lora --m2, uniform --m3."""
    assert analysis.methods == ["lora", "adalora", "fw_lora", "uniform"]
    for picture in (
        pictures.score_pictures(analysis) + pictures.curve_pictures(analysis) + pictures.seconds_pictures(analysis)
    ):
        assert set(re.findall(r"--m\d", picture.svg)) == {"--m0", "--m1", "--m2", "--m3"}, picture.title
    for picture in pictures.difference_pictures(analysis):
        assert set(re.findall(r"--m\d", picture.svg)) == {"--m1", "--m2", "--m3"}
    text = (full / "report.html").read_text()
    assert {"0": "lora", "1": "adalora", "2": "fw_lora", "3": "uniform"} == dict(
        re.findall(r'style="--c:var\(--m(\d)\)"></span>(\w+)<', text)
    )


# files


def test_the_files_beside_the_page(small):
    write_report(small)
    aggregated = json.loads((small / "comparison" / "aggregated_metrics.json").read_text())
    assert aggregated["primary_metric"] == "matthews_correlation"
    assert aggregated["metrics"]["matthews_correlation"] == pytest.approx(
        {"cola-0.2-lora": 0.53, "cola-0.2-fw_lora": 0.54, "cola-0.2-adalora": 0.4775}
    )
    assert aggregated["best_proposed"] == {"run_id": "cola-0.2-fw_lora", "value": pytest.approx(0.54)}
    assert aggregated["best_baseline"] == {"run_id": "cola-0.2-lora", "value": pytest.approx(0.53)}
    assert aggregated["gap"] == pytest.approx(100 * 0.01 / 0.53)
    of_run = json.loads((small / "cola-0.2-lora" / "metrics.json").read_text())
    assert of_run["matthews_correlation"] == pytest.approx(0.53) and of_run["seeds"] == [0, 1, 2, 3]
    assert of_run["by_seed"]["matthews_correlation"]["1"] == 0.52
    tex = (small / "comparison" / "table.tex").read_text()
    assert r"fw\_lora & 4 & 54.00 (49.32 to 58.68) & +1.00 (\ensuremath{-}0.30 to +2.30) & 0.092 & 1.000 \\" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 1 and "\\midrule" in tex
    assert "| cola | 0.2 | fw\\_lora | 4 | +1.00 |" in (small / "report.md").read_text()


def test_airas_proposed_runs_are_those_that_say_so(tmp_path):
    plan = fake_study.study(tmp_path, {"cola": {"lora": LORA, "fw_lora": FW, "adalora": ADALORA}})
    run_ids = {"lora": "comparative-1-cola", "adalora": "proposed-cola", "fw_lora": "comparative-2-cola"}
    for cell in plan.cells:
        (tmp_path / cell.run_id).rename(tmp_path / run_ids[cell.method])
        for file in (tmp_path / run_ids[cell.method]).glob("*/record.json"):
            values = json.loads(file.read_text().replace(cell.run_id, run_ids[cell.method]))
            file.write_text(json_text(seal(values)))
    cells = [cell.model_copy(update={"run_id": run_ids[cell.method]}) for cell in plan.cells]
    write_plan(tmp_path, plan.model_copy(update={"cells": cells}))
    found = aggregated_metrics(analyse(read_study(tmp_path)))
    assert found["best_proposed"]["run_id"] == "proposed-cola"
    assert found["best_baseline"]["run_id"] == "comparative-2-cola"
    assert found["gap"] == pytest.approx(100 * (0.4775 - 0.54) / 0.54)


def test_the_gap_to_a_baseline_below_zero_keeps_its_sign(tmp_path):
    fake_study.study(tmp_path, {"cola": {"lora": [-0.10, -0.10], "fw_lora": [-0.05, -0.05]}})
    assert aggregated_metrics(analyse(read_study(tmp_path)))["gap"] == pytest.approx(50)


def test_latex_escapes():
    assert latex("a_b & 50 % #1 {x}") == r"a\_b \& 50 \% \#1 \{x\}"
    assert latex("~ ^ \\input\n −1 <") == (
        r"\textasciitilde{} \textasciicircum{} \textbackslash{}input \ensuremath{-}1 \textless{}"
    )


def digest(folder: Path) -> str:
    written = [
        "report.html",
        "report.md",
        *(f"comparison/{name}" for name in sorted(os.listdir(folder / "comparison"))),
    ]
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in written)).hexdigest()


def test_the_same_records_give_the_same_bytes_without_torch(small, drawn):
    """In another process, with another hash seed; report reads records and imports no training code."""
    write_report(small)
    before = digest(small)
    code = (
        "import sys; from fwlora_lab.report.page import write_report; write_report(sys.argv[1])\n"
        "makers = ('training', 'study', 'search', 'lanes', 'models')\n"
        "heavy = {'torch', 'transformers', 'optuna', 'hydra', *(f'fwlora_lab.{m}' for m in makers)}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code, str(small)], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert digest(small) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_one_message_and_leaves_the_old_page(small, monkeypatch, number):
    write_report(small)
    before = digest(small)
    cfg = fake_study.config(small, "cola", "fw_lora")
    fake_study.write(small, cfg, fake_study.record(cfg, 3, 0.9))
    write, calls = Path.write_bytes, []

    def fill(self, *args, **more):
        calls.append(self)
        if len(calls) == 4:
            raise OSError(number, os.strerror(number))
        return write(self, *args, **more)

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(UserError, match="the disk is full" if number == errno.ENOSPC else "Read-only") as caught:
        write_report(small)
    assert "verdicts.csv" in str(caught.value)
    monkeypatch.undo()
    assert digest(small) == before, "no file is new, none half-written"
    assert not [p for p in small.rglob("*.tmp")]
    write_report(small)
    assert digest(small) != before


def test_a_file_where_a_folder_should_be_is_one_message(small):
    (small / "comparison").write_text("in the way")
    with pytest.raises(UserError, match="aggregated_metrics.json: cannot be written"):
        write_report(small)
    assert not (small / "report.html").exists() and not list(small.glob(".*.tmp"))


def test_a_broken_plan_is_one_message(small):
    (small / "study.json").write_text("{")
    with pytest.raises(UserError, match="study.json"):
        write_report(small)


# model cards


def adapter_of(folder: Path, seed: int = 0) -> Path:
    adapter = folder / "cola-0.2-fw_lora" / f"seed-{seed}" / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    return adapter / "README.md"


def pefts_card(base: str = "/some/folder") -> str:
    """What PEFT 0.21 writes beside an adapter."""
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard.from_template(ModelCardData())
    card.data["library_name"], card.data["tags"], card.data["base_model"] = "peft", ["lora"], base
    lines = card.text.splitlines()
    heading = "### Framework versions"
    if heading in lines:
        lines.insert(lines.index(heading) + 2, "- PEFT 0.21.2")
    else:
        lines.append(f"{heading}\n\n- PEFT 0.21.2")
    card.text = "\n".join(lines)
    return str(card)


def test_a_card_takes_the_place_of_pefts_form_and_says_the_records_numbers(small):
    card = adapter_of(small)
    card.write_text(pefts_card())
    write_report(small)
    from huggingface_hub import ModelCard

    read = ModelCard.load(card)
    assert read.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert read.data.library_name == "peft" and read.data.datasets == ["nyu-mll/glue"]
    assert read.data.eval_results is not None
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("matthews_correlation", 0.51)
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("nyu-mll/glue", "cola", "validation")
    assert "51.00 points" in read.text and "54.00 points, 4 seeds" in read.text
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER")' in read.text and "45,312 adapter parameters" in read.text
    assert len(list(small.rglob("README.md"))) == 1, "where no adapter was kept there is no card"


def test_a_card_is_written_again_unless_a_person_changed_it(small):
    card, mine, form = adapter_of(small), adapter_of(small, 1), adapter_of(small, 2)
    mine.write_text("# My own card\n")
    form.write_text(pefts_card().replace("## Model Details", "It likes short sentences.\n\n## Model Details"))
    write_report(small)
    first = card.read_text()
    cfg = fake_study.config(small, "cola", "fw_lora")
    fake_study.write(small, cfg, fake_study.record(cfg, 3, 0.9))
    write_report(small)
    assert card.read_text() != first and "62.25 points, 4 seeds" in card.read_text()
    changed = card.read_text().replace("## Limits", "## Limits\n\n- It was tried on my cat.")
    card.write_text(changed)
    write_report(small)
    assert card.read_text() == changed
    assert mine.read_text() == "# My own card\n" and "It likes short sentences." in form.read_text()


def test_a_card_of_a_backbone_from_a_folder_names_no_hub_model(tmp_path):
    cfg = fake_study.config(tmp_path, "cola", "fw_lora")
    model = cfg.model.model_copy(update={"pretrained_id": "./mine"})
    cfg = cfg.model_copy(update={"model": model})
    fake_study.write(tmp_path, cfg, fake_study.record(cfg, 0, 0.5, warnings=["a\n---\nb: c"]))
    card = adapter_of(tmp_path)
    write_report(tmp_path)
    header = yaml.safe_load(card.read_text().split("---")[1])
    assert "base_model" not in header and "FOLDER_OF_THE_BASE_MODEL" in card.read_text()
