"""The table of a study: what each cell shows, and that it fits a narrow terminal.

pytest tests/fwlora_lab/display/test_study_table.py
"""

from __future__ import annotations

import io

import fake_study
import pytest
from rich.console import Console

from fwlora_lab.display.study_table import StudyTable
from fwlora_lab.records.record import Failure
from fwlora_lab.training.events import Note, RunFailed, RunFinished, RunStarted, StepDone


def printed(renderable, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_table_shows_every_seed_and_running_means(tmp_path, capsys):
    cfg = fake_study.config(tmp_path, "cola", "lora")
    table = StudyTable({cfg.run_id: "cola 0.2 % lora"}, range(10), 9)
    table.add_finished(fake_study.record(cfg, 0, 0.4))
    table.on_event(RunStarted(cfg.run_id, 1, "lora", 100, 3, 0, 9))
    table.on_event(StepDone(cfg.run_id, 1, 40, 100, 0.5, "steady", 10.0))
    table.on_event(RunFinished(cfg.run_id, 2, fake_study.record(cfg, 2, 0.5), trained=True))
    failed = fake_study.record(cfg, 3, 0.0).model_copy(
        update={"error": Failure(type="E", message="diverged", traceback="")}
    )
    table.on_event(RunFailed(cfg.run_id, 3, failed))
    table.on_event(Note(cfg.run_id, 3, "once"))
    table.on_event(Note(cfg.run_id, 4, "once"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("[1/9] cola 0.2 % lora seed 2: 0.5000 (mean of 2: 0.4500)")
    assert said[1].startswith("[2/9] cola 0.2 % lora seed 3: FAILED: diverged")
    assert said[2:] == ["  note: once"]
    head, row, note, state = (line.split() for line in printed(table._render(150), 150))
    assert head[0] == "matthews_correlation" and head[-4:] == ["more", "mean", "±", "sd"]
    assert row[4:] == ["0.4000", "40%", "0.5000", "failed", "·", "·", "·", "·", "0/2", "0.4500", "±", "0.0707"]
    assert note == ["note:", "once"] and state[:5] == ["2", "of", "9", "runs", "trained,"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("seeds", [3, 10])
def test_the_table_fits_the_terminal(tmp_path, width, seeds):
    methods = ("lora", "adalora", "fw_lora", "a_method_with_an_unusually_long_name_of_its_own")
    cells = {}
    for method in methods:
        cells[fake_study.config(tmp_path, "cola", method).run_id] = f"cola 0.2 % {method}"
    table = StudyTable(cells, range(seeds), 4 * seeds)
    for method in methods:
        cfg = fake_study.config(tmp_path, "cola", method)
        for seed in range(seeds):
            table.add_finished(fake_study.record(cfg, seed, -0.1234 * seed))
    lines = printed(table._render(width), width)
    assert len(lines) == 1 + len(cells) + 1, "no row takes two lines"
    assert max(map(len, lines)) <= width
    head, *rows, state = lines
    assert head.split()[-3:] == ["mean", "±", "sd"] and all(" ± " in row for row in rows)
    assert rows[2].startswith("cola 0.2 % fw_lora ") and state.startswith("0 of ")
    shown = head.count("seed ")
    assert shown >= 1 and (shown == min(seeds, 8)) == (width >= (80 if seeds == 3 else 200))
    assert f"{seeds - shown} more" in head or shown == seeds


def test_the_heading_names_no_metric_that_some_rows_do_not_have(tmp_path):
    configs = [fake_study.config(tmp_path, task, "lora") for task in ("cola", "sst2")]
    table = StudyTable({cfg.run_id: cfg.run_id for cfg in configs}, [0], 2)
    headings = []
    for cfg in configs:
        table.add_finished(fake_study.record(cfg, 0, 0.5))
        headings.append(printed(table._render(100), 100)[0].split("  ")[0])
    assert headings == ["matthews_correlation", "primary metric"]
