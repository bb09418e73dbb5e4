"""Names in designs: methods, data sets, run ids, and the sizes of the known encoders.

pytest tests/fwlora_lab/design/test_names.py
"""

from __future__ import annotations

from designs import PROPOSED

from fwlora_lab.catalog.encoders import ENCODERS
from fwlora_lab.design.names import method_in, slug, subset_of


def test_names_of_methods_data_and_runs():
    for text, method in {
        "FW-LoRA": "fw_lora",
        "Fisher-Weighted LoRA (FW-LoRA)": "fw_lora",
        "proposed_fw_lora": "fw_lora",
        "Fisher-Weighted LoRA (FW-LoRA) is a replacement for ordinary LoRA, unlike AdaLoRA: " + "x" * 50: None,
        "LoRA adapters (rank 8)": "lora",
        "LoRA (DoRA)": None,
        "GLoRA": None,
        "AdaLoRA": "adalora",
        "SVD-LoRA": "svd_lora",
        "plain LoRA": "lora",
        "Vanilla LoRA (uniform rank)": "lora",
        "QLoRA": None,
        "LoRA+": None,
        "FW-LoRA without warm-up": None,
    }.items():
        assert method_in(text) == method, text
    for text, subset in {"SST-2 (GLUE)": "sst2", "GLUE (CoLA)": "cola", "glue/mrpc": "mrpc", "imdb": None}.items():
        assert subset_of(text) == subset
    assert slug(["proposed", "roberta-base (110M)", "SST-2 (GLUE)"]) == PROPOSED


def test_sizes_of_the_known_encoders():
    words = {"roberta": (50265, 514, 1), "uncased": (30522, 512, 2), "cased": (28996, 512, 2), "mpnet": (30527, 514, 0)}
    for name, e in ENCODERS.items():
        vocabulary, positions, types = words[next((w for w in words if w in name), "uncased")]
        d, f = e.width, e.feed_forward
        embeddings = (vocabulary + positions + types) * d + 2 * d
        layer = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
        relative = 32 * 12 if "mpnet" in name else 0
        assert e.parameters == embeddings + relative + e.layers * layer + d * d + d, name
    roberta = ENCODERS["roberta-base"]
    assert roberta.parameters_per_rank(["query", "key", "value", "intermediate", "output"]) == 147_456
    assert roberta.parameters_per_rank(["all-linear"]) == 165_888
    assert roberta.parameters_per_rank(["query", "q_proj"]) is None
    assert roberta.parameters_per_rank(["output.dense"]) == 12 * (1536 + 3840)
