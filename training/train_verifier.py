"""`slipstream train-verifier`: from a target, a draft and a task to a head that `diversed` takes.

Roll-outs are real block speculation at a temperature with the head of the moment; a run that was killed goes on where
it was. See `training/verifier/objective.py` for what is optimised.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.hub.drafts import settle_draft
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR, configure
from engine.models.fingerprint import fingerprint
from engine.models.verifier_head import HeadSpec, save_head
from training.options import positive, say
from training.tasks.loading import NAMES, load
from training.tasks.scoring import KINDS
from training.tasks.task import Task
from training.verifier import report
from training.verifier.objective import Goals
from training.verifier.probe import Probe
from training.verifier.rollouts import HeadSlot, Rollouts, Sampling
from training.verifier.trainer import Point, Schedule, Trainer

DESCRIPTION = "Train a head for the verifier `diversed`: for one target, one draft and one task."


def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    _check(asked)
    torch.manual_seed(asked.seed)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    task = load(asked.task, asked.score, chat=not asked.plain, max_tokens=asked.max_tokens or 256)
    cache = CACHE_DIR.expanduser()
    config = settle_draft(_config(asked), cache, say)
    folder = resolve(config.model.path, cache, say)
    slot = HeadSlot(asked.min_weight)
    rollouts = Rollouts(config, folder, task, _sampling(asked), slot)
    worker = rollouts.worker
    slot.head = probe = Probe(worker.draft_width, worker.target_width, worker.places, asked.start)
    try:
        points = _train(asked, probe, rollouts)
    finally:
        rollouts.close()
    draft = config.model.draft
    assert draft is not None
    pair = HeadSpec(
        target_width=worker.target_width,
        draft_width=worker.draft_width,
        places=worker.places,
        target=fingerprint(folder),
        draft=fingerprint(resolve(draft.path, cache)),
        task=task.name,
    )
    _write(asked, task, probe, pair, points)
    return 0


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser("slipstream train-verifier", description=DESCRIPTION)
    new.add_argument("output", help="folder of the head; training's own state goes to OUTPUT/training")
    new.add_argument("--model", default="demo", help="the target, as `slipstream serve` takes it (default: demo)")
    new.add_argument("--draft", required=True, help="the draft's checkpoint: a folder or a hub id")
    task = new.add_argument_group("task")
    task.add_argument("--task", required=True, help=(
        f"{', '.join(NAMES)}, or a JSON-lines file with prompt and reference (or tests) in each line"))  # fmt: skip
    task.add_argument("--score", default="", choices=("", *KINDS), help=(
        "how a file's answers are scored (default: number, or code where there are tests). "
        "code RUNS what the model wrote, in a process of its own that is no wall against malice"))  # fmt: skip
    task.add_argument("--plain", action="store_true", help="a file's prompts are text to continue, not messages")
    task.add_argument("--max-tokens", type=int, default=0, help="of an answer (default: the task's)")
    goal = new.add_argument_group("goal")
    goal.add_argument("--reward", choices=("task", "none"), default="task", help=(
        "none: no answer is scored; the head is distilled to lose least likelihood under the target"))  # fmt: skip
    goal.add_argument("--distill", type=float, default=None, help=(
        "weight of KL(emitted law, target's law) per position (default: 0.1 beside a reward, 1 without)"))  # fmt: skip
    goal.add_argument("--target-acceptance", type=float, default=0.0, help=(
        "mean acceptance rate of a verified position to steer to; 0: keep the price as it is"))  # fmt: skip
    goal.add_argument("--price", type=float, default=0.1, help="lambda: of a rejection; where steered, at the start")
    goal.add_argument("--min-weight", type=float, default=0.0, help="least weight of the target in the roll-outs")
    goal.add_argument("--entropy-floor", type=float, default=0.1, help="of w on average, in nats, at most 0.69")
    rolling = new.add_argument_group("roll-outs")
    rolling.add_argument("--prompts", type=positive, default=16, help="in one batch")
    rolling.add_argument("--samples", type=positive, default=4, help="of each of them")
    rolling.add_argument("--temperature", type=float, default=0.8)
    rolling.add_argument("--top-k", type=int, default=0)
    rolling.add_argument("--top-p", type=float, default=1.0)
    rolling.add_argument("--max-draft", type=positive, default=None, help="tokens (default: all that the draft offers)")
    rolling.add_argument("--memory", default="512MiB", help="of the KV pool")
    learn = new.add_argument_group("training")
    learn.add_argument("--updates", type=positive, default=40)
    learn.add_argument("--epochs", type=positive, default=4, help="steps of AdamW on each batch")
    learn.add_argument("--lr", type=float, default=3e-3)
    learn.add_argument("--start", type=float, default=0.9, help="the head's weight before it has learned anything")
    learn.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    learn.add_argument("--seed", type=int, default=1)
    return new


def _check(asked: argparse.Namespace) -> None:
    """Raises ConfigError that names the option."""
    bounds = {
        "temperature": (1e-3, 10.0, "a greedy roll-out explores nothing"),
        "target_acceptance": (0.0, 0.999, "it is a share of verified positions"),
        "price": (0.0, 1e3, "a negative one would pay for rejections"),
        "min_weight": (0.0, 0.999, "at 1 there is nothing to learn"),
        "entropy_floor": (0.0, 0.69, "no entropy of two outcomes is above ln 2"),
        "start": (0.01, 0.99, "the head starts inside (0, 1)"),
        "lr": (1e-8, 1.0, "it is a learning rate"),
    }
    for name, (low, high, reason) in bounds.items():
        if not low <= getattr(asked, name) <= high:
            raise ConfigError(f"--{name.replace('_', '-')} must be between {low:g} and {high:g}: {reason}")


def _config(asked: argparse.Namespace) -> EngineConfig:
    size = asked.prompts * asked.samples
    draft: dict[str, object] = {"path": asked.draft, "max_draft": asked.max_draft}
    settings: dict[str, object] = {
        "path": asked.model,
        "pipeline": "speculative",
        "draft": draft,
        "max_num_seqs": min(size, 128),
        "max_batched_tokens": 1024,
        "memory": asked.memory,
    }
    return configure({**settings, "threads": asked.threads} if asked.threads else settings)


def _sampling(asked: argparse.Namespace) -> Sampling:
    return Sampling(
        prompts=asked.prompts,
        samples=asked.samples,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        max_tokens=asked.max_tokens,
        seed=asked.seed,
    )


def _train(asked: argparse.Namespace, probe: Probe, rollouts: Rollouts) -> list[Point]:
    rewarded = asked.reward == "task"
    distill = asked.distill if asked.distill is not None else (0.1 if rewarded else 1.0)
    goals = Goals(float(rewarded), distill, asked.entropy_floor, min_weight=asked.min_weight)
    schedule = Schedule(asked.updates, asked.epochs, asked.lr, price=asked.price, target=asked.target_acceptance)
    trainer = Trainer(probe, rollouts, schedule, goals, Path(asked.output) / "training")
    with tqdm(total=schedule.updates, initial=len(trainer.points), unit=" updates", desc="training") as bar:

        def on_point(point: Point) -> None:
            bar.update()
            bar.write(
                f"update {point.update}: score {point.reward:.3f}, acceptance {point.acceptance:.3f}, "
                f"bias {point.bias:.4f}, mean weight {point.weight:.3f}, price {point.price:.3f}"
            )

        trainer.run(on_point)
    return trainer.points


def _write(asked: argparse.Namespace, task: Task, probe: Probe, spec: HeadSpec, points: Sequence[Point]) -> None:
    """The head with its card and curves, and the same as data."""
    output = Path(asked.output)
    save_head(output, spec, probe.folded())
    title = f"Verifier head for {asked.model}, its draft {Path(asked.draft).name} and the task {task.name}"
    report.draw_curves(points, title, output / "curves.png")
    last = points[-1]
    facts: dict[str, object] = {
        "target": asked.model,
        "draft": Path(asked.draft).name,
        "task": f"{task.name}, scored by {task.kind}",
        "goal": report.goal(asked.reward, asked.distill, asked.target_acceptance, asked.price),
        "roll-outs": f"{last.update} updates of {asked.prompts} prompts, {asked.samples} answers each, "
        f"temperature {asked.temperature:g}, drafts of up to {spec.places} tokens",
        "inputs": f"{spec.draft_width} of the draft, {spec.target_width} of the target, {spec.places} places",
        "time": f"{last.seconds / 60:.0f} minutes",
        "made": time.strftime("%Y-%m-%d"),
    }
    (output / "README.md").write_text(report.card(title, facts, points), encoding="utf-8")
    options = {name: value for name, value in vars(asked).items() if name not in ("output", "model", "draft", "task")}
    record = {"facts": facts, "options": options, "points": [asdict(point) for point in points]}
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"{output}: score {last.reward:.3f} at an acceptance of {last.acceptance:.3f}; "
         f"try: slipstream serve {asked.model} --draft {asked.draft} --verifier-head {output}")  # fmt: skip
