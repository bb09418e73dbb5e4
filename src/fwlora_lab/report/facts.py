"""What the report says about runs besides their numbers: where they were made, and which are missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from fwlora_lab.analysis.results import StudyResults, seeds_text, task_of
from fwlora_lab.records.record import Record


def environment(study: StudyResults) -> dict[str, list[tuple[str, int]]]:
    """What the runs were made with: the values of every kind of fact, each with the number of its runs."""
    kinds: dict[str, Callable[[Record], str]] = {
        "backbone": _backbone,
        "data": _data,
        "machine": _machine,
        "versions": lambda r: ", ".join(f"{name} {version}" for name, version in sorted(r.versions.items())),
        "engine": lambda r: {"lanes": "lanes", "peft": "PEFT’s layers"}[r.engine],
        "source": lambda r: r.git_commit or "no git commit",
    }
    records = study.records
    return {kind: Counter(map(value_of, records)).most_common() for kind, value_of in kinds.items() if records}


def _backbone(record: Record) -> str:
    b = record.backbone
    return f"{b.name}: {b.source}{f', commit {b.commit}' if b.commit else ''}, {b.parameters:,} parameters"


def _data(record: Record) -> str:
    fingerprint = record.data_fingerprint[:12]
    return f"{task_of(record)}: {record.data_source}, scored on {record.evaluated_on} (fingerprint {fingerprint})"


def _machine(record: Record) -> str:
    m = record.machine
    device = m.cpu if m.device == "cpu" else m.device
    return f"{device}, {m.cores} cores, {m.threads} threads a process, encoder in {m.precision}"


def missing_seeds(study: StudyResults) -> dict[str, str]:
    """The seeds without a record, by run id."""
    seeds: dict[str, list[int]] = defaultdict(list)
    for run in study.runs:
        if run.state == "missing":
            seeds[run.cell.run_id].append(run.seed)
    return {run_id: seeds_text(missing) for run_id, missing in seeds.items()}
