"""What a small study is: cases, what is measured of each, and how the rows are read.

A row is a function of its case and the seed alone, so a study that was killed goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sharpen.records import Row

from .chart import Panel


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


def _cell(x: object) -> str:
    if x is None:
        return "never"
    if not isinstance(x, float):
        return f"{x:,}" if isinstance(x, int) else str(x)
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def slope(x: Sequence[float | int], y: Sequence[float | int]) -> float:
    """Of the least-squares line through the points.

    Example:
        >>> round(slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]), 9)
        2.0
    """
    return float(np.polyfit(np.asarray(x), np.asarray(y), 1)[0])
