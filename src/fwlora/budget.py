"""From a parameter budget to a rank for every matrix, and back to what a model really holds.

An adapter of rank r on a d_in -> d_out matrix has r·(d_in + d_out) parameters, so a budget buys
units of rank whose prices differ from matrix to matrix. `rank_pattern` buys as evenly as integers
allow, `lora_kwargs` writes the result down for PEFT, `count` reads back what was built.
"""

# PEFT's layers and parts of torch are untyped. What is read from them is given a type where it is stored.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from numbers import Integral
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from fwlora.adapters import named_modules

# Steps after which the search for the most proportional pattern keeps the best one found. Up to six
# prices it ends far earlier by itself; the cap bounds the time on models with dozens of shapes.
_SEARCH_STEPS = 20_000


@dataclass(frozen=True)
class Matrix:
    """A frozen d_out × d_in weight that can carry an adapter, under its full module name."""

    name: str
    in_features: int
    out_features: int

    @property
    def cost(self) -> int:
        """Parameters of one unit of rank: d_in + d_out."""
        return self.in_features + self.out_features


@dataclass(frozen=True)
class Counts:
    """Parameters of a PEFT model, each tensor once; `percent` is adapters / backbone · 100."""

    backbone: int
    adapters: int
    head: int
    trainable: int

    @property
    def percent(self) -> float:
        return 100 * self.adapters / self.backbone


def matrices(model: nn.Module, names: Sequence[str]) -> list[Matrix]:
    """The Linear and Conv1D modules that `names` mean in a plain model, in the model's order.

    A name is a full module name or its end after a dot, which is the rule of PEFT's
    `target_modules`. Only shapes are read: the model may be on the meta device. Raises ValueError
    for a name without a match and for a match that is neither Linear nor Conv1D.
    """
    if isinstance(names, str):
        raise ValueError(f"names is the single string {names!r}; pass a list of module names")
    modules = {name: module for name, module in named_modules(model) if name}
    wanted = set(names)
    hit: set[str] = set()
    found: list[Matrix] = []
    for name, module in modules.items():
        by = {want for want in wanted if name == want or name.endswith("." + want)}
        if by:
            hit |= by
            found.append(Matrix(name, *_shape(name, module)))
    if missing := sorted(wanted - hit):
        raise ValueError(f"no module is called {missing[0]!r}{_nearest(missing[0], modules)}")
    return found


def parameters_of_percent(percent: float, backbone_parameters: int) -> int:
    """The whole number of parameters in `percent` of the backbone, rounded down.

    The percentage is taken as the decimal number that it is written as, so 0.29 % of 10,000 is 29
    and not 28. Raises ValueError for a percentage that is not a positive finite number and for a
    backbone without parameters.
    """
    _positive_number("percent", percent)
    _whole_number("backbone_parameters", backbone_parameters)
    if backbone_parameters < 1:
        raise ValueError(f"backbone_parameters is {backbone_parameters}; it must be at least 1")
    return int(Fraction(str(percent)) * int(backbone_parameters) / 100)


def rank_pattern(matrices: Sequence[Matrix], budget: int) -> dict[str, int]:
    """A rank for every matrix, as near uniform as integers allow, never above `budget` parameters.

    Every matrix gets ⌊budget / Σ cost⌋; what is left buys one more unit for some. Those are chosen
    to use the most parameters; among equals, so that the kinds of matrix (kind = cost) get the most
    equal shares, min Σ_k n_k·(m_k/n_k − f)² for m_k of n_k matrices of kind k and f the share of
    all; within a kind, evenly over depth (the order given). Rank 0 means no adapter. Raises
    ValueError for a budget that buys no rank at all or one above min(d_in, d_out).
    """
    if not matrices:
        raise ValueError("there is no matrix to give a rank to; check the names of the target modules")
    if len({m.name for m in matrices}) < len(matrices):
        raise ValueError("a matrix is listed twice; list each name once")
    for m in matrices:
        if min(m.in_features, m.out_features) < 1:
            raise ValueError(f"{m.name} is {m.in_features} -> {m.out_features}, not a matrix")
    _whole_number("budget", budget, " (parameters_of_percent turns a percentage into one)")
    cheapest = min(m.cost for m in matrices)
    if budget < cheapest:
        raise ValueError(
            f"a budget of {budget:,} parameters buys no adapter: rank 1 of the cheapest matrix costs {cheapest:,}"
        )

    total = sum(m.cost for m in matrices)
    base, left = divmod(int(budget), total)
    smallest = min(matrices, key=_limit)
    if base > _limit(smallest):
        raise ValueError(
            f"a budget of {budget:,} parameters gives every matrix rank {base}, but "
            f"{smallest.name} ({smallest.in_features} -> {smallest.out_features}) holds at most "
            f"{_limit(smallest)}; stay below {(_limit(smallest) + 1) * total:,} parameters or "
            f"leave that matrix out"
        )

    kinds: dict[int, list[Matrix]] = {}
    for m in matrices:
        if base < _limit(m):
            kinds.setdefault(m.cost, []).append(m)
    costs = sorted(kinds, reverse=True)
    extras = _fill(costs, [len(kinds[cost]) for cost in costs], left)
    pattern = {m.name: base for m in matrices}
    for cost, extra in zip(costs, extras, strict=True):
        for m in _evenly(kinds[cost], extra):
            pattern[m.name] += 1
    return pattern


