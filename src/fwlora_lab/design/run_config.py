"""From the draft of a run to a checked run config, as YAML text with a comment on each inferred value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwlora_lab.config.faults import InvalidRun, Issue
from fwlora_lab.config.validation import validate_run
from fwlora_lab.config.yaml_writer import yaml_with_comments
from fwlora_lab.design.draft import SETTABLE_KEYS, RunDraft
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.errors import UserError
from fwlora_lab.text import listing, one_line


@dataclass(frozen=True)
class CommentedConfig:
    """A run config as nested dicts, and the comment of each key; "" for a value that the design states."""

    values: dict[str, Any]
    comments: dict[str, str]

    def to_yaml(self, source: str) -> str:
        """The config as YAML; its first line names the file `source` that it was made from."""
        head = f"# Generated from {one_line(Path(source).name)}. A value without a comment is stated there."
        return f"{head}\n{yaml_with_comments(self.values, self.comments)}"


def to_run_config(request: DesignRequest, draft: RunDraft) -> CommentedConfig:
    """The config of a drafted run.

    Raises:
        UserError: the schema of run configs refuses it; the message names the places in the design.
    """
    values: dict[str, Any] = {"run_id": draft.run_id, "method": draft.method.config_name}
    comments = {"run_id": draft.id_note, "method": _comment(request, "", draft.method.source_location)}
    for key in SETTABLE_KEYS:
        if key in draft.values:
            sourced = draft.values[key]
            *blocks, leaf = key.split(".")
            block = values
            for name in blocks:
                block = block.setdefault(name, {})
            block[leaf] = sourced.value
            comments[key] = _comment(request, sourced.note, sourced.source_location)
    if draft.search:
        comments["optuna.n_trials"] = _comment(request, draft.n_trials.note, draft.n_trials.source_location)
        comments["optuna.direction"] = "every metric here is better when it is larger"
        space = {}
        for entry in draft.search.values():
            space[entry.present_name] = entry.space.dimension
            comment = _comment(request, entry.space.note, entry.source_location)
            comments[f"optuna.search_space.{entry.present_name}.type"] = comment
        values["optuna"] = {"n_trials": draft.n_trials.value, "direction": "maximize", "search_space": space}
    try:
        validate_run(values)
    except InvalidRun as error:
        raise UserError(listing([_in_the_design(request, draft, issue) for issue in error.issues])) from None
    return CommentedConfig(values, comments)


def _comment(request: DesignRequest, note: str, source_location: str) -> str:
    """The comment of a value; it always says so if a language model filled the value."""
    note = one_line(note)
    if not request.is_filled(source_location):
        return note
    filled = f"filled by {one_line(request.writer, 60)}, not stated by the request"
    return f"{filled}; {note}" if note else filled


def _in_the_design(request: DesignRequest, draft: RunDraft, issue: Issue) -> str:
    """A fault of the run config as a message that begins with the place in the design that it comes from."""
    sourced = draft.values.get(issue.key)
    location = sourced.source_location if sourced is not None else ""
    for entry in draft.search.values():
        if issue.key.startswith(f"optuna.search_space.{entry.present_name}"):
            location = entry.source_location
    where = request.locate(one_line(location)) if location else request.source
    return f"{where}: run {draft.run_id}: {one_line(issue.key)}: {one_line(issue.text, 400)}"
