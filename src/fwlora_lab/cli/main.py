"""The command line `fwlora`: finds the command and turns errors into messages and exit codes.

User errors end in one message on standard error and exit code 2, never in a traceback. Exit code 1 says that runs
failed, 130 that Ctrl-C stopped the work, 143 that SIGTERM did.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from fwlora_lab.cli.grammar import Command, UsageError, two_columns
from fwlora_lab.config.former_names import FormerName
from fwlora_lab.errors import UserError, is_out_of_memory
from fwlora_lab.text import did_you_mean, one_line, without_secrets
from fwlora_lab.training.stop_signals import EXIT_TERMINATED, Terminated, sigterm_raises

# In the order in which people meet them. Each is a module of this folder with a `COMMAND`; importing one is quick.
COMMANDS = ("doctor", "demo", "show", "validate", "train", "search", "compare", "report", "verify", "generate", "bench")

_STOPPED = "fwlora: stopped. What is done is kept; the same command goes on from there."
_ABOUT = """\
usage: fwlora COMMAND [ARGUMENT ...]

Train LoRA, AdaLoRA and Fisher-Weighted LoRA side by side, from run configs to
records and verdicts.

start here:
  fwlora doctor                    what can be used on this machine
  fwlora demo                      three methods x three seeds, offline
  fwlora train run=minilm-cola-fw_lora dataset.root=DIR_WITH_GLUE

commands (`fwlora COMMAND --help` explains one):"""

# What to install for a missing package; everything else comes with the extra `lab`.
_EXTRAS = {"openai": "llm", "psycopg": "postgres", "joblib": "workers", "submitit": "workers"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark
    # What libraries tell each other about their next versions is not for the reader of this screen.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with sigterm_raises(), warnings.catch_warnings():
        warnings.simplefilter("default", FormerName)
        _show_former_names_plainly()
        return _run(words)


def command_named(name: str) -> Command:
    """The command of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in COMMANDS:
        raise UsageError(
            f"no command {name!r}{did_you_mean(name, COMMANDS)}: use one of {', '.join(COMMANDS)}",
            "usage: fwlora COMMAND [ARGUMENT ...]",
        )
    return importlib.import_module(f"fwlora_lab.cli.{name}").COMMAND


def _run(words: list[str]) -> int:
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            summaries = [(name, command_named(name).summary) for name in COMMANDS]
            print("\n".join([_ABOUT, *two_columns(summaries)]))
            return 0 if words else 2
        if words[0] in ("-V", "--version"):
            from importlib.metadata import version

            print(f"fwlora {version('fwlora')}")
            return 0
        command = command_named(words[0])
        if {"-h", "--help"} & set(words[1:]):
            print(command.help())
            return 0
        return command.run(command.parse(words[1:]))
    except UsageError as error:
        print(without_secrets(f"fwlora: {error}\n{error.usage}"), file=sys.stderr)
        return 2
    except UserError as error:
        print(without_secrets(f"fwlora: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `fwlora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if is_out_of_memory(error):
            print(
                f"fwlora: too little memory: {one_line(error) or 'the system gave none'}. Finished runs are kept; free "
                "some memory, or set a smaller training.batch_size, dataset.max_length or workers=.",
                file=sys.stderr,
            )
            return 2
        if not isinstance(error, ModuleNotFoundError):
            raise
        package = (error.name or "").split(".")[0]
        if package in ("", "fwlora", "fwlora_lab"):
            raise
        extra = _EXTRAS.get(package, "lab")
        print(
            f"fwlora: this command needs the package {package}, which is not installed: pip install 'fwlora[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\n{_STOPPED}", file=sys.stderr)
        return 130
    except Terminated:
        print(_STOPPED, file=sys.stderr)
        return EXIT_TERMINATED


def _show_former_names_plainly() -> None:
    """Show a former name in a config as one line, without the place in this package's code."""
    usual = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:  # type: ignore[no-untyped-def]
        if issubclass(category, FormerName):
            print(f"fwlora: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())
