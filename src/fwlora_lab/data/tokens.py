"""Token tables and the batches that are cut from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fwlora_lab.data.task import Examples, Text
from fwlora_lab.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 2000  # examples that are tokenized at once


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The token ids of n examples, concatenated; example i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: int32 [N], N tokens in all.
        types: segment ids, int8 [N]; None if the model has none.
        offsets: int64 [n + 1].
        labels: int64 [n], or float32 [n] for regression.
        cut_examples: how many were longer than max_length.
        cut_tokens: how many tokens they lost.
    """

    tokens: torch.Tensor
    types: torch.Tensor | None
    offsets: torch.Tensor
    labels: torch.Tensor
    cut_examples: int = 0
    cut_tokens: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> torch.Tensor:
        """Tokens of each example, special ones included: int64 [n]."""
        return self.offsets.diff()

    def to(self, device: torch.device) -> TokenTable:
        """The same table on `device`."""
        types = None if self.types is None else self.types.to(device)
        return replace(
            self,
            tokens=self.tokens.to(device),
            types=types,
            offsets=self.offsets.to(device),
            labels=self.labels.to(device),
        )


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: bool) -> TokenTable:
    """The token ids of every example with its special tokens, at most `max_length` each.

    Raises:
        UserError: `max_length` leaves no space for text, or an example is longer and `truncation` is off.
    """
    pairs = bool(examples.texts) and not isinstance(examples.texts[0], str)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= special + pairs:
        raise UserError(
            f"dataset.max_length: {max_length} leaves no space for text besides the {special} "
            f"special tokens; set it to {special + pairs + 1} or more"
        )
    with_types = "token_type_ids" in tokenizer.model_input_names
    lengths, tokens, types = [], [], []
    # In chunks, because lists of ids take ten times the memory of arrays.
    for start in range(0, len(examples), _CHUNK):
        chunk = examples.texts[start : start + _CHUNK]
        fields: list[Any] = [list(f) for f in zip(*chunk, strict=True)] if pairs else [list(chunk)]
        encoded = tokenizer(
            *fields,
            truncation=truncation,
            max_length=max_length if truncation else None,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=with_types,
            verbose=False,
        )
        ids = encoded["input_ids"]
        lengths.append(np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))
        tokens.append(_flat(ids, np.int32))
        if with_types:
            types.append(_flat(encoded["token_type_ids"], np.int8))
    sizes = np.concatenate([np.zeros(1, np.int64), *lengths])  # offsets begin with 0
    if sizes.max() > max_length:
        worst = int(sizes.argmax())
        raise UserError(
            f"dataset.max_length: example {worst - 1} (counted from 0) has {sizes[worst]} tokens, "
            f"more than {max_length}, and dataset.truncation is false; raise max_length or set "
            "truncation: true"
        )
    # Only an example of exactly max_length tokens may have lost some.
    full = [examples.texts[i] for i in np.flatnonzero(sizes[1:] == max_length)] if truncation else []
    lost = [n - max_length for n in _lengths(full, tokenizer, pairs) if n > max_length]
    return TokenTable(
        tokens=torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *tokens])),
        types=torch.from_numpy(np.concatenate([np.zeros(0, np.int8), *types])) if with_types else None,
        offsets=torch.from_numpy(sizes.cumsum()),
        labels=torch.from_numpy(examples.labels.copy()),
        cut_examples=len(lost),
        cut_tokens=sum(lost),
    )


def _lengths(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, pairs: bool) -> list[int]:
    """How many tokens each text has in full, special ones included."""
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        fields: list[Any] = [list(f) for f in zip(*chunk, strict=True)] if pairs else [list(chunk)]
        encoded = tokenizer(*fields, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        lengths += map(len, encoded["input_ids"])
    return lengths


def _flat(rows: list[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype)


def collate(
    table: TokenTable,
    index: torch.Tensor,
    pad_id: int,
    padding: Literal["longest", "max_length", "grouped"],
    max_length: int,
) -> dict[str, torch.Tensor]:
    """The batch of the b examples at the positions in `index` (int64 [b]), padded on the right to T tokens.

    T is the length of the batch's longest example, or `max_length` if `padding` is "max_length".

    Returns:
        input_ids, attention_mask and, if the table has types, token_type_ids, int64 [b, T]; labels [b].
    """
    start, end = table.offsets[index], table.offsets[index + 1]
    width = max_length if padding == "max_length" else int((end - start).max())
    position = start[:, None] + torch.arange(width, device=start.device)
    mask = position < end[:, None]
    position = position.clamp(max=len(table.tokens) - 1)
    batch = {
        "input_ids": torch.where(mask, table.tokens[position].long(), pad_id),
        "attention_mask": mask.long(),
        "labels": table.labels[index],
    }
    if table.types is not None:
        batch["token_type_ids"] = torch.where(mask, table.types[position].long(), 0)
    return batch


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """The shuffled batches of an epoch, as positions (int64 [batch_size]); the last one may be shorter.

    The result depends on the arguments alone.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)
    return list(torch.from_numpy(order).split(batch_size)) if n else []


def length_groups(lengths: torch.Tensor, overhead: int = 32) -> list[torch.Tensor]:
    """Divide a batch into groups of similar length, such that computing one after another costs least.

    The division minimises `Σ_groups (size · longest + overhead)` exactly, by dynamic programming over the sorted
    lengths. The batch's loss does not change: it is the mean of the groups' losses, weighted by their sizes.

    Args:
        lengths: of the batch's examples, in tokens, int64 [b].
        overhead: the cost of one more forward and backward pass, in tokens.

    Returns:
        Positions in the batch, one tensor for each group.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    longest = lengths[order].tolist()
    best, cut = [0] + [0] * len(longest), [0] * (len(longest) + 1)
    for end in range(1, len(longest) + 1):
        costs = [best[a] + (end - a) * longest[a] + overhead for a in range(end)]
        best[end] = min(costs)
        cut[end] = costs.index(best[end])
    groups, end = [], len(longest)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]
