"""From names in a configuration to a pipeline over a runner, and what its steps cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from engine.config import ModelConfig
from engine.protocols import Drafter, ForwardRunner, Pipeline, Verifier
from engine.registry import DRAFTERS, PIPELINES, VERIFIERS, resolve
from engine.runtime.batch import SeqInput

COSTED = (1, 2, 4, 8, 16, 32, 64)  # tokens of the steps that are timed
TURNS = 3  # the fastest of so many counts: anything slower was disturbed


def build_pipeline(config: ModelConfig, runner: ForwardRunner) -> Pipeline:
    """The configured pipeline. Raises ConfigError for a name that no table knows."""
    kind = resolve(PIPELINES, config.pipeline, "pipeline")
    if config.draft is None:
        return cast(Callable[[ForwardRunner], Pipeline], kind)(runner)
    drafter = cast(Callable[[], Drafter], resolve(DRAFTERS, config.draft.drafter, "drafter"))()
    verifier = cast(Callable[[], Verifier], resolve(VERIFIERS, config.verifier.name, "verifier"))()
    speculative = cast(Callable[[ForwardRunner, Drafter, Verifier, int], Pipeline], kind)
    return speculative(runner, drafter, verifier, config.draft.max_draft or drafter.most)


def measure_step_costs(runner: ForwardRunner, block_size: int, num_blocks: int) -> tuple[tuple[int, float], ...]:
    """(tokens, seconds) of passes that score each of their tokens, never falling with their number.

    Runs over the first blocks of the pool, so it must come before any request.
    """
    sizes = [tokens for tokens in COSTED if tokens <= num_blocks * block_size]
    best = dict.fromkeys(sizes, float("inf"))
    for _ in range(TURNS):  # the sizes in turn, so that a disturbance does not hit all tries of one of them
        for tokens in sizes:
            inputs = [SeqInput([0] * tokens, 0, tuple(range(-(-tokens // block_size))), tokens)]
            best[tokens] = min(best[tokens], _seconds(runner, inputs, tokens))
    for smaller, larger in zip(reversed(sizes[:-1]), reversed(sizes[1:]), strict=True):
        best[smaller] = min(best[smaller], best[larger])  # noise only ever adds
    return tuple(best.items())


def _seconds(runner: ForwardRunner, inputs: list[SeqInput], rows: int) -> float:
    begin = time.perf_counter()
    logits = runner.forward(inputs, range(rows))
    logits[:1, :1].tolist()  # waits for a device that runs behind
    return time.perf_counter() - begin
