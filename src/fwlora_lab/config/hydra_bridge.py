"""All that this project uses of Hydra and OmegaConf; no other module imports them.

Hydra parses overrides, composes a run's file with the files that it names, expands sweeps and starts workers. Some of
that has no public interface (`hydra._internal`, `omegaconf._utils`); a new version of Hydra is adapted to here.
"""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser import types as hydra_types
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fwlora_lab.errors import UserError

# --- YAML ---------------------------------------------------------------------------------------


def yaml_loader(text: str) -> Any:
    """A PyYAML loader of `text` that resolves scalars as Hydra does."""
    return get_yaml_loader()(text)


# --- overrides and sweeps -----------------------------------------------------------------------


class Unreadable(Exception):
    """Hydra's grammar cannot read a text; the message is the grammar's reason."""


@dataclass(frozen=True)
class Override:
    """One override of a config: `a.b=c`, `+a.b=c` (add) or `~a.b` (delete).

    `key` has no sign. A sweep has several values, `a.b=1,2` or a function such as `range(1,3)` or `glob(*)`.
    """

    text: str
    key: str
    kind: Literal["change", "add", "delete"]
    is_sweep: bool
    is_glob: bool
    parsed: hydra_types.Override = field(repr=False, compare=False)


def parse_override(text: str) -> Override:
    """The override in `text`.

    Raises:
        Unreadable: `text` is no override in Hydra's grammar.
    """
    try:
        (parsed,) = OverridesParser.create().parse_overrides([text])
    except (HydraException, RecursionError) as error:
        raise Unreadable(next((x for x in str(error).splitlines() if x.strip()), "").split(": ", 1)[-1]) from None
    is_sweep = parsed.is_sweep_override()
    return Override(
        text,
        parsed.key_or_group,
        "add" if parsed.is_add() else "delete" if parsed.is_delete() else "change",
        is_sweep,
        is_sweep and isinstance(parsed.value(), hydra_types.Glob),
        parsed,
    )


def expand_sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of the sweeps' values, each as a list of overrides without sweeps.

    Raises:
        Unreadable: a sweep has no finite list of values, such as `interval(0,1)`.
    """
    try:
        return BasicSweeper.split_arguments([o.parsed for o in overrides], None)[0]
    except HydraException as error:
        raise Unreadable(str(error).splitlines()[0]) from None


def select_names(text: str, known: Sequence[str]) -> list[str] | None:
    """The names that `a,b` or `glob(…)` selects; None where `text` is neither.

    A glob selects among the `known` names and may select none; a list is taken as it is.
    """
    try:
        (parsed,) = OverridesParser.create().parse_overrides([f"name={text}"])
    except (HydraException, ValueError):
        return None
    value = parsed.value()
    if isinstance(value, hydra_types.Glob):
        return value.filter(list(known))
    if parsed.is_discrete_sweep():
        return [v.strip("'\"") for v in parsed.sweep_string_iterator()]
    return None


# --- composing a run ----------------------------------------------------------------------------

_GIVEN = "given_run"  # the one run that a tree offers to Hydra, whatever its file is called
_SCHEMA = "run_schema"  # the name under which conf/config.yaml lists the schema's defaults
_hydra_lock = threading.Lock()  # Hydra keeps one global instance


@dataclass(frozen=True)
class Composition:
    """What composing needs besides the run's file.

    Args:
        packaged: the packaged config tree; its files are found behind those of the run's own tree.
        defaults: the schema, every key with its default and `???` for none.
        read: reads a file of a tree: its values, and its first lines, which may hold `# @package`.
    """

    packaged: Path
    defaults: Mapping[str, Any]
    read: Callable[[Path], tuple[dict[str, Any], str]]

    def packaged_run(self, file: Path) -> Path:
        """Where the run in `file` would be in the packaged tree, so that a `RunTree` finds that tree's root."""
        return self.packaged / "run" / file.name


@dataclass(frozen=True)
class Source:
    """A file that takes part in a composition; its keys are placed below the block `package` ("" for the top)."""

    path: Path
    package: str


