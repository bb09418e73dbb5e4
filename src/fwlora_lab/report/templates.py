"""TODO"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import jinja2

from fwlora_lab.analysis.read import percent
from fwlora_lab.report.formatting import points, seeds_word, words


def markdown(text: object) -> str:
    """Text as Markdown shows it in a table: on one line, and nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


def shipped(name: str) -> str:
    """A file of the package's folder of templates."""
    return resources.files("fwlora_lab").joinpath("report", "files", name).read_text("utf-8")


def render(name: str, **values: Any) -> str:
    """A template with its values; in HTML they are escaped, in Markdown the template does that."""
    page = jinja2.Environment(
        loader=jinja2.FunctionLoader(shipped),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page.filters |= {"md": markdown, "points": points, "percent": percent, "words": words, "seeds_word": seeds_word}
    return page.get_template(name).render(**values)
