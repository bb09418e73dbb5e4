"""Figures drawn by Matplotlib, as SVG to be put into the page.

Every function takes plain numbers and returns the text of one `<svg>`. No colour is fixed: the colours below are
placeholders that become the page's CSS variables, so that one figure fits both light and dark pages. A figure is about
280 units wide, a little less than a telephone, with text of 9 to 10 units.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from fwlora_lab.report import svg

METHOD_COLOURS = 6  # --m0 … --m5 of the page
HEAT_TURNS = 0.63  # from this opacity of --heat on, a number is easier to read in --on-strong than in --on-pale
_MARKERS = "osD^vPX"  # seven, so that a seventh method differs from the first in one of the two
# The placeholders that Matplotlib draws with, and the CSS variables that replace them.
_NAMES = ("--ink", "--muted", "--line", "--surface", "--heat", "--on-pale", "--on-strong")
_INK, _MUTED, _GRID, _SURFACE, _HEAT, _ON_PALE, _ON_STRONG = (f"#0a0a{i:02x}" for i in range(len(_NAMES)))
_VARIABLES = {f"#0a0a{i:02x}": name for i, name in enumerate(_NAMES)} | {
    f"#0b0b{i:02x}": f"--m{i}" for i in range(METHOD_COLOURS)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fwlora",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_WIDTH = 3.9  # inches, of 72 units


@dataclass(frozen=True)
class Row:
    """A line of a dot plot.

    Attributes:
        colour: the method's number.
        points: the value of each seed.
        interval: of the mean.
        wider: a second interval, drawn thin.
    """

    label: str
    colour: int
    points: Mapping[int, float]
    mean: float | None = None
    interval: tuple[float, float] | None = None
    wider: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A method's mean over x, and its seeds.

    Attributes:
        colour: the method's number.
        intervals: of the means; empty, or one (or None) for each x.
        seeds: points (x, y); by seed in learning curves, by x over budgets.
    """

    label: str
    colour: int
    x: Sequence[float]
    mean: Sequence[float]
    intervals: Sequence[tuple[float, float] | None] = ()
    seeds: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)


def colour_of(index: int) -> str:
    """The CSS variable of the method with this number."""
    return f"--m{index % METHOD_COLOURS}"


def dots(rows: Sequence[Row], xlabel: str, zero: bool = False) -> str:
    """Every seed as a dot, and below them the mean with its interval; `zero` draws a line at 0."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if zero:
            axes.axvline(0, color=_INK, linewidth=1)
        for y, row in enumerate(rows):
            colour, marker = _colour(row.colour), _marker(row.colour)
            values = list(row.points.values())
            # Every second seed is drawn a little higher, because equal ones would hide each other.
            heights = [y - 0.2 - 0.11 * (i % 2) for i in range(len(values))]
            axes.scatter(values, heights, s=16, color=colour, marker=marker, alpha=0.6, linewidth=0)
            if row.wider is not None:
                axes.plot(row.wider, (y + 0.14, y + 0.14), color=colour, linewidth=1.2)
                for end in row.wider:
                    axes.plot((end, end), (y + 0.07, y + 0.21), color=colour, linewidth=1.2)
            if row.interval is not None:
                axes.plot(row.interval, (y + 0.14, y + 0.14), color=colour, linewidth=4, solid_capstyle="butt")
            if row.mean is not None:
                axes.scatter(
                    [row.mean],
                    [y + 0.14],
                    s=42,
                    color=colour,
                    marker=marker,
                    edgecolor=_SURFACE,
                    linewidth=1.2,
                    zorder=3,
                )
        axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x")
        axes.set_xlabel(xlabel)

    return _render(draw, (_WIDTH, 0.75 + 0.46 * max(1, len(rows))))


def against_budget(curves: Sequence[Curve], ylabel: str) -> str:
    """Means with intervals over the budget in percent; at every budget the methods are drawn next to each other."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        budgets = sorted({x for curve in curves for x in curve.x})
        axes.set_xscale("log" if min(budgets) > 0 else "linear")
        for i, curve in enumerate(curves):
            shift = 1 + 0.035 * (i - (len(curves) - 1) / 2)
            x = [budget * shift for budget in curve.x]
            colour, marker = _colour(curve.colour), _marker(curve.colour)
            axes.plot(
                x, curve.mean, color=colour, marker=marker, markersize=6, linewidth=1.4,
                markeredgecolor=_SURFACE, label=_short(curve.label),
            )  # fmt: skip
            for at, interval in zip(x, curve.intervals, strict=True):
                if interval is not None:
                    axes.plot((at, at), interval, color=colour, linewidth=2.2, solid_capstyle="butt")
            for points in curve.seeds.values():
                axes.scatter(
                    [at * shift for at, _ in points], [y for _, y in points], s=9, color=colour, alpha=0.45, linewidth=0
                )
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.set_xlabel("parameters, % of the backbone")
        axes.set_ylabel(ylabel)
        axes.grid(axis="y")
        _legend(axes, len(curves))

    return _render(draw, (_WIDTH, 3.2))


