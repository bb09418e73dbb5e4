"""`fwlora bench`: what a step costs, side by side with PEFT and the Trainer."""

from __future__ import annotations

from fwlora_lab.cli.grammar import Argument, Arguments, Command, UsageError, cpu_cores


def _run(arguments: Arguments) -> int:
    if arguments.positional:
        raise UsageError(f"{arguments.positional[0]!r} is not an argument of fwlora bench", arguments.usage)
    threads = arguments.whole_number("threads", 0, most=cpu_cores()) or None
    from fwlora_lab.bench.run import bench

    return bench(
        arguments.get("task") or "cola",
        arguments.get("backbone") or "minilm",
        threads,
        arguments.switch("quick"),
        arguments.switch("cpu_time"),
        arguments.switch("json"),
        arguments.switch("profile"),
    )


COMMAND = Command(
    name="bench",
    summary="what a step costs: this against PEFT and the Trainer, side by side",
    description="Trains several implementations on the same batches, block by block forwards and backwards, and prints "
    "the ratios of their times with intervals. Runs on the GPU where there is one. Needs no network and no data; takes "
    "about a quarter of an hour, or with --quick three minutes on two cores. Nothing else should run meanwhile.",
    run=_run,
    arguments=(
        Argument("task", "whose sentence lengths (default: cola)", "TASK", choices=("cola", "sst2")),
        Argument(
            "backbone",
            "the encoder, or for roberta-base its shape (default: minilm)",
            "NAME",
            choices=("minilm", "roberta-base"),
        ),
        Argument("threads", "of the CPU (default: as many as there are cores)", "N"),
        Argument("cpu_time", "CPU time of one thread, for a machine that others use meanwhile"),
        Argument("quick", "fewer blocks, 4 lanes (16 on a GPU), without PEFT's AdaLoRA"),
        Argument("profile", "what a step's time goes into, instead of the ratios"),
        Argument("json", "one JSON object a ratio and line; the table goes to standard error"),
    ),
    examples=(("bench --quick", ""), ("bench --task sst2 --backbone roberta-base", "")),
)
