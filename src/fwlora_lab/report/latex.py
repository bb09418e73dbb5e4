"""The report's table for a paper, in LaTeX."""

from __future__ import annotations

from fwlora_lab.analysis.results import percent
from fwlora_lab.analysis.study import Analysis, Cell
from fwlora_lab.report.formatting import interval_text, p_value, points, ratio, signed_points

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
    """The text in LaTeX's spelling, on one line; a character that cannot be printed becomes a question mark."""
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
    for group in analysis.groups:
        lines.append(r"\midrule")
        lines += [" & ".join(map(latex, _entries(cell))) + r" \\" for cell in group.cells]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _entries(cell: Cell) -> list[str]:
    """One line of the table; a column without a number is empty."""
    summary, comparison = cell.summary, cell.comparison
    mean = points(summary.mean) + (f" ({interval_text(summary.interval, points)})" if summary.interval else "")
    entries = [cell.task, percent(cell.budget), cell.method, str(summary.n), mean]
    if comparison is None:  # the reference
        return [*entries, "", "", "1"]
    difference = signed_points(comparison.mean)
    if comparison.interval:
        difference += f" ({interval_text(comparison.interval, signed_points)})"
    seconds = cell.ratios.get("train_seconds")
    return [*entries, difference, p_value(cell.adjusted_p), "" if seconds is None else ratio(seconds.mean)]
