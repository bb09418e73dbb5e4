"""A written request or a design file becomes an `ExperimentDesign`: what is to be compared, on what, searched how.

Three kinds of source are told apart by what they hold: a design file (YAML or JSON, the schema below), the prompt text
of a request (sections with Python-like values inside), and an AIRAS research history (JSON, both generations of it).
Nothing in a source is evaluated: string literals are decoded one by one, a call such as `datetime.datetime(...)`
becomes a mapping of its arguments.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from omegaconf._utils import get_yaml_loader
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fwlora_lab.compose import inspect_node, syntax_message
from fwlora_lab.errors import UserError
from fwlora_lab.runconfig import Dimension, Positive, RunId, Text, issues_of, listing, nearest

MAX_YAML_BYTES = 1_000_000
MAX_BYTES = 5_000_000  # a research history carries whole papers
MAX_KEY = 1_000
MAX_DEPTH = 100

# ---------------------------------------------------------------------------------------------
# The schema
# ---------------------------------------------------------------------------------------------

Name = Annotated[Text, Field(max_length=200)]
Prose = Annotated[str, Field(max_length=500_000)]
Scalar = bool | int | float | str | None
Setting = Scalar | list[Scalar]
Percent = Annotated[float, Field(gt=0, le=100)]
# A range in text (`1e-4-3e-4`, `4,8,16`), one value, a list of choices, or a typed dimension.
Space = str | int | float | list[Scalar] | Dimension


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Hypothesis(Part):
    """What the experiment is to show, in prose; numbers in it are read where no list states them."""

    open_problems: Prose | None = None
    method: Prose | None = None
    experimental_setup: Prose | None = None
    experimental_code: Prose | None = None
    expected_result: Prose | None = None
    expected_conclusion: Prose | None = None


class Method(Part):
    """A method; `settings` and `hyperparameters_to_search` are its own and win over the design's."""

    name: Name
    description: Prose | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)
    hyperparameters_to_search: dict[str, Space] = Field(default_factory=dict)
    n_trials: Positive | None = None


class Model(Part):
    """A backbone: its name, where it comes from, and the size that the design believes it has."""

    name: Name
    pretrained_id: Name | None = None
    revision: Text | None = None
    parameters: Positive | None = None


class Dataset(Part):
    """A data set; `settings` are keys of a run config's `dataset` block (name, subset, train_file, …)."""

    name: Name
    settings: dict[str, Setting] = Field(default_factory=dict)


class Run(Part):
    """One run: `method` is `proposed`, `comparative-<i>` or a method's name.

    `model` and `dataset` may be left out where the design has one of them.
    """

    run_id: RunId | None = None
    method: Name
    model: Name | None = None
    dataset: Name | None = None
    budget: Percent | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)


class ExperimentDesign(Part):
    """A hypothesis and the experiment that tests it.

    Without `runs` there is one for every method × model × dataset × budget. `settings` maps keys of a run config
    (`learning_rate`, `lora_rank`, `dataset.max_length`) to values for all runs. `budgets` are percent of the backbone.
    """

    hypothesis: Prose | Hypothesis | None = None
    summary: Prose | None = None
    proposed_method: Prose | Method
    comparative_methods: list[Name | Method] = Field(default_factory=list, max_length=100)
    models: Annotated[list[Name | Model], Field(min_length=1, max_length=100)]
    datasets: Annotated[list[Name | Dataset], Field(min_length=1, max_length=100)]
    metrics: list[Name] = Field(default_factory=list)
    hyperparameters_to_search: dict[str, Space] = Field(default_factory=dict)
    n_trials: Positive | None = None
    budgets: list[Percent] = Field(default_factory=list, max_length=100)
    settings: dict[str, Setting] = Field(default_factory=dict)
    environment: Prose | None = None
    runs: list[Run] = Field(default_factory=list, max_length=1000)


