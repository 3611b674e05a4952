"""What training a head leaves for people: curves as a picture, and the card of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import ConfigError
from training.verifier.trainer import Point

_CURVES = {
    "reward": "score of the answers",
    "acceptance": "mean acceptance of a verified position",
    "bias": "mean bias (total variation) there",
    "weight": "mean weight of the target",
    "entropy": "mean entropy of the weight, nats",
    "price": "price of a rejection",
}
_COLOURS = ("#4269d0", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0", "#9c6b4e")


def draw_curves(points: Sequence[Point], title: str, file: Path) -> None:
    """Score, acceptance, bias, weight, its entropy and the price over the updates, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the curves need matplotlib (pip install 'slipstream[train]')") from error
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    updates = [point.update for point in points]
    for axes, (name, text), colour in zip(figure.subplots(2, 3).flat, _CURVES.items(), _COLOURS, strict=True):
        values = [float(getattr(point, name)) for point in points]
        axes.plot(updates, values, color=colour, alpha=0.35, linewidth=1)
        axes.plot(updates, _smooth(values), color=colour)
        axes.set_title(text, fontsize=10, loc="left")
        axes.set_xlabel("updates")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(file, dpi=110)


def card(title: str, facts: Mapping[str, object], points: Sequence[Point]) -> str:
    """The README of a head: what it is for, how it was made, where training ended."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    last = points[-max(1, len(points) // 8) :]
    means = {name: sum(getattr(point, name) for point in last) / len(last) for name in ("reward", "acceptance", "bias")}
    first = points[0]
    return (
        f"# {title}\n\n| | |\n|---|---|\n{rows}\n"
        "It fits this target and this draft only, and is worth something on this task only.\n\n"
        "| on training prompts | score | acceptance of a verified position | bias there |\n|---|---|---|---|\n"
        f"| first update, the same weight {first.weight:.2f} everywhere | {first.reward:.3f} | {first.acceptance:.3f} "
        f"| {first.bias:.4f} |\n"
        f"| mean of the last {len(last)} | {means['reward']:.3f} | {means['acceptance']:.3f} | {means['bias']:.4f} |\n"
        "\n"
        "![curves](curves.png)\n"
    )


def goal(reward: str, distill: float | None, target: float, price: float) -> str:
    """What was optimised, in words."""
    what = "score of the task" if reward == "task" else "distilled: least KL to the target's law"
    also = f", {distill:g} KL(emitted, target)" if distill else ""
    steered = f"steered to an acceptance of {target:g}" if target else f"price of a rejection {price:g}"
    return f"{what}{also}; {steered}"


def _smooth(values: Sequence[float], keep: float = 0.7) -> list[float]:
    """A running mean that starts at the first value."""
    found: list[float] = []
    for value in values:
        found.append(value if not found else keep * found[-1] + (1 - keep) * value)
    return found
