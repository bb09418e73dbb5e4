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
import errno
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fwlora_lab import figures, stats, views
from fwlora_lab.analysis import BOOTSTRAP_SEED, DRAWS, Analysis, Run, Study, analyse, percent, read_study
from fwlora_lab.errors import UserError
from fwlora_lab.modelcards import model_cards
from fwlora_lab.views import p_value, points, span, times

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
        comparison / "seeds.csv": views.seeds_table(analysis).csv,
        comparison / "comparisons.csv": views.comparisons_table(analysis).csv,
        comparison / "verdicts.csv": views.verdicts_table(analysis).csv,
        comparison / "table.tex": latex_table(analysis),
        study.folder / "report.md": render_markdown(analysis),
    }
    files |= {study.folder / run_id / "metrics.json": _json(m) for run_id, m in run_metrics(analysis).items()}
    files |= model_cards(analysis)
    page = study.folder / "report.html"
    files[page] = render_page(analysis)
    _write_all(files)
    return page


def _write_all(files: Mapping[Path, str]) -> None:
    """Write all files under temporary names, and only when that went well move them into place."""
    halves = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = next(iter(files))
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            halves[path].write_text(text, encoding="utf-8", newline="\n")
        for path, half in halves.items():
            half.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "the disk is full" if full else error.strerror or str(error)
        cure = "Free some space" if full else "Make the folder one that can be written"
        raise UserError(f"{path}: the report cannot be written: {cause}. {cure}, and ask for it again.") from error
    finally:
        for half in halves.values():
            with suppress(OSError):
                half.unlink(missing_ok=True)


def _json(content: object) -> str:
    return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- the page -----------------------------------------------------------------------------------


