"""Small designs for the tests of fwlora_lab.design, and what becomes of them."""

from __future__ import annotations

import yaml

from fwlora_lab.design.generate import generate_configs
from fwlora_lab.design.request import DesignRequest
from fwlora_lab.design.schema import ExperimentDesign

PROPOSED = "proposed-roberta-base-110M--SST-2-GLUE"
COMPARATIVE = "comparative-1-roberta-base-110M--SST-2-GLUE"
DESIGN = {
    "proposed_method": "FW-LoRA",
    "comparative_methods": ["AdaLoRA", "LoRA"],
    "models": ["roberta-base"],
    "datasets": ["SST-2"],
}


def design(**changes) -> DesignRequest:
    """A request for FW-LoRA, AdaLoRA and LoRA on one model and one data set, with changes."""
    return DesignRequest("d.yaml", ExperimentDesign.model_validate({**DESIGN, **changes}))


def configs(**changes) -> list[dict]:
    """The run configs that such a request becomes."""
    return [yaml.safe_load(text) for text in generate_configs(design(**changes)).configs.values()]


def kinds(**changes) -> list[str]:
    """The kinds of its contradictions."""
    return [c.kind for c in generate_configs(design(**changes)).contradictions]
