"""What `fwlora.attach` adds to the peak memory of a training step, by estimator.

    python scripts/memory_of_attach.py            # all parts; two minutes and 4 GB of memory
    python scripts/memory_of_attach.py --counts   # the first part only

1. Counts for Llama-7B's shape, all linear layers adapted, from a model on the meta device: bytes of the statistics that
   each estimator keeps until the optimizer's step, and of the largest that lives within one layer's backward pass.
2. A training step (forward, backward, AdamW) of that shape in bfloat16 with adapters in float32 and LoRA's dropout,
   run on the meta device, whose tensors have shapes and no content: what would be allocated, without the machine.
3. The same for a random decoder of more than 300 million parameters in float32, run for real.

The peak of 2 and 3 is the largest number of bytes that live tensors hold at once, counted at every operator's output
through torch's dispatch mode: it does not depend on the machine, its allocator or chance. Memory that an operator takes
and frees inside is not seen. Each figure is the larger peak of two steps, model and optimizer included.
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import fwlora
from fwlora import FWLoraConfig, estimators
from fwlora.adapters import find_targets
from fwlora.estimators import hooked_estimator

ESTIMATORS = ("exact", "sketch", "per_example")
GIB, MIB = 2**30, 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.finalize(storage, self._freed, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return out


def decoder(config: LlamaConfig, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """A frozen decoder of that dtype with adapters in float32, as PEFT makes them."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, lora)


def counts() -> None:
    with torch.device("meta"):
        model = decoder(LlamaConfig(), torch.bfloat16)  # the defaults are Llama-7B's
    targets = find_targets(model)
    own = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    print(f"Llama-7B's shape: {own / GIB:.1f} GiB of parameters, {len(targets)} adapted matrices; fp32 statistics\n")
    print("| estimator | all matrices, until the step | share of the model | largest of one matrix |")
    print("|---|---|---|---|")
    for name in ESTIMATORS:
        estimator = hooked_estimator(FWLoraConfig(estimator=name))
        sizes = [estimator.bytes(t.out_features, t.in_features, torch.float32) for t in targets]
        label = f"{name}, one pass a step" if estimator.reduces else name
        if estimator.reduces:
            print(f"| {name}, accumulated or several processes | {sum(sizes) / MIB:,.1f} MiB | {sum(sizes) / own:.2%} "
                  f"| {max(sizes) / MIB:,.1f} MiB |")  # fmt: skip
        kept = 4 * len(sizes) if estimator.reduces else sum(sizes)
        print(f"| {label} | {kept / MIB:,.3f} MiB | {kept / own:.3%} | {max(sizes) / MIB:,.3f} MiB |")


def step_peak(model: Any, estimator: str | None, ids: torch.Tensor, micro: int = 1) -> int:
    """The peak over two steps with `micro` backward passes each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    handle = None
    if estimator is not None:
        handle = fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=9, estimator=estimator))
    with LiveBytes() as live:
        for p in [*model.parameters(), *model.buffers()]:
            live.count(p.detach())
        for _ in range(2):
            for part in ids.chunk(micro):
                n, tokens = part.shape
                mask = torch.ones(n, 1, tokens, tokens, dtype=torch.bool, device=part.device).tril()
                (model(input_ids=part, labels=part, attention_mask=mask).loss / micro).backward()
            optimizer.step()
            optimizer.zero_grad()
    if handle is not None:
        handle.detach()
    return live.peak


def table(model: Any, ids: torch.Tensor, runs: list[tuple[str, int]]) -> None:
    base = {micro: step_peak(model, None, ids, micro) for micro in dict.fromkeys(micro for _, micro in runs)}
    print("| estimator | micro-batches | plain LoRA | with fwlora | added |")
    print("|---|---|---|---|---|")
    for name, micro in runs:
        peak, plain = step_peak(model, name, ids, micro), base[micro]
        print(
            f"| {name} | {micro} | {plain / MIB:,.1f} MiB | {peak / MIB:,.1f} MiB | {peak / plain - 1:+.2%} |",
            flush=True,
        )


def probe_without_numbers(d_in: int, columns: int, *, device: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    """The meta device has no generator."""
    return torch.empty(columns, d_in, device=device, dtype=dtype).T


def llama_7b() -> None:
    estimators.gaussian_probe, drawn = probe_without_numbers, estimators.gaussian_probe
    with torch.device("meta"):
        model = decoder(LlamaConfig(use_cache=False), torch.bfloat16, dropout=0.05)
        ids = torch.zeros(2, 512, dtype=torch.int64)
        print(f"\nLlama-7B's shape, bfloat16, {ids.numel()} tokens a step, on the meta device:\n")
        table(model, ids, [("sketch", 1), ("exact", 1), ("per_example", 1), ("adapter", 1), ("sketch", 2)])
    estimators.gaussian_probe = drawn


def measure() -> None:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=9,
        num_attention_heads=12,
        use_cache=False,
    )
    model = decoder(config, torch.float32, dropout=0.05)
    total = sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    print(f"\nRandom decoder of {total / 1e6:.0f} M parameters, float32, {ids.numel()} tokens a step:\n")
    table(model, ids, [("sketch", 1), ("exact", 1), ("per_example", 1), ("adapter", 1), ("sketch", 2), ("exact", 2)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--counts", action="store_true", help="the counts only")
    arguments = parser.parse_args()
    counts()
    if not arguments.counts:
        llama_7b()
        measure()
