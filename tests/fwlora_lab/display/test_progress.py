"""What training and a search show on a terminal of 80 columns: nothing wraps, and what matters is not cut off.

pytest tests/fwlora_lab/display/test_progress.py
"""

from __future__ import annotations

import io
import re

import fake_study
import pytest
from rich.console import Console

from fwlora_lab.display.progress import show, summary
from fwlora_lab.display.search_progress import SearchProgress, SearchStatus, TrialStatus, search_display
from fwlora_lab.display.width import shorten
from fwlora_lab.records.record import Failure
from fwlora_lab.training.events import Evaluated, RunStarted, StepDone

LONG = "proposed-roberta-base-110M--SST-2-GLUE"


def drawn(console: Console) -> list[str]:
    """The lines that a live display drew, one state after another."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()


def terminal(width: int) -> Console:
    return Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, highlight=False)


def test_the_summary_of_runs_fits_80_columns(tmp_path):
    records = []
    for task, method in (("cola", "fw_lora"), ("sst2", "adalora")):
        cfg = fake_study.config(tmp_path, task, method)
        records += [fake_study.record(cfg, seed, 0.5 + seed / 100, 1234.5) for seed in range(10)]
    cfg = fake_study.config(tmp_path, "cola", "lora", run_id=LONG)
    failure = Failure(type="E", message="diverged", traceback="")
    records += [fake_study.record(cfg, 0, 0.5), fake_study.record(cfg, 1, 0.0, status="failed", error=failure)]
    lines = summary(records, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["run", "seeds", "metric", "mean", "sd", "train", "s", "param", "%"]
    rows = [line.split() for line in lines[1:]]
    assert rows[0] == ["cola-0.2-fw_lora", "10", "matthews_correlation", "0.5450", "0.0303", "1234.5", "0.200"]
    assert rows[1][:4] == ["sst2-0.2-adalora", "10", "accuracy", "0.5450"]
    assert rows[2][1:5] == ["1", "of", "2", "matthews_correlation"]
    assert "".join(row[0] for row in rows[2:]) == LONG, "a long name goes on in the next line"
    assert summary(records, 200).splitlines()[3].split()[0] == LONG


@pytest.mark.parametrize("width", [80, 150])
def test_the_bars_of_training_fit_the_terminal(width):
    console = terminal(width)
    with show(3, console) as on_event:
        for seed in (0, 12):
            on_event(RunStarted(LONG, seed, "fw_lora", 6315, 3, seed, 3))
            on_event(Evaluated(LONG, seed, 1, {"matthews_correlation": 0.9123, "accuracy": 0.5}))
            on_event(StepDone(LONG, seed, 1234, 6315, 0.1234, "penalty", 99.0))
    bars = [line for line in drawn(console) if "1234/6315" in line]
    assert bars and max(map(len, bars)) <= width
    for seed in (0, 12):
        (last,) = [line for line in bars[-2:] if f"GLUE seed {seed} " in line]
        assert last.split()[-6:-1] == ["penalty", "loss", "0.123", "matthews", "0.9123"]


def test_the_bar_of_a_search_fits_80_columns():
    best = TrialStatus(7, "complete", 0.4567, {"training.learning_rate": 0.00123})
    trials = [best, TrialStatus(8, "failed", None, {"training.learning_rate": 1.0}, "diverged\nat step 3")]
    status = SearchStatus(running=2, finished=[], best=None)
    console = terminal(80)
    with search_display(console) as bar:
        progress = SearchProgress(LONG, 20, lambda: status, bar)
        status = SearchStatus(running=2, finished=trials, best=best)
        progress.update(0.5, force=True)
    lines = drawn(console)
    assert "[1/20] trial 7: 0.4567  learning_rate=0.00123" in " ".join(lines)
    assert "trial 8: FAILED: diverged  learning_rate=1" in " ".join(lines)
    bars = [line for line in lines if "done" in line]
    assert bars and max(map(len, bars)) <= 80
    assert "2/20 done 2 running 0 pruned 1 failed, best 0.4567 (trial 7)" in bars[-1]


def test_a_search_without_a_terminal_prints_lines(capsys):
    pruned = TrialStatus(3, "pruned", 0.25, {"model.lora.rank": 4})
    status = SearchStatus(running=0, finished=[pruned], best=None)
    progress = SearchProgress("lora", 5, lambda: status)
    status = SearchStatus(
        running=1, finished=[pruned, TrialStatus(4, "complete", 0.5, {"model.lora.rank": 8})], best=None
    )
    progress.note("once")
    progress.note("once")
    progress.update(force=True)
    progress.update()  # less than a second later
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  note: once"
    assert lines[1].startswith("[2/5] trial 4: 0.5000  rank=8 | 1 running 1 pruned 0 failed, about ")
    assert len(lines) == 2


def test_a_quiet_search_shows_and_reads_nothing(capsys):
    def refuse() -> SearchStatus:
        raise AssertionError("the status was read")

    progress = SearchProgress("lora", 5, refuse, quiet=True)
    progress.update(force=True)
    progress.note("hidden")
    assert capsys.readouterr().out == ""


def test_long_names_lose_their_middle():
    assert shorten("cola-0.2-lora", 13) == "cola-0.2-lora"
    assert shorten("minilm-cola-0.2-fw_lora", 15) == "minilm-…fw_lora"
