"""What a training run leaves for people: accuracy by a plain sampler, curves as a picture, and the card."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from engine.errors import ConfigError
from training.diffusion.batches import Sheets
from training.diffusion.loss import Objective
from training.diffusion.network import Network
from training.diffusion.sampling import Sampler
from training.diffusion.trainer import Point
from training.tasks import worksheet
from training.tasks.task import Item, held_out

SEED = "trials"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the training: its options, and the points it passed."""

    options: Mapping[str, object]
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Trial:
    """Held-out sheets decoded: share of parts right, of sheets all right, tokens and forwards of all answers."""

    threshold: float
    cases: int
    parts: float
    sheets: float
    tokens: int
    forwards: int


def cases(count: int) -> list[Item]:
    """Held-out sheets, the same ones every time."""
    random = Random(SEED)
    found: dict[str, Item] = {}
    while len(found) < count:
        item = worksheet.sample(random)
        if held_out(item):
            found[item.prompt] = item
    return list(found.values())


def attempt(
    network: Network, sheets: Sheets, objective: Objective, attention: str, threshold: float, asked: Sequence[Item]
) -> Trial:
    """Decode and score. A threshold above 1 decodes one token a step."""
    ends = (sheets.turn_end, sheets.end)
    sampler = Sampler(network, objective.mask_id, ends, objective.block, sheets.canvas, threshold)
    scores, tokens, forwards = [], 0, 0
    for item in asked:
        ids, took = sampler(attention, sheets.encode(item.prompt).prompt)
        scores.append(worksheet.score(sheets.text(ids), item))
        tokens, forwards = tokens + len(ids), forwards + took
    whole = sum(score == 1.0 for score in scores) / len(scores)
    return Trial(threshold, len(scores), sum(scores) / len(scores), whole, tokens, forwards)


