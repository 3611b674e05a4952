"""The target answers prompts through our own engine; answers and hidden states go to shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from engine.core import EngineCore
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR, configure
from engine.protocols import Worker
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import Request, SamplingParams
from training.data import shards
from training.data.record import RecordingWorker


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message, and what kind of task it is."""

    text: str
    kind: str


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


def generate(
    model: str, prompts: Iterable[Prompt], folder: Path, plan: Plan, on_shard: Callable[[int, int, float], None]
) -> None:
    """Answer `prompts` into shards in `folder`, going on behind those that are there already.

    `on_shard(answers, tokens, seconds)` hears of every shard written. A prompt is skipped by its index, so the same
    prompts in the same order must be given again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = configure({"path": model, "max_num_seqs": plan.concurrency, "max_batched_tokens": 512, "memory": "2GiB"})
    source = resolve(config.model.path, CACHE_DIR.expanduser())
    tokenizer = Tokenizer.load(source)
    worker_class = type("TapWorker", (RecordingWorker,), {"TAPS": plan.taps})
    worker = worker_class(config, source, lambda _: None)
    core = EngineCore(cast(Worker, worker), config)
    try:
        _run(core, worker, tokenizer, prompts, folder, plan, on_shard)
    finally:
        core.close()


def _run(core, worker, tokenizer, prompts, folder, plan, on_shard) -> None:
    done = _answered(folder)
    feed = _requests(prompts, tokenizer, plan, done)
    running: dict[str, tuple[Request, list[int], str]] = {}
    finished: dict[str, shards.Sample] = {}
    ready: list[shards.Sample] = []
    number, begin, exhausted = len(shards.paths(folder)), time.monotonic(), False
    while True:
        while not exhausted and len(running) < plan.concurrency:
            item = next(feed, None)
            if item is None:
                exhausted = True
                break
            request, kind = item
            running[request.id] = (request, [], kind)
            core.add(request)
        if not core.has_work():
            break
        report = core.step()
        for update in report.updates:
            if update.request_id not in running:
                continue
            request, output, kind = running[update.request_id]
            output += update.token_ids
            if update.finish is not None:
                del running[update.request_id]
                finished[request.id] = (request, output, kind)
        for request_id in list(finished):
            if request_id in worker.recorded:
                request, output, kind = finished.pop(request_id)
                states = worker.recorded.pop(request_id)
                tokens = [*request.prompt_ids, *output]
                ready.append(shards.Sample(tokens, len(request.prompt_ids), f"{kind}:{request_id}", states))
        total = sum(len(sample.tokens) for sample in ready)
        if total >= plan.shard_tokens or (ready and not core.has_work()):
            shards.write(folder / f"shard-{number:05d}.safetensors", ready, plan.taps)
            number += 1
            on_shard(len(ready), total, time.monotonic() - begin)
            ready = []


def _answered(folder: Path) -> set[int]:
    """Indices of the prompts that are in the shards already."""
    from safetensors import safe_open

    found: set[int] = set()
    for path in shards.paths(folder):
        with safe_open(path, "pt") as file:
            found.update(int(kind.rsplit(":", 1)[1]) for kind in file.metadata()["kinds"].split(","))
    return found


def _requests(
    prompts: Iterable[Prompt], tokenizer: Tokenizer, plan: Plan, done: set[int]
) -> Iterator[tuple[Request, str]]:
    for index, prompt in enumerate(prompts):
        if index in done:
            continue
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt.text}])
        if len(ids) > plan.max_prompt:
            continue
        drawn = index % plan.sampled_every == plan.sampled_every - 1
        sampling = SamplingParams(
            max_tokens=plan.max_tokens, temperature=plan.temperature if drawn else 0.0, seed=plan.seed + index
        )
        yield Request(str(index), tuple(ids), sampling, tokenizer.eos_ids, arrival=time.monotonic()), prompt.kind
