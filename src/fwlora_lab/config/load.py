"""From a run's id or file to a checked run config, and from a sweep to all of its run configs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fwlora_lab.config.checks import warnings_of
from fwlora_lab.config.faults import InvalidRun, Issue
from fwlora_lab.config.former_names import present_key, with_present_names
from fwlora_lab.config.hydra_bridge import (
    Composition,
    Override,
    Unreadable,
    compose,
    expand_sweep,
    merged_sources,
    parse_override,
    select_names,
)
from fwlora_lab.config.keys import KEYS, get_key, nearest_key, schema_defaults
from fwlora_lab.config.schema import RunConfig
from fwlora_lab.config.tree import CONF, available_runs, find_run
from fwlora_lab.config.validation import validate_run
from fwlora_lab.config.yaml_reader import File, interpolation_fault, read_file
from fwlora_lab.config.yaml_writer import plain_values
from fwlora_lab.errors import UserError
from fwlora_lab.text import listing

MAX_RUNS = 1_000


def _read_member(path: Path) -> tuple[dict[str, Any], str]:
    """A file of a config tree as Hydra takes it: its values under their present names, and its first lines."""
    file = read_file(path)
    _check_defaults_list(path, file)
    return with_present_names(file.values, warn=True), file.header


def _check_defaults_list(path: Path, file: File) -> None:
    """Refuse a `defaults` list that Hydra cannot read, or that would win over the file's own keys."""
    if "defaults" not in file.values:
        return
    entries, where = file.values["defaults"], f"{path}:{file.lines['defaults']}: defaults: "
    if not isinstance(entries, list):
        raise UserError(f"{where}must be a list of config names, e.g. [/base/minilm, _self_]")
    for entry in entries:
        names = list(entry.items())[0] if isinstance(entry, dict) and len(entry) == 1 else (entry, "")
        if not all(isinstance(n, str) for n in names):
            raise UserError(f"{where}{entry!r} is not a config's name: write one such as /base/minilm")
        if "hydra" in names[0]:
            raise UserError(f"{where}{names[0]!r}: Hydra's own settings are not used here: remove it")
    if "_self_" not in entries and len(file.values) > 1:
        raise UserError(f"{where}must end in `- _self_`, so that this file's own keys win over the others'")


_COMPOSITION = Composition(CONF, schema_defaults(), _read_member)


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for text in map(_with_present_key, overrides):
        try:
            override = parse_override(text)
        except Unreadable as error:
            raise UserError(
                f"override `{text}` cannot be read ({error}): write key=value, and quote values "
                "with spaces or special characters, e.g. \"dataset.root='/my data'\""
            ) from None
        _refuse_override(override)
        parsed.append(override)
    return parsed


