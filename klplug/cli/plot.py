"""Curves in a terminal: a letter for each, so that they are told apart without colours too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.text import Text

# Eight hues that keep their order for the most common forms of colour blindness (Okabe and Ito).
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#000000",
    "#999999",
)
TERMINAL_COLOURS = ("cyan", "red", "green", "magenta", "blue", "yellow", "white", "bright_black")
LETTERS = "abcdefgh"


def text_plot(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    limit: float,
    rows: int = 17,
) -> Text:
    """The curves over ``x``, one column a point, with values from ``-limit`` to ``limit``.

    Values beyond it are left out. Where curves meet, the first one's letter stands.

    Args:
        x: the columns' abscissae, ascending, with their middle at 0.
        curves: a value per column, by name; eight at most.
        limit: the top row's value.
        rows: an odd number, so that 0 has a row.
    """
    step = 2 * limit / (rows - 1)
    cells: list[list[tuple[str, str]]] = [
        [("-", "dim") if row == rows // 2 else (" ", "") for _ in x] for row in range(rows)
    ]
    for row in cells:
        row[len(x) // 2] = ("|", "dim")
    for index in reversed(range(len(curves))):
        mark = (LETTERS[index], TERMINAL_COLOURS[index])
        for column, value in enumerate(list(curves.values())[index]):
            if math.isfinite(value) and abs(value) <= limit + step / 2:
                row_number = rows // 2 - round(value / step)
                cells[row_number][column] = mark
    plot = Text()
    for number, row in enumerate(cells):
        label = f"{limit - number * step:6.1f} " if number % 2 == 0 else " " * 7
        plot.append(label, "dim")
        for character, style in row:
            plot.append(character, style)
        plot.append("\n")
    ends = f"{x[0]:g}", "0", f"{x[-1]:g}"
    half = len(x) // 2
    plot.append(" " * 7 + ends[0].ljust(half) + ends[1] + ends[2].rjust(len(x) - half - 1) + "\n")
    for index, name in enumerate(curves):
        plot.append(f"       {LETTERS[index]}  ", TERMINAL_COLOURS[index])
        plot.append(f"{name}\n")
    return plot
