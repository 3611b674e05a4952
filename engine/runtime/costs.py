"""What steps cost on this machine: timed at start, before the first request, with requests that are made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.protocols import DraftAsk, Drafter, ForwardRunner
from engine.runtime.batch import AttentionMode, SeqInput, TreeRows

Points = tuple[tuple[int, float], ...]

COSTED = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)  # tokens of the steps that are timed
DRAFTED = (1, 2, 4, 8, 16, 32)  # requests of the draft passes that are timed
CONTEXT = 64  # tokens before these requests' drafts
TURNS = 3  # the fastest of so many counts: anything slower was disturbed


@dataclass(frozen=True, slots=True)
class Costs:
    """(tokens fed, seconds) of plain passes and of those with draft trees; (requests, seconds) of draft passes.

    Empty where there is no such pass, or its price is nobody's concern.
    """

    steps: Points = ()
    drafts: Points = ()
    trees: Points = ()

    def __str__(self) -> str:
        parts = {"": self.steps, "drafts ": self.drafts, "trees ": self.trees}
        return "; ".join(
            name + ", ".join(f"{count}: {seconds * 1e3:.1f} ms" for count, seconds in points)
            for name, points in parts.items()
            if points
        )


def measure_costs(
    config: EngineConfig, runner: ForwardRunner, drafter: Drafter | None, num_blocks: int, most: int
) -> Costs:
    """Time what the configured steps consist of; `drafter` is None where drafting needs no pass of a network.

    `most`: tokens of the longest draft.
    """
    size, draft = config.kv.block_size, config.model.draft
    steps = measure_step_costs(runner, size, num_blocks)
    trees: Points = ()
    if draft is not None and draft.tree:
        trees = measure_step_costs(runner, size, num_blocks, AttentionMode.TREE)
    if drafter is None:
        return Costs(steps, (), trees)
    return Costs(steps, measure_draft_costs(drafter, most, size, num_blocks, config.scheduler.max_num_seqs), trees)


def measure_step_costs(
    runner: ForwardRunner, block_size: int, num_blocks: int, mode: AttentionMode = AttentionMode.CAUSAL
) -> Points:
    """(tokens, seconds) of passes that score each of their tokens, never falling with their number.

    In mode TREE the tokens are a draft tree. Runs over the first blocks of the pool, so it must come before any
    request.
    """

    def seconds(tokens: int) -> float:
        tree = None
        if mode is AttentionMode.TREE:
            tree = TreeRows(0, [min(node, 1) for node in range(tokens)], [1 | 1 << node for node in range(tokens)])
        inputs = [SeqInput([0] * tokens, 0, tuple(range(-(-tokens // block_size))), tokens, tree)]
        begin = time.perf_counter()
        logits = runner.forward(inputs, range(tokens), mode)
        logits[:1, :1].tolist()  # waits for a device that runs behind
        return time.perf_counter() - begin

    return _fastest([tokens for tokens in COSTED if tokens <= num_blocks * block_size], seconds)


def measure_draft_costs(drafter: Drafter, most: int, block_size: int, num_blocks: int, max_seqs: int) -> Points:
    """(requests, seconds) of proposals of `most` tokens for each of them, never falling with their number.

    The requests are made up and share the first blocks of the pool, so it must come before any other request. They
    are dropped again.
    """
    position = min(CONTEXT, num_blocks * block_size // 2)
    blocks = tuple(range(min(num_blocks, -(-(position + most + 1) // block_size))))
    asks = [DraftAsk(f"rehearsal {i}", most, position, 1, blocks) for i in range(min(max_seqs, DRAFTED[-1]))]

    def seconds(requests: int) -> float:
        begin = time.perf_counter()
        drafter.propose(asks[:requests]).tokens[:1].tolist()
        return time.perf_counter() - begin

    for ask in asks:
        drafter.admit(ask.request_id, [0] * (position + 1))
    try:
        return _fastest([requests for requests in DRAFTED if requests <= len(asks)], seconds)
    finally:
        for ask in asks:
            drafter.drop(ask.request_id)


def _fastest(sizes: Sequence[int], seconds: Callable[[int], float]) -> Points:
    best = dict.fromkeys(sizes, float("inf"))
    for _ in range(TURNS):  # the sizes in turn, so that a disturbance does not hit all tries of one of them
        for size in sizes:
            best[size] = min(best[size], seconds(size))
    for smaller, larger in zip(reversed(sizes[:-1]), reversed(sizes[1:]), strict=True):
        best[smaller] = min(best[smaller], best[larger])  # noise only ever adds
    return tuple(best.items())
