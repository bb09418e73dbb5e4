"""Records as version 0.1 wrote them, brought into the present form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fwlora_lab.config.former_names import with_present_names

# Version 0.1 recorded no engine. Where lanes did not know the encoder, the run's only trace of PEFT's engine is the
# beginning of this warning. Those records exist and do not change, so this text is part of their format.
_WARNING_OF_PEFT_ENGINE = "training.engine=lanes does not know"


def from_version_0_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """A record of version 0.1, which is known by its key `arm`, under the present names.

    What is not well formed is left as it is, so that checking the record names it.
    """
    out = {("method" if key == "arm" else key): value for key, value in data.items()}
    if out.get("evaluated_on") == "selection":
        out["evaluated_on"] = "validation"
    if isinstance(out.get("config"), Mapping):
        out["config"] = with_present_names(out["config"])
    if isinstance(out.get("times"), Mapping):
        out["times"] = _times(out["times"], out["method"])
    out.setdefault("engine", _engine(out))
    return out


def _times(times: Mapping[str, Any], method: object) -> dict[str, Any]:
    out = {("warmup_seconds" if key == "fisher_seconds" else key): value for key, value in times.items()}
    if isinstance(out.get("phases"), Mapping):
        phases = {"fisher": "warmup", "steady": "penalty" if method == "fw_lora" else "training"}
        out["phases"] = {phases.get(name, name): seconds for name, seconds in out["phases"].items()}
    return out


def _engine(record: Mapping[str, Any]) -> str:
    config, warnings = record.get("config"), record.get("warnings")
    training = config.get("training") if isinstance(config, Mapping) else None
    asked = training.get("engine") if isinstance(training, Mapping) else None
    notes = warnings if isinstance(warnings, list) else []
    fell_back = any(str(note).startswith(_WARNING_OF_PEFT_ENGINE) for note in notes)
    return "lanes" if asked == "lanes" and not fell_back else "peft"
