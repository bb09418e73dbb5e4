"""From a parameter budget to a rank for every matrix, and back to what a model really holds.

An adapter of rank r on a d_in -> d_out matrix has r·(d_in + d_out) parameters, so one unit of rank costs more on a
large matrix than on a small one. `rank_pattern` spends a budget as evenly as whole ranks allow, `lora_kwargs` turns the
result into PEFT's arguments, `count` counts what was built.
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

# The search for the most proportional pattern stops after this many steps and keeps the best one found. With up to six
# different costs it ends far earlier by itself; the limit bounds the time on models with dozens of shapes.
_SEARCH_STEPS = 20_000


@dataclass(frozen=True)
class Matrix:
    """A frozen weight of shape [out_features, in_features] that can get an adapter, and its full module name."""

    name: str
    in_features: int
    out_features: int

    @property
    def cost(self) -> int:
        """Parameters of one unit of rank: d_in + d_out."""
        return self.in_features + self.out_features


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a PEFT model; a tensor that is used in several places counts once.

    Attributes:
        backbone: the frozen pretrained model.
        adapters: the active adapters.
        head: everything else that is trained.
        trainable: all that the optimizer changes.
    """

    backbone: int
    adapters: int
    head: int
    trainable: int

    @property
    def percent(self) -> float:
        """Adapters in percent of the backbone."""
        return 100 * self.adapters / self.backbone


def matrices(model: nn.Module, names: Sequence[str]) -> list[Matrix]:
    """The Linear and Conv1D modules that `names` mean in a plain model, in the model's order.

    Only shapes are read, so the model may be on the meta device.

    Args:
        model: the model as it was before PEFT.
        names: full module names, or their ends after a dot, as in PEFT's `target_modules`.

    Raises:
        ValueError: a name without a match, or one that matches a module that is neither Linear nor Conv1D.
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
    """The number of parameters in `percent` of the backbone, rounded down.

    The percentage is read as the decimal number that was written, not as its binary approximation, so 0.29 % of 10,000
    is 29 and not 28.

    Raises:
        ValueError: a percentage that is not a positive finite number, or a backbone without parameters.
    """
    _positive_number("percent", percent)
    _whole_number("backbone_parameters", backbone_parameters)
    if backbone_parameters < 1:
        raise ValueError(f"backbone_parameters is {backbone_parameters}; it must be at least 1")
    return int(Fraction(str(percent)) * int(backbone_parameters) / 100)


def rank_pattern(matrices: Sequence[Matrix], budget: int) -> dict[str, int]:
    """A rank for every matrix, as near to uniform as whole numbers allow, with at most `budget` parameters in all.

    Every matrix gets rank ⌊budget / Σ cost⌋, and some get one more from what is left. Which ones is decided in three
    steps. (1) The choice that uses the most parameters. (2) Among equals, the choice that gives matrices of each cost
    the most equal share: with m_k of the n_k matrices of cost k chosen, and f the share that all costs would get, the
    least Σ_k n_k·(m_k/n_k − f)². (3) Within one cost, matrices at even distances in the order given (depth).

    Args:
        matrices: the matrices to adapt.
        budget: the most parameters that all adapters together may have.

    Returns:
        The rank by name; 0 means no adapter.

    Raises:
        ValueError: a budget that buys no rank at all, or a rank above min(d_in, d_out).
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
    extras = _extra_ranks(costs, [len(kinds[cost]) for cost in costs], left)
    pattern = {m.name: base for m in matrices}
    for cost, extra in zip(costs, extras, strict=True):
        for m in _evenly(kinds[cost], extra):
            pattern[m.name] += 1
    return pattern


