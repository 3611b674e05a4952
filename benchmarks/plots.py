"""The picture of `bench serve`: speed and latencies over the load, and how the latencies spread. Needs matplotlib.

With one load only, the upper half shows how the run went by instead: tokens per second and requests in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.report import machine, percentile, show
from benchmarks.serve_load import Outcome
from benchmarks.serve_measures import Spread, in_flight
from benchmarks.serve_record import Point
from benchmarks.stream import Timing

# Okabe and Ito: told apart by people who see few colours, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BARS = 60  # of the timeline


def draw(points: Sequence[Point], title: str, file: Path) -> None:
    """Write a PNG."""
    figure_of(points, title).savefig(file, format="png", metadata={"Software": "slipstream bench serve"})


def figure_of(points: Sequence[Point], title: str) -> Figure:
    """Four panels, 11 by 7.5 inches."""
    figure = Figure(figsize=(11, 7.5), layout="constrained", dpi=120)
    axes = figure.subplots(2, 2)
    if len(points) > 1:
        _throughput(axes[0, 0], points)
        _latency(axes[0, 1], points)
    else:
        _timeline(axes[0, 0], points[0].outcomes)
        _crowd(axes[0, 1], points[0].outcomes)
    ttft = [[timing.first_token for timing in _timings(point)] for point in points]
    gaps = [[gap for timing in _timings(point) for gap in timing.gaps] for point in points]
    _distribution(axes[1, 0], points, ttft, "Time to first token (TTFT)")
    _distribution(axes[1, 1], points, gaps, "Between two chunks of an answer (ITL)")
    figure.suptitle(title, fontweight="bold")
    others = max(point.other_cores.during for point in points)
    answered = sum(point.summary.succeeded for point in points)
    failed = sum(sum(point.summary.failed.values()) for point in points)
    foot = f"{answered} requests answered, {failed} failed; other processes kept up to {others:.2f} cores busy"
    when = points[0].began[:16].replace("T", " ")
    figure.supxlabel(f"{machine()}; {foot}; {when}", fontsize=8, color="#555555")
    return figure


def _throughput(axes: Axes, points: Sequence[Point]) -> None:
    places = range(len(points))
    output = [point.summary.output_rate for point in points]
    total = [point.summary.total_rate for point in points]
    for values, label, colour, above in ((total, "input + output", COLOURS[4], 6), (output, "output", COLOURS[0], -14)):
        axes.plot(places, values, "o-", color=colour, label=f"{label} tokens")
        for place, value in zip(places, values, strict=True):
            axes.annotate(show(value), (place, value), (0, above), textcoords="offset points", ha="center", fontsize=8)
    _over_load(axes, points, "Throughput", "tokens per second")
    axes.set_ylim(-0.08 * max(total), 1.12 * max(total))


def _latency(axes: Axes, points: Sequence[Point]) -> None:
    for name, colour in (("ttft", COLOURS[1]), ("tpot", COLOURS[2])):
        spreads: list[tuple[int, Spread]] = [
            (place, found) for place, point in enumerate(points) if (found := getattr(point.summary, name)) is not None
        ]
        places = [place for place, _ in spreads]
        axes.plot(places, [s.p50 for _, s in spreads], "o-", color=colour, label=f"{name.upper()} median")
        axes.plot(places, [s.p99 for _, s in spreads], "v:", color=colour, label=f"{name.upper()} p99")
    axes.set_yscale("log")
    _plain_numbers(axes)
    _over_load(axes, points, "Latency: first token (TTFT), each token after it (TPOT)", "milliseconds")


def _over_load(axes: Axes, points: Sequence[Point], title: str, unit: str) -> None:
    """Loads stand side by side: they are often powers of two, or 1 and 100."""
    clients = [point.load.clients for point in points]
    loads = [str(point.load.clients) if point.load.clients else f"{point.load.rate:g}" for point in points]
    axes.set_xticks(range(len(points)), loads)
    axes.set_xlim(-0.4, len(points) - 0.6)
    _label(axes, title, "requests at once" if all(clients) else "requests per second that arrive", unit)
    axes.legend(fontsize=8)


def _timeline(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Tokens of each answer are spread evenly over its chunks."""
    began, ended = min(o.sent for o in outcomes), max(o.ended for o in outcomes)
    times, weights = [], []
    for timing in (outcome.timing for outcome in outcomes if outcome.timing is not None):
        texts = [chunk.at - began for chunk in timing.chunks if chunk.text]
        times.extend(texts)
        weights.extend([timing.completion_tokens / len(texts)] * len(texts))
    width = max(ended - began, 1e-9) / BARS
    per_second = [weight / width for weight in weights]
    axes.hist(times, bins=BARS, range=(0, width * BARS), weights=per_second, color=COLOURS[0])
    _label(axes, "Throughput over the run", "seconds", "output tokens per second")


def _crowd(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    steps = in_flight(outcomes)
    times, counts = [at - steps[0][0] for at, _ in steps], [count for _, count in steps]
    axes.step(times, counts, where="post", color=COLOURS[1])
    axes.set_ylim(bottom=0)
    _label(axes, "Requests in flight", "seconds", "requests")


def _distribution(axes: Axes, points: Sequence[Point], values: Sequence[Sequence[float]], title: str) -> None:
    """The share of values up to each; steep is even."""
    axes.set_xscale("log")
    everything = [1000 * value for seconds in values for value in seconds]
    if everything:  # chunks that came together lie far to the left and would squeeze the rest
        axes.set_xlim(max(percentile(everything, 5) / 3, 1e-3), max(*everything, 1e-2) * 1.3)
    for number, (point, seconds) in enumerate(zip(points, values, strict=True)):
        ranked = sorted(max(1000 * value, 1e-3) for value in seconds)
        shares = [100 * (rank + 1) / len(ranked) for rank in range(len(ranked))]
        colour = COLOURS[number % len(COLOURS)]
        axes.step(ranked, shares, where="post", label=point.load.title, color=colour, linewidth=1.4)
    _plain_numbers(axes, x=True)
    axes.set_ylim(0, 101)
    axes.set_yticks([0, 25, 50, 75, 90, 99], ["0", "25", "50", "75", "90", "99"])
    _label(axes, title, "milliseconds", "% of them up to this")
    if len(points) > 1:
        axes.legend(fontsize=8)


def _plain_numbers(axes: Axes, *, x: bool = False) -> None:
    """200 on a logarithmic axis, not 2 x 10^2; small axes name what lies between the powers of ten, too."""
    axis = axes.xaxis if x else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    few = high < 20 * low
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}") if few else NullFormatter())
    axes.tick_params(which="minor", labelsize=7)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _timings(point: Point) -> list[Timing]:
    return [outcome.timing for outcome in point.outcomes if outcome.timing is not None]
