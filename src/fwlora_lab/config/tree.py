"""Where run configs are found: the packaged tree `conf/`, and a tree or file of the user's own."""

from __future__ import annotations

from pathlib import Path

from fwlora_lab.errors import UserError
from fwlora_lab.text import did_you_mean

CONF = Path(__file__).resolve().parents[1] / "conf"


def available_runs(config_dir: str | None = None) -> list[str]:
    """The ids of all runs in the packaged tree and, if given, in a tree of the user's own."""
    folders = [CONF / "run"]
    if config_dir is not None:
        folders += [Path(config_dir) / "run", Path(config_dir)]
    return sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob("*.yaml")})


def available_studies() -> list[str]:
    """The names of the packaged studies."""
    return sorted(path.stem for path in (CONF / "study").glob("*.yaml"))


def find_run(run: str, config_dir: str | None = None) -> Path:
    """The file of a run: a path to a .yaml file, or an id in `config_dir` or the packaged tree.

    Raises:
        UserError: no file has this id.
    """
    if not run:
        raise UserError("run= is empty: name a run id or a .yaml file")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"{config_dir}: no such folder of run configs")
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
        f"there is no run {run!r}{did_you_mean(run, known)}; known runs: {', '.join(known)}, "
        "or the path of a .yaml file"
    )