def lora_kwargs(pattern: Mapping[str, int], scale: float) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig` for each matrix's rank, with s = alpha / r = `scale` for all.

    Not for rsLoRA, where s = alpha / √r, nor for AdaLoRA, which takes no rank per matrix.

    Args:
        pattern: rank by the full module name in the plain model, without the prefix that PEFT adds.
        scale: s of `ΔW = s·B·A`.

    Raises:
        ValueError: a negative rank, a pattern of zeros, or a scale that is not positive.
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
    # PEFT tries every key on every module, so only what differs from the common values is listed. The "^" keeps a key
    # from matching the end of a longer name.
    differing = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    kwargs: dict[str, Any] = {
        "r": largest,
        "lora_alpha": alpha(largest),
        "target_modules": list(ranks),
        "rank_pattern": differing,
        "alpha_pattern": {key: alpha(rank) for key, rank in differing.items()},
    }
    # PEFT matches a target with the end of longer names too. A matrix of rank 0 must not get an adapter that way.
    ends = tuple("." + name for name in ranks)
    shadowed = [name for name in pattern if name not in ranks and name.endswith(ends)]
    if shadowed:
        kwargs["exclude_modules"] = "|".join(re.escape(name) for name in shadowed)
    return kwargs


def count(model: nn.Module) -> Counts:
    """Count the parameters of a model that PEFT has prepared.

    `adapters` are the tensors of the active adapters (LoRA: A and B; AdaLoRA: A, B and E), whether they are trained or
    loaded for inference. `head` are the active copies of `modules_to_save`, and everything else that is trained.
    `backbone` is the rest. Two things count nowhere: inactive adapters, and the frozen originals of which PEFT trains a
    copy. Tensors are told apart by identity, so a tied one counts once. A packed 4-bit weight counts as d_in·d_out.

    Raises:
        ValueError: a model without an active adapter.
    """
    # Each tensor's id goes into one of these by the module that owns it; the loop below over all parameters then sorts
    # the rest into head (trained) and backbone (frozen).
    adapters: set[int] = set()
    head: set[int] = set()
    idle: set[int] = set()  # inactive adapters, and tensors that are no weights
    originals: list[str] = []
    for name, module in named_modules(model):
        if isinstance(module, BaseTunerLayer):
            for attribute in module.adapter_layer_names:
                for adapter, held in getattr(module, attribute, {}).items():
                    into = adapters if adapter in module.active_adapters else idle
                    tensors = held.parameters() if isinstance(held, nn.Module) else [held]
                    into.update(map(id, tensors))
            # AdaLoRA stores the current rank as a Parameter, which is no weight.
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
    # With duplicates, because a frozen original that is tied to a tensor elsewhere is backbone under that other name.
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


def _extra_ranks(costs: Sequence[int], counts: Sequence[int], capacity: int) -> list[int]:
    """How many matrices of each cost get one more unit of rank.

    First the largest total Σ cost·taken that fits into `capacity`, then, among the ways to reach that total, the one
    with the most equal shares.

    The most equal shares are found by branch and bound, one cost after another. If the remaining counts could be any
    real numbers, the best ones would be the nearest point of a plane (Σ cost·taken = total), which is known in closed
    form. It gives the order in which counts are tried, and a lower bound that ends hopeless branches.

    Args:
        costs: the different costs, each once.
        counts: the number of matrices of each cost.
        capacity: the parameters that are left to spend.
    """
    if not costs:
        return []
    unit = math.gcd(*costs)
    prices = [cost // unit for cost in costs]
    capacity //= unit
    sums = _reachable_totals(prices, counts, capacity)
    target = sums[0].bit_length() - 1
    # Reading one bit of a long integer copies all of it; reading one byte of a bytes object does not.
    reachable = [bits.to_bytes((capacity >> 3) + 1, "little") for bits in sums]

    kinds = len(prices)
    share = target / sum(price * number for price, number in zip(prices, counts, strict=True))
    wanted = [share * number for number in counts]  # the counts with exactly equal shares, not whole numbers
    # Sums over kinds k and later, for the bounds.
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
        allowed = max(0.0, best_cost - cost - slack**2 / spread[k])
        # The tolerance keeps a count that rounding errors put just outside its integer.
        radius = math.sqrt(allowed * counts[k] * spread[k + 1] / spread[k]) + 1e-6
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


def _reachable_totals(prices: Sequence[int], counts: Sequence[int], capacity: int) -> list[int]:
    """For each k, the totals up to `capacity` that kinds k and later can reach: bit t is set if some choice costs t.

    This is the subset-sum problem by dynamic programming, with one long integer as the table.
    """
    within = (1 << (capacity + 1)) - 1
    sums = [1]  # built from the last kind backwards
    for price, number in zip(reversed(prices), reversed(counts), strict=True):
        # Every count up to `number` is a sum of some of 1, 2, 4, … and a rest: log2(number) shifts instead of number.
        bits, step = sums[-1], 1
        while number:
            step = min(step, number)
            bits |= (bits << (step * price)) & within
            number -= step
            step *= 2
        sums.append(bits)
    return sums[::-1]


def _evenly(items: Sequence[Matrix], number: int) -> list[Matrix]:
    """`number` of the items at even distances (Bresenham's line algorithm, centred)."""
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
        f"{name} is a {type(module).__name__}, neither Linear nor Conv1D; name the Linear layers inside it or near it"
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