def curves(series: Sequence[Curve], xlabel: str, ylabel: str) -> str:
    """Learning curves: the mean of the seeds thick, every seed thin."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for curve in series:
            colour, marker = _colour(curve.colour), _marker(curve.colour)
            for points in curve.seeds.values():
                axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(
                curve.x, curve.mean, color=colour, linewidth=2, marker=marker, markersize=5.5,
                markeredgecolor=_SURFACE, label=_short(curve.label),
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _legend(axes, len(series))

    return _render(draw, (_WIDTH, 2.9))


def heat_strength(share: float) -> float:
    """The opacity in a heat map for a value's share of the largest; above 0, so that a cell of 0 can be seen."""
    return 0.05 + 0.95 * share


def heat(values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], top: float) -> str:
    """A heat map of `values[row][column]` ≥ 0, in the full colour at `top`; None is left empty."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                strength = heat_strength(0.0 if value is None or top <= 0 else min(1.0, value / top))
                axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, color=_HEAT, alpha=strength, linewidth=0))
                if value is not None:
                    ink = _ON_STRONG if strength > HEAT_TURNS else _ON_PALE
                    axes.text(x + 0.5, y + 0.52, _three(value), ha="center", va="center", fontsize=8, color=ink)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks(
            [x + 0.5 for x in range(len(columns))], [_short(c, 17) for c in columns], rotation=32, ha="left"
        )
        axes.xaxis.tick_top()
        axes.set_yticks([y + 0.5 for y in range(len(rows))], [_short(r, 8) for r in rows])
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return _render(draw, (0.9 + 0.46 * max(1, len(columns)), 0.75 + 0.26 * max(1, len(rows))))


def stacks(rows: Sequence[tuple[str, int, Sequence[float]]], parts: Sequence[str], xlabel: str) -> str:
    """Horizontal bars of (label, colour, length of each part); the parts differ in the strength of the colour."""
    strengths = [0.95, 0.5, 0.18][: len(parts)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for y, (_, colour, lengths) in enumerate(rows):
            left = 0.0
            for length, strength in zip(lengths, strengths, strict=True):
                axes.barh(y, length, left=left, height=0.6, color=_colour(colour), alpha=strength, linewidth=0)
                left += length
        axes.set_yticks(range(len(rows)), [_short(label) for label, _, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x")
        axes.set_xlabel(xlabel)
        handles = [Patch(facecolor=_INK, alpha=s, label=p) for p, s in zip(parts, strengths, strict=True)]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=len(parts),
            handlelength=1.0,
            columnspacing=1.0,
            handletextpad=0.4,
        )

    return _render(draw, (_WIDTH, 0.95 + 0.34 * max(1, len(rows))))


def _render(draw: Any, size: tuple[float, float]) -> str:
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = svg.only_drawing(text.getvalue())
    for ink, variable in _VARIABLES.items():
        drawing = drawing.replace(ink, f"var({variable})")
    return drawing


def _colour(index: int) -> str:
    return f"#0b0b{index % METHOD_COLOURS:02x}"


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _short(text: str, most: int = 14) -> str:
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _three(value: float) -> str:
    """At most three digits, without a zero before the point, because a cell of a heat map is small."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value)))) if abs(value) < 10 else 0
    return f"{value:.{min(digits, 3)}f}".removeprefix("0") if digits <= 3 else "0"


def _legend(axes: Axes, methods: int) -> None:
    figure = axes.figure
    assert isinstance(figure, Figure)
    if methods:
        figure.legend(
            loc="outside upper left", ncols=min(methods, 4), handlelength=1.4, columnspacing=1.0, handletextpad=0.4
        )
