"""`fwlora validate`: check run configs and studies without training."""

from __future__ import annotations

import sys

from fwlora_lab.cli.grammar import Arguments, Command, UsageError
from fwlora_lab.errors import UserError


def _run(arguments: Arguments) -> int:
    if not arguments.positional:
        raise UsageError("say which files to check: fwlora validate FILE...", arguments.usage)
    from fwlora_lab.config.load import validate_file
    from fwlora_lab.study.plan import validate_study
    from fwlora_lab.study.spec import is_study

    wrong = 0
    for file in arguments.positional:
        try:
            remarks = validate_study(file) if is_study(file) else validate_file(file)
        except UserError as error:
            wrong += 1
            print(f"fwlora: {error}", file=sys.stderr)
        else:
            print(f"{file}: valid")
            for remark in remarks:
                print(f"  warning: {remark}")
    return 2 if wrong else 0


COMMAND = Command(
    name="validate",
    summary="check run configs and studies without training",
    description="Checks run configs and studies (YAML files) and prints every fault with its file, line and key.",
    run=_run,
    positional="FILE...",
    examples=(("validate runs/*.yaml", ""),),
)