class Sketch(ExperimentDesign):
    """A design that does not say yet what is compared, with which models or on which data sets."""

    proposed_method: Prose | Method | None = None  # type: ignore[assignment]
    models: list[Name | Model] = Field(default_factory=list, max_length=100)
    datasets: list[Name | Dataset] = Field(default_factory=list, max_length=100)


def schema() -> str:
    """The JSON Schema of a design file."""
    return json.dumps(ExperimentDesign.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


_NAMES = sorted({n for part in (ExperimentDesign, Method, Model, Dataset, Run, Hypothesis) for n in part.model_fields})


@dataclass(frozen=True)
class Request:
    """A design, where each of its keys stands in the source, and the source's own example configs by run id.

    `filled` holds what the language model `writer` answered where the source states nothing: key -> value.
    """

    source: str
    design: ExperimentDesign
    spelling: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)
    writer: str = ""
    filled: Mapping[str, Any] = field(default_factory=dict)

    def is_filled(self, key: str) -> bool:
        return any(k in self.filled for k in _upwards(key))

    def place(self, key: str, *said: object) -> str:
        """`file:line: key: what it says`, with the key as the source spells it."""
        words = "".join(f": {one_line(word)}" for word in said)
        if self.is_filled(key):
            return f"answer of {one_line(self.writer)}: {_indexed(key)}{words}"
        line = next((self.lines[k] for k in _upwards(key) if k in self.lines), None)
        known = next((k for k in _upwards(key) if k in self.spelling), None)
        shown = key if known is None else self.spelling[known] + key[len(known) :]
        return f"{self.source}{f':{line}' if line else ''}: {_indexed(shown)}{words}"


def _indexed(key: str) -> str:
    """`models.0.name` -> `models[0].name`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)


def _upwards(key: str) -> list[str]:
    """The key and the blocks around it, innermost first."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def one_line(value: object, width: int = 160) -> str:
    """A text that can stand in one line of a message or of a YAML comment, whatever it holds."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 4 * width]).split())
    return text if len(text) <= width else text[: width - 1] + "…"


# ---------------------------------------------------------------------------------------------
# Reading a source
# ---------------------------------------------------------------------------------------------


def read_request(source: str, complete: bool = True) -> Request:
    """Read a design file, a request's prompt text or an AIRAS history; UserError with every fault found.

    Where it need not be `complete`, its design may be a `Sketch`, and a text or Markdown file that names no key of a
    design is prose: the hypothesis.
    """
    path = Path(source)
    text = _read_text(path)
    start = text.lstrip()
    kind = ExperimentDesign if complete else Sketch
    if path.suffix.lower() == ".json" or start.startswith(("{", "[")):
        data = read_json(text, source)
        found = _airas_part(data)
        if found is not None:
            plain, spelling = _from_airas(found, "")
            examples = _run_configs(found, source)
            design = _checked(plain, source, {}, spelling, kind)
            return Request(source, design, spelling, {}, examples, _commits(found.design))
        return Request(source, _checked(data, source, {}, {}, kind))
    if re.search(r"^#{1,2} Experimental Design\s*$", text, re.M):
        return _read_prompt(text, source, kind)
    if not complete and path.suffix.lower() in (".txt", ".md") and not _DESIGN_KEY.search(text):
        return Request(source, _checked({"hypothesis": text}, source, {}, {}, kind))
    if len(text.encode()) > MAX_YAML_BYTES:
        raise UserError(f"{source}: a design file has at most {MAX_YAML_BYTES:,} bytes: is it the right file?")
    data, lines = _read_yaml(text, source)
    return Request(source, _checked(data, source, lines, {}, kind), lines=lines)


_DESIGN_KEY = re.compile(rf"^['\"]?(?:{'|'.join(ExperimentDesign.model_fields)})['\"]?\s*:", re.M)


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder: name the file inside it")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: is {size:,} bytes, a request has at most {MAX_BYTES:,}: is it the right file?")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text: save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)[:200]!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise UserError(f"{path}: is empty: a design names proposed_method, models and datasets")
    return text


def read_json(text: str, where: str) -> Any:
    """JSON without duplicate keys, bombs, NaN and `_target_`; UserError with the place otherwise."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if len(key) > MAX_KEY:
                raise UserError(f"{where}: the key {one_line(key, 60)!r} is {len(key):,} characters long")
            if key in seen:
                raise UserError(f"{where}: the key {one_line(key)!r} stands twice in one block: keep one")
            if key == "_target_":
                raise UserError(f"{where}: the key '_target_' is refused: a design names values, it runs no code")
            seen[key] = value
        return seen

    def constant(name: str) -> Any:
        raise UserError(f"{where}: {name} is no JSON number: write a finite one")

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        _check_depth(data)
        return data
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply: a design has four levels") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}:{error.colno}: is not JSON: {error.msg}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: holds a number that cannot be read: {one_line(error)}") from None


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
        if not level:
            return
    raise RecursionError


