"""`fwlora verify`: name every file of a results folder that is not as it was written."""

from __future__ import annotations

from fwlora_lab.cli.grammar import Arguments, Command, UsageError


def _run(arguments: Arguments) -> int:
    if not arguments.positional:
        raise UsageError("name a folder of results: fwlora verify RESULTS_DIR", arguments.usage)
    from fwlora_lab.study.verify import verify

    faults = 0
    for folder in arguments.positional:
        found = verify(folder)
        for fault in found.faults:
            print(f"{fault.path}: {fault.text}")
        faults += len(found.faults)
        parts = [f"{found.runs} runs", f"{len(found.faults)} faults"]
        if found.in_training:
            parts.append(f"{found.in_training} in training and not looked at")
        if found.without_hashes:
            parts.append(f"{found.without_hashes} from before records had hashes: read, and nothing more")
        print(f"{folder}: {', '.join(parts)}")
    return 2 if faults else 0


COMMAND = Command(
    name="verify",
    summary="name files of results that were changed, torn or misplaced",
    description="Compares every file of every run below RESULTS_DIR with the SHA-256 that the run's record has of it, "
    "and the record and the study's plan with their own; looks for renamed folders, torn checkpoints and damaged "
    "databases of searches. Ends with 2 if there is a fault. Nothing is written.",
    run=_run,
    positional="RESULTS_DIR ...",
    examples=(("verify results/demo", ""), ("verify results", "all studies below a folder")),
)
