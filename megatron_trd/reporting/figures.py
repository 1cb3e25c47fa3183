"""The report's figures: matplotlib drawings as inline SVG whose colours are CSS variables of the page.

matplotlib supports fixed colours only, and the page has two sets of them, light and dark. So everything is drawn in
stand-in colours, one for each variable of the page's style sheet, and `_inline` replaces them by the variables. Text
stays text, set in the page's font.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

Scale = Literal["linear", "log", "fraction"]

# CSS variable -> stand-in. `series-0` is the page's accent.
SERIES_COLOURS = 6
_VARIABLES = ["ink", "paper", "muted", "rule", "base", *(f"series-{index}" for index in range(SERIES_COLOURS))]
_VARIABLES += [f"part-{index}" for index in range(5)]
_STAND_INS = {name: f"#0{index:x}0b0d" for index, name in enumerate(_VARIABLES)}

_TICK_STEPS = [1, 2, 5, 10]
_WIDTH = 520  # px at the page's usual width, where a font size of 12 is 12 px
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-trd",  # the same report for the same run
    "text.parse_math": False,  # names of runs are not formulas
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.edgecolor": _STAND_INS["rule"],
    "axes.labelcolor": _STAND_INS["muted"],
    "text.color": _STAND_INS["ink"],
    "xtick.color": _STAND_INS["rule"],
    "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.labelcolor": _STAND_INS["muted"],
    "ytick.left": False,
    "ytick.minor.left": False,
    "grid.color": _STAND_INS["rule"],
    "grid.linewidth": 0.75,
}


@dataclass(frozen=True)
class Curve:
    """One metric of one run. steps, values: [steps]; dashed distinguishes a refinement's curve from its rollout's."""

    colour: str
    steps: Sequence[int]
    values: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Interval:
    """A score in [0, 1] with its 95 % interval."""

    name: str
    colour: str
    value: float
    low: float
    high: float


def curves(lines: Sequence[Curve], scale: Scale, width: int) -> Markup:
    """Curves over steps: a thin line for each step, and a thick one for the mean of the last `width` steps."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(height=250)
        for line in lines:
            values = np.asarray(line.values, dtype=float)
            if scale == "log":
                values = np.where(values > 0, values, np.nan)
            style: dict[str, Any] = {"color": _STAND_INS[line.colour], "linestyle": (0, (3, 2)) if line.dashed else "-"}
            axes.plot(line.steps, values, linewidth=0.8, alpha=0.35, color=style["color"])
            marker = "o" if len(values) == 1 else None
            axes.plot(line.steps, _trailing_mean(values, width), linewidth=1.8, marker=marker, **style)
        axes.set_xlabel("step", loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_TICK_STEPS))
        axes.grid(axis="y")
        _set_scale(axes, scale)
        return _inline(figure)


def bars(intervals: Sequence[Interval]) -> Markup:
    """A bar for each score with its interval; the first score (the base) continues as a line behind the others."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(height=70 + 34 * len(intervals))
        rows = range(len(intervals))
        values = [entry.value for entry in intervals]
        colours = [_STAND_INS[entry.colour] for entry in intervals]
        errors = [[e.value - e.low for e in intervals], [e.high - e.value for e in intervals]]
        axes.barh(rows, values, height=0.56, color=colours)
        for colour, width in ("paper", 3.2), ("ink", 1.2):  # paper around ink: visible on a bar of any colour
            line: dict[str, Any] = {"color": _STAND_INS[colour], "elinewidth": width, "capthick": width}
            axes.errorbar(values, rows, xerr=errors, fmt="none", capsize=3, **line)
        for row, entry in enumerate(intervals):
            _label(axes, f"{100 * entry.value:.1f}", entry.high, row)
        axes.axvline(values[0], color=_STAND_INS["base"], linewidth=1, linestyle=(0, (3, 2)), zorder=0.9)
        axes.set_xlim(0, 1.1)
        axes.set_xticks(np.linspace(0, 1, 5), [f"{percent} %" for percent in (0, 25, 50, 75, 100)])
        _name_rows(axes, [entry.name for entry in intervals])
        return _inline(figure)


def stacked(names: Sequence[str], parts: Sequence[Sequence[float]]) -> Markup:
    """A bar for each name, of seconds by part; parts: [names][parts]. The sum is written at its end."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(height=70 + 34 * len(names), width=2 * _WIDTH)
        seconds = np.asarray(parts, dtype=float)
        left = np.zeros(len(names))
        for index, column in enumerate(seconds.T):
            axes.barh(range(len(names)), column, left=left, height=0.56, color=_STAND_INS[f"part-{index}"])
            left += column
        for row, total in enumerate(left):
            _label(axes, f"{total:.2f} s", total, row)
        axes.set_xlim(0, 1.1 * max(left.max(), 1e-9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
        _name_rows(axes, names)
        return _inline(figure)


def _trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the `width` - 1 before it; non-finite values are ignored."""
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    view = np.lib.stride_tricks.sliding_window_view(padded, width)
    finite = np.isfinite(view)
    with np.errstate(invalid="ignore"):
        return np.where(finite, view, 0).sum(axis=1) / finite.sum(axis=1)


def _canvas(height: int, width: int = _WIDTH) -> tuple[Figure, Axes]:
    # A bare Figure draws without a display and without pyplot's global state.
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def _label(axes: Axes, text: str, end: float, row: int) -> None:
    """Text to the right of a bar's end."""
    axes.annotate(text, (end, row), (7, 0), va="center", textcoords="offset points")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=_STAND_INS["ink"])
    axes.set_ylim(len(names) - 0.45, -0.55)  # the first on top
    axes.grid(axis="x")


def _set_scale(axes: Axes, scale: Scale) -> None:
    if scale == "fraction":
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        return
    low, high = axes.dataLim.intervaly
    if scale == "log" and high >= 10 * low > 0:  # within a decade a logarithmic axis has too few ticks
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))


def _inline(figure: Figure) -> Markup:
    """The figure as an SVG element of an HTML page: colours by variable, no fixed size or font, ids of its own."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    own = f"f{zlib.crc32(svg.encode()):08x}-"
    for pattern, replacement in (
        (r"^<svg[^>]*>", f'<svg {view[0]} aria-hidden="true">'),
        (r"<style.*?</style>", ""),  # would apply to the whole page
        (r"font-family: [^;]*; ", ""),
        (r'<g id="[^"]*"', "<g"),
        (r'( id="| xlink:href="#|url\(#)', rf"\1{own}"),
        (r"#0([0-9a-f])0b0d", lambda match: f"var(--{_VARIABLES[int(match[1], 16)]})"),
    ):
        svg = re.sub(pattern, replacement, svg)
    return Markup(svg)  # matplotlib has escaped the text in it
