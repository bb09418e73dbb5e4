"""TODO"""

from __future__ import annotations

from collections import Counter

from fwlora_lab.analysis.study import LEVEL, Analysis
from fwlora_lab.report.formatting import points


def headline(analysis: Analysis) -> str:
    """One sentence that says what the study found, losses first."""
    study, counts = analysis.study, Counter(v.state for v in analysis.verdicts)
    if not study.done:
        return "No run is complete yet."
    parts = []
    if n := len(analysis.verdicts):
        fails, open_, holds = counts["fails"], counts["undecided"], counts["holds"]
        parts.append(
            f"of {n} claim{'s' * (n > 1)} {fails} fail{'s' * (fails == 1)}, {open_} {'is' if open_ == 1 else 'are'} "
            f"undecided and {holds} hold{'s' * (holds == 1)}"
        )
    clocked = sum(v.claim.is_ratio and v.state != "undecided" for v in analysis.verdicts)
    if clocked and analysis.seconds_doubt:
        parts.append(f"{clocked} of these verdicts {'is' if clocked == 1 else 'are'} about time, by no fair clock")
    told, silent = [], 0
    for group in analysis.groups:
        for c in group.comparisons:
            p = analysis.adjusted_p(group, c.method)
            if c.mean is None:  # no pairs
                continue
            if p is None or p >= 1 - LEVEL:
                silent += 1
                continue
            gap = f"{points(abs(c.mean))} points {'below' if c.mean < 0 else 'above'} {c.reference}"
            told.append((c.mean, f"on {group.where} {c.method} ends {gap}"))
    parts += [text for _, text in sorted(told, key=lambda pair: pair[0])[:4]]
    if len(told) > 4:
        parts.append(f"{len(told) - 4} more comparisons with {analysis.reference} differ")
    if silent:
        which = "no other difference" if told else "no difference"
        parts.append(f"{which} from {analysis.reference} can be told from chance")
    sentence = "; ".join(parts) or f"there is nothing to compare with {analysis.reference}"
    if len(study.done) < len(study.runs):
        sentence = f"so far, with {len(study.done)} of {len(study.runs)} runs: {sentence}"
    return f"{sentence[0].upper()}{sentence[1:]}."
