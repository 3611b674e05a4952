"""The picture of `slipstream bench verifiers`: what each verifier gains against what it costs. Needs matplotlib.

A row of panels for each temperature: quality, perplexity and bias over tokens per round, then quality over tokens per
second. A line joins the values of one knob; bars are 95 % intervals (of speeds: the range of rounds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.report import machine
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_figures import Estimate
from benchmarks.verifiers_report import Found, Row
from benchmarks.verifiers_task import GENERAL
from benchmarks.verifiers_variants import STRICT

try:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise BenchmarkError("--png: it needs matplotlib (pip install 'slipstream[bench]')") from error

# Okabe and Ito: told apart by people who see few colours, too.
COLOURS = {
    "strict": "#000000",
    "rejection": "#777777",
    "block": "#777777",
    "ensemble": "#0072B2",
    "bounded": "#D55E00",
    "diversed": "#009E73",
    "lenient": "#CC79A7",
    "typical": "#E69F00",
    "top_k_gap": "#56B4E9",
}
MARKS = {"strict": "*", "rejection": "s", "block": "D", "diversed": "^", "bounded": "v", "lenient": "P", "typical": "X"}


@dataclass(frozen=True, slots=True)
class Axis:
    """What is drawn along one side of a panel."""

    name: str
    of: Callable[[Row], Estimate | None]


def draw(found: Found, title: str, file: Path) -> None:
    """Write a PNG."""
    temperatures = list(dict.fromkeys(row.temperature for row in found.rows))
    groups = list(dict.fromkeys(row.group for row in found.rows))
    narrow, wide = groups[0], GENERAL if GENERAL in groups else groups[0]
    figure = Figure(figsize=(16, 1.3 + 4.1 * len(temperatures)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(temperatures), 4, squeeze=False)
    for line, temperature in zip(panels, temperatures, strict=True):
        _line(line, found, temperature, narrow, wide)
    figure.suptitle(f"{title}; {machine()}", fontsize=12, fontweight="bold")
    entries = {name: handle for line in panels for axes in line for handle, name in _legend(axes)}
    columns = min(len(entries), 8)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(file, format="png", metadata={"Software": "slipstream bench verifiers"})


def _line(panels: Sequence[Axes], found: Found, temperature: float, narrow: str, wide: str) -> None:
    """The panels of one temperature."""
    rows = {name: [r for r in found.rows if (r.temperature, r.group) == (temperature, name)] for name in (narrow, wide)}
    scored = not math.isnan(rows[narrow][0].estimates["score"].value)
    quality = _measure("score", f"score on {narrow}") if scored else _best()
    length = _measure("tokens_per_round", "tokens per round")
    batch = found.batches[0] if found.batches else 0
    where = f"temperature {temperature:g}"
    _panel(panels[0], rows[narrow], length, quality, f"Quality, {where}, {narrow}")
    perplexity = _measure("perplexity", "perplexity under the target")
    _panel(panels[1], rows[wide], length, perplexity, f"Perplexity, {where}, {wide}")
    _panel(
        panels[2], rows[narrow], length, _measure("bias", "mean estimated bias per token"), f"Bias, {where}, {narrow}"
    )
    if batch:
        speed = Axis(f"tokens per second, {batch} at once", lambda row: _speed(found, row, batch))
        _panel(panels[3], rows[narrow], speed, quality, f"Quality over speed, {where}")
    else:
        _panel(panels[3], rows[wide], length, _best(), f"Agreement, {where}, {wide}")


def _measure(name: str, title: str) -> Axis:
    return Axis(title, lambda row: row.estimates[name])


def _best() -> Axis:
    return Axis("share of the target's best tokens", lambda row: row.estimates["target_best"])


def _speed(found: Found, row: Row, batch: int) -> Estimate | None:
    one = found.speed(row, batch)
    return None if one is None else Estimate(median(one.speeds), min(one.speeds), max(one.speeds))


def _panel(axes: Axes, rows: Sequence[Row], x: Axis, y: Axis, title: str) -> None:
    """Values of one verifier's knob are a line; strict's level runs across."""
    families: dict[tuple[str, bool], list[tuple[Row, Estimate, Estimate]]] = {}
    for row in rows:
        a, b = x.of(row), y.of(row)
        if a is not None and b is not None and not (math.isnan(a.value) or math.isnan(b.value)):
            families.setdefault((row.variant.verifier, row.variant.drawn), []).append((row, a, b))
    for (verifier, drawn), points in families.items():
        _family(axes, verifier, drawn, points)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x.name, fontsize=9)
    axes.set_ylabel(y.name, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _family(axes: Axes, verifier: str, drawn: bool, points: Sequence[tuple[Row, Estimate, Estimate]]) -> None:
    """One verifier's points, joined in their order."""
    colour = COLOURS.get(verifier, "#999999")
    axes.errorbar(
        [a.value for _, a, _ in points],
        [b.value for _, _, b in points],
        xerr=_bars([a for _, a, _ in points]),
        yerr=_bars([b for _, _, b in points]),
        label=f"{verifier} (drawn)" if drawn else verifier,
        color=colour,
        marker=MARKS.get(verifier, "o"),
        linestyle=":" if drawn else "-",
        linewidth=1.1,
        markersize=15 if verifier == STRICT else 6,
        markerfacecolor="white" if drawn else colour,
        elinewidth=0.6,
        ecolor=(*_rgb(colour), 0.35),
        zorder=5 if verifier == STRICT else 3,
    )
    for row, a, b in points:
        if verifier == STRICT:
            axes.axhline(b.value, color=colour, linewidth=0.8, linestyle="--", alpha=0.5, zorder=1)
        elif row.variant.value is not None:
            text = f"{row.variant.value:g}"
            axes.annotate(text, (a.value, b.value), (4, 4), textcoords="offset points", fontsize=7, color=colour)


def _bars(estimates: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    """Lengths below and above, as errorbar takes them; a percentile interval may miss its value by a hair."""
    below = [max(0.0, one.value - one.low) for one in estimates]
    above = [max(0.0, one.high - one.value) for one in estimates]
    return below, above


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _legend(axes: Axes) -> list[tuple[Artist, str]]:
    handles, names = axes.get_legend_handles_labels()
    return list(zip(handles, names, strict=True))