def lora_kwargs(pattern: Mapping[str, int], scale: float) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig` for each matrix's rank, with s = alpha / r = `scale` for all.

    `pattern` holds full module names of the plain model, without the prefix that PEFT adds. Not for
    rsLoRA, where s = alpha / √r, nor for AdaLoRA, which takes no rank per matrix. Raises ValueError
    for a negative rank, for a pattern of zeros and for a scale that is not positive.
    """
    _positive_number("scale", scale)
    for name, rank in pattern.items():
        _whole_number(f"the rank of {name}", rank)
        if rank < 0:
            raise ValueError(f"the rank of {name} is {rank}; it must be 0 (no adapter) or more")
    ranks = {name: int(rank) for name, rank in pattern.items() if rank > 0}
    if not ranks:
        raise ValueError("every rank of the pattern is 0: there would be no adapter")

    def alpha(rank: int) -> int | float:
        exact = scale * rank
        return int(exact) if exact == int(exact) else float(exact)  # PEFT's own type is int

    largest = max(ranks.values())
    # PEFT tries every key on every module, so only what differs from the common values is listed;
    # "^" because it would otherwise accept a key at the end of a longer name.
    differing = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    kwargs: dict[str, Any] = {
        "r": largest,
        "lora_alpha": alpha(largest),
        "target_modules": list(ranks),
        "rank_pattern": differing,
        "alpha_pattern": {key: alpha(rank) for key, rank in differing.items()},
    }
    # PEFT takes a target for the end of longer names too: no matrix of rank 0 may come in that way.
    ends = tuple("." + name for name in ranks)
    shadowed = [name for name in pattern if name not in ranks and name.endswith(ends)]
    if shadowed:
        kwargs["exclude_modules"] = "|".join(re.escape(name) for name in shadowed)
    return kwargs


def count(model: nn.Module) -> Counts:
    """What a model that PEFT has prepared holds, in parameters; tied tensors count once.

    `adapters` are the tensors of the active adapters (LoRA: A and B; AdaLoRA: A, B and E), trained
    or loaded for inference. `head` is the active copies of `modules_to_save` and whatever else is
    trained. `backbone` is the rest; the frozen originals that PEFT keeps beside its copies, and
    inactive adapters, are in neither. A packed 4-bit weight counts d_in·d_out. Raises ValueError
    for a model without an active adapter.
    """
    adapters: set[int] = set()
    head: set[int] = set()
    idle: set[int] = set()
    originals: list[str] = []
    for name, module in named_modules(model):
        if isinstance(module, BaseTunerLayer):
            for attribute in module.adapter_layer_names:
                for adapter, held in getattr(module, attribute, {}).items():
                    into = adapters if adapter in module.active_adapters else idle
                    tensors = held.parameters() if isinstance(held, nn.Module) else [held]
                    into.update(map(id, tensors))
            # AdaLoRA keeps the current rank as a Parameter: bookkeeping, not a weight.
            idle.update(map(id, getattr(module, "ranknum", {}).values()))
        elif isinstance(module, ModulesToSaveWrapper):
            for adapter, copy in module.modules_to_save.items():
                into = head if adapter in module.active_adapters else idle
                into.update(map(id, copy.parameters()))
            originals.append((name + "." if name else "") + "original_module.")
    if not adapters:
        raise ValueError("the model has no active adapter; call peft.get_peft_model first")

    backbone: set[int] = set()
    sizes: dict[int, int] = {}
    trainable: set[int] = set()
    kept = tuple(originals)
    # With duplicates: a frozen original tied to a tensor elsewhere is backbone by that name.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = id(parameter)
        if key not in sizes:
            sizes[key] = _elements(model, name, parameter)
        if parameter.requires_grad:
            trainable.add(key)
        if key in adapters or key in head or key in idle or (kept and name.startswith(kept)):
            continue
        (head if parameter.requires_grad else backbone).add(key)

    def size(keys: set[int]) -> int:
        return sum(sizes[key] for key in keys)

    return Counts(size(backbone), size(adapters), size(head - adapters), size(trainable))


def _fill(costs: Sequence[int], counts: Sequence[int], room: int) -> list[int]:
    """How many of each kind to take: the largest Σ cost·taken ≤ `room`, then the most equal shares.

    The largest sum comes from the set of all reachable sums, held as the bits of one integer. Its
    most proportional composition is found by branch and bound over the kinds: where the counts of
    the remaining kinds may be real numbers, the nearest point of the plane Σ cost·taken = sum is
    known in closed form, which orders and bounds the candidates.
    """
    if not costs:
        return []
    unit = math.gcd(*costs)
    prices = [cost // unit for cost in costs]
    room //= unit
    within = (1 << (room + 1)) - 1
    sums = [1]  # sums[k]: what kinds k and later can reach, built from the last kind backwards
    for price, number in zip(reversed(prices), reversed(counts), strict=True):
        bits, step = sums[-1], 1
        while number:
            step = min(step, number)
            bits |= (bits << (step * price)) & within
            number -= step
            step *= 2
        sums.append(bits)
    sums.reverse()
    target = sums[0].bit_length() - 1
    # One bit of a long integer costs a copy of it, one byte of a bytes object does not.
    reachable = [bits.to_bytes((room >> 3) + 1, "little") for bits in sums]

    kinds = len(prices)
    share = target / sum(price * number for price, number in zip(prices, counts, strict=True))
    wanted = [share * number for number in counts]
    spread, later_want, later_rounding = ([0.0] * (kinds + 1) for _ in range(3))
    for k in reversed(range(kinds)):
        spread[k] = spread[k + 1] + prices[k] ** 2 * counts[k]
        later_want[k] = later_want[k + 1] + prices[k] * wanted[k]
        later_rounding[k] = later_rounding[k + 1] + (wanted[k] - round(wanted[k])) ** 2 / counts[k]

    best, best_cost = [0] * kinds, sum(counts) + 1.0
    taken = [0] * kinds
    steps = 0

    def visit(k: int, rest: int, cost: float) -> None:
        nonlocal best, best_cost, steps
        if k == kinds:
            best, best_cost = taken.copy(), cost
            return
        slack = rest - later_want[k]
        centre = wanted[k] + slack * prices[k] * counts[k] / spread[k]
        room_for_cost = max(0.0, best_cost - cost - slack**2 / spread[k])
        # The tolerance keeps a solution that floating point puts a hair beside its integer.
        radius = math.sqrt(room_for_cost * counts[k] * spread[k + 1] / spread[k]) + 1e-6
        low = max(0, math.ceil(centre - radius))
        high = min(counts[k], rest // prices[k], math.floor(centre + radius))
        for number in sorted(range(low, high + 1), key=lambda n: (abs(n - centre), n)):
            left = rest - number * prices[k]
            if not reachable[k + 1][left >> 3] >> (left & 7) & 1:
                continue
            new_cost = cost + (number - wanted[k]) ** 2 / counts[k]
            relaxed = (left - later_want[k + 1]) ** 2 / spread[k + 1] if k + 1 < kinds else 0.0
            if new_cost + max(relaxed, later_rounding[k + 1]) >= best_cost - 1e-12:
                continue
            steps += 1
            if steps > _SEARCH_STEPS and best_cost <= sum(counts):
                return
            taken[k] = number
            visit(k + 1, left, new_cost)

    visit(0, target, 0.0)
    return best


def _evenly(items: Sequence[Matrix], number: int) -> list[Matrix]:
    """`number` of the items at even distances (Bresenham's line, centred)."""
    n = len(items)
    line = [(i * number + n // 2) // n for i in range(n + 1)]
    return [item for i, item in enumerate(items) if line[i + 1] > line[i]]


def _limit(matrix: Matrix) -> int:
    return min(matrix.in_features, matrix.out_features)


def _shape(name: str, module: nn.Module) -> tuple[int, int]:
    if isinstance(module, BaseTunerLayer):
        raise ValueError(f"{name} already carries an adapter; pass the model as it was before PEFT")
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        d_in, d_out = module.get_parameter("weight").shape  # GPT-2 stores it transposed
        return d_in, d_out
    raise ValueError(
        f"{name} is a {type(module).__name__}, neither Linear nor Conv1D; name the Linear layers inside or beside it"
    )


def _nearest(name: str, modules: Mapping[str, nn.Module]) -> str:
    ends = {end for full in modules for end in (full, full.rpartition(".")[2])}
    close = get_close_matches(name, sorted(ends), n=1)
    return f"; the nearest name is {close[0]!r}" if close else "; see model.named_modules()"


def _elements(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """Elements of the weight that a parameter stands for; a packed one holds fewer."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    owner = model.get_submodule(name.rpartition(".")[0])
    d_in, d_out = getattr(owner, "in_features", None), getattr(owner, "out_features", None)
    packed = not parameter.is_floating_point()
    return d_in * d_out if packed and d_in and d_out else parameter.numel()


def _whole_number(what: str, value: object, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{what} is {value!r}; it must be a whole number{hint}")


def _positive_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} is {value!r}; it must be a positive finite number")
