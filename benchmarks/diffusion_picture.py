"""The pictures of `slipstream bench diffusion`. Needs matplotlib.

Accuracy over tokens per forward, a line for each rule: all cases, then those that the model is unsure of; how sure it
is of the places that it could commit; accuracy over tokens per second; DualDiffusion beside its drafter, by cost. There
is a panel for what was measured. Bars are 95 % intervals; of speeds: the range of rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.diffusion_dual import ALONE, Dual
from benchmarks.diffusion_figures import frontier
from benchmarks.diffusion_report import Found
from benchmarks.diffusion_rules import Part, Row, Swept
from benchmarks.diffusion_speed import Timed
from benchmarks.report import machine
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_figures import Estimate

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise BenchmarkError("--png: it needs matplotlib (pip install 'slipstream[bench]')") from error

# Okabe and Ito: told apart by people who see few colours, too.
COLOURS = {
    "quota": "#000000",
    "threshold": "#0072B2",
    "factor": "#E69F00",
    "factor_compat": "#CC79A7",
    "frechet": "#D55E00",
    "dynamic": "#009E73",
}
MARKS = {"quota": "*", "threshold": "o", "factor": "v", "factor_compat": "P", "frechet": "s", "dynamic": "^"}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CACHES = {"none": ":", "prefix": "--", "dual": "-", "block": "-"}
Panel = Callable[[Axes], None]
Place = tuple[str, Estimate, Estimate]  # a text beside it, and where it is; the accuracy in percent


def draw(found: Found, title: str, file: Path) -> None:
    """Write a PNG. Raises BenchmarkError where nothing was measured that can be drawn."""
    panels = list(_panels(found))
    if not panels:
        raise BenchmarkError("--png: there is nothing to draw; measure rules or dual, or speed and caches")
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(8 * columns, 0.6 + 5.2 * lines), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(places, panels, strict=False):
        panel(axes)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(f"{title}; {machine()}", fontsize=11, fontweight="bold")
    figure.savefig(file, format="png", metadata={"Software": "slipstream bench diffusion"})


def _panels(found: Found) -> Iterable[Panel]:
    swept, timed, dual = found.rules, found.speed, found.dual
    rows = [*(found.caches.rows if found.caches else ()), *(swept.parts[0].rows if swept else ())]
    if swept is not None:
        yield lambda axes: _pareto(axes, swept.parts[0])
        unsure = [one for one in swept.parts if one.name.startswith("unsaturated")]
        for one in unsure:
            yield lambda axes, one=one: _pareto(axes, one)  # type: ignore[misc]
        yield lambda axes: _confidence(axes, swept)
    if timed is not None and rows:
        yield lambda axes: _speed(axes, rows, timed)
    if dual is not None:
        yield lambda axes: _dual(axes, dual)


def _pareto(axes: Axes, part: Part) -> None:
    """A line joins the values of one rule's knob."""
    rules: dict[str, list[Place]] = {}
    for row in part.rows:
        told = "" if row.value is None else f"{row.value:g}"
        rules.setdefault(row.rule, []).append((told, row.tokens_per_forward, row.accuracy))
    for rule, points in rules.items():
        _line(axes, points, rule, COLOURS.get(rule, "#777777"), MARKS.get(rule, "o"))
    _label(axes, f"Accuracy over tokens per forward: {part.name}, {part.cases} cases", "tokens per forward")
    axes.legend(fontsize=8, loc="lower left")


def _confidence(axes: Axes, swept: Swept) -> None:
    """Bars of equal width: the edges are much closer at 1."""
    width = 0.8 / len(swept.histograms)
    for number, one in enumerate(swept.histograms):
        heights = [100 * count / max(one.total, 1) for count in one.counts]
        shares = ", ".join(f"{100 * share:.0f} % >= {level:g}" for level, share in one.above)
        colour = SERIES[number % len(SERIES)]
        places = [place + number * width for place in range(len(heights))]
        axes.bar(places, heights, width, align="edge", color=colour, label=f"{one.variant}: {shares}")
    edges = swept.histograms[0].edges
    axes.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges], rotation=45)
    axes.set_title("How sure the model is of the places it could commit", fontsize=10)
    axes.set_xlabel("confidence (edges of the bars are not evenly spaced)", fontsize=9)
    axes.set_ylabel("% of candidates seen by the rule", fontsize=9)
    axes.legend(fontsize=8)