def render_page(analysis: Analysis) -> str:
    study = analysis.study
    script = views.shipped("report.js")
    records = [run.record for run in study.runs if run.record]
    rows = [(g, method, {run.seed: run for run in runs}) for g in analysis.groups for method, runs in g.runs.items()]
    return views.render(
        "report.html",
        analysis=analysis,
        study=study,
        plan=study.plan,
        headline=views.headline(analysis),
        counts=Counter(v.state for v in analysis.verdicts),
        cards=views.cards(analysis),
        verdicts_csv=views.verdicts_table(analysis).csv,
        scores=views.score_pictures(analysis),
        differences=views.difference_pictures(analysis),
        curves=views.curve_pictures(analysis),
        maps=views.matrix_maps(analysis),
        seconds=views.seconds_pictures(analysis),
        tables=_tables(analysis),
        selection={k: v if isinstance(v, str) else json.dumps(v) for k, v in study.plan.selection.items()},
        searches=_search_plots(study),
        seeds=sorted({run.seed for run in study.runs}),
        grid=rows,
        failed=_failed(study),
        missing=views.missing(analysis),
        running=[run for run in study.runs if run.state == "running"],
        environment=views.environment(analysis),
        commands=list(dict.fromkeys(r.command for r in records)),
        warnings=Counter(w for r in records for w in dict.fromkeys(r.warnings)).most_common(),
        until=max((r.finished for r in records), default=None),
        colours={method: figures.colour_of(i) for method, i in views.colours(analysis).items()},
        style=views.shipped("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        draws=DRAWS,
        bootstrap_seed=BOOTSTRAP_SEED,
    )


def _tables(analysis: Analysis) -> dict[str, views.Table]:
    made = (
        views.scores_table(analysis),
        views.comparisons_table(analysis),
        views.contrast_table(analysis),
        views.ratios_table(analysis),
        views.seconds_table(analysis),
        views.parameters_table(analysis),
        views.settings_table(analysis),
        views.seeds_table(analysis),
    )
    return {table.id.removesuffix("-table"): table for table in made}


def render_markdown(analysis: Analysis) -> str:
    tables = _tables(analysis)
    return views.render(
        "report.md",
        analysis=analysis,
        study=analysis.study,
        headline=views.headline(analysis),
        cards=views.cards(analysis),
        tables=[tables[name] for name in ("scores", "comparisons", "ratios") if tables[name].rows],
        failed=_failed(analysis.study),
        missing=views.missing(analysis),
        environment=views.environment(analysis),
    )


def _failed(study: Study) -> list[Run]:
    return [run for run in study.runs if run.state in ("failed", "broken")]


def _search_plots(study: Study) -> dict[str, list[tuple[str, str]]]:
    """The plots, name and SVG, that `fwlora search` left for the study's runs, by the search's run id."""
    out: dict[str, list[tuple[str, str]]] = {}
    for run_id in dict.fromkeys(cell.run_id for cell in study.plan.cells):
        for name in (run_id, run_id.removesuffix("-best")):
            for plot in ("history", "slices", "importances") if name not in out else ():
                file = study.folder / name / "search" / f"{plot}.svg"
                with suppress(OSError, UnicodeDecodeError):
                    svg = figures.foreign(file.read_text("utf-8")) if file.stat().st_size <= _LARGEST_PLOT else None
                    if svg is not None:
                        out.setdefault(name, []).append((plot, figures.with_ids(svg, views.slug("search", plot, name))))
    return out


# --- for other programs -------------------------------------------------------------------------


def run_metrics(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """For every run id with a complete run: the mean of each metric, and beside it spread, seeds and every value."""
    out = {}
    for g in analysis.groups:
        for method in g.runs:
            records = g.done(method)
            values: dict[str, dict[int, float]] = defaultdict(dict)
            for record in records:
                for name, value in record.metrics.items():
                    values[name][record.seed] = value
                if record.times is not None:
                    values["train_seconds"][record.seed] = record.times.train_seconds
            summaries = stats.summarize(values)
            if records:
                out[records[0].run_id] = {name: s.mean for name, s in summaries.items()} | {
                    "seeds": sorted(r.seed for r in records),
                    "sd": {name: s.sd for name, s in summaries.items()},
                    "by_seed": {name: {str(k): v for k, v in s.seeds.items()} for name, s in summaries.items()},
                }
    return out


def aggregated_metrics(analysis: Analysis) -> dict[str, Any]:
    """What AIRAS's evaluation writes: metrics[metric][run_id], the best proposed and baseline runs, and their gap.

    The gap is 100·(proposed − baseline)/|baseline|. AIRAS knows one task and one metric; here the top level is the
    first cell with both kinds of runs, and `cells` has them all. A run is a proposed one where its id says so
    ("proposed"), or, where no run's id does, if its method is fw_lora; all others are baselines, controls among them.
    """
    by_run = run_metrics(analysis)
    metrics: dict[str, dict[str, float]] = defaultdict(dict)
    for run_id, values in by_run.items():
        for name, value in values.items():
            if isinstance(value, float):
                metrics[name][run_id] = value
    named = any("proposed" in cell.run_id for cell in analysis.study.plan.cells)
    cells = []
    for g in analysis.groups:
        best: dict[bool, dict[str, Any] | None] = {True: None, False: None}
        for method, s in g.summaries.items():
            if s.mean is None:
                continue
            run_id = g.done(method)[0].run_id
            proposed = "proposed" in run_id if named else method == "fw_lora"
            there = best[proposed]
            if there is None or s.mean > there["value"]:
                best[proposed] = {"run_id": run_id, "value": s.mean}
        gap = None
        ours, theirs = best[True], best[False]
        if ours is not None and theirs is not None and theirs["value"] != 0:
            gap = 100 * (ours["value"] - theirs["value"]) / abs(theirs["value"])
        cells.append(
            {"task": g.task, "budget_percent": g.budget or None, "primary_metric": g.metric, "best_proposed": ours,
             "best_baseline": theirs, "gap": gap}
        )  # fmt: skip
    first = next((c for c in cells if c["best_proposed"] and c["best_baseline"]), cells[0])
    top = {key: first[key] for key in ("primary_metric", "best_proposed", "best_baseline", "gap")}
    return top | {"metrics": metrics, "cells": cells}


_TEX = {c: f"\\{c}" for c in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": r"\ensuremath{-}",
    "–": "--",
    "×": r"\ensuremath{\times}",
}


def latex(text: str) -> str:
    """Text as LaTeX shows it, on one line; what is not printable becomes a question mark."""
    return "".join(_TEX.get(c, c if c.isprintable() else "?") for c in " ".join(text.split()))


def latex_table(analysis: Analysis) -> str:
    """Means, differences from the reference and ratios of training seconds, for booktabs."""
    reference = analysis.reference
    lines = [
        "% Written by `fwlora report`. Needs \\usepackage{booktabs}.",
        "% Metrics in points; intervals are 95 % t intervals over seeds; p is Holm's over all comparisons.",
        r"\begin{tabular}{lrlrrrrr}",
        r"\toprule",
        f"Task & Budget & Method & Seeds & Mean (interval) & Difference from {latex(reference)} & $p$ & Time \\\\",
    ]
    for g in analysis.groups:
        lines.append(r"\midrule")
        compared = {c.method: c for c in g.comparisons}
        for method, s in g.summaries.items():
            c = compared.get(method)
            ratio = g.ratios.get("train_seconds", {}).get(method)
            mean = points(s.mean) + (f" ({span(s.interval, points)})" if s.interval else "")
            difference = "" if c is None else points(c.mean, True)
            if c is not None and c.interval:
                difference += f" ({span(c.interval, lambda v: points(v, True))})"
            time = "1" if c is None else "" if ratio is None else times(ratio.mean)
            cells = [g.task, percent(g.budget), method, str(s.n), mean, difference]
            cells += ["" if c is None else p_value(analysis.adjusted_p(g, method)), time]
            lines.append(" & ".join(map(latex, cells)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"