def _read_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Values and the line of every key; the checks are those of run configs."""
    depth = deepest = 0
    for match in re.finditer(r"[\[\]{}]", text):  # the scanner's time grows with the square of open brackets
        depth += 1 if match[0] in "[{" else -1
        deepest = max(deepest, depth)
    try:
        if deepest > 500:
            raise RecursionError
        loader = get_yaml_loader()(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where}: must hold keys such as `proposed_method:` at its top")
        lines, faults = inspect_node(node)
        if faults:
            raise UserError(listing([f"{where}:{line}: {fault}" for line, fault in faults]))
        longest = max(lines, key=len, default="")
        if len(longest) > MAX_KEY:
            raise UserError(f"{where}: the key {one_line(longest, 60)!r} is {len(longest):,} characters long")
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        raise UserError(one_line(syntax_message(Path(where), error), 400)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply: a design has four levels") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: holds a value that cannot be read: {one_line(error)}") from None


def _checked(
    data: Any,
    source: str,
    lines: Mapping[str, int],
    spelling: Mapping[str, str],
    kind: type[ExperimentDesign],
) -> ExperimentDesign:
    if not isinstance(data, dict):
        raise UserError(f"{source}: must hold keys such as proposed_method, models and datasets")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        request = Request(source, ExperimentDesign.model_construct(), spelling, lines)
        messages = []
        for key, text in issues_of(error, data):
            if text.startswith("is no key of a run config"):
                text = f"is no key of a design{nearest(key.rsplit('.', 1)[-1], _NAMES)}"
            messages.append(request.place(one_line(key), one_line(text, 400)))
        raise UserError(listing(messages)) from None


# ---------------------------------------------------------------------------------------------
# AIRAS: the design's keys under other names
# ---------------------------------------------------------------------------------------------


class _Airas(NamedTuple):
    """The parts of a research history that say what to run."""

    design: Mapping[str, Any]
    runs: list[Any]
    hypothesis: Any
    method: str | None
    environment: str | None


def _airas_part(data: Any) -> _Airas | None:
    """The part with `experimental_design`: at the top, under `new_method`, or in the last iteration or cycle."""
    if not isinstance(data, dict):
        return None
    around: list[Any] = [data, data.get("new_method")]
    session = data.get("research_session")
    for held, name in ((session, "iterations"), (data.get("experiment_history"), "cycles")):
        if isinstance(held, dict):
            tried = held.get(name)
            around += [held.get("current_iteration"), *(reversed(tried) if isinstance(tried, list) else ())]
    for part in around:
        design = part.get("experimental_design") if isinstance(part, dict) else None
        if isinstance(design, dict):
            runs = next((r for r in (part.get("experiment_runs"), design.get("experiment_runs")) if r), [])
            beside = (part, data, session if isinstance(session, dict) else {})
            hypothesis = next((b[k] for b in beside for k in ("research_hypothesis", "hypothesis") if b.get(k)), None)
            method = part.get("method")
            return _Airas(
                design,
                runs if isinstance(runs, list) else [runs],
                hypothesis,
                method if isinstance(method, str) else None,
                _environment(design),
            )
    return None


def _environment(design: Mapping[str, Any]) -> str | None:
    """The machine, which the second generation describes inside the design."""
    machine = design.get("runner_config") or design.get("compute_environment")
    return json.dumps(machine, ensure_ascii=False) if machine else None


_AIRAS_NAMES = {
    "experiment_summary": "summary",
    "proposed_method": "proposed_method",
    "comparative_methods": "comparative_methods",
    "models_to_use": "models",
    "datasets_to_use": "datasets",
    "evaluation_metrics": "metrics",
    "hyperparameters_to_search": "hyperparameters_to_search",
}
# Their names of settings that are called otherwise here. Theirs warms the learning rate up; ours, under the same name,
# is FW-LoRA's K.
_AIRAS_SETTINGS = {
    "warmup_steps": "training.warmup_steps",
    "gradient_clip": "max_grad_norm",
    "scheduler": "lr_scheduler",
}
_AIRAS_RUN = {"run_id": "run_id", "method_name": "method", "model_name": "model", "dataset_name": "dataset"}


def _from_airas(found: _Airas, prefix: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A design as plain values, and the AIRAS spelling of its keys."""
    plain: dict[str, Any] = {}
    spelling: dict[str, str] = {}
    for theirs, ours in _AIRAS_NAMES.items():
        spelling[ours] = f"{prefix or 'experimental_design.'}{theirs}"
        if found.design.get(theirs) is not None:
            plain[ours] = found.design[theirs]
    if isinstance(plain.get("proposed_method"), dict):
        plain["proposed_method"] = _airas_method(plain["proposed_method"])
    if isinstance(plain.get("comparative_methods"), list):
        plain["comparative_methods"] = [
            _airas_method(m) if isinstance(m, dict) else m for m in plain["comparative_methods"]
        ]
    if isinstance(plain.get("metrics"), list):
        plain["metrics"] = [m.get("name") if isinstance(m, dict) else m for m in plain["metrics"]]
    space = plain.get("hyperparameters_to_search")
    if isinstance(space, list):  # `[{name, range}]`, an older spelling
        plain["hyperparameters_to_search"] = {str(d.get("name")): d.get("range") for d in space if isinstance(d, dict)}
    hypothesis = found.hypothesis
    if isinstance(hypothesis, dict):
        hypothesis = {k: hypothesis[k] for k in Hypothesis.model_fields if isinstance(hypothesis.get(k), str)}
        if found.method is not None:
            hypothesis.setdefault("method", found.method)
    plain["hypothesis"] = hypothesis if isinstance(hypothesis, dict | str) else found.method
    if found.environment:
        plain["environment"] = found.environment
    runs = []
    for run in found.runs:
        if not isinstance(run, dict):
            runs.append(run)
            continue
        runs.append({ours: run[theirs] for theirs, ours in _AIRAS_RUN.items() if run.get(theirs) is not None})
    if runs:
        plain["runs"] = runs
    return plain, spelling


