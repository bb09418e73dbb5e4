"""TODO"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from fwlora_lab.config.checks import warnings_of
from fwlora_lab.config.faults import Issue
from fwlora_lab.config.former_names import present_key, with_present_names
from fwlora_lab.config.hydra_bridge import compose_run
from fwlora_lab.config.keys import KEYS, get_key, nearest_key
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.tree import available_runs, find_run
from fwlora_lab.config.validation import InvalidRun, validate_run
from fwlora_lab.config.yaml_reader import interpolation_fault, read_file
from fwlora_lab.errors import UserError
from fwlora_lab.text import listing

MAX_RUNS = 1_000


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for text in map(_with_present_key, overrides):
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except (HydraException, RecursionError) as error:
            reason = next((x for x in str(error).splitlines() if x.strip()), "").split(": ", 1)[-1]
            raise UserError(
                f"override `{text}` cannot be read ({reason}): write key=value, and quote values "
                "with spaces or special characters, e.g. \"dataset.root='/my data'\""
            ) from None
        _refuse_override(text, override)
        parsed.append(override)
    return parsed


def _with_present_key(text: str) -> str:
    """The override with the present name of its key: `fw_lora.lambda_fw=1e-4` -> `fw_lora.penalty_strength=1e-4`."""
    mark, key, value = re.fullmatch(r"([+~]*)([^=]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{mark}{present_key(key, warn=True)}{value}"


def _refuse_override(text: str, override: Override) -> None:
    key = override.key_or_group
    if key == "run" or key.startswith("run@"):
        raise UserError(f"override `{text}`: the run is named once, as run=<run_id>")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise UserError(f"override `{text}`: Hydra's own settings have no use here; results go to results_dir=")
    if "_target_" in text:
        raise UserError(f"override `{text}`: _target_ is refused: a config names values, it runs no code")
    fault = interpolation_fault(text)
    if fault:
        raise UserError(f"override `{text}`: {fault}")
    free = key.startswith("optuna.search_space") or override.is_delete() or "/" in key or key == "base"
    if key not in KEYS and not free:
        raise UserError(f"override `{text}`: {key!r} is no key of a run config{nearest_key(key)}")


def load_run(run: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> RunConfig:
    """Compose and check one run.

    `run` is an id of the packaged tree or of `config_dir` (`run/` below it, or flat), or the path
    of a .yaml file. `overrides` are Hydra's (`a.b=c`, `+a.b=c`, `~a.b`), without sweeps. Raises
    UserError with every fault found.
    """
    file = find_run(run, config_dir)
    overrides = [_with_present_key(text) for text in overrides]
    parsed = _parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"override `{override.input_line}` is a sweep, which needs --multirun; a list goes in brackets, a=[b,c]"
            )
    source = read_file(file)  # first, so that its faults come with their lines
    lines_of_keys = {present_key(key): line for key, line in source.lines.items()}
    # Every key of the schema is there from the start, so that `+key=` can only mean its value.
    lines = [
        f"+{text}" if o.is_add() and o.key_or_group in KEYS else text for text, o in zip(overrides, parsed, strict=True)
    ]
    data = with_present_names(compose_run(file, lines), warn=True)
    given = {o.key_or_group: o.input_line for o in parsed}
    try:
        return validate_run(data)
    except InvalidRun as error:
        issues = _faults_of(data, error.issues)
        raise UserError(listing([f"{_place(file, lines_of_keys, given, i.key)}{i.text}" for i in issues])) from None


def _faults_of(data: dict[str, Any], issues: list[Issue]) -> list[Issue]:
    """Every fault of a composed config: those found first, of single keys, then of their combinations.

    Combinations are judged with the faulty keys left out, so that one reading lists everything.
    """
    rest = json.loads(json.dumps(data))
    for issue in issues:
        try:
            *blocks, last = issue.key.split(".")
            block = get_key(rest, ".".join(blocks)) if blocks else rest
            block.pop(last, None)
            if issue.key in _PLACEHOLDERS:
                block[last] = _PLACEHOLDERS[issue.key]
        except (KeyError, TypeError, AttributeError):
            return issues  # a whole block is amiss: say that first
    try:
        validate_run(rest)
    except InvalidRun as error:
        faulty = [i.key for i in issues]
        issues += [
            i for i in error.issues if not any(f"{i.key}.".startswith(f"{key}.") or key in i.text for key in faulty)
        ]
    return issues


# Stand-ins for faulty keys that have no default, while the combinations of the others are judged.
_PLACEHOLDERS = {
    "run_id": "x",
    "method": "lora",
    "model.name": "x",
    "model.pretrained_id": "x",
    "dataset.name": "offline",
}


def _place(file: Path, lines: Mapping[str, int], overrides: Mapping[str, str | None], key: str) -> str:
    """`file:line: key: `, or the override that set the key."""
    for path in (key, *(key[: m.start()] for m in re.finditer(r"\.", key))):
        if path in overrides:
            return f"override `{overrides[path]}`: {key}: "
    line = lines.get(key)
    return f"{file}{f':{line}' if line else ''}: {key + ': ' if key else ''}"


def validate_file(path: str) -> list[str]:
    """Check one file and return its warnings; raises UserError with every fault found."""
    cfg = load_run(str(Path(path).expanduser().resolve()))
    return warnings_of(cfg)


def expand_runs(
    run_argument: str,
    overrides: Sequence[str] = (),
    multirun: bool = False,
    config_dir: str | None = None,
) -> list[RunConfig]:
    """All runs meant by `run=a,b` (or `glob(…)`) and, with `multirun`, by sweeps over other keys.

    The runs of a sweep get their run_id from the swept keys: `<run_id>--learning_rate=0.0005`.
    """
    parsed = _parse_overrides(overrides)
    swept = [o.key_or_group for o in parsed if o.is_sweep_override()]
    if swept and not multirun:
        raise UserError(
            f"{swept[0]} has several values, which is a sweep: add --multirun to train all of "
            f"them, or put a list in brackets, {swept[0]}=[a,b]"
        )
    if any(o.is_sweep_override() and isinstance(o.value(), Glob) for o in parsed):
        raise UserError("glob(…) matches run ids: it can only stand in run=")
    try:
        batches = BasicSweeper.split_arguments(parsed, None)[0] if swept else [list(overrides)]
    except HydraException as error:
        raise UserError(f"this sweep cannot be expanded: {str(error).splitlines()[0]}") from None
    runs = _split_runs(run_argument, config_dir)
    if len(runs) * len(batches) > MAX_RUNS:
        raise UserError(f"the sweep has {len(runs) * len(batches):,} runs; {MAX_RUNS:,} is the limit")

    configs: list[RunConfig] = []
    origin: dict[str, str] = {}
    for run in runs:
        for batch in batches:
            cfg = load_run(run, batch, config_dir)
            if len(batches) > 1 and "run_id" not in swept:
                changed = {k: v for k, v in (b.split("=", 1) for b in batch) if k.lstrip("+") in swept}
                cfg = RunConfig.model_validate(cfg.model_dump() | {"run_id": _swept_id(cfg.run_id, changed)})
            here = " ".join([f"run={run}", *batch])
            if cfg.run_id in origin:
                raise UserError(
                    f"two runs would write to one folder, both are called {cfg.run_id!r} "
                    f"({origin[cfg.run_id]} and {here}): give them distinct run_ids"
                )
            origin[cfg.run_id] = here
            configs.append(cfg)
    return configs


def _split_runs(run_argument: str, config_dir: str | None) -> list[str]:
    known = available_runs(config_dir)
    if run_argument in known:
        return [run_argument]
    try:
        if Path(run_argument).exists():
            return [run_argument]  # a path may hold what Hydra's grammar would not read
    except (OSError, ValueError):
        pass  # too long for a path, or a NUL byte: it may still be a list of runs
    try:
        (override,) = OverridesParser.create().parse_overrides([f"run={run_argument}"])
    except (HydraException, ValueError):
        return [run_argument]
    value = override.value()
    if isinstance(value, Glob):
        runs = value.filter(known)
        if not runs:
            raise UserError(f"run={run_argument} matches none of {', '.join(known)}")
        return runs
    if override.is_discrete_sweep():
        return [v.strip("'\"") for v in override.sweep_string_iterator()]
    return [run_argument]


def _swept_id(run_id: str, changed: Mapping[str, str]) -> str:
    """`<run_id>--<leaf>=<value>` for every swept key, made safe for a folder's name."""
    parts = [f"{k.lstrip('+').rsplit('.', 1)[-1]}={v}" for k, v in changed.items()]
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", f"{run_id}--{'--'.join(parts)}")
    if len(name) > 200 or re.sub(r"[^A-Za-z0-9._=,-]", "", "".join(parts)) != "".join(parts):
        # What was cut or replaced might have told two runs apart.
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
        name = f"{name[:190]}-{digest}"
    return name
