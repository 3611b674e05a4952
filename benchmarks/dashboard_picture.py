"""The drawing half of `benchmarks.dashboard`: panels in Grafana's grid, in its dark colours, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.dashboard import Panel

PAGE, CARD, TEXT, FAINT = "#111217", "#1f2128", "#d8d9da", "#8e8f94"
COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#f2495c", "#b877d9", "#37a2a2", "#fade2a")
NAMED = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}
ROW_INCHES = 0.26  # of one grid row; the page is 16 inches wide
NOTE = "every panel's own query, answered by Prometheus, drawn by benchmarks/dashboard.py - not Grafana itself"


def draw(panels: Sequence[Panel], title: str, file: Path) -> None:
    """Write a PNG. Raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png: it needs matplotlib (pip install matplotlib)") from error
    rows = max(y + height for _, y, _, height in (panel.place for panel in panels)) + 2
    figure = Figure(figsize=(16, rows * ROW_INCHES), facecolor=PAGE, dpi=76)
    FigureCanvasAgg(figure)
    figure.text(0.008, 1 - 1.1 / rows, title, color=TEXT, fontsize=14, weight="bold", va="center")
    figure.text(0.992, 1 - 1.1 / rows, NOTE, color=FAINT, fontsize=9, va="center", ha="right", style="italic")
    for panel in panels:
        _draw_panel(figure, panel, rows)
    figure.savefig(file, facecolor=PAGE)


def _draw_panel(figure: Figure, panel: Panel, rows: int) -> None:
    x, y, width, height = panel.place
    left, top = x / 24, 1 - (y + 2) / rows  # two rows of the page are its head
    if panel.kind == "row":
        figure.text(left + 0.008, top - 0.5 / rows, panel.title, color=TEXT, fontsize=10, weight="bold", va="center")
        return
    box = (left + 0.003, top - (height - 0.15) / rows, width / 24 - 0.006, (height - 0.3) / rows)
    card = figure.add_axes(box, facecolor=CARD)
    card.set(xticks=[], yticks=[])
    for spine in card.spines.values():
        spine.set_color("#2c2e36")
    head = box[1] + box[3] - 0.6 / rows
    figure.text(box[0] + 0.004, head, panel.title, color=TEXT, fontsize=8.5, va="center")
    if not panel.curves:
        card.text(0.5, 0.45, "No data", color=FAINT, ha="center", va="center", fontsize=10)
    elif panel.kind == "stat":
        _draw_stat(figure, panel, box)
    else:
        _draw_series(figure, panel, box, rows)


def _draw_stat(figure: Figure, panel: Panel, box: tuple[float, float, float, float]) -> None:
    curve = panel.curves[0]
    last = next(value for value in reversed(curve.values) if not math.isnan(value))
    colour = next((name for at, name in reversed(panel.steps) if at is None or last >= at), "green")
    axes = figure.add_axes((box[0], box[1], box[2], box[3] * 0.42), facecolor=CARD)
    axes.fill_between(curve.times, curve.values, color=NAMED[colour], alpha=0.25, linewidth=0)
    axes.plot(curve.times, curve.values, color=NAMED[colour], linewidth=0.8, alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.set_axis_off()
    place = (box[0] + box[2] / 2, box[1] + box[3] * 0.48)
    figure.text(*place, words(last, panel.unit), color=NAMED[colour], fontsize=18, ha="center", va="center")


def _draw_series(figure: Figure, panel: Panel, box: tuple[float, float, float, float], rows: int) -> None:
    margin = 0.037  # for the numbers at the left
    columns = min(len(panel.curves), panel.place[2] // 2 if len(panel.curves[0].legend) > 3 else 9)  # of the legend
    lines = 0.5 + 0.5 * math.ceil(len(panel.curves) / columns)  # in grid rows
    axes = figure.add_axes(
        (box[0] + margin, box[1] + (0.6 + lines) / rows, box[2] - margin - 0.008, box[3] - (1.8 + lines) / rows),
        facecolor=CARD,
    )
    if panel.stacked:
        _stack(axes, panel)
    else:
        for index, curve in enumerate(panel.curves):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(curve.times, curve.values, color=colour, linewidth=1.2, label=curve.legend)
            axes.fill_between(curve.times, curve.values, panel.limits[0] or 0, color=colour, alpha=0.08, linewidth=0)
    bottom, top = panel.limits
    highest = max((value for curve in panel.curves for value in curve.values if not math.isnan(value)), default=0)
    axes.set_ylim(bottom=bottom, top=top if top is not None else (None if highest > (bottom or 0) else 1))
    axes.yaxis.set_major_formatter(lambda value, _: words(value, panel.unit))
    first, last = axes.get_xlim()
    clock = "%H:%M" if last - first > 900 else "%H:%M:%S"
    axes.xaxis.set_major_formatter(lambda value, _: datetime.fromtimestamp(value).strftime(clock))
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(colors=FAINT, labelsize=7, length=0)
    axes.set_axisbelow(True)
    axes.grid(color="#2c2e36", linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, -0.16),
        ncols=columns,
        fontsize=6.5,
        borderaxespad=0,
        labelspacing=0.2,
        frameon=False,
        labelcolor=TEXT,
        handlelength=1.2,
        columnspacing=1.2,
    )
    legend.set_in_layout(False)


def _stack(axes: Axes, panel: Panel) -> None:
    """Areas on top of each other, over all times that any curve has."""
    times = sorted({at for curve in panel.curves for at in curve.times})
    below = [0.0] * len(times)
    for index, curve in enumerate(panel.curves):
        known = dict(zip(curve.times, curve.values, strict=True))
        values = [known.get(at, 0.0) for at in times]
        above = [low + (0.0 if math.isnan(value) else value) for low, value in zip(below, values, strict=True)]
        colour = COLOURS[index % len(COLOURS)]
        axes.fill_between(times, below, above, color=colour, alpha=0.6, linewidth=0.5, label=curve.legend)
        below = above


def words(value: float, unit: str) -> str:
    """A value as Grafana would write it, near enough."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.3g} GiB"
    suffix = {"none": "", "reqps": " req/s"}.get(unit, f" {unit.removeprefix('suffix:')}")
    number = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{number}{suffix}"
