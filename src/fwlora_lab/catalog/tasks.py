"""TODO"""

from __future__ import annotations

GLUE_SUBSETS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
GLUE_DEV_SPLITS = ("validation", "validation_matched", "validation_mismatched")
GLUE_TRAIN = {
    "cola": 8_551, "sst2": 67_349, "mrpc": 3_668, "qqp": 363_846, "stsb": 5_749,
    "mnli": 392_702, "qnli": 104_743, "rte": 2_490, "wnli": 635,
}  # fmt: skip
