"""Which runs share a measurement of seconds, and the independent values that such runs leave.

Runs that train together, in lanes of one step or one after another in one call of a process, are slowed by the same
neighbours at the same time. Their seconds are one measurement, however many seeds they are: counted as independent,
cohorts of 4, 4 and 2 seeds decide 42 % of A/A comparisons (a method with itself) wrongly at a nominal 5 %.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from fwlora_lab.records.record import Record

# Fewer measurements say next to nothing about their spread: t's factor is 12.7 for two and 4.3 for three.
FEWEST = 3
# Two runs slowed each other if they trained at the same time for more than this part of the shorter one. Less is a
# handover, in which one run was being written while the next one started.
_OVERLAP = 0.05

Measurements = Mapping[str, Mapping[int, Hashable]]  # by method and seed; what is equal is one measurement


class _Partition:
    """Disjoint sets of items that grow together (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def root(self, item: Hashable) -> Hashable:
        while (parent := self._parent.setdefault(item, item)) != item:
            item = parent
        return item

    def join(self, a: Hashable, b: Hashable) -> None:
        self._parent[self.root(a)] = self.root(b)


def measurements_of(runs: Mapping[str, Sequence[Record]]) -> dict[str, dict[int, Hashable]]:
    """The measurement that the seconds of each of the records `runs[method]` belong to.

    Records share one if they say so (`Record.measurement`), or if they trained at the same time on one machine. Records
    from before that field also share one if their seconds are equal to every digit, as equal shares of a step are.
    """
    sets = _Partition()
    by_key = {(method, record.seed): record for method, records in runs.items() for record in records}
    for key, record in by_key.items():
        if record.measurement is not None:
            sets.join(key, ("measurement", record.measurement))
        elif record.times is not None and record.engine == "lanes":
            sets.join(key, ("seconds", key[0], record.times.train_seconds))
    keys = list(by_key)
    for i, j in _overlapping(list(by_key.values())):
        sets.join(keys[i], keys[j])
    found: dict[str, dict[int, Hashable]] = {method: {} for method in runs}
    for method, seed in by_key:
        found[method][seed] = sets.root((method, seed))
    return found


def overlapping(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Pairs of runs that trained on the same machine at the same time."""
    for i, j in _overlapping(records):
        yield records[i], records[j]


def clusters(seeds: Sequence[int], methods: Sequence[str], measurements: Measurements) -> tuple[tuple[int, ...], ...]:
    """The seeds in sets that share no measurement with each other, for any of the methods.

    A seed without a known measurement is one of its own.
    """
    sets = _Partition()
    for seed in seeds:
        sets.root(seed)
        for method in methods:
            own = measurements.get(method, {}).get(seed)
            if own is not None:
                sets.join(seed, ("measurement", own))
    found: dict[Hashable, list[int]] = {}
    for seed in seeds:
        found.setdefault(sets.root(seed), []).append(seed)
    return tuple(tuple(of_one) for of_one in found.values())


def cluster_means(
    seeds: Sequence[int], values: np.ndarray, methods: Sequence[str], measurements: Measurements
) -> np.ndarray:
    """The mean of `values` [seeds] within each independent measurement of the methods, [measurements]."""
    by_seed = dict(zip(seeds, values.tolist(), strict=True))
    return np.array([np.mean([by_seed[s] for s in own]) for own in clusters(seeds, methods, measurements)], dtype=float)


def too_few(measurements: int, seeds: int) -> str | None:
    """Why so few independent measurements have no interval; None if they are enough."""
    if measurements >= FEWEST or seeds == 0:
        return None
    which = f"{measurements} independent measurement{'s' if measurements > 1 else ''} of seconds"
    shared = f" ({seeds} seeds, which shared lanes, a process or the machine)" if seeds > measurements else ""
    return f"{which} only{shared}: their spread is not known well enough below {FEWEST}"


def _overlapping(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """The places of pairs of runs that trained on the same machine at the same time."""
    order = sorted(range(len(records)), key=lambda i: (records[i].started, records[i].run_id, records[i].seed))
    for place, i in enumerate(order):
        a = records[i]
        for j in order[place + 1 :]:
            b = records[j]
            if b.started >= a.finished:
                break
            overlap = (min(a.finished, b.finished) - b.started).total_seconds()
            shorter = min(r.finished - r.started for r in (a, b)).total_seconds()
            if a.machine == b.machine and overlap > _OVERLAP * shorter:
                yield i, j
