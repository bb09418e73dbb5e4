"""`fwlora doctor`: what is installed and can be used here."""

from __future__ import annotations

from fwlora_lab.cli.grammar import Arguments, Command


def _run(_: Arguments) -> int:
    from rich.console import Console
    from rich.table import Table

    from fwlora_lab.cli.doctor_lines import doctor_lines

    table = Table(box=None, show_header=False, pad_edge=False)
    colour = {"ok": "green", "warn": "yellow", "no": "red"}
    for status, what, detail in doctor_lines():
        table.add_row(f"[{colour[status]}]{status}[/]", what, detail)
    Console(highlight=False).print(table)
    return 0


COMMAND = Command(
    name="doctor",
    summary="what is installed and can be used here",
    description="Lists packages, devices, encoders and data that can be used on this machine, one line each.",
    run=_run,
    examples=(("doctor", ""),),
)
