"""The report's templates (`report/files/`), rendered by Jinja."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import jinja2

from fwlora_lab.analysis.results import percent
from fwlora_lab.report.formatting import points, seeds_argument, words


def markdown(text: object) -> str:
    """The text for a cell of a Markdown table: on one line, with all markup escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


def template_text(name: str) -> str:
    """A file of the package's folder of templates."""
    return resources.files("fwlora_lab").joinpath("report", "files", name).read_text("utf-8")


def render(name: str, **values: Any) -> str:
    """Fill in a template; in HTML all values are escaped, in Markdown those that the template passes through `md`."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template_text),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = {"md": markdown, "points": points, "percent": percent, "words": words, "seeds_argument": seeds_argument}
    environment.filters |= filters
    return environment.get_template(name).render(**values)
