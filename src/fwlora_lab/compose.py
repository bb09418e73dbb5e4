"""From a name, a file or a sweep to checked run configs: every YAML file is read here, and only here.

Hydra composes a run's file with the schema's defaults and the command line's overrides; pydantic checks the result.
Whatever is wrong ends in one `UserError` that lists every fault with its file, line and key. Nothing that a config
says is ever executed: there are no `_target_`s and no resolvers, only plain references such as `${training.seed}`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose, version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from fwlora_lab.errors import UserError
from fwlora_lab.runconfig import (
    KEYS,
    InvalidRun,
    Issue,
    RunConfig,
    get_key,
    listing,
    nearest,
    nearest_key,
    schema_defaults,
    validate_run,
    warnings_of,
)

CONF = Path(__file__).resolve().parent / "conf"
MAX_FILE_BYTES = 1_000_000
MAX_NODES = 10_000  # a run config has about 100 keys and values
MAX_SEEDS = 1_000
MAX_RUNS = 1_000


# ---------------------------------------------------------------------------------------------
# Reading one file
# ---------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_.]*\}")
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_PLAIN_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAGS = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "map", "seq")}


class File(NamedTuple):
    """A checked file: its values, and the line of every key path in it."""

    values: dict[str, Any]
    header: str
    lines: dict[str, int]


def _interpolation_fault(text: str) -> str | None:
    """What is wrong with the `${…}` in a text: anything but a plain reference to another key."""
    if text.count("${") != len(_REFERENCE.findall(text)):
        return (
            f"{text!r} is an interpolation that would run or read something: only references to "
            "other keys such as ${training.seed} are allowed; write the value itself"
        )
    return None


def read_file(path: Path, what: str = "run config", first: str = "run_id") -> File:
    """Read one YAML file of a config tree; the only way in which a config is ever read.

    `what` it is and its `first` key are for the messages.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name the .yaml file inside it")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(
                f"{path}: is {size:,} bytes, a {what} has at most {MAX_FILE_BYTES:,}: is it the right file?"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such file{nearest(path.name, near)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    try:
        loader = get_yaml_loader()(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: is empty: a {what} starts with {first}: <name>")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(
                f"{path}:{node.start_mark.line + 1}: must hold keys such as `{first}: <name>` at "
                f"its top, not a {'list' if node.id == 'sequence' else 'single value'}"
            )
        lines, faults = inspect_node(node)
        if faults:
            raise UserError(listing([f"{path}:{line}: {text}" for line, text in faults]))
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(syntax_message(path, error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply: a {what} has four levels") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: holds a value that cannot be read: {error}") from None
    return File(values, text[:512], lines)


def syntax_message(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    problem = error.problem or error.context or "cannot be read"
    cure = ""
    if r"'\t'" in problem:
        cure = ": indent with spaces, not tabs"
    elif "expected a single document" in (error.context or ""):
        problem, cure = (
            "a second document starts here",
            ": one file holds one run, remove the '---'",
        )
    elif "mapping values are not allowed" in problem:
        cure = ": check the indentation, and quote values that hold ': '"
    elif "%" in problem or "'@'" in problem or "'`'" in problem:
        cure = ": quote the value"
    return f"{where}: is not YAML: {problem}{cure}"


def inspect_node(root: yaml.MappingNode) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Every key path's line, and all that is refused before any value is built."""
    lines: dict[str, int] = {}
    faults: list[tuple[int, str]] = []
    visited = 0

    def visit(node: yaml.Node, path: str, parents: tuple[int, ...]) -> None:
        nonlocal visited
        visited += 1
        line = node.start_mark.line + 1
        if id(node) in parents:
            raise yaml.MarkedYAMLError(problem="an alias refers to itself", problem_mark=node.start_mark)
        if visited > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES:,} values once its aliases are expanded",
                problem_mark=node.start_mark,
            )
        if node.tag not in _TAGS:
            faults.append(
                (
                    line,
                    f"{path or 'the file'}: the tag {_short_tag(node.tag)} is refused: write the plain value",
                )
            )
            return
        inside = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key_node, value in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                    shown = getattr(key_node, "value", "")
                    shown = f"`{shown}`" if isinstance(shown, str) else "a list or mapping"
                    faults.append(
                        (
                            key_line,
                            f"{path or 'top level'}: {shown} cannot be a key: keys are plain words",
                        )
                    )
                    continue
                key = key_node.value
                full = f"{path}.{key}" if path else key
                if key in keys:
                    faults.append((key_line, f"{full}: stands twice, first on line {keys[key]}: keep one"))
                keys[key] = key_line
                lines.setdefault(full, key_line)
                if key == "_target_":
                    faults.append((key_line, f"{full}: is refused: a config names values, it runs no code"))
                elif full == "hydra":
                    faults.append((key_line, "hydra: Hydra's own settings have no use here: remove the block"))
                elif "${" in key:
                    faults.append(
                        (
                            key_line,
                            f"{full}: an interpolation cannot be a key: write the key itself",
                        )
                    )
                else:
                    visit(value, full, inside)
        elif isinstance(node, yaml.SequenceNode):
            if KEYS.get(path):
                faults.append((line, f"{path}: must be a block of keys, not a list"))
            for index, item in enumerate(node.value):
                lines[f"{path}.{index}"] = item.start_mark.line + 1
                visit(item, f"{path}.{index}", inside)
        else:
            fault = _scalar_fault(node)
            if fault:
                faults.append((line, f"{path}: {fault}"))

    visit(root, "", ())
    return lines, faults


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _scalar_fault(node: yaml.Node) -> str | None:
    text = str(node.value)
    quoted = getattr(node, "style", None) is not None
    if node.tag.endswith(":str"):
        return _interpolation_fault(text)
    if quoted:  # `!!int "3"`: the tag and the quotes disagree
        return f"the tag {_short_tag(node.tag)} on a quoted text is refused: write the plain value"
    if node.tag.endswith(":int") and not _PLAIN_INT.fullmatch(text):
        return f"`{text}` is another number to other loaders: write plain digits, or quote it"
    if node.tag.endswith(":float") and not _PLAIN_FLOAT.fullmatch(text):
        return f"`{text}` is read as a number by some loaders only: write it like 1.0e-4, or quote it"
    return None


# ---------------------------------------------------------------------------------------------
# Composing with Hydra
# ---------------------------------------------------------------------------------------------

_GIVEN = "given_run"  # the one run a tree offers to Hydra, whatever its file is called


class RunTree(ConfigSource):
    """A config tree as Hydra sees it, read through `read_file`; its path names the run's file.

    The root is the folder above `run/`, or the file's own folder if that is not called `run`.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.file = Path(urllib.parse.unquote(self.path))
        self.root = self.file.parent.parent if self.file.parent.name == "run" else self.file.parent

    @staticmethod
    def scheme() -> str:
        return "fwlora-run"

    @staticmethod
    def url(file: Path) -> str:
        return f"{RunTree.scheme()}://{urllib.parse.quote(str(file))}"

    def available(self) -> bool:
        return True

    def _locate(self, config_path: str) -> Path | None:
        name = config_path.removesuffix(".yaml").strip("/")
        if name == f"run/{_GIVEN}":
            return self.file
        if name == "config":
            return CONF / "config.yaml"  # never a stray config.yaml beside somebody's run
        beside = self.file.parent / f"{name.removeprefix('run/')}.yaml"
        for path in (self.root / f"{name}.yaml", beside):
            if path.is_file():
                return path
        return None

    def is_config(self, config_path: str) -> bool:
        return self._locate(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return config_path == "run" or (self.root / config_path).is_dir()

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._locate(config_path)
        assert path is not None
        file = read_file(path)
        _check_defaults_list(path, file)
        try:
            header = self._get_header_dict(file.header)
        except ValueError as error:
            raise UserError(f"{path}:1: the header line `# @…` cannot be read: {error}") from None
        if header.get("package") is None:
            header["package"] = "_global_"  # a run's keys are the config's keys, wherever it lies
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(file.values),
            header=header,
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        folder = self.root / config_path
        if not folder.is_dir() or results_filter == ObjectType.GROUP:
            return []
        return sorted(p.stem for p in folder.glob("*.yaml"))


def _check_defaults_list(path: Path, file: File) -> None:
    """Refuse a `defaults` list that Hydra cannot read, or that would beat the file's own keys."""
    if "defaults" not in file.values:
        return
    entries, where = file.values["defaults"], f"{path}:{file.lines['defaults']}: defaults: "
    if not isinstance(entries, list):
        raise UserError(f"{where}must be a list of config names, e.g. [/base/minilm, _self_]")
    for entry in entries:
        names = list(entry.items())[0] if isinstance(entry, dict) and len(entry) == 1 else (entry, "")
        if not all(isinstance(n, str) for n in names):
            raise UserError(f"{where}{entry!r} is no entry: write a config's name, e.g. /base/minilm")
        if "hydra" in names[0]:
            raise UserError(f"{where}{names[0]!r}: Hydra's own settings have no use here: remove it")
    if "_self_" not in entries and len(file.values) > 1:
        raise UserError(f"{where}must end in `- _self_`, so that this file's own keys win over the others'")


Plugins.instance().register(RunTree)
ConfigStore.instance().store(name="fwlora_schema", node=schema_defaults(), package="_global_")
_hydra_lock = threading.Lock()  # Hydra keeps one global instance


def available_runs(config_dir: str | None = None) -> list[str]:
    """The ids of all runs in the packaged tree and, if given, in a tree of the user's own."""
    folders = [CONF / "run"]
    if config_dir is not None:
        folders += [Path(config_dir) / "run", Path(config_dir)]
    return sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob("*.yaml")})


