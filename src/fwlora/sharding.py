"""Adapters that are split over processes (FSDP): their full values, and this process's piece of a full value.

Between steps, each process of FSDP holds one contiguous piece of every parameter, some rows of it (FSDP2,
`fully_shard`) or some of its elements (FSDP1). The penalty needs whole factors, because a Gram matrix mixes all rows.
Adapters are small, so all of them are gathered in a single all-reduce a step: each process puts its pieces into a
buffer of zeros, and the sum over processes is the full value.
"""

# Parts of torch are untyped, and FSDP1 has no public way to read where a piece lies.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class _Piece:
    """The elements [start, stop) of a flattened parameter of `shape`, which this process holds.

    `group` are the processes that hold the other pieces; None if this process holds all elements.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    group: Any


class Factors:
    """The factors of all adapters as full matrices, wherever their pieces lie.

    Args:
        parameters: A and B of each pair in turn.
        model: the model that they belong to; it knows how FSDP1 split them.

    Attributes:
        full: the full factors, [r, d_in] and [d_out, r]: the parameters themselves where nothing is split. Otherwise
            call `gather` before they are read.
        is_split: whether any factor may be held by several processes in pieces.

    Raises:
        ValueError: a split that is not FSDP's, or one of FSDP1 that `model` does not know about.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], model: nn.Module) -> None:
        self._parameters = list(parameters)
        flat = _flat_pieces(model)
        self._pieces = [flat.get(id(p)) or _rows(p) for p in parameters]
        if any(piece is None and p.dim() != 2 for piece, p in zip(self._pieces, parameters, strict=True)):
            raise ValueError(
                "fwlora cannot read how FullyShardedDataParallel split these adapters, because it was attached to a "
                "model inside of the wrapper: attach to the wrapped model, after the optimizer was made."
            )
        self.is_split = any(piece is not None for piece in self._pieces)
        self.full: list[Tensor] = list(parameters)
        self._buffers: list[tuple[Any, Tensor]] = []
        for group in {id(p.group): p.group for p in self._pieces if p is not None}.values():
            members = [i for i, p in enumerate(self._pieces) if p is not None and p.group is group]
            sizes = [prod(cast(_Piece, self._pieces[i]).shape) for i in members]
            dtype = torch.float32
            for i in members:
                dtype = torch.promote_types(dtype, parameters[i].dtype)
            buffer = torch.zeros(sum(sizes), dtype=dtype, device=self.local(members[0]).device)
            self._buffers.append((group, buffer))
            for i, part in zip(members, torch.split(buffer, sizes), strict=True):
                self.full[i] = part.view(cast(_Piece, self._pieces[i]).shape)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring `full` up to date. Every process of the group must call this at the same time."""
        for _, buffer in self._buffers:
            buffer.zero_()
        for i, piece in enumerate(self._pieces):
            if piece is not None and piece.stop > piece.start:
                self.full[i].view(-1)[piece.start : piece.stop].copy_(self.local(i).reshape(-1))
        for group, buffer in self._buffers:
            if group is not None:
                dist.all_reduce(buffer, group=group)

    def piece(self, i: int, full: Tensor) -> Tensor:
        """This process's piece of a matrix of factor i's full shape, in the shape of `local(i)`."""
        piece = self._pieces[i]
        return full if piece is None else full.reshape(-1)[piece.start : piece.stop].view(self.local(i).shape)

    def holds(self, i: int) -> bool:
        """Whether this process holds anything of factor i."""
        piece = self._pieces[i]
        return piece is None or piece.stop > piece.start

    def sum_over_pieces(self, values: Tensor, index: Sequence[int]) -> Tensor:
        """Sums over processes of what each computed from its pieces of the factors `index`, [len(index)]."""
        for group, _ in self._buffers:
            if group is None:
                continue
            mine = [k for k, i in enumerate(index) if (p := self._pieces[i]) is not None and p.group is group]
            part = values[mine].contiguous()
            dist.all_reduce(part, group=group)
            values = values.index_copy(0, torch.tensor(mine, device=values.device), part)
        return values

    def local(self, i: int) -> Tensor:
        """What this process holds of factor i; writing to it changes the parameter."""
        return _local(self._parameters[i])

    def gradient(self, i: int) -> Tensor:
        """The gradient of this process's piece of factor i; zeros, which are not stored, where there is none."""
        grad = self._parameters[i].grad
        return torch.zeros_like(self.local(i)) if grad is None else _local(grad)

    @torch.no_grad()
    def local_gradient(self, i: int) -> Tensor:
        """The gradient of what this process holds of factor i, made of zeros where there is none yet."""
        parameter = self._parameters[i]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return _local(parameter.grad)


def _local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor as it is."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return cast(Any, tensor).to_local()


def _rows(parameter: nn.Parameter) -> _Piece | None:
    """The rows that this process holds of a DTensor; None for an ordinary parameter.

    Raises:
        ValueError: a split other than FSDP2's, such as tensor parallelism.
    """
    if not hasattr(parameter, "device_mesh"):
        return None
    from torch.distributed.tensor import Replicate, Shard  # slow to import, and only needed with FSDP2

    mesh, placements = cast(Any, parameter).device_mesh, cast(Any, parameter).placements
    shape = tuple(parameter.shape)
    split = [d for d, p in enumerate(placements) if not isinstance(p, Replicate) and mesh.size(d) > 1]
    # FSDP2 together with tensor parallelism makes a subclass of Shard.
    if len(split) > 1 or any(type(placements[d]) is not Shard or placements[d].dim != 0 for d in split):
        raise ValueError(
            f"fwlora cannot work with an adapter split as {placements}: it supports FSDP's split into rows only. "
            "Leave the adapters out of the tensor-parallel plan; they are too small to be worth splitting."
        )
    if not split:
        return _Piece(shape, 0, prod(shape), None)
    size, rank = mesh.size(split[0]), mesh.get_local_rank(split[0])
    chunk = -(-shape[0] // size)  # as torch.chunk does: the last processes may hold fewer rows, or none
    row, width = min(rank * chunk, shape[0]), prod(shape[1:])
    return _Piece(shape, row * width, min(row + chunk, shape[0]) * width, mesh.get_group(split[0]))


def _flat_pieces(model: nn.Module) -> dict[int, _Piece]:
    """The pieces of the parameters that FSDP1 (with use_orig_params) holds, by the parameter's id."""
    pieces: dict[int, _Piece] = {}
    for module in model.modules():
        handle: Any = getattr(module, "_handle", None)
        flat: Any = getattr(handle, "flat_param", None)
        if flat is None or flat._params is None or not handle.uses_sharded_strategy:
            continue
        for parameter, info, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
            start, stop = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
            pieces[id(parameter)] = _Piece(tuple(shape), start, stop, handle.process_group)
    return pieces


def refuse_flat_parameters(model: nn.Module) -> None:
    """Refuse FSDP1 without use_orig_params, which leaves no adapter to be seen.

    Raises:
        ValueError: a part of the model is wrapped like that.
    """
    for module in model.modules():
        flat: Any = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is not None and flat._params is None:
            raise ValueError(
                "fwlora cannot work with FullyShardedDataParallel(use_orig_params=False), which hides the adapters in "
                "one flat parameter: pass use_orig_params=True, or use fully_shard (FSDP2)."
            )
