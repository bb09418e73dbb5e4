"""From a name, a file or a sweep to checked run configs: every YAML file is read here, and only here.

Hydra composes a run's file with the schema's defaults and the command line's overrides; pydantic checks the result.
Whatever is wrong ends in one `UserError` that lists every fault with its file, line and key. Nothing that a config
says is ever executed: there are no `_target_`s and no resolvers, only plain references such as `${training.seed}`.
"""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fwlora_lab.config.former_names import with_present_names
from fwlora_lab.config.keys import schema_defaults
from fwlora_lab.config.tree import CONF
from fwlora_lab.config.yaml_reader import File, read_file
from fwlora_lab.errors import UserError

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
            config=OmegaConf.create(with_present_names(file.values, warn=True)),
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


def compose_run(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
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
