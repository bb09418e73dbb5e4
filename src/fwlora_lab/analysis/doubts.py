"""What keeps two methods' runs from being a fair comparison: it stands beside each verdict about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fwlora_lab.records.record import Record

_SHARE_TOLERANCE = 0.05  # parameter budgets that differ by less than this part of the larger one count as equal


def comparison_doubts(method: Sequence[Record], reference: Sequence[Record], names: tuple[str, str]) -> list[str]:
    """Why the metrics of a method and a reference compare more than the methods; [] if nothing is known.

    Args:
        names: of the method and of the reference.
    """
    found = [_unequal_parameters(method, reference, names)]
    return [doubt for doubt in found if doubt]


def settings_doubt(
    selection: Mapping[str, object], method: Sequence[Record], reference: Sequence[Record], names: tuple[str, str]
) -> str:
    """A sentence about hyper-parameters that were fixed and not tuned alike for both; "" if they were tuned."""
    if selection.get("policy") != "fixed":
        return ""
    rates = [_learning_rates(records) for records in (method, reference)]
    values = ""
    if all(rates):
        own, other = (", ".join(f"{rate:g}" for rate in of_method) for of_method in rates)
        values = (
            f" (learning rate {own} for both)"
            if own == other
            else f" (learning rate {own} for {names[0]}, {other} for {names[1]})"
        )
    return f"Settings were fixed{values}, not tuned alike: another setting may reverse the verdict."


def _unequal_parameters(method: Sequence[Record], reference: Sequence[Record], names: tuple[str, str]) -> str:
    shares = [[r.parameters.percent for r in records if r.parameters is not None] for records in (method, reference)]
    if not all(shares):
        return ""
    own, other = (float(np.mean(of_method)) for of_method in shares)
    if abs(own - other) <= _SHARE_TOLERANCE * max(own, other):
        return ""
    return (
        f"Not at equal parameters: {names[0]} ends with {own:.2f} % of the backbone's, {names[1]} with {other:.2f} %."
    )


def _learning_rates(records: Sequence[Record]) -> list[float]:
    found = {record.config.get("training", {}).get("learning_rate") for record in records}
    return sorted(float(rate) for rate in found if isinstance(rate, (int, float)))