def _airas_method(method: dict[str, Any]) -> dict[str, Any]:
    """The second generation's MethodConfig; `optuna_config.search_spaces` is a list of named dimensions."""
    plain: dict[str, Any] = {"name": method.get("method_name", method.get("name"))}
    described = [method.get("description")]
    training = method.get("training_config") or method.get("hyperparameters")
    if isinstance(training, dict):
        settings = {_AIRAS_SETTINGS.get(k, k): v for k, v in training.items() if v is not None}
        described.append(settings.pop("additional_params", None))  # prose: "lambda_fw=1e-4, ..."
        for key in ("optimizer", "lr_scheduler"):
            if isinstance(settings.get(key), str):
                settings[key] = settings[key].lower()
        plain["settings"] = settings
    if any(described):
        plain["description"] = "\n".join(text for text in described if isinstance(text, str) and text)
    optuna = method.get("optuna_config")
    if isinstance(optuna, dict) and optuna.get("enabled", True):
        plain["hyperparameters_to_search"] = named_dimensions(optuna.get("search_spaces"))
        if optuna.get("n_trials"):
            plain["n_trials"] = optuna["n_trials"]
    return plain


def named_dimensions(spaces: Any) -> dict[str, dict[str, Any]]:
    """The list `[{param_name, distribution_type, low, …}]` as dimensions by name.

    AIRAS holds low and high as floats also for an int dimension: 300.0 is 300 there.
    """
    found = {}
    for given in spaces if isinstance(spaces, list) else ():
        if isinstance(given, dict):
            kind = given.get("distribution_type")
            found[str(given.get("param_name"))] = {
                "type" if key == "distribution_type" else key: int(value)
                if kind == "int" and isinstance(value, float) and value.is_integer()
                else value
                for key, value in given.items()
                if key != "param_name" and value is not None
            }
    return found


