"""The picture of `benchmarks.growth`: one panel for each size, both axes logarithmic. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.growth import exponent
from benchmarks.growth_cases import Curve
from benchmarks.plots import COLOURS
from benchmarks.report import machine, show

TITLES = {
    "batch": ("Scheduling a step", "sequences in the step"),
    "prompt": ("Long prompts", "tokens of the prompt"),
    "waiting": ("A queue behind 32 that run", "requests that wait"),
    "cache": ("Prefix cache: time", "blocks of 16 tokens"),
    "memory": ("Prefix cache: memory", "blocks of 16 tokens"),
    "engine": ("Steps of a real model", "sequences, or tokens of context"),
}
UNITS = {"us": "microseconds of processor time", "ms": "milliseconds", "MB": "megabytes"}
MARKS = "os^Dv"


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Write a PNG."""
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 4.3 * rows), layout="constrained", dpi=110)
    axes = [*figure.subplots(rows, 2, squeeze=False).flat]
    for panel, one in zip(panels, axes, strict=False):
        _panel(one, [curve for curve in curves if curve.panel == panel])
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    figure.suptitle("How costs grow: behind each name its exponent (1 is linear) and its largest value")
    figure.supxlabel(machine(), fontsize=8, color="#555555")
    figure.savefig(file, format="png", metadata={"Software": "slipstream benchmarks.growth"})


def _panel(axes: Axes, curves: Sequence[Curve]) -> None:
    title, size = TITLES[curves[0].panel]
    axes.set_xscale("log")
    axes.set_yscale("log")
    for number, curve in enumerate(curves):
        sizes, values = zip(*curve.points, strict=True)
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        label = f"{curve.name}: {exponent(curve.points):.2f}, up to {show(values[-1])}"
        axes.plot(sizes, values, marker=mark, markersize=4, color=colour, label=label)
    lowest = min(value for curve in curves for _, value in curve.points)
    highest = max(value for curve in curves for _, value in curve.points)
    everywhere = [at for curve in curves for at, _ in curve.points]
    ends = min(everywhere), max(everywhere)
    axes.plot(
        ends,
        [2 * highest * at / ends[1] for at in ends],
        ":",
        color="#888888",
        linewidth=1,
        label="this slope is linear",
    )
    axes.set_ylim(lowest / 2, highest * 10)
    axes.margins(x=0.06)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(size, fontsize=9)
    axes.set_ylabel(UNITS[curves[0].unit], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="upper left")