def find_run(run: str, config_dir: str | None = None) -> Path:
    """The file of a run: a path to a .yaml file, or an id in `config_dir` or the packaged tree."""
    if not run:
        raise UserError("run= is empty: name a run id or a .yaml file")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"{config_dir}: there is no such folder of run configs")
    try:
        if run.endswith((".yaml", ".yml")) or "/" in run:
            return Path(run).expanduser().resolve()  # whatever is wrong with it, reading it says so
        folders = [CONF / "run"]
        if config_dir is not None:
            folders = [Path(config_dir).resolve() / "run", Path(config_dir).resolve(), *folders]
        for folder in folders:
            if (folder / f"{run}.yaml").is_file():
                return folder / f"{run}.yaml"
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"run={run[:100]!r} cannot name a file: {error}") from None
    known = available_runs(config_dir)
    raise UserError(
        f"there is no run {run!r}{nearest(run, known)}; known runs: {', '.join(known)}, or the path of a .yaml file"
    )


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for text in overrides:
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


def _refuse_override(text: str, override: Override) -> None:
    key = override.key_or_group
    if key == "run" or key.startswith("run@"):
        raise UserError(f"override `{text}`: the run is named once, as run=<run_id>")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise UserError(f"override `{text}`: Hydra's own settings have no use here; results go to results_dir=")
    if "_target_" in text:
        raise UserError(f"override `{text}`: _target_ is refused: a config names values, it runs no code")
    fault = _interpolation_fault(text)
    if fault:
        raise UserError(f"override `{text}`: {fault}")
    free = key.startswith("optuna.search_space") or override.is_delete() or "/" in key or key == "base"
    if key not in KEYS and not free:
        raise UserError(f"override `{text}`: {key!r} is no key of a run config{nearest_key(key)}")