def _speed(axes: Axes, rows: Sequence[Row], timed: Timed) -> None:
    """At the smallest and the largest load, what the accuracy of is known; a line joins the caches of one rule."""
    right = {(row.variant, row.cache): row.accuracy for row in rows}
    loads = sorted({one.batch for one in timed.speeds})
    for batch in dict.fromkeys((loads[0], loads[-1])):
        own: dict[str, list[Place]] = {}
        for one in timed.speeds:
            if one.batch == batch and (one.variant, one.cache) in right:
                seen = Estimate(statistics.median(one.speeds), min(one.speeds), max(one.speeds))
                own.setdefault(one.variant, []).append((one.cache, seen, right[one.variant, one.cache]))
        for name, points in own.items():
            rule, filled = name.split()[0], batch == loads[0]
            colour, title = COLOURS.get(rule, "#777777"), f"{name}, {batch} at once"
            _line(axes, points, title, colour, MARKS.get(rule, "o"), "-" if filled else ":", hollow=not filled)
    _logarithmic(axes)
    _label(axes, f"Accuracy over speed by cache: answers of up to {timed.tokens} tokens", "tokens per second")
    axes.legend(fontsize=7)


def _dual(axes: Axes, dual: Dual) -> None:
    """Of each series those points that none beats are joined."""
    series: dict[str, dict[str, Place]] = {}
    for one in dual.points:
        cost = Estimate(*(value / 1e9 for value in (one.cost.value, one.cost.low, one.cost.high)))
        series.setdefault(one.series, {})[one.variant] = (one.variant, cost, one.accuracy)
    colours = iter(SERIES * len(series))
    for name, points in series.items():
        colour = "#000000" if name == ALONE else next(colours)
        best = frontier({key: (-cost.value, right.value) for key, (_, cost, right) in points.items()})
        _line(axes, [(key if name == ALONE else "", *points[key][1:]) for key in best], name, colour, "o")
        rest = [points[key] for key in points if key not in best]
        axes.plot(
            [cost.value for _, cost, _ in rest], [100 * right.value for *_, right in rest], "x", color=colour, alpha=0.4
        )
    _logarithmic(axes)
    _label(axes, f"DualDiffusion and its drafter alone: {dual.cases} cases", "cost of a case, 10^9 multiplications")
    axes.legend(fontsize=8)


def _line(
    axes: Axes, points: Sequence[Place], label: str, colour: str, mark: str, style: str = "-", *, hollow: bool = False
) -> None:
    """Points with bars both ways, joined in their order, with their texts."""
    ordered = sorted(points, key=lambda one: one[1].value)
    axes.errorbar(
        [x.value for _, x, _ in ordered],
        [100 * y.value for *_, y in ordered],
        xerr=_bars([x for _, x, _ in ordered], 1),
        yerr=_bars([y for *_, y in ordered], 100),
        label=label,
        color=colour,
        marker=mark,
        linestyle=style,
        linewidth=1.1,
        markersize=5,
        markerfacecolor="white" if hollow else colour,
        elinewidth=0.5,
    )
    for text, x, y in ordered:
        axes.annotate(text, (x.value, 100 * y.value), (4, 4), textcoords="offset points", fontsize=6, color=colour)


def _bars(estimates: Sequence[Estimate], scale: float) -> tuple[list[float], list[float]]:
    """Lengths below and above; a percentile interval may miss its value by a hair."""
    below = [scale * max(0.0, one.value - one.low) for one in estimates]
    return below, [scale * max(0.0, one.high - one.value) for one in estimates]


def _logarithmic(axes: Axes) -> None:
    """200 along the axis, not 2 x 10^2."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="minor", labelsize=6)


def _label(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel("accuracy, %", fontsize=9)
