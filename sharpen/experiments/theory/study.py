"""What a small study is: cases, what is measured of each, how the rows are read, and their figure.

A row is a function of its case and the seed alone, so a study that was killed goes on. A figure is
panels side by side, lines on logarithmic axes, in one SVG file: text stays text, and the same lines
give the same bytes.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sharpen.evaluation.figures import INK, MARKERS, RC, RULE, SERIES
from sharpen.records import Row

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


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        cases: What each row is about, as JSON values.
        measure: Case and random numbers to what was found, as JSON values.
        table: All rows, cases included, to Markdown.
        panels: All rows to what the figure shows.
    """

    cases: Sequence[Row]
    measure: Callable[[Row, np.random.Generator], Row]
    table: Callable[[Sequence[Row]], str]
    panels: Callable[[Sequence[Row]], Sequence[Panel]]

    def row(self, i: int, seed: int) -> Row:
        """Case i, measured."""
        case = self.cases[i]
        return {**case, **self.measure(case, np.random.default_rng([seed, i]))}


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers get three digits that count."""
    lines = [heads, ["---"] * len(heads), *([_cell(x) for x in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_by(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    """The rows of each value that they have under `key`, values in the order of the rows."""
    grouped: dict[Any, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row[key], []).append(row)
    return grouped


def slope(x: Sequence[float | int], y: Sequence[float | int]) -> float:
    """Of the least-squares line through the points.

    Example:
        >>> round(slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]), 9)
        2.0
    """
    return float(np.polyfit(np.asarray(x), np.asarray(y), 1)[0])


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
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            colors = iter(zip(SERIES * 2, MARKERS * 2, strict=True))
            for line in panel.lines:
                color, marker = (INK, None) if line.dashed else next(colors)
                axes.plot(
                    line.x,
                    line.y,
                    label=line.name or None,
                    color=color,
                    marker=marker,
                    ms=4.5,
                    ls="--" if line.dashed else "-",
                    lw=1.0 if line.dashed else 1.6,
                )
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


def _cell(x: object) -> str:
    if x is None:
        return "never"
    if not isinstance(x, float):
        return f"{x:,}" if isinstance(x, int) else str(x)
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