def write(
    output: Path, attention: str, network: Network, objective: Objective, runs: Sequence[Run], trials: Sequence[Trial]
) -> None:
    """README.md, curves.png and training.json of a checkpoint."""
    record = {
        "runs": [{"options": run.options, "points": [asdict(point) for point in run.points]} for run in runs],
        "trials": [asdict(trial) for trial in trials],
        "made": time.strftime("%Y-%m-%d"),
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw_curves(runs, attention, output / "curves.png")
    (output / "README.md").write_text(card(attention, network, objective, runs, trials), encoding="utf-8")


def read_runs(folder: Path) -> list[Run]:
    """The runs that a checkpoint came from, none where it has no record. Raises ConfigError."""
    file = folder / "training.json"
    if not file.exists():
        return []
    try:
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
        return [Run(run["options"], [Point.read(json.dumps(point)) for point in run["points"]]) for run in runs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no record of train-diffusion: {error}") from error


def draw_curves(runs: Sequence[Run], attention: str, file: Path) -> None:
    """Training loss, held-out cross entropy and share right over the hidden tokens learned from, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the curves need matplotlib (pip install 'slipstream[train]')") from error
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, entropy, right = figure.subplots(1, 3)
    before = 0
    for run, color in zip(runs, ("#9498a0", "#4269d0", "#3ca951") * len(runs), strict=False):
        loss.plot([(before + point.tokens) / 1e6 for point in run.points], [p.loss for p in run.points], color=color)
        held = [point for point in run.points if attention in point.held_out]
        at = [(before + point.tokens) / 1e6 for point in held]
        entropy.plot(at, [point.held_out[attention][0] for point in held], color=color)
        label = f"{run.options['attention']}, block {run.options['block_size']}"
        right.plot(at, [point.held_out[attention][1] for point in held], color=color, label=label)
        before += run.points[-1].tokens
    loss.set_title("training loss", fontsize=10, loc="left")
    entropy.set_title("held-out nats per hidden token", fontsize=10, loc="left")
    right.set_title("held-out share of hidden tokens right", fontsize=10, loc="left")
    right.legend(frameon=False, fontsize=8, title="objective")
    for axes in (loss, entropy, right):
        axes.set_xlabel("hidden tokens learned from, millions")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


_CARD = """\
# A small masked-diffusion model: {kind}

{about} It is here so that the diffusion pipelines can be tried and measured on a laptop, with answers that can be
checked. It does small exercises with worked steps and nothing else.

| | |
|---|---|
{rows}
## What it can do

A user's message holds one to eight exercises in lines `a) ...` to `h) ...`: sums and differences of two numbers of two
or three digits, two digits times one, sums of a few digits, reversing and sorting up to six digits, the largest of a
few numbers, and facts of an invented table (`training/tasks/atlas.py`). It answers line by line, with the steps:

```
{example}
```

Held-out sheets, greedy, by the training's own plain sampler (blocks of {block}, canvas {canvas}, a token is committed
at a confidence of the threshold or more; above 1: one token a step). A part is right when its result is:

| threshold | sheets | parts right | sheets all right | tokens per forward |
|---|---|---|---|---|
{trials}
Held out are the fifth of all sheets that a hash of their text picks; training never meets them, whatever its seed. The
facts of the table are asked in training, of course, in other sheets.

## How it was made

{runs}
Every step takes sheets drawn afresh; each is learned from twice, under a mask and under its complement; the prompt is
never masked. Loss: plain cross entropy of the hidden tokens, averaged; <|endoftext|> behind the answer has a weight of
{padding:g}. {objective} `training.json` holds all options and points; the commands, one after another, repeat it:

```
{commands}
```

![curves](curves.png)

## What it cannot do

Anything else: it has seen no other text. No system message, no second turn, no numbers of other lengths, no other
kinds of exercises, no more than {canvas} tokens of answer or {positions} positions in all. What it does wrong, it does
wrong with confidence at times: steps that do not add up are not taken back.

## Keys of config.json

Tensors and keys are Llama's. Of its own: `mask_token_id`; `diffusion_attention`, "full" (every position sees the whole
canvas) or "block_causal" (a position sees its own block and those before it); `block_size`, in tokens (block_causal: as
trained; full: what training decoded by); `shift_logits`, false: the logits at a position are for that position's token.
"""
_ABOUT = {
    "full": "A {size} Llama without a causal mask, trained as LLaDA is: every token of the answer's canvas sees all "
    "others.",
    "block_causal": "A {size} Llama with block-causal attention, trained as Fast-dLLM v2 is but without its shift: an "
    "answer grows by blocks of {block} tokens, which see themselves both ways and what is before them.",
}
_OBJECTIVE = {
    "full": "Half of the masks have one rate for the whole canvas, as LLaDA's; the others are those of decoding by "
    "blocks: all behind an open block hidden, and the open block at a rate of its own.",
    "block_causal": "Masks have a rate for each block; a pass feeds the clean answer once and both noisy copies.",
}


def card(attention: str, network: Network, objective: Objective, runs: Sequence[Run], trials: Sequence[Trial]) -> str:
    """The README of a checkpoint."""
    shape = network.shape
    size = f"{sum(one.numel() for one in network.parameters()) / 1e6:.2f} M parameter"
    example = cases(1)[0]
    learned = sum(run.points[-1].tokens for run in runs)
    facts = {
        "network": f"{shape.layers} layers, width {shape.hidden}, {shape.heads} heads of {shape.head_dim}, "
        f"inner width {shape.inner}, {size}s with the tied embedding",
        "attention": f"{attention}, block {objective.block}, no shift",
        "vocabulary": f"{shape.vocab} ids: byte-level BPE, every digit a token; the same for both variants",
        "learned from": f"{learned / 1e6:.2f} M hidden tokens in {sum(run.points[-1].step for run in runs)} steps",
        "time": f"{sum(run.points[-1].seconds for run in runs) / 60:.0f} minutes, one thread of a shared CPU",
        "weights": "float16; the license is the project's",
    }
    kind = "full attention" if attention == "full" else "block-causal attention"
    text = _CARD.format(
        kind=kind,
        about=_ABOUT[attention].format(size=size, block=objective.block),
        rows="".join(f"| {name} | {value} |\n" for name, value in facts.items()),
        example=f"{example.prompt}\n\n{example.reference}",
        block=objective.block,
        canvas=256,
        positions=shape.max_positions,
        trials="".join(_row(trial) for trial in trials) or "| not tried | | | | |\n",
        runs="".join(_told(number, run) for number, run in enumerate(runs, 1)),
        padding=objective.padding,
        objective=_OBJECTIVE[attention],
        commands="\n".join(str(run.options["command"]) for run in runs),
    )
    return "\n".join(_wrapped(line) for line in text.split("\n"))


def _wrapped(line: str) -> str:
    """Lines of prose in at most 120 characters; tables and commands as they are."""
    if line.startswith(("|", "slipstream ")):
        return line
    return textwrap.fill(line, 120, subsequent_indent="   " if line[:1].isdigit() else "") if line else line


def _row(trial: Trial) -> str:
    shares = f"{trial.parts:.3f} | {trial.sheets:.3f} | {trial.tokens / trial.forwards:.2f}"
    return f"| {trial.threshold:g} | {trial.cases} | {shares} |\n"


def _told(number: int, run: Run) -> str:
    last = run.points[-1]
    held = "; ".join(
        f"{name} {entropy:.3f} nats, {right:.3f} right" for name, (entropy, right) in last.held_out.items()
    )
    return (
        f"{number}. Objective {run.options['attention']}, block {run.options['block_size']}: {last.step} steps of "
        f"{run.options['sequences']} sheets, {last.tokens / 1e6:.2f} M hidden tokens, {last.seconds / 60:.0f} minutes. "
        f"Held-out hidden tokens at its end: {held}.\n"
    )
