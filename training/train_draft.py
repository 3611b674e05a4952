"""`slipstream train-draft`: from prompts to a checkpoint that `slipstream serve --draft` takes.

Four stages, each of which goes on where it was killed: prompts are collected, the target answers them through our own
engine (keeping its hidden states unless told otherwise), the draft is trained, the checkpoint and its card are written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from engine.errors import ConfigError
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR
from training import report, target
from training.batches import Corpus
from training.data import shards
from training.data.generate import Plan, generate
from training.data.prompts import TEMPLATES, collect
from training.drafts import DRAFTS, Draft
from training.options import positive, say
from training.shapes import Shape
from training.trainer import Point, Schedule, Trainer

DESCRIPTION = "Train a draft for a target model on the target's own answers."


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that was asked for."""

    options: argparse.Namespace

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    @property
    def data(self) -> Path:
        return Path(self.options.data) if self.options.data else self.output / "data"


def main(arguments: Sequence[str]) -> int:
    job = Job(parser().parse_args(arguments))
    torch.manual_seed(job.options.seed)
    if job.options.threads:
        torch.set_num_threads(job.options.threads)
    folder = resolve(job.options.model, CACHE_DIR.expanduser(), say)
    taps = _taps(job, folder)
    if not job.options.skip_generation:
        _answer(job, (*taps, target.last_layer(folder)))
    draft, trainer = _train(job, folder, taps)
    _write(job, draft, trainer.points)
    return 0


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser("slipstream train-draft", description=DESCRIPTION)
    new.add_argument("output", help="folder of the checkpoint; training's own state goes to OUTPUT/training")
    new.add_argument("--model", default="demo", help="the target, as `slipstream serve` takes it (default: demo)")
    new.add_argument("--drafter", choices=sorted(DRAFTS), default="dflash")
    data = new.add_argument_group("data")
    known = ", ".join(sorted(TEMPLATES))
    data.add_argument("--prompts", action="append", default=[], metavar="SOURCE", help=(
        f"a JSON-lines file with prompt, messages or turns; a ShareGPT file; or templates: {known}. "
        "Give it again for more sources, which are taken in turn (default: all templates)"))  # fmt: skip
    data.add_argument("--num-prompts", type=positive, default=2000)
    data.add_argument("--exclude", action="append", default=[], metavar="FILE", help="prompts kept for evaluation")
    data.add_argument("--data", default="", metavar="DIR", help="where answers are kept (default: OUTPUT/data)")
    data.add_argument("--skip-generation", action="store_true", help="train on the answers that are there")
    data.add_argument("--states", choices=("cached", "fly"), default="cached", help=(
        "keep the target's hidden states on disk, or compute them anew for every batch"))  # fmt: skip
    data.add_argument("--max-tokens", type=positive, default=160, help="of an answer")
    data.add_argument("--max-prompt", type=positive, default=256, help="longer prompts are left out, in tokens")
    data.add_argument("--sampled-every", type=positive, default=4, help="each so many-th answer is drawn, not greedy")
    data.add_argument("--temperature", type=float, default=0.8, help="of the drawn answers")
    data.add_argument("--concurrency", type=positive, default=128)
    shape = new.add_argument_group("draft")
    shape.add_argument("--layers", type=positive, default=1)
    shape.add_argument("--block-size", type=positive, default=8, help="input slots of one pass, the anchor among them")
    shape.add_argument("--taps", default="", help="target layers to read, from 0 on (default: the paper's)")
    shape.add_argument("--draft-vocab", type=int, default=0, help="most frequent ids that can be drafted; 0: all")
    shape.add_argument("--mask-token-id", type=int, default=-1, help="default: an id that no text here has")
    shape.add_argument("--markov-rank", type=int, default=0, help="DSpark's bias from the token before; 0: none")
    shape.add_argument("--anchor-predicts", action="store_true", help="DSpark's layout: the anchor's slot drafts, too")
    shape.add_argument("--random-start", action="store_true", help="do not start from the target's own layers")
    learn = new.add_argument_group("training")
    learn.add_argument("--steps", type=positive, default=2000)
    learn.add_argument("--sequences", type=positive, default=8, help="answers in one step")
    learn.add_argument("--anchors", type=positive, default=32, help="blocks of each of them")
    learn.add_argument("--lr", type=float, default=1e-3)
    learn.add_argument("--hard", type=float, default=0.5, help="share of the label in the loss; the rest is distilled")
    learn.add_argument("--decay", type=float, default=4.0, help="gamma of the weights exp(-(k - 1) / gamma)")
    learn.add_argument("--evaluate-every", type=positive, default=100)
    learn.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    learn.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    learn.add_argument("--seed", type=int, default=1)
    return new