class RunTree(ConfigSource):
    """A config tree as Hydra sees it; its path names the run's file.

    The root is the folder above `run/`, or the file's own folder if that is not called `run`.
    """

    composition: Composition  # of the composition under way, which holds the lock

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

    def locate(self, config_path: str) -> Path | None:
        """The file of Hydra's config path, such as `base/minilm`."""
        name = config_path.removesuffix(".yaml").strip("/")
        if name == f"run/{_GIVEN}":
            return self.file
        if name == "config":  # always the packaged one, never a file of this name in the user's folder
            return self.composition.packaged / "config.yaml"
        own_folder = self.file.parent / f"{name.removeprefix('run/')}.yaml"
        for path in (self.root / f"{name}.yaml", own_folder):
            if path.is_file():
                return path
        return None

    def is_config(self, config_path: str) -> bool:
        return self.locate(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return config_path == "run" or (self.root / config_path).is_dir()

    def load_config(self, config_path: str) -> ConfigResult:
        path = self.locate(config_path)
        assert path is not None
        values, first_lines = self.composition.read(path)
        try:
            header = self._get_header_dict(first_lines)
        except ValueError as error:
            raise UserError(f"{path}:1: the header line `# @…` cannot be read: {error}") from None
        if header.get("package") is None:
            header["package"] = "_global_"  # a run's keys are the config's keys, in whatever folder the file is
        return ConfigResult(
            provider=self.provider, path=self.full_path(), config=OmegaConf.create(values), header=header
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        folder = self.root / config_path
        if not folder.is_dir() or results_filter == ObjectType.GROUP:
            return []
        return sorted(p.stem for p in folder.glob("*.yaml"))


Plugins.instance().register(RunTree)


@contextmanager
def _own_instance() -> Iterator[None]:
    """Whatever global instance of Hydra the caller's program has is put away, and comes back at the end."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        version.setbase("1.3")
        yield
    finally:
        GlobalHydra.instance().hydra = before


@contextmanager
def _hydra_for(file: Path, composition: Composition) -> Iterator[tuple[Hydra, list[str]]]:
    """An instance of Hydra that composes the run in `file`, and the overrides that make it do so."""
    # The run's own tree comes first, so that a copied and changed tree wins over the packaged one.
    searchpath = f"hydra.searchpath=['{RunTree.url(composition.packaged_run(file))}']"
    with _hydra_lock, _own_instance():
        RunTree.composition = composition
        ConfigStore.instance().store(name=_SCHEMA, node=composition.defaults, package="_global_")
        try:
            # What hydra.initialize_config_dir does, for a source that is not a plain folder.
            hydra = Hydra.create_main_hydra2("fwlora", create_config_search_path(RunTree.url(file)))
            yield hydra, [searchpath, f"run={_GIVEN}"]
        except (HydraException, OmegaConfBaseException, RecursionError, AssertionError, ValueError) as error:
            raise UserError(_compose_message(file, error)) from None


@dataclass(frozen=True)
class Composed:
    """A composed run.

    Args:
        values: plain values, without keys that have none and without those of `broken`.
        broken: key -> what is wrong with the reference `${...}` that it holds.
    """

    values: dict[str, Any]
    broken: dict[str, str]


def compose(file: Path, overrides: Sequence[str], composition: Composition) -> Composed:
    """The run in `file`, composed with the files that it names and `overrides`.

    Raises:
        UserError: the files or overrides do not go together.
    """
    with _hydra_for(file, composition) as (hydra, given):
        config = hydra.compose_config(
            "config", [*given, *overrides], run_mode=RunMode.RUN, from_shell=False, with_log_configuration=False
        )
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        broken: dict[str, str] = {}
        # Files and overrides hold plain references only, so resolving runs no resolver.
        try:
            composed = OmegaConf.to_container(config, resolve=True)
        except (InterpolationResolutionError, RecursionError):
            tree = OmegaConf.to_container(config, resolve=False)
            broken = _take_out_broken(config, tree)
            composed = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    return Composed(_without_missing(composed), broken)


def _take_out_broken(config: Any, tree: Any) -> dict[str, str]:
    """Remove from `tree`, the plain values of `config`, the keys whose references cannot be followed; what is wrong."""
    found: dict[tuple[str, ...], str] = {}

    def visit(node: Any, path: tuple[str, ...], key: tuple[str, ...]) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                visit(child, (*path, str(name)), (*path, str(name)))
        elif isinstance(node, list):  # a list is one value: it goes as a whole
            for index, child in enumerate(node):
                visit(child, (*path, str(index)), key)
        elif isinstance(node, str) and "${" in node:
            try:
                OmegaConf.select(config, ".".join(path), throw_on_missing=False)
            except (OmegaConfBaseException, RecursionError):
                why = _why_broken(tree, node, ()) or "it cannot be followed"
                found.setdefault(key, f"the reference {node} is refused: {why}; write the value out")

    visit(tree, (), ())
    for *blocks, last in found:
        block = tree
        for name in blocks:
            block = block[name]
        del block[last]
    return {".".join(key): text for key, text in found.items()}


def _why_broken(tree: Any, text: str, followed: tuple[str, ...]) -> str | None:
    """Why a reference in `text` leads to no value, after those that were `followed`."""
    for name in re.findall(r"\$\{(.*?)\}", text):
        if name in followed:
            return f"it leads in a circle, {' -> '.join((*followed[followed.index(name) :], name))}"
        value = tree
        for part in name.split("."):
            try:
                value = value[int(part) if isinstance(value, list) else part]
            except (KeyError, IndexError, TypeError, ValueError):
                return f"it leads to nothing, there is no key {name}"
        if value == "???":
            return f"it leads to nothing, {name} has no value"
        if isinstance(value, str) and (why := _why_broken(tree, value, (*followed, name))):
            return why
    return None


def merged_sources(file: Path, overrides: Sequence[str], composition: Composition) -> list[Source]:
    """The files that `compose` merges, in its order: a later one wins over an earlier one."""
    with _hydra_for(file, composition) as (hydra, given):
        entries = hydra.config_loader.compute_defaults_list("config", [*given, *overrides], RunMode.RUN).defaults
        trees = [RunTree("", RunTree.url(run)) for run in (file, composition.packaged_run(file))]
        found = []
        for entry in entries:
            path = next((p for tree in trees if (p := tree.locate(entry.config_path or ""))), None)
            if path is not None:
                found.append(Source(path, entry.package or ""))
    return found


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
    return f"{file}: cannot be composed: {text}"


# --- workers ------------------------------------------------------------------------------------


class LauncherError(Exception):
    """Hydra knows no such launcher, or refuses one of its settings; the message is Hydra's reason."""


def launch(task: Callable[[Any], Any], workers: int, overrides: Sequence[str], folder: Path) -> list[Any]:
    """Call `task` in each of `workers` processes that a launcher plugin starts; what each returned.

    Args:
        task: is given the composed config, which it need not read; pickled by the launcher.
        overrides: `hydra/launcher=NAME` and `hydra.launcher.KEY=VALUE`.
        folder: for the launcher's own files.

    Raises:
        LauncherError: the launcher or its settings are wrong. An exception of a worker is raised as it is.
    """
    absolute = str(folder.resolve())
    quoted = absolute.replace("\\", r"\\").replace("'", r"\'")
    quiet = ["hydra/hydra_logging=disabled", "hydra/job_logging=disabled", "hydra.output_subdir=null"]
    with _own_instance():
        try:
            hydra = Hydra.create_main_hydra2("fwlora", create_config_search_path(None))
            config = hydra.compose_config(None, [*quiet, *overrides], run_mode=RunMode.MULTIRUN)
            OmegaConf.set_readonly(config.hydra, False)
            config.hydra.sweep.dir = absolute
            config.hydra.sweep.subdir = "${hydra.job.num}"
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
            launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
            jobs = launcher.launch([[f"hydra.sweep.dir='{quoted}'"]] * workers, initial_job_idx=0)
        except (HydraException, OmegaConfBaseException) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise LauncherError(reason) from error
    return [job.return_value for job in jobs]
