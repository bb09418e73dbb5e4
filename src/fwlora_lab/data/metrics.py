"""A task's official metrics from a model's outputs."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.errors import UserError


def score(spec: TaskSpec, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics by name, as fractions (not percent).

    F1 is that of label 1. A metric that is 0 / 0, because all predictions or all labels are the same, is 0.0: a
    constant predicts nothing.

    Args:
        logits: the model's outputs, [n, classes], or [n, 1] for regression.
        labels: class indices or numbers, [n].

    Raises:
        UserError: an output that is not finite.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = np.asarray(logits)
    labels = np.asarray(labels)
    outputs = max(1, len(spec.labels))
    if logits.shape != (len(labels), outputs) or not len(labels):
        raise ValueError(f"logits {logits.shape} for {len(labels)} labels and {outputs} outputs")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise UserError(
            f"the model's outputs are not finite for {bad} of {len(labels)} examples: training has "
            "diverged; lower training.learning_rate or the adapter's scale alpha/rank"
        )
    if spec.kind == "regression":
        predicted = logits[:, 0].astype(np.float64)
        constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
        measures = {
            "pearson": lambda: 0.0 if constant else pearsonr(predicted, labels)[0],
            "spearmanr": lambda: 0.0 if constant else spearmanr(predicted, labels)[0],
        }
    else:
        predicted = logits.argmax(axis=1)
        measures = {
            "accuracy": lambda: accuracy_score(labels, predicted),
            # 0 is documented, but scikit-learn's annotation allows strings only.
            "f1": lambda: f1_score(labels, predicted, pos_label=1, zero_division=cast(Any, 0)),
            "matthews_correlation": lambda: matthews_corrcoef(labels, predicted),
        }
    return {name: float(measures[name]()) for name in spec.metrics}
