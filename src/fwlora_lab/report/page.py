"""`fwlora report`: from the records of a results folder to one page that opens from disk, and the files next to it.

results_dir/
    report.html                          everything, in one file that loads nothing
    report.md                            the most important numbers as Markdown
    comparison/aggregated_metrics.json   in AIRAS's form
    comparison/seeds.csv                 every run of the study with its metrics and seconds
    comparison/comparisons.csv           paired differences from the reference
    comparison/verdicts.csv              the study's claims
    comparison/table.tex                 a table for a paper (booktabs)
    <run_id>/metrics.json                means over the run's seeds, where AIRAS looks for them
    <run_id>/seed-<n>/adapter/README.md  a model card, unless a person wrote one

Everything follows from the records and study.json alone: the same records give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

from fwlora_lab.analysis.results import RunResult, StudyResults, read_study
from fwlora_lab.analysis.study import BOOTSTRAP_SEED, DRAWS, Analysis, analyse
from fwlora_lab.files import json_text, write_all_atomic
from fwlora_lab.report import facts, figures, matrices, pictures, settings, svg, tables, templates
from fwlora_lab.report.aggregate import aggregated_metrics, run_metrics
from fwlora_lab.report.cards import cards
from fwlora_lab.report.headline import headline
from fwlora_lab.report.latex import latex_table
from fwlora_lab.report.modelcards import model_cards
from fwlora_lab.report.table import Table

_LARGEST_PLOT = 1_500_000  # bytes of a search's plot that is put into the page


def write_report(results_dir: str | Path) -> Path:
    """Write report.html and the files next to it, and return the page's path.

    Raises:
        UserError: there is nothing to report, study.json or a claim is not well formed, or a file cannot be written.
            The files of an earlier report then stay as they were.
    """
    study = read_study(results_dir)
    analysis = analyse(study)
    comparison = study.folder / "comparison"
    files = {
        comparison / "aggregated_metrics.json": json_text(aggregated_metrics(analysis)),
        comparison / "seeds.csv": tables.seeds_table(analysis).csv,
        comparison / "comparisons.csv": tables.comparisons_table(analysis).csv,
        comparison / "verdicts.csv": tables.verdicts_table(analysis).csv,
        comparison / "table.tex": latex_table(analysis),
        study.folder / "report.md": render_markdown(analysis),
    }
    files |= {study.folder / run_id / "metrics.json": json_text(m) for run_id, m in run_metrics(analysis).items()}
    files |= model_cards(analysis)
    page = study.folder / "report.html"
    files[page] = render_page(analysis)
    write_all_atomic(files)
    return page


def render_page(analysis: Analysis) -> str:
    """The HTML page."""
    study = analysis.study
    script = templates.template_text("report.js")
    return templates.render(
        "report.html",
        analysis=analysis,
        study=study,
        plan=study.plan,
        headline=headline(analysis),
        counts=Counter(v.state for v in analysis.verdicts),
        cards=cards(analysis),
        verdicts_csv=tables.verdicts_table(analysis).csv,
        scores=pictures.score_pictures(analysis),
        differences=pictures.difference_pictures(analysis),
        curves=pictures.curve_pictures(analysis),
        maps=matrices.matrix_maps(analysis),
        seconds=pictures.seconds_pictures(analysis),
        tables=_tables(analysis),
        selection={k: v if isinstance(v, str) else json.dumps(v) for k, v in study.plan.selection.items()},
        searches=_search_plots(study),
        seeds=sorted({run.seed for run in study.runs}),
        grid=[(cell, {run.seed: run for run in cell.runs}) for cell in analysis.cells],
        failed=_failed(study),
        missing=facts.missing_seeds(study),
        running=[run for run in study.runs if run.state == "running"],
        environment=facts.environment(study),
        commands=list(dict.fromkeys(record.command for record in study.records)),
        warnings=Counter(w for record in study.records for w in dict.fromkeys(record.warnings)).most_common(),
        last_finished=max((record.finished for record in study.records), default=None),
        colours={method: figures.colour_of(i) for method, i in pictures.colours(analysis).items()},
        style=templates.template_text("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        draws=DRAWS,
        bootstrap_seed=BOOTSTRAP_SEED,
    )


def _tables(analysis: Analysis) -> dict[str, Table]:
    """The page's tables, by the names that the templates use."""
    return {
        "scores": tables.scores_table(analysis),
        "comparisons": tables.comparisons_table(analysis),
        "contrast": matrices.contrast_table(analysis),
        "ratios": tables.ratios_table(analysis),
        "seconds": tables.seconds_table(analysis),
        "parameters": tables.parameters_table(analysis),
        "settings": settings.settings_table(analysis),
        "seeds": tables.seeds_table(analysis),
    }


def render_markdown(analysis: Analysis) -> str:
    """The Markdown page."""
    shown = (tables.scores_table(analysis), tables.comparisons_table(analysis), tables.ratios_table(analysis))
    return templates.render(
        "report.md",
        analysis=analysis,
        study=analysis.study,
        headline=headline(analysis),
        cards=cards(analysis),
        tables=[table for table in shown if table.rows],
        failed=_failed(analysis.study),
        missing=facts.missing_seeds(analysis.study),
        environment=facts.environment(analysis.study),
    )


def _failed(study: StudyResults) -> list[RunResult]:
    return [run for run in study.runs if run.state in ("failed", "broken")]


def _search_plots(study: StudyResults) -> dict[str, list[tuple[str, str]]]:
    """The plots, name and SVG, that `fwlora search` left for the study's runs, by the search's run id."""
    plots: dict[str, list[tuple[str, str]]] = {}
    for run_id in dict.fromkeys(cell.run_id for cell in study.plan.cells):
        for search in (run_id, run_id.removesuffix("-best")):  # a search's best config is called <run_id>-best
            if search in plots:
                continue
            found = [(name, _search_plot(study, search, name)) for name in ("history", "slices", "importances")]
            shown = [(name, drawing) for name, drawing in found if drawing is not None]
            if shown:
                plots[search] = shown
    return plots


def _search_plot(study: StudyResults, search: str, name: str) -> str | None:
    """A search's plot as it can be put into the page; None if it does not exist, is too large, or is not SVG."""
    file = study.folder / search / "search" / f"{name}.svg"
    with suppress(OSError, UnicodeDecodeError):
        if file.stat().st_size <= _LARGEST_PLOT:
            drawing = svg.foreign(file.read_text("utf-8"))
            return None if drawing is None else svg.with_ids(drawing, pictures.slug("search", name, search))
    return None
