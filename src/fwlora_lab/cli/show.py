"""`fwlora show`: a run's resolved config, with the origin of each value."""

from __future__ import annotations

from fwlora_lab.cli.grammar import CONFIG_DIR, Arguments, Command
from fwlora_lab.cli.train import RUN, named_run, packaged_runs


def _run(arguments: Arguments) -> int:
    run = named_run(arguments)
    from fwlora_lab.config.load import load_run, origins_of
    from fwlora_lab.config.yaml_writer import plain_values, yaml_with_comments
    from fwlora_lab.text import without_secrets

    config_dir = arguments.get("config_dir")
    cfg = load_run(run, arguments.overrides, config_dir)
    origins = {row.key: row.origin for row in origins_of(run, arguments.overrides, config_dir)}
    print(without_secrets(yaml_with_comments(plain_values(cfg), origins, align=True)), end="")
    return 0


COMMAND = Command(
    name="show",
    summary="print a run's resolved config with the origin of each value",
    description="Prints the run config as `fwlora train` would use it, as YAML. A comment behind each value says where "
    "it comes from: a file and line, an override, or the default.",
    run=_run,
    arguments=(RUN, CONFIG_DIR),
    overrides=True,
    examples=(
        ("show run=demo-fw_lora", ""),
        ("show run=minilm-cola-lora training.learning_rate=5e-4", ""),
    ),
    more=packaged_runs,
)
