"""The engine's own step time against batch and context, on a real model: the slow part of `benchmarks.growth`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import cast

from benchmarks.growth_cases import Curve, curve, request
from engine.cluster.process import prepare_threads
from engine.config import EngineConfig, KVConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.hub.resolve import resolve
from engine.protocols import WorkerFactory
from engine.registry import WORKERS
from engine.registry import resolve as look_up

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
STEPS = 24


def engine_curves(model: str, quant: str, cache_dir: Path) -> Iterator[Curve]:
    """Milliseconds of decode steps and of whole prompts."""
    longest = max(CONTEXTS)
    config = EngineConfig(
        ModelConfig(model, quant=quant, max_model_len=longest + 256),
        SchedulerConfig(max_num_seqs=max(BATCHES), max_batched_tokens=512),
        KVConfig(memory="1GiB", prefix_cache=False),
    )
    prepare_threads(config)
    factory = cast(WorkerFactory, look_up(WORKERS, "local", "worker"))
    core = EngineCore(factory(config, resolve(model, cache_dir), lambda _phase: None), config)
    try:
        for name, sizes, measure in (
            ("a decode step, by sequences", BATCHES, partial(_decode, core, prompt=64)),
            ("a decode step, by context", CONTEXTS, partial(_decode_at, core)),
            ("a prompt, by its length", CONTEXTS, partial(_prompt, core)),
        ):
            yield curve("engine", f"{name} ({quant})", "ms", sizes, measure)
    finally:
        core.close()


def _decode(core: EngineCore, sequences: int, prompt: int) -> float:
    ids = []
    for number in range(sequences):
        asked = request(number, prompt, max_tokens=100_000)
        ids.append(asked.id)
        core.add(asked)
    while core.stats().waiting or core.step().stats.step_tokens != sequences:
        core.step()
    spent = []
    for _ in range(STEPS):
        began = time.monotonic()
        core.step()
        spent.append(time.monotonic() - began)
    _clear(core, ids)
    return 1000 * median(spent)


def _decode_at(core: EngineCore, context: int) -> float:
    return _decode(core, 1, context)


def _prompt(core: EngineCore, prompt: int) -> float:
    spent = []
    for number in range(3):
        asked, told = request(number, prompt), False
        core.add(asked)
        began = time.monotonic()
        while not told:
            told = any(update.token_ids for update in core.step().updates)
        spent.append(time.monotonic() - began)
        _clear(core, [asked.id])
    return 1000 * median(spent)


def _clear(core: EngineCore, ids: list[str]) -> None:
    core.abort(ids)
    while core.has_work():
        core.step()
