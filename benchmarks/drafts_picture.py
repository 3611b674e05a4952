"""Pictures of the draft benchmarks: acceptance over the position, and speed over the load. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.drafts_acceptance import Accepted
from benchmarks.drafts_compare import Compared
from benchmarks.stream import BenchmarkError

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise BenchmarkError("--png: it needs matplotlib (pip install 'slipstream[bench]')") from error

# Okabe and Ito: told apart by people who see few colours, too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_acceptance(found: Sequence[Accepted], title: str, file: Path) -> None:
    """Write a PNG: tokens per round of every drafter and data set, and the share that stood at each position."""
    figure, (bars, lines) = _figure(title)
    sets = list(dict.fromkeys(one.prompts for one in found))
    drafters = list(dict.fromkeys(one.drafter for one in found))
    width = 0.8 / len(drafters)
    for number, name in enumerate(drafters):
        colour = COLOURS[1 + number % (len(COLOURS) - 1)]
        own = [one for one in found if one.drafter == name]
        places = [sets.index(one.prompts) + (number - (len(drafters) - 1) / 2) * width for one in own]
        heights = [one.figures.tokens_per_round for one in own]
        bars.bar(places, heights, width, color=colour, label=name)
        for place, height in zip(places, heights, strict=True):
            bars.annotate(f"{height:.2f}", (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        if own[-1].chains:
            shares = own[-1].figures.by_position
            lines.plot(range(1, len(shares) + 1), shares, "o-", color=colour, label=name)
    bars.set_xticks(range(len(sets)), sets)
    _label(bars, "Tokens per round", "", "tokens that a step adds to an answer")
    lines.set_ylim(0, 1)
    _label(lines, f"Drafted tokens that stood ({sets[-1]})", "position in the draft", "share")
    figure.savefig(file, format="png")


def draw_speed(found: Compared, title: str, file: Path) -> None:
    """Write a PNG: speed over that without drafts at every load, and tokens per round."""
    figure, (speeds, lengths) = _figure(title)
    names = list(dict.fromkeys(row.variant for row in found.rows))
    loads = list(dict.fromkeys(row.clients for row in found.rows))
    for number, name in enumerate(names):
        own, colour = [row for row in found.rows if row.variant == name], COLOURS[number % len(COLOURS)]
        places = [loads.index(row.clients) + (number - (len(names) - 1) / 2) * 0.04 for row in own]
        middles = [row.speed_ratio.median for row in own]
        low = [row.speed_ratio.median - row.speed_ratio.low for row in own]
        high = [row.speed_ratio.high - row.speed_ratio.median for row in own]
        speeds.errorbar(places, middles, (low, high), fmt="o-", color=colour, label=name, capsize=3)
        lengths.plot(places, [row.tokens_per_round for row in own], "o-", color=colour, label=name)
    for axes in (speeds, lengths):
        axes.set_xticks(range(len(loads)), [str(load) for load in loads])
    _label(speeds, "Tokens per second over those without drafts", "requests at once", "ratio (median, range)")
    _label(lengths, "Tokens per round", "requests at once", "tokens that a step adds to an answer")
    figure.savefig(file, format="png")


def _figure(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    return figure, (left, right)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