def _run_configs(found: _Airas, where: str) -> dict[str, dict[str, Any]]:
    """The configs that a history already holds, as examples."""
    configs = {}
    for index, run in enumerate(found.runs):
        text = run.get("run_config") if isinstance(run, dict) else None
        if isinstance(text, str) and text.strip():
            configs[str(run.get("run_id"))] = _read_yaml(text, f"{where}: experiment_runs[{index}].run_config")[0]
    return configs


def _commits(design: Mapping[str, Any]) -> dict[str, str]:
    """Model id (and its last part) -> the commit that the design's external resources name."""
    at: Any = design.get("external_resources")
    for key in ("hugging_face", "models"):
        at = at.get(key) if isinstance(at, dict) else None
    commits = {}
    for model in at if isinstance(at, list) else ():
        name, sha = (model.get("id"), model.get("sha")) if isinstance(model, dict) else (None, None)
        if isinstance(name, str) and isinstance(sha, str) and re.fullmatch("[0-9a-f]{40}", sha):
            commits[name] = sha
            commits.setdefault(name.rsplit("/", 1)[-1], sha)
    return commits


# ---------------------------------------------------------------------------------------------
# The prompt's text
# ---------------------------------------------------------------------------------------------

_HEADING = re.compile(r"#{1,2} +(.+?)\s*")
_RUN_LINE = re.compile(r"\s*(-?)\s*(Run ID|Method|Model|Dataset):\s*(.*?)\s*")
_RUN_KEYS = {"Run ID": "run_id", "Method": "method", "Model": "model", "Dataset": "dataset"}


