"""The look of every figure in the documentation: one SVG for light and dark pages, for desktop and
phone.

The colours are Okabe and Ito's, which colour-blind readers tell apart; each line has a marker and a
dash of its own as well. A panel is as wide as a phone's column, so that a browser puts two side by
side where there is room. Text stays text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PANEL = (3.7, 3.2)  # inches: 355 pixels, a phone's column
# stand-ins, which `save` turns into the theme's
FOREGROUND, BACKGROUND, GRID = (
    "#010203",
    "#fdfcfb",
    "#a1a2a3",
)
THEMES = {"light": ("#222222", "#ffffff", "#d0d0d0"), "dark": ("#e6e6e6", "#1e2129", "#4a4d57")}
# colour, marker, dash of each method
LINES: dict[str, tuple[str, str, Any]] = {
    "DIP": ("#d55e00", "o", "-"),
    "input noise": ("#0a83c4", "s", "-"),
    "fixed variance": ("#009e73", "D", (0, (6, 2))),
    "plain": (FOREGROUND, "x", (0, (1, 2))),
    "plain, equal time": (FOREGROUND, "+", (0, (4, 2, 1, 2))),
    "GaussianDropout": ("#cc79a7", "^", (0, (3, 2))),
    "SAM": ("#e69f00", "v", (0, (5, 1, 1, 1))),
    "NEFTune": ("#e69f00", "v", (0, (5, 1, 1, 1))),
}
# where a figure compares something else
ORDER = (
    "#d55e00",
    "#0a83c4",
    "#e69f00",
    "#009e73",
    "#cc79a7",
)
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dipkernels",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
} | dict.fromkeys(
    (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    ),
    FOREGROUND,
)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Whatever is drawn and saved inside looks as described above."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(_RC):
        yield


def panels(
    rows: int = 1,
    columns: int = 1,
    width: float = PANEL[0],
    height: float = PANEL[1],
    **kwargs: Any,
) -> Any:
    """A figure of rows x columns axes, [rows, columns]; inches for the whole."""
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **kwargs
    )


def line_of(method: str) -> dict[str, Any]:
    """How this method's line is drawn. DIP's is the widest and lies below all others, so that it
    hides none."""
    color, marker, dash = LINES[method]
    width, order = (4.0, 2) if method == "DIP" else (1.5, 3)
    return {
        "color": color,
        "marker": marker,
        "linestyle": dash,
        "linewidth": width,
        "zorder": order,
        "label": method,
    }


def legend(figure: Any, axis: Any, columns: int = 2, length: float = 3.0) -> None:
    """The axis's legend beside the axes, where it covers nothing. length: of its lines, in font
    sizes; wide dashes need more."""
    handles, labels = axis.get_legend_handles_labels()
    look = {"loc": "outside lower center", "ncols": columns, "handlelength": length}
    figure.legend(handles, labels, **look)


def save(figure: Any, path: Path) -> None:
    """Write an SVG whose colours follow the reader's theme."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = path.read_text(encoding="utf-8")
    for number, stand_in in enumerate((FOREGROUND, BACKGROUND, GRID)):
        text = text.replace(stand_in, f"var(--c{number})")
    rules = {
        name: ";".join(f"--c{i}:{color}" for i, color in enumerate(colors))
        for name, colors in THEMES.items()
    }
    css = f":root{{{rules['light']}}}@media (prefers-color-scheme:dark){{:root{{{rules['dark']}}}}}"
    text = text.replace("<defs>", f"<style>{css}</style>\n<defs>", 1)
    text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", text)
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