def _with_present_key(text: str) -> str:
    """The override with the present name of its key: `fw_lora.lambda_fw=1e-4` -> `fw_lora.penalty_strength=1e-4`."""
    mark, key, value = re.fullmatch(r"([+~]*)([^=]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{mark}{present_key(key, warn=True)}{value}"


def _refuse_override(override: Override) -> None:
    text, key = override.text, override.key
    if key == "run" or key.startswith("run@"):
        raise UserError(f"override `{text}`: the run is named once, as run=<run_id>")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise UserError(f"override `{text}`: Hydra's own settings are not used here; results go to results_dir=")
    if "_target_" in text:
        raise UserError(f"override `{text}`: _target_ is refused: a config holds values and runs no code")
    fault = interpolation_fault(text)
    if fault:
        raise UserError(f"override `{text}`: {fault}")
    free = key.startswith("optuna.search_space") or override.kind == "delete" or "/" in key or key == "base"
    if key not in KEYS and not free:
        raise UserError(f"override `{text}`: unknown key {key!r}{nearest_key(key)}")


def load_run(run: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> RunConfig:
    """Compose and check one run.

    Args:
        run: an id of the packaged tree or of `config_dir` (in `run/` below it, or in it), or the path of a .yaml file.
        overrides: in Hydra's grammar (`a.b=c`, `+a.b=c`, `~a.b`), without sweeps.

    Raises:
        UserError: with every fault found, each with its file, line and key, or its override.
    """
    file = find_run(run, config_dir)
    parsed = _parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep:
            raise UserError(
                f"override `{override.text}` is a sweep, which needs --multirun; a list goes in brackets, a=[b,c]"
            )
    read_file(file)  # first, so that its faults come with their lines
    composed = compose(file, _as_hydra_reads(parsed), _COMPOSITION)
    data = with_present_names(composed.values, warn=True)
    issues = [Issue(present_key(key), text) for key, text in composed.broken.items()]
    try:
        if not issues:
            return validate_run(data)
        issues = _faults_of(data, issues)
    except InvalidRun as error:
        issues = error.issues
    issues = _faults_of(data, issues)
    lines = _lines_of(file, parsed, str)
    given = {o.key: o.text for o in parsed}
    if "optuna" not in lines and (key := next((k for k in given if k.startswith("optuna.")), None)):
        issues = [replace(i, key=key, text=_NO_OPTUNA) if i.key == "optuna" else i for i in issues]
    raise UserError(listing([f"{_place(file, lines, given, i.key)}{i.text}" for i in issues]))


_NO_OPTUNA = (
    "the run itself has no optuna block, so say what is searched too, e.g. "
    "'optuna.search_space.learning_rate={type:loguniform,low:1e-4,high:1e-2}'"
)
# Blocks that a run may be without, so that Hydra does not know their keys from the schema.
_OPTIONAL = tuple(f"{key}." for key, value in schema_defaults().items() if value is None and KEYS[key])


def _as_hydra_reads(overrides: Sequence[Override]) -> list[str]:
    """Every key of the schema exists from the start, so that `+key=` can only mean its value, as `++key=` does.

    Below a block that a run may be without, a plain `key=` means the same: whether the run's file happens to name the
    key makes no difference, and what does not belong there is refused when the config is checked.
    """
    return [
        f"++{o.text.lstrip('+')}"
        if o.kind == "add" and o.key in KEYS or o.kind != "delete" and o.key.startswith(_OPTIONAL)
        else o.text
        for o in overrides
    ]


def _lines_of(file: Path, overrides: Sequence[Override], shown: Callable[[Path], str]) -> dict[str, str]:
    """`file:line` of every key that the merged files hold, the last of them winning; `shown` writes the file."""
    lines: dict[str, str] = {}
    for source in merged_sources(file, _as_hydra_reads(overrides), _COMPOSITION):
        prefix = f"{source.package}." if source.package else ""
        found = {f"{prefix}{k}": f"{shown(source.path)}:{line}" for k, line in read_file(source.path).lines.items()}
        lines |= {present_key(key): where for key, where in found.items()} | found
    return lines


@dataclass(frozen=True)
class OriginRow:
    """One value of a resolved config and where it comes from.

    `origin` is `FILE:LINE`, `packaged FILE:LINE` of the packaged tree, ``override `KEY=VALUE` ``, or `default`.
    """

    key: str
    value: Any
    origin: str


def origins_of(run: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> list[OriginRow]:
    """Every value of a run's resolved config, in the schema's order, and what set it.

    The arguments are those of `load_run`.

    Raises:
        UserError: as `load_run`.
    """
    cfg = load_run(run, overrides, config_dir)
    file = find_run(run, config_dir)
    parsed = _parse_overrides(overrides)

    def shown(path: Path) -> str:
        return f"packaged {path.relative_to(CONF)}" if path.is_relative_to(CONF) else str(path)

    lines = _lines_of(file, parsed, shown)
    given = {o.key: f"override `{o.text}`" for o in parsed}

    def origin(key: str) -> str:
        blocks = [key[: m.start()] for m in re.finditer(r"\.", key)]
        setters = [given[path] for path in given if path in (key, *blocks)]
        return setters[-1] if setters else lines.get(key, "default")

    return [OriginRow(key, value, origin(key)) for key, value in _leaves(plain_values(cfg))]


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
            return issues  # a whole block is wrong: report that first
    try:
        validate_run(rest)
    except InvalidRun as error:
        faulty = [i.key for i in issues]
        issues += [
            i for i in error.issues if not any(f"{i.key}.".startswith(f"{key}.") or key in i.related for key in faulty)
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


def _place(file: Path, lines: Mapping[str, str], overrides: Mapping[str, str], key: str) -> str:
    """`file:line: key: `, or the override that set the key; of a missing key, the line of the block that lacks it."""
    paths = [key, *reversed([key[: m.start()] for m in re.finditer(r"\.", key)])]
    for path in paths:
        if path in overrides:
            return f"override `{overrides[path]}`: {key}: "
    where = next((lines[path] for path in paths if path in lines), f"{file}:1")
    return f"{where}: {key + ': ' if key else ''}"


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
    """All runs that `run=a,b` (or `glob(…)`) names and, with `multirun`, those of sweeps over other keys.

    The runs of a sweep get their run_id from the swept keys: `<run_id>--learning_rate=0.0005`.

    Raises:
        UserError: as `load_run`, or the sweep is too large, cannot be expanded, or names two runs alike.
    """
    parsed = _parse_overrides(overrides)
    swept = [o.key for o in parsed if o.is_sweep]
    if swept and not multirun:
        raise UserError(
            f"{swept[0]} has several values, which is a sweep: add --multirun to train all of "
            f"them, or put a list in brackets, {swept[0]}=[a,b]"
        )
    if any(o.is_glob for o in parsed):
        raise UserError("glob(…) matches run ids: use it in run= only")
    try:
        batches = expand_sweep(parsed) if swept else [list(overrides)]
    except Unreadable as error:
        raise UserError(f"this sweep cannot be expanded: {error}") from None
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
    runs = select_names(run_argument, known)
    if runs == []:
        raise UserError(f"run={run_argument} matches none of {', '.join(known)}")
    return [run_argument] if runs is None else runs


def _swept_id(run_id: str, changed: Mapping[str, str]) -> str:
    """`<run_id>--<leaf>=<value>` for every swept key, made safe for a folder's name."""
    parts = [f"{k.lstrip('+').rsplit('.', 1)[-1]}={v}" for k, v in changed.items()]
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", f"{run_id}--{'--'.join(parts)}")
    if len(name) > 200 or re.sub(r"[^A-Za-z0-9._=,-]", "", "".join(parts)) != "".join(parts):
        # What was cut or replaced might have told two runs apart.
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
        name = f"{name[:190]}-{digest}"
    return name
