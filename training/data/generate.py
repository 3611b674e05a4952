"""The target answers prompts through our own engine; answers and hidden states go to shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core import EngineCore
from engine.errors import StepFailed
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR, configure
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import FinishReason, Request, SamplingParams, StepReport
from training.data import shards
from training.data.prompts import Prompt
from training.data.record import RecordingWorker


@dataclass(frozen=True, slots=True)
class Plan:
    """How to answer. Greedy answers but for every `sampled_every`-th, which is drawn at `temperature`."""

    taps: tuple[int, ...]
    max_tokens: int = 160
    max_prompt: int = 256
    sampled_every: int = 4
    temperature: float = 0.8
    concurrency: int = 128
    shard_tokens: int = 20000
    seed: int = 0
    threads: int | None = None
    memory: str = "2GiB"  # of the KV pool


def generate(
    model: str, prompts: Sequence[Prompt], folder: Path, plan: Plan, on_answers: Callable[[int], object]
) -> None:
    """Answer `prompts` into shards in `folder`, going on behind those that are there already.

    `on_answers(count)` hears of answers as they are kept, or found. Prompts are known by their index, so the same ones
    in the same order must be given again. Those that are too long are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"path": model, "max_num_seqs": plan.concurrency, "max_batched_tokens": 512, "memory": plan.memory}
    config = configure({**settings, "threads": plan.threads})
    source = resolve(config.model.path, CACHE_DIR.expanduser())
    worker = RecordingWorker(config, source, plan.taps)
    run = _Run(EngineCore(worker, config), worker, folder, plan, on_answers)
    try:
        run.answer(_requests(prompts, Tokenizer.load(source), plan, run.found()))
    finally:
        run.core.close()


class _Run:
    """Requests that are under way, and answers that wait for their shard."""

    def __init__(
        self, core: EngineCore, worker: RecordingWorker, folder: Path, plan: Plan, on_answers: Callable[[int], object]
    ) -> None:
        self.core = core
        self._worker, self._folder, self._plan, self._on_answers = worker, folder, plan, on_answers
        self._running: dict[str, tuple[Request, list[int]]] = {}
        self._ready: list[shards.Sample] = []
        self._number = shards.next_number(folder)

    def found(self) -> set[int]:
        """Indices of the prompts that are answered already."""
        found = {int(name) for path in shards.paths(self._folder) for name in shards.names_of(path)}
        self._on_answers(len(found))
        return found

    def answer(self, requests: Iterator[Request]) -> None:
        more = True
        while more or self.core.has_work():
            while more and len(self._running) < self._plan.concurrency:
                request = next(requests, None)
                more = request is not None
                if request is not None:
                    self._running[request.id] = (request, [])
                    self.core.add(request)
            if self.core.has_work():
                self._take(self.core.step())
        if self._ready:
            self._write()

    def _take(self, report: StepReport) -> None:
        for update in report.updates:
            self._running[update.request_id][1].extend(update.token_ids)
            if update.finish is FinishReason.ERROR:
                raise StepFailed(update.error or "the target failed")
        for request_id, states in self._worker.take().items():  # finished, a step ago
            request, output = self._running.pop(request_id)
            tokens = [*request.prompt_ids, *output]
            self._ready.append(shards.Sample(request_id, tokens, len(request.prompt_ids), states))
        if sum(len(sample.tokens) for sample in self._ready) >= self._plan.shard_tokens:
            self._write()

    def _write(self) -> None:
        shards.write(shards.path(self._folder, self._number), self._ready, self._plan.taps)
        self._number += 1
        self._on_answers(len(self._ready))
        self._ready = []


def _requests(prompts: Sequence[Prompt], tokenizer: Tokenizer, plan: Plan, done: set[int]) -> Iterator[Request]:
    for index, prompt in enumerate(prompts):
        if index in done:
            continue
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt.text}])
        if len(ids) > plan.max_prompt:
            continue
        drawn = index % plan.sampled_every == plan.sampled_every - 1
        temperature = plan.temperature if drawn else 0.0
        sampling = SamplingParams(max_tokens=plan.max_tokens, temperature=temperature, seed=plan.seed + index)
        yield Request(str(index), tuple(ids), sampling, tokenizer.eos_ids, arrival=time.monotonic())
