"""The training loop of a masked-diffusion model: warm-up, plateau, decay; checkpoints that survive a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engine.errors import ConfigError
from training.diffusion import loss
from training.diffusion.batches import Sample, Sheets
from training.diffusion.loss import Objective, Scored
from training.diffusion.network import Network

ATTENTION = ("full", "block_causal", "both")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast. `attention` both: every other step is of the other objective, for a shared start.

    The learning rate rises over `warmup` steps, stays, and falls in a line to zero over the last `decay` share of the
    steps: without a decay the run may be stopped anywhere and gone on from.
    """

    attention: str
    steps: int
    sequences: int = 12
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.0
    weight_decay: float = 0.05
    clip: float = 1.0
    evaluate_every: int = 250
    save_every: int = 100
    seed: int = 1
    muon: bool = True
    bfloat16: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup if self.warmup else 1.0, falling)


@dataclass(frozen=True, slots=True)
class Point:
    """Where training stands. Held-out cross entropy in nats per hidden token, and the share of them that are right."""

    step: int
    seconds: float  # of all runs together
    tokens: int  # answer tokens that were hidden and learned from, padding aside
    loss: float
    held_out: dict[str, tuple[float, float]]  # attention -> (cross entropy, share right)

    @classmethod
    def read(cls, line: str) -> Point:
        """A point as it was written in JSON."""
        values = json.loads(line)
        return cls(**{**values, "held_out": {name: tuple(pair) for name, pair in values["held_out"].items()}})


class Trainer:
    """Trains a network; `folder` keeps its state, and a second run goes on where the first was killed."""

    def __init__(
        self,
        network: Network,
        sheets: Sheets,
        objective: Objective,
        schedule: Schedule,
        folder: Path,
        tests: int = 96,
    ) -> None:
        """`tests`: held-out sheets for the points. Raises ConfigError where the folder's run had other options."""
        self.network, self._sheets = network, sheets
        self._objective, self.schedule = objective, schedule
        self._state, self._log = folder / "state.safetensors", folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._optimizers = _optimizers(network, schedule)
        self._test = sheets.samples(Random("held out"), tests, test=True)
        self.points: list[Point] = []
        self._seconds, self._tokens = 0.0, 0
        self.step = self._resume() if self._state.exists() else 0

    def run(self, on_step: Callable[[int, float], None], on_point: Callable[[Point], None]) -> None:
        """Train to the schedule's end. `on_step(steps done, loss)` after each step."""
        plan = self.schedule
        begin, total, count = time.monotonic() - self._seconds, 0.0, 0
        while self.step < plan.steps:
            value = self._train()
            self.step += 1
            total, count = total + value, count + 1
            on_step(self.step, value)
            last = self.step == plan.steps
            self._seconds = time.monotonic() - begin
            if self.step % plan.evaluate_every == 0 or last:
                self.points.append(Point(self.step, self._seconds, self._tokens, total / count, self.evaluate()))
                total, count = 0.0, 0
                on_point(self.points[-1])
            if self.step % plan.save_every == 0 or last:
                self._save()

    def evaluate(self) -> dict[str, tuple[float, float]]:
        """Held-out cross entropy and share right, under the same masks every time."""
        found = {}
        for attention in ("full", "block_causal") if self.schedule.attention == "both" else (self.schedule.attention,):
            parts = []
            for start in range(0, len(self._test), 16):
                with torch.no_grad():
                    part = self._test[start : start + 16]
                    parts.append(self._score(attention, part, Random(start), torch.Generator().manual_seed(start)))
            count = sum(part.count for part in parts)
            found[attention] = (sum(part.entropy for part in parts) / count, sum(part.right for part in parts) / count)
        return found

    def _score(self, attention: str, samples: list[Sample], random: Random, generator: torch.Generator) -> Scored:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.schedule.bfloat16):
            if attention == "full":
                batch = self._sheets.on_canvas(samples, random)
                return loss.full(self.network, batch, self._objective, generator)
            batch = self._sheets.in_blocks(samples, self._objective.block)
            return loss.block_causal(self.network, batch, self._objective, generator)

    def _train(self) -> float:
        plan = self.schedule
        attention = ATTENTION[self.step % 2] if plan.attention == "both" else plan.attention
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(self.step)
        seed = Random(f"{plan.seed}/{self.step}")
        samples = self._sheets.step(plan.seed, self.step, plan.sequences)
        scored = self._score(attention, samples, seed, torch.Generator().manual_seed(seed.getrandbits(40)))
        scored.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), plan.clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._tokens += scored.count
        return float(scored.loss.detach())

    def _save(self) -> None:
        """Weights, moments and the place in the schedule, whole or not at all; no pickles."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for name, parameter, optimizer in self._owned():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
        meta = {"step": str(self.step), "tokens": str(self._tokens), "seconds": str(self._seconds)}
        meta |= {"schedule": json.dumps(_kept(self.schedule)), "objective": json.dumps(asdict(self._objective))}
        part = self._state.with_suffix(".part")
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, meta)
        os.replace(part, self._state)
        lines = "".join(json.dumps(asdict(point)) + "\n" for point in self.points)
        self._log.write_text(lines, encoding="utf-8")

    def _owned(self) -> list[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Every parameter by name, with the optimizer that has it."""
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        groups = ((optimizer, group) for optimizer in self._optimizers for group in optimizer.param_groups)
        return [(names[one], one, optimizer) for optimizer, group in groups for one in group["params"]]

    def _resume(self) -> int:
        with safe_open(self._state, "pt") as file:
            meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        for key, plan in (("schedule", _kept(self.schedule)), ("objective", asdict(self._objective))):
            if json.loads(meta[key]) != plan:
                raise ConfigError(f"{self._state} was made under another {key}; take it, or another folder")
        weights = {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
        self.network.load_state_dict(weights)
        for name, parameter, optimizer in self._owned():
            keys = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
            found = {key: tensors[f"optimizer.{key}.{name}"] for key in keys if f"optimizer.{key}.{name}" in tensors}
            optimizer.state[parameter] = found
        self._seconds, self._tokens = float(meta["seconds"]), int(meta["tokens"])
        if self._log.exists():
            lines = self._log.read_text(encoding="utf-8").splitlines()
            self.points = [point for point in map(Point.read, lines) if point.step <= int(meta["step"])]
        return int(meta["step"])


def _kept(schedule: Schedule) -> dict[str, object]:
    """What a run that goes on must share with the one that was killed: all but the length of a plateau."""
    plan = asdict(schedule)
    return plan if schedule.decay else plan | {"steps": 0}


def _optimizers(network: Network, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon`, the layers' matrices get Muon's orthogonal steps (https://kellerjordan.github.io/posts/muon)."""
    matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and schedule.muon and "embed" not in name]
    others = [parameter for parameter in network.parameters() if not any(parameter is one for one in matrices)]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, schedule.lr, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    ]
    if matrices:
        rates = {"lr": schedule.lr, "weight_decay": schedule.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        made.append(torch.optim.Muon(matrices, **rates))  # type: ignore[arg-type]
    return made
