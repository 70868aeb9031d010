"""A figure of a study: panels side by side, lines on logarithmic axes, one SVG file.

Text stays text, and the same lines give the same bytes.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..panel import INK, MARKERS, RC, RULE, SERIES

SIZE_INCHES = (4.8, 3.2)


@dataclass(frozen=True)
class Line:
    """Points of one name, which may be empty; a dashed line is theory, without markers."""

    name: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes; x is logarithmic unless `linear_x`."""

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    linear_x: bool = False


def chart_svg(panels: Sequence[Panel], name: str) -> str:
    """The figure as an SVG document.

    Args:
        panels: From left to right.
        name: Seed of the ids inside the file.
    """
    width, height = SIZE_INCHES
    with style.context([RC, {"svg.hashsalt": name}]):
        figure = Figure(
            figsize=(width * len(panels), height), layout="constrained", facecolor="white"
        )
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            colors = iter(zip(SERIES * 2, MARKERS * 2, strict=True))
            for line in panel.lines:
                color, marker = (INK, None) if line.dashed else next(colors)
                axes.plot(
                    line.x, line.y, label=line.name or None, color=color, marker=marker, ms=4.5,
                    ls="--" if line.dashed else "-", lw=1.0 if line.dashed else 1.6,
                )  # fmt: skip
            axes.set(yscale="log", xscale="linear" if panel.linear_x else "log")
            for axis in (axes.yaxis,) if panel.linear_x else (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(numticks=7))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
                axis.set_minor_formatter(NullFormatter())
            axes.set_xticks(sorted({x for line in panel.lines for x in line.x}))
            axes.minorticks_off()
            axes.tick_params(labelsize=8)
            axes.set_xlabel(panel.xlabel)
            axes.set_title(panel.ylabel, loc="left", fontsize=10)
            axes.grid(color=RULE, lw=0.6)
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"[ \t]+\n", "\n", buffer.getvalue())
