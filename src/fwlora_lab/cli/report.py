"""`fwlora report`: write one page about a folder of results."""

from __future__ import annotations

from fwlora_lab.cli.grammar import Arguments, Command, UsageError


def _run(arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise UsageError("name one folder of results: fwlora report RESULTS_DIR", arguments.usage)
    from fwlora_lab.report.page import write_report

    print(f"report: {write_report(arguments.positional[0])}")
    return 0


COMMAND = Command(
    name="report",
    summary="write one page about a folder of results",
    description="Writes RESULTS_DIR/report.html, one file that opens from disk and loads nothing, and next to it "
    "report.md, CSV and LaTeX tables, comparison/aggregated_metrics.json and a model card for each kept adapter. "
    "Reads records only: nothing is trained; runs that are missing, failed or in training are listed.",
    run=_run,
    positional="RESULTS_DIR",
    examples=(("report results/demo", ""),),
)
