"""The report's headline: the outcome of the study in a sentence or two."""

from __future__ import annotations

from collections import Counter

from fwlora_lab.analysis.study import LEVEL, Analysis
from fwlora_lab.report.formatting import points

_MOST = 4  # differences that are spelled out


def headline(analysis: Analysis) -> str:
    """One sentence that says what the study found, losses first."""
    study, counts = analysis.study, Counter(v.state for v in analysis.verdicts)
    if not study.complete_records:
        return "No run is complete yet."
    parts = []
    if n := len(analysis.verdicts):
        fails, open_, holds = counts["fails"], counts["undecided"], counts["holds"]
        parts.append(
            f"of {n} claim{'s' * (n > 1)} {fails} fail{'s' * (fails == 1)}, {open_} {'is' if open_ == 1 else 'are'} "
            f"undecided and {holds} hold{'s' * (holds == 1)}"
        )
    of_seconds = sum(v.claim.is_ratio and v.state != "undecided" for v in analysis.verdicts)
    if of_seconds and analysis.seconds_doubt:
        parts.append(
            f"{of_seconds} of these verdicts {'is' if of_seconds == 1 else 'are'} about time, and the times are not "
            "comparable"
        )
    differences, without = _differences(analysis)
    parts += differences[:_MOST]
    if len(differences) > _MOST:
        parts.append(f"{len(differences) - _MOST} more comparisons with {analysis.reference} differ")
    if without:
        which = "no other difference" if differences else "no difference"
        parts.append(f"{which} from {analysis.reference} can be told from chance")
    sentence = "; ".join(parts) or f"there is nothing to compare with {analysis.reference}"
    if len(study.complete_records) < len(study.runs):
        sentence = f"so far, with {len(study.complete_records)} of {len(study.runs)} runs: {sentence}"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _differences(analysis: Analysis) -> tuple[list[str], int]:
    """The comparisons that differ, the largest loss first, and how many do not."""
    differing, without = [], 0
    for group in analysis.groups:
        for cell in group.cells:
            if cell.comparison is None or cell.comparison.mean is None:  # the reference, or no pairs
                continue
            if cell.adjusted_p is None or cell.adjusted_p >= 1 - LEVEL:
                without += 1
                continue
            mean = cell.comparison.mean
            gap = f"{points(abs(mean))} points {'below' if mean < 0 else 'above'} {analysis.reference}"
            differing.append((mean, f"on {group.name} {cell.method} ends {gap}"))
    return [text for _, text in sorted(differing, key=lambda pair: pair[0])], without
