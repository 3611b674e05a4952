"""The split of every case as a picture: one bar of parts each, and a mark where the floor is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.step import Run

COLOURS = {
    "gemm": "#4269d0",
    "attention": "#efb118",
    "norms": "#ff725c",
    "rope": "#a463f2",
    "activation": "#97bbf5",
    "waiting": "#9c6b4e",
    "other": "#6cc5b0",
    "sampling": "#3ca951",
    "rest": "#9498a0",
    "host": "#d8dade",
    "captured": "#ff725c",
}


def draw(run: Run, file: Path) -> None:
    """Write a PNG. Bars are shares of the median step. Raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png: it needs matplotlib (pip install 'slipstream[bench]')") from error
    figures = run.figures
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(figures)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [row.case.name for row in figures]
    left = [0.0] * len(figures)
    for part, colour in COLOURS.items():
        widths = [row.ms * row.shares.get(part, 0.0) for row in figures]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=part, height=0.6)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    floors = [sum(row.floors_ms(run.ceilings).values()) for row in figures]
    axes.plot(floors, names, "k|", markersize=16, markeredgewidth=2, label="floor")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step (median)")
    axes.set_title(run.title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.4 / len(figures)))
    figure.savefig(file, dpi=140)
