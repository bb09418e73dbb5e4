"""What can be written on a command line, and what is said of the rest.

pytest tests/fwlora_lab/cli/test_grammar.py
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time

import pytest
import yaml

from fwlora_lab.cli.grammar import UsageError
from fwlora_lab.cli.main import COMMANDS, command_named, main
from fwlora_lab.config.load import load_run
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.errors import UserError


def parse(line: str):
    name, *words = shlex.split(line)
    return command_named(name).parse(words)


@pytest.mark.parametrize("name", ["search", "compare", "demo"])
@pytest.mark.parametrize("workers", ["--workers 3", "--workers=3", "--jobs 3", "--jobs=3", "workers=3", "jobs=3"])
def test_workers_have_one_meaning_in_every_spelling_and_place(name, workers):
    for line in (f"{name} {workers} a.b=c", f"{name} a.b=c {workers}"):
        parsed = parse(line)
        assert parsed.whole_number("workers", 1) == 3 and parsed.overrides == ["a.b=c"]


@pytest.mark.parametrize(
    "line",
    [
        "compare study=demo --dry-run results_dir=x seeds=0..3",
        "compare --dry-run study=demo results_dir=x seeds=0..3",
        "compare study=demo results_dir=x --seeds 0..3 dry_run=true",
        "compare --study demo results_dir=x --seeds=0..3 --dry_run",
    ],
)
def test_arguments_stand_anywhere(line):
    parsed = parse(line)
    assert parsed.values == {"study": "demo", "seeds": "0..3", "dry_run": "true"}
    assert parsed.overrides == ["results_dir=x"]


def test_switches_and_overrides():
    parsed = parse("train -m run=a,b +optuna.n_trials=3 ~dataset.root again=true 'dataset.root=/my data/a=b'")
    assert parsed.switch("multirun") and parsed.switch("overwrite") and not parse("train run=a").switch("overwrite")
    assert parsed.overrides == ["+optuna.n_trials=3", "~dataset.root", "dataset.root=/my data/a=b"]
    assert not parse("train run=a overwrite=false").switch("overwrite")
    assert parse("validate a.yaml -- -b.yaml").positional == ["a.yaml", "-b.yaml"]
    assert parse("generate - --out x").positional == ["-"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare study=demo --dryrun", "--dryrun is not an argument of fwlora compare.*'--dry-run'"),
        ("search run=a --worker 2", "did you mean '--workers'"),
        ("train run=a --seeds", "--seeds needs a value: --seeds 0..2"),
        ("train run=a run=b", "run= is given twice"),
        ("compare workers=2 --jobs 3", "workers= is given twice"),
        ("train run=a again=perhaps", "must be true or false"),
        ("train run=", "run= is empty"),
        ("bench --task mnli", "task=mnli: must be one of cola, sst2"),
        ("bench nonsense=1", "'nonsense=1' is not an argument of fwlora bench"),
    ],
)
def test_what_is_wrong_is_said_with_the_commands_own_usage(line, said, capsys):
    with pytest.raises(UsageError, match=said):
        parse(line)
    assert main(shlex.split(line)) == 2
    message, usage, *_ = capsys.readouterr().err.splitlines()
    assert message.startswith("fwlora: ") and usage.startswith(f"usage: fwlora {line.split()[0]}")


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", "", "２"])
def test_numbers(given):
    with pytest.raises(UserError, match="workers="):
        parse(f"search run=a workers={given}").whole_number("workers", 1)


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert main([]) == 2 and "commands" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_its_examples_can_be_parsed(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = command_named(name)
    assert main([name, "anything=1", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fwlora {name}") and command.summary
    examples = {f"  fwlora {line}" for line, _ in command.examples}
    assert all(len(line) <= 80 for line in text.splitlines() if line not in examples)
    assert all(len(line) <= 100 for line in examples)
    for line, _ in command.examples:
        written, *words = shlex.split(line)
        assert written == name
        command.parse(words)
    for argument in command.arguments:
        assert argument.shown in text and argument.help.split()[0] in text


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["compare", "--help"], ["search", "--help"]])
def test_help_is_quick(words):
    """0.3 s on a machine with nothing else to do; the bound leaves room for one that has."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fwlora_lab.cli", *words], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0, times


CORE_ONLY = """
import sys
for name in ("hydra", "omegaconf", "pydantic", "datasets", "optuna", "rich", "scipy", "sklearn", "jinja2", "matplotlib",
             "yaml", "filelock", "transformers"):
    sys.modules[name] = None
from fwlora_lab.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "line",
    [
        "doctor", "train run=demo-lora", "show run=demo-lora", "validate x.yaml", "search run=demo-lora",
        "compare study=demo", "demo", "report .", "generate --schema", "bench --quick",
    ],
)  # fmt: skip
def test_without_the_labs_packages_a_command_says_what_to_install(line, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CORE_ONLY, *line.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "pip install 'fwlora[lab]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    helped = subprocess.run(
        [sys.executable, "-c", CORE_ONLY, line.split()[0], "--help"], capture_output=True, text=True
    )
    assert helped.returncode == 0 and "usage" in helped.stdout


def test_show_prints_the_config_with_the_origin_of_each_value(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "run_id: mine\nmethod: fw_lora\nmodel: {name: m, pretrained_id: minilm, lora: {rank: 2}}\n"
        "dataset:\n  name: offline\n"
    )
    assert main(["show", f"run={path}", "training.learning_rate=5e-4"]) == 0
    text = capsys.readouterr().out
    assert RunConfig.model_validate(yaml.safe_load(text)) == load_run(str(path), ["training.learning_rate=5e-4"])
    origins = {line.split(":")[0].strip(): line.split("  # ")[1] for line in text.splitlines() if "  # " in line}
    assert origins["learning_rate"] == "override `training.learning_rate=5e-4`"
    assert origins["run_id"] == f"{path}:1" and origins["rank"] == f"{path}:3"
    assert origins["weight_decay"] == "default"
    assert main(["show", "run=demo-lora"]) == 0
    assert "# packaged base/minilm.yaml:" in capsys.readouterr().out


def test_a_former_name_is_noted_in_one_line(capsys, monkeypatch):
    from fwlora_lab.config import former_names

    monkeypatch.setattr(former_names, "_warned", set())
    assert main(["show", "run=demo-fw_lora", "fw_lora.lambda_fw=0.5"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("fwlora: fw_lora.lambda_fw is now called fw_lora.penalty_strength")
