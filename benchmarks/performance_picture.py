"""The pictures of docs/performance.md: all speeds side by side, and where a step's time goes. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from benchmarks.performance_contenders import Contender
from benchmarks.performance_figures import FIGURES, Figure, Servers, Step, Steps, limit, servers_of, steps_of
from benchmarks.performance_record import About, Part
from benchmarks.performance_tables import chosen
from benchmarks.plots import COLOURS
from benchmarks.report import show

OURS, DRAFTING, SERVER, LIBRARY = COLOURS[5], COLOURS[0], "#9498a0", "#c8cacd"
PANELS = FIGURES[:5]
PART_COLOURS = {  # in the order of the bars: a pass, what is around it, and what nobody worked in
    "gemm": COLOURS[0],
    "attention": COLOURS[4],
    "norms": COLOURS[3],
    "rope": "#6a3d9a",
    "activation": COLOURS[5],
    "sampling": COLOURS[2],
    "other": "#7a7a52",
    "rest": "#9498a0",
    "waiting": "#d8dade",
}


def draw(parts: Mapping[str, Part], folder: Path) -> list[Path]:
    """Write the pictures of the parts that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    servers, steps = servers_of(parts), steps_of(parts)
    written = []
    if servers is not None and servers.measurements:
        written.append(folder / "performance.png")
        _save(speeds(servers, steps, parts["servers"].about), written[-1])
    if steps is not None and steps.runs:
        written.append(folder / "performance_steps.png")
        _save(split(steps, parts["steps"].about), written[-1])
    return written


def _save(picture: Picture, file: Path) -> None:
    picture.savefig(file, format="png", metadata={"Software": "slipstream"})


def speeds(found: Servers, steps: Steps | None, about: About) -> Picture:
    """A panel for each figure, the best on top."""
    rows = max(len(found.present()), 4)
    picture = Picture(figsize=(13, 1.6 + 0.46 * rows), layout="constrained", dpi=120)
    axes = picture.subplots(2, 3).flatten()
    for panel, figure in zip(axes, PANELS, strict=False):
        _panel(panel, found, steps, figure)
    _legend(axes[-1])
    picture.suptitle("Slipstream beside its peers: SmolLM2-135M-Instruct", fontweight="bold")
    foot = f"{about.machine}; medians and ranges of up to {found.rounds} interleaved rounds; {about.began}"
    picture.supxlabel(foot, fontsize=8, color="#555555")
    return picture


def _panel(axes: Axes, found: Servers, steps: Steps | None, figure: Figure) -> None:
    columns = {one: list(found.values(one.name, figure).values()) for one in found.present()}
    columns = {one: values for one, values in columns.items() if values}
    ranked = sorted(columns, key=lambda one: statistics.median(columns[one]), reverse=figure.higher)
    for place, one in enumerate(ranked):
        values = columns[one]
        middle = statistics.median(values)
        axes.barh(place, middle, color=_colour(one), height=0.7)
        axes.plot([min(values), max(values)], [place, place], color="black", linewidth=1)
        limits = steps.limits.get(one.quant) if steps and one.kind == "ours" and not one.drafts else None
        most = limit(limits, figure, found.new_tokens) if limits is not None else 0.0
        if most:
            axes.plot(most, place, "|", color="#D55E00", markersize=11, mew=2)
        right = max(*values, most if most < 1.4 * middle else 0.0)  # clear of the mark
        axes.annotate(f"  {show(middle)}", (right, place), va="center", fontsize=7)
    axes.set_yticks(range(len(ranked)), [_name(one) for one in ranked], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(figure.title + ("" if figure.higher else " (less is better)"), fontsize=9)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _name(one: Contender) -> str:
    return f"Slipstream {one.title}" if one.kind == "ours" else one.title


def _colour(one: Contender) -> str:
    if one.kind == "ours":
        return DRAFTING if one.drafts else OURS
    return SERVER if one.kind == "server" else LIBRARY


def _legend(axes: Axes) -> None:
    axes.axis("off")
    entries = (
        (OURS, "Slipstream"),
        (DRAFTING, "Slipstream with DFlash drafts:\nthe same tokens, sooner"),
        (SERVER, "other servers"),
        (LIBRARY, "a library behind a thin server"),
    )
    for colour, label in entries:
        axes.barh([0], [0], color=colour, label=label)
    axes.plot([], [], "|", color="#D55E00", markersize=11, mew=2, label="the limit: matrix products alone")
    axes.plot([], [], color="black", linewidth=1, label="lowest to highest round")
    axes.legend(loc="center left", frameon=False, fontsize=9)


def split(found: Steps, about: About) -> Picture:
    """A bar for each format and kind of step, cut into its parts; a mark where the floor is."""
    kinds = list(dict.fromkeys(step.name for run in found.runs.values() for step in chosen(run.cases)))
    picture = Picture(figsize=(11, 1.2 + 0.5 * len(kinds) * len(found.runs)), layout="constrained", dpi=120)
    axes = picture.subplots(len(kinds), 1, squeeze=False)[:, 0]
    names = list(dict.fromkeys(p for run in found.runs.values() for step in run.cases for p in step.parts_ms))
    colours = _part_colours(names)
    for panel, kind in zip(axes, kinds, strict=True):
        steps = {quant: step for quant, run in found.runs.items() for step in chosen(run.cases) if step.name == kind}
        _stack(panel, steps, colours)
        panel.set_title(kind, fontsize=9, loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    picture.supxlabel(f"milliseconds per step, median; {about.machine}; {about.began}", fontsize=8, color="#555555")
    return picture


def _stack(axes: Axes, steps: Mapping[str, Step], colours: Mapping[str, str]) -> None:
    for place, step in enumerate(steps.values()):
        left = 0.0
        for part, colour in colours.items():
            width = step.ms * step.share(part)
            axes.barh(place, width, left=left, color=colour, height=0.7, label=part if not place else None)
            left += width
        floor = sum(step.floors_ms.values())
        axes.plot(floor, place, "k|", markersize=13, mew=2, label=None if place else "floor")
        axes.annotate(f" {step.ms:.1f}", (left, place), va="center", fontsize=7)
    axes.set_yticks(range(len(steps)), list(steps), fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _part_colours(names: Sequence[str]) -> dict[str, str]:
    known = {name: colour for name, colour in PART_COLOURS.items() if name in names}
    return {**known, **{name: "#b15928" for name in names if name not in known}}
