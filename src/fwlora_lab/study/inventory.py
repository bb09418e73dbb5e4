"""What a study's results folder holds: which of its runs are complete, and which are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fwlora_lab.errors import UserError
from fwlora_lab.models.weights import local_weights
from fwlora_lab.records.folder import RunFolder, differences, load_record, status_of
from fwlora_lab.records.record import Record
from fwlora_lab.study.plan import PlannedCell
from fwlora_lab.training.resources import ResourceCache


@dataclass(frozen=True)
class Conflict:
    """A finished run in the folder of a planned one, but with another config or other data."""

    folder: Path
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    """The runs of a study as they are on disk, looked up once; each is known by its run id and seed.

    Attributes:
        complete: the records of the finished runs.
        conflicts: finished runs that were made with another config or other data.
    """

    complete: dict[tuple[str, int], Record]
    conflicts: tuple[Conflict, ...]

    def missing(self, cell: PlannedCell, seeds: Sequence[int]) -> list[int]:
        """Those of the seeds whose run of this cell is not complete."""
        return [seed for seed in seeds if (cell.cfg.run_id, seed) not in self.complete]

    def refuse_conflicts(self) -> None:
        """Raise a UserError about the first run that was made with another config or other data."""
        for conflict in self.conflicts:
            raise UserError(
                f"{conflict.folder} holds a finished run of another kind: {'; '.join(conflict.reasons)}. "
                "Set another results_dir, or delete that folder."
            )


def run_folder(cell: PlannedCell, seed: int) -> Path:
    """Where the run of a cell with this seed is, or will be."""
    return RunFolder(cell.cfg.results_dir, cell.cfg.run_id, seed).path


def take_inventory(cells: Sequence[PlannedCell], seeds: Sequence[int], resources: ResourceCache) -> Inventory:
    """Look up the runs of these cells; a run counts as complete if its config and its data are those of the cell."""
    complete: dict[tuple[str, int], Record] = {}
    conflicts = []
    for cell in cells:
        data, weights = resources.task(cell.cfg.dataset).fingerprint, local_weights(cell.cfg.model)
        for seed in seeds:
            status = status_of(cell.cfg, seed, data, weights)
            if status == "complete":
                complete[cell.cfg.run_id, seed] = load_record(run_folder(cell, seed))
            elif status == "different":
                folder = run_folder(cell, seed)
                reasons = differences(cell.cfg, load_record(folder), data, weights)
                conflicts.append(Conflict(folder, tuple(reasons)))
    return Inventory(complete, tuple(conflicts))
