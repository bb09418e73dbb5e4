"""`fwlora report`: from the records in a results folder to one page that opens from disk, and the files beside it.

results_dir/
    report.html                          everything, in one file that loads nothing
    report.md                            the same numbers without figures
    comparison/aggregated_metrics.json   in AIRAS's form
    comparison/seeds.csv                 every run, planned or found, with its metrics and seconds
    comparison/comparisons.csv           paired differences from the reference
    comparison/verdicts.csv              the study's claims
    comparison/table.tex                 a table for a paper (booktabs)
    <run_id>/metrics.json                means over the run's seeds, where AIRAS looks for them
    <run_id>/seed-<n>/adapter/README.md  a model card, unless a person wrote one

All of it follows from the records (and study.json, where there is one) and nothing else: the same records give the
same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

from fwlora_lab.analysis.read import RunResult, StudyResults, read_study
from fwlora_lab.analysis.study import BOOTSTRAP_SEED, DRAWS, Analysis, analyse
from fwlora_lab.files import write_all_atomic
from fwlora_lab.report import cards, figures, headline, pictures, tables, templates
from fwlora_lab.report.aggregate import aggregated_metrics, run_metrics
from fwlora_lab.report.latex import latex_table
from fwlora_lab.report.modelcards import model_cards

_LARGEST_PLOT = 1_500_000  # bytes of a search's plot that is put into the page


def write_report(results_dir: str | Path) -> Path:
    """Write report.html and the files beside it; the page's path.

    Raises:
        UserError: there is nothing to report, study.json or a claim is not well formed, or a file cannot be written.
            The files of an earlier report then stay as they were.
    """
    study = read_study(results_dir)
    analysis = analyse(study)
    comparison = study.folder / "comparison"
    files = {
        comparison / "aggregated_metrics.json": _json(aggregated_metrics(analysis)),
        comparison / "seeds.csv": tables.seeds_table(analysis).csv,
        comparison / "comparisons.csv": tables.comparisons_table(analysis).csv,
        comparison / "verdicts.csv": tables.verdicts_table(analysis).csv,
        comparison / "table.tex": latex_table(analysis),
        study.folder / "report.md": render_markdown(analysis),
    }
    files |= {study.folder / run_id / "metrics.json": _json(m) for run_id, m in run_metrics(analysis).items()}
    files |= model_cards(analysis)
    page = study.folder / "report.html"
    files[page] = render_page(analysis)
    write_all_atomic(files)
    return page


def _json(content: object) -> str:
    return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render_page(analysis: Analysis) -> str:
    study = analysis.study
    script = templates.shipped("report.js")
    records = [run.record for run in study.runs if run.record]
    rows = [(g, method, {run.seed: run for run in runs}) for g in analysis.groups for method, runs in g.runs.items()]
    return templates.render(
        "report.html",
        analysis=analysis,
        study=study,
        plan=study.plan,
        headline=headline.headline(analysis),
        counts=Counter(v.state for v in analysis.verdicts),
        cards=cards.cards(analysis),
        verdicts_csv=tables.verdicts_table(analysis).csv,
        scores=pictures.score_pictures(analysis),
        differences=pictures.difference_pictures(analysis),
        curves=pictures.curve_pictures(analysis),
        maps=pictures.matrix_maps(analysis),
        seconds=pictures.seconds_pictures(analysis),
        tables=_tables(analysis),
        selection={k: v if isinstance(v, str) else json.dumps(v) for k, v in study.plan.selection.items()},
        searches=_search_plots(study),
        seeds=sorted({run.seed for run in study.runs}),
        grid=rows,
        failed=_failed(study),
        missing=tables.missing(analysis),
        running=[run for run in study.runs if run.state == "running"],
        environment=tables.environment(analysis),
        commands=list(dict.fromkeys(r.command for r in records)),
        warnings=Counter(w for r in records for w in dict.fromkeys(r.warnings)).most_common(),
        until=max((r.finished for r in records), default=None),
        colours={method: figures.colour_of(i) for method, i in pictures.colours(analysis).items()},
        style=templates.shipped("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        draws=DRAWS,
        bootstrap_seed=BOOTSTRAP_SEED,
    )


def _tables(analysis: Analysis) -> dict[str, tables.Table]:
    made = (
        tables.scores_table(analysis),
        tables.comparisons_table(analysis),
        tables.contrast_table(analysis),
        tables.ratios_table(analysis),
        tables.seconds_table(analysis),
        tables.parameters_table(analysis),
        tables.settings_table(analysis),
        tables.seeds_table(analysis),
    )
    return {table.id.removesuffix("-table"): table for table in made}


def render_markdown(analysis: Analysis) -> str:
    shown = _tables(analysis)
    return templates.render(
        "report.md",
        analysis=analysis,
        study=analysis.study,
        headline=headline.headline(analysis),
        cards=cards.cards(analysis),
        tables=[shown[name] for name in ("scores", "comparisons", "ratios") if shown[name].rows],
        failed=_failed(analysis.study),
        missing=tables.missing(analysis),
        environment=tables.environment(analysis),
    )


def _failed(study: StudyResults) -> list[RunResult]:
    return [run for run in study.runs if run.state in ("failed", "broken")]


def _search_plots(study: StudyResults) -> dict[str, list[tuple[str, str]]]:
    """The plots, name and SVG, that `fwlora search` left for the study's runs, by the search's run id."""
    out: dict[str, list[tuple[str, str]]] = {}
    for run_id in dict.fromkeys(cell.run_id for cell in study.plan.cells):
        for name in (run_id, run_id.removesuffix("-best")):
            for plot in ("history", "slices", "importances") if name not in out else ():
                file = study.folder / name / "search" / f"{plot}.svg"
                with suppress(OSError, UnicodeDecodeError):
                    svg = figures.foreign(file.read_text("utf-8")) if file.stat().st_size <= _LARGEST_PLOT else None
                    if svg is not None:
                        out.setdefault(name, []).append(
                            (plot, figures.with_ids(svg, pictures.slug("search", plot, name)))
                        )
    return out
