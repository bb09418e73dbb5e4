"""F of every architecture in tests/tiny_architectures.py against an unfrozen twin, as a table.

    python scripts/architectures.py [NAME …]

`error` is the largest relative difference over the adapted matrices between F and what the twin's `weight.grad` gives:
‖∇W‖² for exact, ‖∇W·Ω‖²/k with the same probe for sketch, and Σ_i ‖∇W_i‖² from one backward pass an example for
per_example (for matrices that are called once a pass with one row an example). Everything is float64, but for two
models with layers that demand float32.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import transformers  # noqa: E402
from tiny_architectures import ARCHITECTURES, compare  # noqa: E402


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    chosen = [a for a in ARCHITECTURES if not names or a.name in names]
    worst = {"exact": 0.0, "sketch": 0.0, "per_example": 0.0}
    print("| architecture | kind | matrices | calls | exact | sketch | per_example | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture in chosen:
        start = time.perf_counter()
        result = compare(architecture)
        errors = result.errors
        cells = ["–" if error is None else f"{error:.0e}" for error in errors.values()]
        for name, error in errors.items():
            worst[name] = max(worst[name], error or 0.0)
        print(
            f"| {architecture.name} | {architecture.kind} | {result.targets} | {result.uses} | {' | '.join(cells)} | "
            f"{time.perf_counter() - start:.2f} |",
            flush=True,
        )
    print(f"\n{len(chosen)} architectures; worst error: " + ", ".join(f"{n} {e:.1e}" for n, e in worst.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
