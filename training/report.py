"""What a training run leaves for people: curves as a picture, and the card of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import ConfigError
from training.trainer import Point


def draw_curves(points: Sequence[Point], title: str, file: Path) -> None:
    """Loss, acceptance length, and survival by position over the steps, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the curves need matplotlib (pip install 'slipstream[train]')") from error
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, length, survival = figure.subplots(1, 3)
    steps = [point.step for point in points]
    loss.plot(steps, [point.loss for point in points], color="#4269d0")
    loss.set_title("training loss", fontsize=10, loc="left")
    length.plot(steps, [point.acceptance_length for point in points], color="#3ca951")
    length.set_title("held-out acceptance length, tokens per round", fontsize=10, loc="left")
    for position in range(len(points[-1].survival)):
        shade = 0.25 + 0.65 * position / max(1, len(points[-1].survival) - 1)
        line = [point.survival[position] for point in points]
        survival.plot(steps, line, color=(shade * 0.9, shade * 0.75, 0.65), label=str(position + 1))
    survival.set_title("share of blocks right up to position", fontsize=10, loc="left")
    survival.set_ylim(0, 1)
    survival.legend(frameon=False, fontsize=8, ncols=2)
    for axes in (loss, length, survival):
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(file, dpi=110)


def card(title: str, facts: Mapping[str, object], points: Sequence[Point]) -> str:
    """The README of a checkpoint: what it is, how it was made, how often its tokens stand."""
    last = points[-1]
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    positions = " | ".join(str(i + 1) for i in range(len(last.survival)))
    shares = " | ".join(f"{share:.3f}" for share in last.survival)
    rule = "---|" * (len(last.survival) + 1)
    return (
        f"# {title}\n\n| | |\n|---|---|\n{rows}\n"
        f"Held-out answers after {last.step:,} steps and {last.seconds / 60:.0f} minutes: "
        f"{last.acceptance_length:.2f} tokens a round, if every block is verified whole.\n\n"
        f"| position | {positions} |\n|{rule}\n| right up to here | {shares} |\n\n![curves](curves.png)\n"
    )
