"""TODO"""

from __future__ import annotations

from fwlora_lab.analysis.read import percent
from fwlora_lab.analysis.study import Analysis
from fwlora_lab.report.formatting import p_value, points, span, times

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