def _read_prompt(text: str, source: str, kind: type[ExperimentDesign]) -> Request:
    sections: dict[str, list[str]] = {}
    starts: dict[str, int] = {}
    body, _, output = _cut(text, "\nOutput:")
    current: list[str] = []
    fenced = False
    for number, line in enumerate(body.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading:
            current = sections.setdefault(heading[1], [])
            starts.setdefault(heading[1], number)
        else:
            current.append(line)

    def section(name: str) -> str:
        return "\n".join(sections.get(name, ()))

    where = f"{source}: Experimental Design"
    design = _read_fields(section("Experimental Design"), where)
    titled = "Research Hypothesis" if "Research Hypothesis" in sections else "Hypothesis"
    prose = section(titled).strip()
    hypothesis: Any = prose or None
    if re.match(r"\w+=(?:['\"]|None\b)", prose):
        hypothesis = _read_fields(prose, f"{source}: {titled}")
    lines: dict[str, int] = {}
    runs: list[Any] = []
    first = starts.get("Experiment Runs", 0)
    listed = sections.get("Experiment Runs", [])
    printed = "\n".join(listed).strip()
    if printed.startswith("["):  # a printed list of ExperimentRun objects
        runs = _read_fields(f"runs={printed}", f"{source}: Experiment Runs")["runs"]
        listed = []
    for offset, line in enumerate(listed, 1):
        match = _RUN_LINE.fullmatch(line)
        if match is None:
            if line.strip():
                raise UserError(f"{source}:{first + offset}: Experiment Runs: {one_line(line)!r} is no line of a run")
            continue
        key = _AIRAS_BACK[_RUN_KEYS[match[2]]]
        if match[1] or not runs:
            runs.append({})
            lines[f"runs.{len(runs) - 1}"] = first + offset
        if key in runs[-1]:
            raise UserError(f"{source}:{first + offset}: Experiment Runs: {match[2]} stands twice in one run")
        if match[3] not in ("", "None"):
            runs[-1][key] = match[3]
        lines[f"runs.{len(runs) - 1}.{_RUN_KEYS[match[2]]}"] = first + offset
    method = section("Research Method").strip() or None
    environment = section("Experimental Environment").strip() or _environment(design)
    found = _Airas(design, runs, hypothesis, method, environment)
    plain, spelling = _from_airas(found, "Experimental Design: ")
    spelling |= {"runs": "Experiment Runs: runs", "hypothesis": titled, "environment": "Experimental Environment"}
    at = starts["Experimental Design"]
    lines |= {key: at + _offset(sections["Experimental Design"]) for key in _AIRAS_NAMES.values()}
    if titled in starts:
        lines["hypothesis"] = starts[titled] + _offset(sections[titled])
    # empty lines stand for the text above, so that a fault has the file's line
    examples = _read_output("\n" * (body.count("\n") + 1) + output, source)
    for run_id in examples:
        before = text.find(json.dumps(run_id), len(body))
        lines[f"example:{run_id}"] = text.count("\n", 0, max(before, 0)) + 2  # its YAML stands on the next line
        spelling[f"example:{run_id}"] = f"Output: {run_id}"
    return Request(source, _checked(plain, source, lines, spelling, kind), spelling, lines, examples, _commits(design))


_AIRAS_BACK = {ours: theirs for theirs, ours in _AIRAS_RUN.items()}


def _cut(text: str, mark: str) -> tuple[str, str, str]:
    at = text.rfind(mark)
    return (text, "", "") if at < 0 else (text[:at], mark, text[at + len(mark) :])


def _offset(lines: list[str]) -> int:
    """How far below its heading a section's first line stands."""
    return next((n for n, line in enumerate(lines, 1) if line.strip()), 1)


def _read_output(output: str, source: str) -> dict[str, dict[str, Any]]:
    """The request's own example output: run id -> config."""
    if not output.strip():
        return {}
    where = f"{source}: Output"
    data = read_json(output, where)
    configs = data.get("run_configs") if isinstance(data, dict) else None
    if not isinstance(configs, list):
        raise UserError(f"{where}: must hold the list run_configs")
    found: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(configs):
        here = f"{where}: run_configs[{index}]"
        run_id, text = (item.get("run_id"), item.get("run_config_yaml")) if isinstance(item, dict) else (None, None)
        if not isinstance(run_id, str) or not isinstance(text, str):
            raise UserError(f"{here}: must hold the texts run_id and run_config_yaml")
        if run_id in found:
            raise UserError(f"{here}: run_id {one_line(run_id)!r} stands twice: keep one")
        found[run_id] = _read_yaml(text, f"{here}.run_config_yaml")[0]
    return found


# ---------------------------------------------------------------------------------------------
# Values as Python prints them
# ---------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*+(?:(?P<text>'[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+")"""
    r"|(?P<number>[-+]?+(?:\d++\.?+\d*+|\.\d++)(?:[eE][-+]?+\d++)?+)"
    r"|(?P<name>[A-Za-z_][\w.]*+)|(?P<sign>[()\[\]{},:=]))",
    re.S | re.A,
)
_EQUALS = re.compile(r"\s*+=")
_CONSTANTS = {"None": None, "True": True, "False": False}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _read_fields(text: str, where: str) -> dict[str, Any]:
    """`name=value name=value …`, as pydantic prints a model."""
    return _Values(text, where).fields()