def _compose(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed config as plain values; missing keys are left out."""
    # The run's own tree comes first, so that a copied and changed tree wins over the packaged one.
    searchpath = f"hydra.searchpath=['{RunTree.url(CONF / 'run' / file.name)}']"
    with _hydra_lock:
        hydra = GlobalHydra.instance()
        before, hydra.hydra = hydra.hydra, None
        try:
            version.setbase("1.3")
            # What initialize_config_dir does, for a source that is not a plain folder.
            Hydra.create_main_hydra2("fwlora", create_config_search_path(RunTree.url(file)))
            cfg = compose("config", overrides=[searchpath, f"run={_GIVEN}", *overrides])
            # Files and overrides hold plain references only, so resolving runs no resolver.
            composed = OmegaConf.to_container(cfg, resolve=True)
        except (HydraException, OmegaConfBaseException, RecursionError, AssertionError) as error:
            raise UserError(_compose_message(file, error)) from None
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(_compose_message(file, error)) from None
        finally:
            GlobalHydra.instance().hydra = before
    return _without_missing(composed)


def _without_missing(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_missing(v) for k, v in data.items() if not (isinstance(v, str) and v == "???")}
    return data


def _compose_message(file: Path, error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return f"{file}: its references or its defaults go in a circle: write one of them out"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = next((x.strip() for x in str(cause).splitlines() if x.strip()), type(cause).__name__)
    text = text.replace(f"run/{_GIVEN}", file.name)
    key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
    if key and str(key) not in text:
        text = f"{key}: {text}"
    if str(key).startswith("optuna.search_space."):
        text += f"; a parameter that is new to the space is added with a plus, +{key}={{…}}"
    elif str(key).startswith("optuna."):
        text += "; this run has no optuna block: give a whole one, +optuna={…}"
    return f"{file}: cannot be composed: {text}"


# ---------------------------------------------------------------------------------------------
# What the rest of the package calls
# ---------------------------------------------------------------------------------------------


def load_run(run: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> RunConfig:
    """Compose and check one run.

    `run` is an id of the packaged tree or of `config_dir` (`run/` below it, or flat), or the path
    of a .yaml file. `overrides` are Hydra's (`a.b=c`, `+a.b=c`, `~a.b`), without sweeps. Raises
    UserError with every fault found.
    """
    file = find_run(run, config_dir)
    parsed = _parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"override `{override.input_line}` is a sweep, which needs --multirun; a list goes in brackets, a=[b,c]"
            )
    source = read_file(file)  # first, so that its faults come with their lines
    # Every key of the schema is there from the start, so that `+key=` can only mean its value.
    lines = [
        f"+{text}" if o.is_add() and o.key_or_group in KEYS else text for text, o in zip(overrides, parsed, strict=True)
    ]
    data = _compose(file, lines)
    given = {o.key_or_group: o.input_line for o in parsed}
    try:
        return validate_run(data)
    except InvalidRun as error:
        issues = _faults_of(data, error.issues)
        raise UserError(listing([f"{_place(file, source.lines, given, i.key)}{i.text}" for i in issues])) from None


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
            i
            for i in error.issues
            if not any(f"{i.key}.".startswith(f"{key}.") or key in i.text for key in faulty)
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


def parse_seeds(text: str) -> list[int]:
    """`0..2` -> [0, 1, 2]; `1,5,7`; `0..9,42`. UserError on anything else, and on repeats."""
    cure = "write seeds=0..4, seeds=1,5,7 or seeds=0..9,42"
    seeds: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})\s*(?:\.\.\s*([0-9]{1,10})\s*)?", part, re.ASCII)
        if match is None:
            raise UserError(f"seeds={text}: {part.strip()!r} is neither a seed nor a range: {cure}")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise UserError(f"seeds={text}: {part.strip()} runs backwards: write {last}..{first}")
        if last >= 2**32:
            raise UserError(f"seeds={text}: seeds are below 2**32")
        if len(seeds) + last - first + 1 > MAX_SEEDS:
            raise UserError(f"seeds={text}: more than {MAX_SEEDS:,} seeds: {cure}")
        seeds += range(first, last + 1)
    twice = sorted({s for s in seeds if seeds.count(s) > 1})
    if twice:
        raise UserError(f"seeds={text}: seed {twice[0]} stands twice: name each seed once")
    return seeds
