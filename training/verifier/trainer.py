"""The training loop of a head: roll out, score, update; checkpoints without pickles, a log, curves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ConfigError
from training.verifier.batch import Batch
from training.verifier.objective import Goals, loss, parts
from training.verifier.probe import Probe


@dataclass(frozen=True, slots=True)
class Schedule:
    """`updates` batches, each one used for `epochs` steps of AdamW.

    `target` > 0 is an acceptance rate: the price of a rejection goes up while the mean acceptance is below, and down
    while it is above, by the factor exp(gain * difference) an update. Otherwise the price stays what it is.
    """

    updates: int
    epochs: int = 4
    lr: float = 3e-3
    weight_decay: float = 0.01
    price: float = 0.1
    target: float = 0.0
    gain: float = 6.0
    momentum: float = 0.9  # of the running baseline, for prompts that are asked once
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class Point:
    """One update. Means over its batch before the head was changed; `seconds` of all runs together."""

    update: int
    seconds: float
    reward: float
    acceptance: float
    per_round: float  # drafted tokens that stood, by round
    bias: float
    kl: float
    weight: float
    entropy: float
    price: float


class Trainer:
    """Trains a probe on batches from `roll_out(number)`; a second run in the same folder goes on with the first."""

    def __init__(
        self, probe: Probe, roll_out: Callable[[int], Batch], schedule: Schedule, goals: Goals, folder: Path
    ) -> None:
        """Raises ConfigError for a state that is no such head's."""
        self._probe, self._roll_out, self._schedule, self._goals = probe, roll_out, schedule, goals
        self._state, self._log = folder / "state.safetensors", folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        decay = {"params": [probe.direction], "weight_decay": schedule.weight_decay}
        plain = {"params": [probe.bias], "weight_decay": 0.0}
        self._optimizer = torch.optim.AdamW([decay, plain], lr=schedule.lr)
        self.points: list[Point] = []
        self._price, self._baseline = schedule.price, float("nan")
        if self._state.exists():
            self._resume()

    def run(self, on_point: Callable[[Point], None]) -> None:
        """Train to the schedule's end."""
        begin = time.monotonic() - (self.points[-1].seconds if self.points else 0.0)
        while len(self.points) < self._schedule.updates:
            batch = self._roll_out(len(self.points))
            if not self._probe.fitted:
                self._probe.fit(batch.positions.hidden, batch.positions.states)
            point = self._update(batch)
            self.points.append(replace(point, seconds=round(time.monotonic() - begin, 2)))
            self._save()
            on_point(self.points[-1])

    def _update(self, batch: Batch) -> Point:
        found, schedule = batch.positions, self._schedule
        advantage = self._advantages(batch)[found.sequence]
        with torch.no_grad():
            before = parts(self._weights(batch), found, self._goals.min_weight)
        acceptance = float(before.acceptance)
        if schedule.target:
            step = torch.tensor(schedule.gain * (schedule.target - acceptance)).exp()
            self._price = float((self._price * step).clamp(1e-4, 100.0))
        for _ in range(schedule.epochs):
            now = parts(self._weights(batch), found, self._goals.min_weight)
            value = loss(now, before.log_v, advantage, self._price, self._goals)
            self._optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(self._probe.parameters(), schedule.clip)
            self._optimizer.step()
        stood = float(found.stood.double().sum())
        return Point(
            update=len(self.points) + 1,
            seconds=0.0,
            reward=round(float(batch.rewards.mean()), 4),
            acceptance=round(acceptance, 4),
            per_round=round(stood / max(1, batch.rounds), 4),
            bias=round(float(before.bias), 5),
            kl=round(float(before.kl), 5),
            weight=round(float(before.weight), 4),
            entropy=round(float(before.entropy), 4),
            price=round(self._price, 5),
        )

    def _weights(self, batch: Batch) -> Tensor:
        found = batch.positions
        weights: Tensor = self._probe(found.hidden, found.states, found.place)
        return weights

    def _advantages(self, batch: Batch) -> Tensor:
        """R - b [S]: b is the mean of the other answers to the same prompt, or the running mean where it has none."""
        rewards, prompts = batch.rewards, batch.prompts
        same = prompts[:, None] == prompts[None, :]
        same.fill_diagonal_(False)
        others = same.sum(1)
        mean = float(rewards.mean())
        running = mean if self._baseline != self._baseline else self._baseline  # NaN: the first batch
        keep = self._schedule.momentum
        self._baseline = keep * running + (1 - keep) * mean
        alone = torch.full_like(rewards, running)
        return rewards - torch.where(others > 0, (same.double() @ rewards) / others.clamp(min=1), alone)

    def _save(self) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self._probe.state_dict().items()}
        for index, parameter in enumerate(self._probe.parameters()):
            tensors |= {f"adam.{index}.{key}": value for key, value in self._optimizer.state[parameter].items()}
        facts = {"price": self._price, "baseline": self._baseline, "updates": len(self.points)}
        part = self._state.with_suffix(".part")
        save_file(tensors, part, {"facts": json.dumps(facts)})
        self._log.write_text("".join(json.dumps(asdict(point)) + "\n" for point in self.points), encoding="utf-8")
        os.replace(part, self._state)

    def _resume(self) -> None:
        tensors = load_file(self._state)
        with safe_open(self._state, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("adam.")}
        shapes = {name: tensor.shape for name, tensor in self._probe.state_dict().items()}
        if {name: tensor.shape for name, tensor in own.items()} != shapes:
            raise ConfigError(f"{self._state} is the state of another head: start in an empty folder")
        self._probe.load_state_dict(own)
        for index, parameter in enumerate(self._probe.parameters()):
            prefix = f"adam.{index}."
            moments = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self._optimizer.state[parameter] = moments
        self._price, self._baseline = facts["price"], facts["baseline"]
        lines = self._log.read_text(encoding="utf-8").splitlines()
        self.points = [Point(**json.loads(line)) for line in lines[: facts["updates"]]]
