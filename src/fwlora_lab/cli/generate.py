"""`fwlora generate`: write run configs from a design or a written request."""

from __future__ import annotations

import functools

from fwlora_lab.cli.grammar import Argument, Arguments, Command, UsageError
from fwlora_lab.errors import UserError


def _run(arguments: Arguments) -> int:
    if arguments.switch("schema"):
        from fwlora_lab.design.schema import design_schema

        print(design_schema())
        return 0
    if not arguments.positional:
        raise UserError("say what to read: fwlora generate SOURCE; `fwlora generate --help` says which files it knows.")
    source, *others = arguments.positional
    if others:
        raise UsageError(f"{others[0]!r} is a second source: generate reads one", arguments.usage)
    model, base_url = arguments.get("llm"), arguments.get("base_url")
    if model is None and base_url is not None:
        raise UserError("--base-url is the server of a language model: say which one with --llm MODEL.")
    from fwlora_lab.design.generate import generate
    from fwlora_lab.design.read import read_request

    read = read_request
    if model is not None:
        from fwlora_lab.design.llm import read_filled

        read = functools.partial(read_filled, model=model, base_url=base_url)
    return generate(source, arguments.get("out"), arguments.switch("json"), arguments.switch("check"), read)


COMMAND = Command(
    name="generate",
    summary="write run configs from a design or a written request",
    description="SOURCE is a design file (YAML or JSON, see --schema), a request's prompt text, or an AIRAS research "
    "history (JSON). Every value that the design did not state carries a comment that says where it came from; "
    "contradictions are listed on standard error.",
    run=_run,
    arguments=(
        Argument("out", "write one YAML file a run into DIR, not to the screen", "DIR", short="o"),
        Argument("json", "print one JSON object with all run configs"),
        Argument("check", "exit with 1, writing nothing, on contradictions"),
        Argument("schema", "print the JSON Schema of a design and exit"),
        Argument("llm", "let a language model fill what only the prose says", "MODEL"),
        Argument("base_url", "its server, which speaks OpenAI's chat protocol; the key is OPENAI_API_KEY", "URL"),
    ),
    positional="SOURCE",
    examples=(
        ("generate request.txt -o runs", ""),
        ("generate design.yaml --check", ""),
        ("generate --schema", ""),
    ),
)
