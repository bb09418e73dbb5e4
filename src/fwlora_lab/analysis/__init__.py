"""Statistics, paired comparisons, claims and verdicts: pure functions over records."""
