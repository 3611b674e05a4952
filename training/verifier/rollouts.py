"""Answers to a task's prompts by block speculation with the head of the moment, scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.config import EngineConfig, VerifierConfig
from engine.core import EngineCore
from engine.errors import StepFailed
from engine.front.output import RequestOutput
from engine.protocols import VerifierHead
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import FinishReason, Request, SamplingParams, TokenEvent
from training.tasks.task import Item, Task
from training.verifier.batch import Batch, Positions
from training.verifier.record import RolloutWorker


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn: `samples` of every prompt, `prompts` prompts at once, from the task's training split."""

    prompts: int = 16
    samples: int = 4
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 0  # 0: the task's own
    seed: int = 1
    pool: int = 4096  # different prompts that are taken in turn


@dataclass(slots=True)
class HeadSlot:
    """A head that is put in later: its widths are known once the models are loaded. See `protocols.VerifierHead`."""

    min_weight: float = 0.0
    head: VerifierHead | None = None

    def weights(self, hidden: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        assert self.head is not None
        return self.head.weights(hidden, states)


@dataclass(slots=True)
class Answer:
    """One answer as it comes in."""

    text: str = ""
    tokens: int = 0

    def take(self, event: TokenEvent) -> None:
        self.text += event.text
        self.tokens = event.usage.completion_tokens


class Rollouts:
    """Batch number n is always of the same prompts and seeds, so that a run that was killed goes on as it would have.

    `head` is asked for its weights as it is at the time.
    """

    def __init__(self, config: EngineConfig, folder: Path, task: Task, sampling: Sampling, head: HeadSlot) -> None:
        """Raises ConfigError and ModelLoadError."""
        knobs = {"min_weight": head.min_weight}
        model = replace(config.model, verifier=VerifierConfig("diversed", knobs))
        config = replace(config, model=model)
        self.worker = RolloutWorker(config, folder, head)
        self._core = EngineCore(self.worker, config)
        self._tokenizer = Tokenizer.load(folder)
        self._task, self._sampling = task, sampling
        self._items = task.items("train", sampling.pool, sampling.seed)

    def __call__(self, number: int) -> Batch:
        """Batch `number` of answers."""
        plan = self._sampling
        first = number * plan.prompts
        asked = [(first + i) % len(self._items) for i in range(plan.prompts) for _ in range(plan.samples)]
        requests = [self._request(self._items[at], number, i) for i, at in enumerate(asked)]
        answers = self._answer(requests)
        rewards = [
            self._task.score(answers[request.id].text, self._items[at])
            for request, at in zip(requests, asked, strict=True)
        ]
        positions, rounds = self._positions(requests, answers)
        tokens = sum(answer.tokens for answer in answers.values())
        return Batch(positions, torch.tensor(rewards, dtype=torch.float64), torch.tensor(asked), tokens, rounds)

    def close(self) -> None:
        self._core.close()

    def _request(self, item: Item, number: int, place: int) -> Request:
        task, plan = self._task, self._sampling
        encoded = (
            self._tokenizer.encode_chat([{"role": "user", "content": item.prompt}])
            if task.chat
            else self._tokenizer.encode(item.prompt)
        )
        sampling = SamplingParams(
            max_tokens=plan.max_tokens or task.max_tokens,
            temperature=plan.temperature,
            top_k=plan.top_k,
            top_p=plan.top_p,
            stop=task.stop,
            seed=(plan.seed * 1_000_003 + number) * 4099 + place,
        )
        eos = self._tokenizer.eos_ids
        return Request(f"{number}-{place}", tuple(encoded), sampling, eos, arrival=time.monotonic())

    def _answer(self, requests: Sequence[Request]) -> dict[str, Answer]:
        outputs = {request.id: RequestOutput(request, self._tokenizer) for request in requests}
        answers = {request.id: Answer() for request in requests}
        for request in requests:
            self._core.add(request)
        while self._core.has_work():
            for update in self._core.step().updates:
                output = outputs.get(update.request_id)
                if output is None:  # over by a stop string
                    continue
                if update.finish is FinishReason.ERROR:
                    raise StepFailed(update.error or "the target failed")
                event = output.take(update, time.monotonic())
                if event is None:
                    continue
                answers[event.request_id].take(event)
                if event.finish is not None:
                    del outputs[event.request_id]
                    if update.finish is None:
                        self._core.abort((event.request_id,))
        return answers

    def _positions(self, requests: Sequence[Request], answers: dict[str, Answer]) -> tuple[Positions, int]:
        """The verified positions whose tokens belong to the answers, or ended them."""
        found, tokens, rounds = self.worker.recorder.take()
        assert found is not None, "nothing was drafted"
        index = {request.id: i for i, request in enumerate(requests)}
        ends = {request.id: len(request.prompt_ids) + answers[request.id].tokens for request in requests}
        kept = torch.tensor([place <= ends[request_id] for request_id, place in tokens])
        sequence = torch.tensor([index[request_id] for request_id, _ in tokens])
        return replace(found, sequence=sequence).take(kept), rounds