class _Values:
    """A reader of printed Python values that evaluates nothing."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.at = 0
        self.kind, self.token = "", ""
        self.step()

    def step(self) -> None:
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            if self.text[self.at :].strip():
                raise self.fault("cannot be read")
            self.kind, self.token = "end", ""
            return
        assert match.lastgroup is not None
        self.kind, self.token, self.at = match.lastgroup, match[match.lastgroup], match.end()

    def fault(self, problem: str) -> UserError:
        shown = one_line(self.text[max(0, self.at - 20) : self.at + 30], 60)
        return UserError(f"{self.where}: character {self.at}: {problem}: …{shown!r}…")

    def expect(self, sign: str) -> None:
        if self.token != sign or self.kind != "sign":
            raise self.fault(f"{sign!r} is missing")
        self.step()

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.kind != "end":
            if self.kind != "name":
                raise self.fault("a name=value is expected")
            self.named(found, 0)
        return found

    def named(self, into: dict[str, Any], depth: int) -> None:
        name = self.token
        self.step()
        self.expect("=")
        if name in into:
            raise self.fault(f"{one_line(name)!r} stands twice")
        into[name] = self.value(depth)

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.fault("is nested too deeply")
        kind, token = self.kind, self.token
        if kind == "text":
            self.step()
            return self.literal(token)
        if kind == "number":
            self.step()
            if len(token) > 300:
                raise self.fault("a number has too many digits")
            return int(token) if re.fullmatch(r"[-+]?\d+", token, re.A) else float(token)
        if kind == "name":
            self.step()
            if self.kind == "sign" and self.token == "(":
                return self.arguments(depth)
            if token not in _CONSTANTS:
                raise self.fault(f"{one_line(token)!r} is no value")
            return _CONSTANTS[token]
        if kind == "sign" and token in _CLOSING:
            self.step()
            return self.braced(depth) if token == "{" else self.items(_CLOSING[token], depth)
        raise self.fault("a value is expected")

    def literal(self, token: str) -> str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = ast.literal_eval(token.replace("\r", "\\r").replace("\n", "\\n"))
        except (SyntaxError, ValueError, MemoryError) as error:
            raise self.fault(f"a text cannot be read ({one_line(error)})") from None
        assert isinstance(value, str)
        return value

    def until(self, closing: str) -> bool:
        """Steps over the closing sign or, before every further item, over the comma."""
        if self.kind == "sign" and self.token == closing:
            self.step()
            return True
        return False

    def items(self, closing: str, depth: int) -> list[Any]:
        found = []
        while not self.until(closing):
            found.append(self.value(depth + 1))
            if not (self.kind == "sign" and self.token == closing):
                self.expect(",")
        return found

    def braced(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.until("}"):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise self.fault(f"the key {one_line(key)!r} is no text or stands twice")
            self.expect(":")
            found[key] = self.value(depth + 1)
            if not (self.kind == "sign" and self.token == "}"):
                self.expect(",")
        return found

    def arguments(self, depth: int) -> dict[str, Any]:
        """`Name(key=value, …)`: the named arguments; nothing is called."""
        self.expect("(")
        found: dict[str, Any] = {}
        while not self.until(")"):
            if self.kind == "name" and _EQUALS.match(self.text, self.at):
                self.named(found, depth + 1)
            elif self.kind == "name" and self.token not in _CONSTANTS and self.text[self.at : self.at + 1] != "(":
                self.step()  # a bare word such as UTC in TzInfo(UTC)
            else:
                self.value(depth + 1)
            if not (self.kind == "sign" and self.token == ")"):
                self.expect(",")
        return found