def _taps(job: Job, folder: Path) -> tuple[int, ...]:
    if not job.options.taps:
        return DRAFTS[job.options.drafter].default_taps(target.last_layer(folder) + 1)
    try:
        return tuple(int(tap) for tap in job.options.taps.split(","))
    except ValueError as error:
        raise ConfigError(f"--taps {job.options.taps}: layers are numbers, as in 1,14,27") from error


def _answer(job: Job, taps: tuple[int, ...]) -> None:
    """The target's answers, as shards."""
    asked = job.options
    sources = asked.prompts or sorted(TEMPLATES)
    prompts = collect(sources, asked.num_prompts, [Path(path) for path in asked.exclude], asked.seed)
    plan = Plan(
        taps=taps if asked.states == "cached" else (),
        max_tokens=asked.max_tokens,
        max_prompt=asked.max_prompt,
        sampled_every=asked.sampled_every,
        temperature=asked.temperature,
        concurrency=asked.concurrency,
        seed=asked.seed,
    )
    with tqdm(total=len(prompts), unit=" answers", desc="answers") as bar:
        generate(asked.model, prompts, job.data, plan, bar.update)


def _train(job: Job, folder: Path, taps: tuple[int, ...]) -> tuple[Draft, Trainer]:
    asked = job.options
    device = torch.device(asked.device if asked.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if not shards.paths(job.data):
        raise ConfigError(f"{job.data} holds no answers")
    wanted = (*taps, target.last_layer(folder))
    corpus = Corpus(job.data, folder if asked.states == "fly" else None, wanted, device)
    shape = Shape(
        taps=taps,
        layers=asked.layers,
        block_size=asked.block_size,
        draft_vocab=asked.draft_vocab,
        mask_token_id=asked.mask_token_id,
        markov_rank=asked.markov_rank,
        anchor_predicts=asked.anchor_predicts,
        random_start=asked.random_start,
        hard=asked.hard,
        decay=asked.decay,
    )
    draft = DRAFTS[asked.drafter](folder, corpus, shape, device)
    schedule = Schedule(
        steps=asked.steps,
        sequences=asked.sequences,
        anchors=asked.anchors,
        lr=asked.lr,
        evaluate_every=asked.evaluate_every,
        seed=asked.seed,
    )
    trainer = Trainer(draft.task, corpus, schedule, job.output / "training")
    with tqdm(total=schedule.steps, initial=trainer.step, unit=" steps", desc="training") as bar:

        def on_step(_: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

        def on_point(point: Point) -> None:
            shares = " ".join(f"{share:.2f}" for share in point.survival)
            bar.write(f"step {point.step}: {point.acceptance_length:.3f} tokens a round; right up to: {shares}")

        trainer.run(on_step, on_point)
    return draft, trainer


def _write(job: Job, draft: Draft, points: Sequence[Point]) -> None:
    """The checkpoint with its card and curves, and the same as data."""
    draft.save(job.output)
    title = f"{job.options.drafter} draft for {job.options.model}"
    report.draw_curves(points, title, job.output / "curves.png")
    facts: dict[str, object] = {
        "target": job.options.model,
        **draft.facts(),
        "steps": f"{points[-1].step:,} of {job.options.sequences} answers, {job.options.anchors} blocks each",
        "time": f"{points[-1].seconds / 60:.0f} minutes",
        "made": time.strftime("%Y-%m-%d"),
    }
    (job.output / "README.md").write_text(report.card(title, facts, points), encoding="utf-8")
    last = {"survival": points[-1].survival, "acceptance_length": points[-1].acceptance_length}
    options = {name: value for name, value in vars(job.options).items() if name not in ("output", "data", "prompts")}
    record = json.dumps({"facts": facts, "options": options, "held_out": last}, indent=1)
    (job.output / "training.json").write_text(record + "\n", encoding="utf-8")
    say(f"{job.output}: {points[-1].acceptance_length:.2f} tokens a round on held-out answers; "
         f"try: slipstream serve {job.options.model} --draft {job.output}")  # fmt: skip
