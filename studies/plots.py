"""What a study's tables say, drawn: one figure for a table, one panel for a column of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tables import Point, figures, points, rows_of


def draw(text: str, folder: Path, parts: tuple[str, ...] = ("",)) -> list[Path]:
    """Write table.svg, or table_1.svg, table_2.svg, ... where the text has several tables.

    A column that has differences shows these alone, with a line at zero.

    Args:
        text: Of tables in Markdown, with a paragraph between two.
        folder: Where the figures go.
        parts: What the numbers of a cell with several are, "a / b / c".

    Returns:
        The files.
    """
    blocks = map(rows_of, text.split("\n\n"))
    tables = [rows for rows in blocks if rows and _numeric(*rows)]
    paths = []
    for number, (head, *rows) in enumerate(tables, 1):
        path = folder / ("table.svg" if len(tables) == 1 else f"table_{number}.svg")
        _draw(head, rows, parts, path)
        paths.append(path)
    return paths


def _draw(head: list[str], rows: list[list[str]], parts: tuple[str, ...], path: Path) -> None:
    columns = [[row[i] for row in rows] for i in range(len(head))]
    numeric = _numeric(head, *rows)
    words = [i for i in range(len(head)) if i not in numeric and not any(map(_many, columns[i]))]
    labels = [", ".join(row[i] for i in words if row[i]) for row in rows]
    width, height = 2.2 + 2.2 * len(numeric), 1.2 + 0.22 * len(rows)
    with figures.style():
        figure, axes = figures.panels(1, len(numeric), width, height, sharey=True)
        for axis, i in zip(axes[0], numeric):
            _panel(axis, head[i].partition(" (")[0], columns[i], parts)
        axes[0, 0].set_yticks(range(len(rows)), labels)
        axes[0, 0].invert_yaxis()
        if len(parts) > 1:
            figures.legend(figure, axes[0, -1], columns=len(parts))
        figures.save(figure, path)


def _numeric(head: list[str], *rows: list[str]) -> list[int]:
    """The columns that hold numbers alone, and some."""
    columns = [[row[i] for row in rows if row[i] not in ("", "-")] for i in range(len(head))]
    return [i for i, cells in enumerate(columns) if cells and all(map(points, cells))]


def by_task(
    path: Path,
    found: dict[str, dict[str, Point]],
    looks: Iterable[tuple[str, str]],
    height: float,
    title: str,
    label: str,
    limits: tuple[float, float],
) -> None:
    """{method: {task: its difference to another one}}, task below task, with intervals; what lies
    outside of the limits is drawn at their end, with its figure."""
    tasks = list(next(iter(found.values())))
    least, most = limits[0] + 3, limits[1] - 5
    step = 0.8 / len(found)
    with figures.style():
        figure, axes = figures.panels(height=height)
        axis = axes[0, 0]
        for place, ((method, of), (color, marker)) in enumerate(zip(found.items(), looks)):
            for i, task in enumerate(tasks):
                mean, half = of[task]
                shown = min(max(mean, least), most)
                at = shown, step * ((len(found) - 1) / 2 - place) - i
                axis.errorbar(
                    *at,
                    xerr=half if shown == mean else 0,
                    fmt=marker,
                    color=color,
                    capsize=2,
                    elinewidth=1,
                    label=None if i else method,
                )
                if shown != mean:
                    beside = (6 if shown == least else -36, -3)
                    how = {"textcoords": "offset points", "fontsize": 8}
                    axis.annotate(f"{mean:+.1f}", at, beside, **how)
        axis.axvline(0, color=figures.FOREGROUND, linewidth=1)
        axis.set_yticks([-i for i in range(len(tasks))], tasks)
        axis.set(title=title, xlim=limits, xlabel=label)
        figures.legend(figure, axis, columns=1 if len(found) > 2 else 2)
        figures.save(figure, path)


def _panel(axis: Any, title: str, cells: list[str], parts: tuple[str, ...]) -> None:
    signed = any(cell.startswith(("+", "-")) and points(cell) for cell in cells)
    for part, (name, color, marker) in enumerate(zip(parts, figures.ORDER, "os^Dv")):
        found = [
            (y, points(cell)[part])
            for y, cell in enumerate(cells)
            if len(points(cell)) > part and (cell.startswith(("+", "-")) or not signed)
        ]
        axis.errorbar(
            [mean for _, (mean, _) in found],
            [y for y, _ in found],
            xerr=[half for _, (_, half) in found],
            fmt=marker,
            color=color,
            capsize=2,
            elinewidth=1,
            label=name,
        )
    if signed:
        axis.axvline(0, color=figures.FOREGROUND, lw=0.8)
    axis.set_title(title)


def _many(cell: str) -> bool:
    """Several numbers without a sign between them, such as the sigma of each layer."""
    return len(cell.split()) > 1 and all(part.replace(".", "").isdigit() for part in cell.split())
