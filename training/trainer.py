"""The training loop: schedule, checkpoints that survive a kill, held-out acceptance."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engine.errors import ConfigError
from training.batches import Batch, Corpus


class Task(Protocol):
    """A draft network and its loss."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def columns(self) -> torch.Tensor:
        """The columns of the stored hidden states that its batches hold."""
        ...

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean loss; right and inside [blocks, k] bool: was the label the likeliest token, and is there one."""
        ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast. One step takes `sequences` samples with up to `anchors` blocks each."""

    steps: int
    sequences: int = 8
    anchors: int = 32
    lr: float = 1e-3
    warmup: float = 0.04
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate_every: int = 100
    save_every: int = 100
    seed: int = 1

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear start, then a cosine down to a fiftieth."""
        start = max(1.0, min(100.0, self.warmup * self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / start) * (0.02 + 0.98 * cosine)


@dataclass(frozen=True, slots=True)
class Point:
    """Where training stands. `survival[j]`: share of held-out blocks whose first j + 1 tokens were all right."""

    step: int
    seconds: float  # of all runs together
    loss: float
    acceptance_length: float  # 1 + sum of survival: tokens of a round, if every block were verified whole
    survival: tuple[float, ...]


class Trainer:
    """Trains a task; `folder` keeps its state, and a second run goes on where the first was killed."""

    def __init__(self, task: Task, corpus: Corpus, schedule: Schedule, folder: Path) -> None:
        self._task, self._corpus, self._schedule = task, corpus, schedule
        self._state, self._log = folder / "state.safetensors", folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        rates = {"lr": schedule.lr, "betas": (0.9, 0.95), "weight_decay": schedule.weight_decay}
        self._optimizer = torch.optim.AdamW(task.network.parameters(), **rates)  # type: ignore[arg-type]
        self.points: list[Point] = []
        self._seconds = 0.0
        self.step = self._resume() if self._state.exists() else 0

    def run(self, on_step: Callable[[int, float], None], on_point: Callable[[Point], None]) -> None:
        """Train to the schedule's end. `on_step(steps done, loss)` after each step."""
        plan = self._schedule
        batches = self._corpus.epochs(plan.sequences, plan.anchors, self._task.columns, plan.seed, self.step)
        begin, total, count = time.monotonic() - self._seconds, 0.0, 0
        while self.step < plan.steps:
            loss = self._train(next(batches))
            self.step += 1
            total, count = total + loss, count + 1
            on_step(self.step, loss)
            last = self.step == plan.steps
            self._seconds = time.monotonic() - begin
            if self.step % plan.evaluate_every == 0 or last:
                self.points.append(Point(self.step, self._seconds, total / count, *self.evaluate()))
                total, count = 0.0, 0
                on_point(self.points[-1])
            if self.step % plan.save_every == 0 or last:
                self._save()

    def evaluate(self, most: int = 96) -> tuple[float, tuple[float, ...]]:
        """Acceptance length and survival by position over blocks of held-out answers, the same ones every time."""
        hits = []
        entries = self._corpus.held_out[:most]
        with torch.no_grad():
            for start in range(0, len(entries), self._schedule.sequences):
                part = entries[start : start + self._schedule.sequences]
                seeded = torch.Generator().manual_seed(start)
                batch = self._corpus.batch(part, self._schedule.anchors, self._task.columns, seeded)
                hits.append(self._task.loss(batch)[1])
        survival = torch.cat(hits).float().cumprod(1).mean(0)
        return 1.0 + float(survival.sum()), tuple(round(value, 4) for value in survival.tolist())

    def _train(self, batch: Batch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(self.step)
        loss, _, _ = self._task.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._task.network.parameters(), self._schedule.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _save(self) -> None:
        """Weights, moments and the place in the schedule, whole or not at all; no pickles."""
        tensors = {f"network.{name}": value for name, value in self._task.network.state_dict().items()}
        for name, parameter in self._task.network.named_parameters():
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
        meta = {"step": str(self.step), "schedule": json.dumps(asdict(self._schedule)), "seconds": str(self._seconds)}
        part = self._state.with_suffix(".part")
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, meta)
        os.replace(part, self._state)
        lines = "".join(json.dumps(asdict(point)) + "\n" for point in self.points)
        self._log.write_text(lines, encoding="utf-8")

    def _resume(self) -> int:
        with safe_open(self._state, "pt") as file:
            meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        if json.loads(meta["schedule"]) != asdict(self._schedule):
            raise ConfigError(f"{self._state} was made under another schedule; take it, or another folder")
        weights = {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
        self._task.network.load_state_dict(weights)
        for name, parameter in self._task.network.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {key: tensors[f"optimizer.{key}.{name}"] for key in keys if f"optimizer.{key}.{name}" in tensors}
            device = parameter.device
            self._optimizer.state[parameter] = {k: t if k == "step" else t.to(device) for k, t in found.items()}
        step = int(meta["step"])
        self._seconds = float(meta["seconds"])
        if self._log.exists():
            read = [json.loads(line) for line in self._log.read_text(encoding="utf-8").splitlines()]
            self.points = [Point(**p | {"survival": tuple(p["survival"])}) for p in read if p["step"] <= step]
        return step
