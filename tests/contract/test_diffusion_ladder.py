"""The equality ladder over diffusion models: whatever happens around a request, its tokens are the same.

One published form of each layout, in fp32, greedy and drawn, with every cache and several rules in one workload.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from engine.core import EngineCore
from engine.diffusion import DiffusionParams, DiffusionSpec
from engine.protocols import Worker
from engine.types import Request, SamplingParams
from tests.contract.ladder import Ladder, Outcome, load_worker
from tests.tiny_diffusion import save_tiny_diffusion

KINDS = ("llada", "dream", "fast_dllm_v2", "sdar")
# A step of 64 cuts the longer prompts of block-causal models, and has room for one whole canvas.
RUNGS: dict[str, dict[str, Any]] = {
    "batched": {},
    "small steps, no prefix cache": {"chunk": 64, "prefix_cache": False},
    "lag 1, three at a time": {"lag": 1, "seqs": 3},
}


@pytest.fixture(scope="module", params=KINDS)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = save_tiny_diffusion(request.param, tmp_path_factory.mktemp(request.param))
    return load_worker(folder, memory="8MiB", threads=1)


def spec_of(worker: Worker) -> DiffusionSpec:
    spec = worker.capacity().diffusion
    assert spec is not None
    return spec


def workload(worker: Worker) -> list[Request]:
    """Prompts of 1 to 40 tokens, some with a common beginning, greedy and drawn; three choices of one prompt."""
    spec, rng = spec_of(worker), random.Random(1)
    length = spec.block_length if spec.block_causal else 8
    shared = [rng.randrange(256) for _ in range(32)]
    prompts = [[rng.randrange(256) for _ in range(size)] for size in (1, 7, 16)] + [shared, [*shared, 9, 8]]
    rules = (("threshold", (("threshold", 0.5),)), ("frechet", ()), ("quota", ()), ("random", ()))
    found = []
    for i, prompt in enumerate([*prompts, *[prompts[1]] * 3]):
        rule, knobs = rules[i % len(rules)] if i < len(prompts) else rules[0]
        wish = DiffusionParams(rule, knobs, spec.caches[i % len(spec.caches)], length, 24, 12)
        sampling = SamplingParams(21 + i % 3, temperature=0.0 if i % 2 and i < len(prompts) else 0.9, seed=i // 5)
        found.append(Request(f"r{i}", tuple(prompt), sampling, choice=i % 3, diffusion=wish))
    return found


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """What each request comes to by itself, with nothing cached."""

    requests: list[Request]
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module")
def alone(worker: Worker) -> Undisturbed:
    requests = workload(worker)
    outcomes: dict[str, Outcome] = {}
    for one in requests:
        outcomes |= Ladder(worker, prefix_cache=False).run([one])
    assert len({tuple(outcome.tokens) for outcome in outcomes.values()}) == len(requests)
    return Undisturbed(requests, outcomes)


def test_tokens_do_not_depend_on_the_surroundings(worker: Worker, alone: Undisturbed) -> None:
    spec = spec_of(worker)
    for name, options in RUNGS.items():
        ladder = Ladder(worker, **options)
        got = ladder.run(alone.requests)
        for one in alone.requests:
            assert got[one.id].tokens == alone.outcomes[one.id].tokens, f"{name}: {one.id}"
        if name == "batched" and spec.block_causal:
            again = ladder.run(alone.requests)
            assert all(again[one.id].tokens == got[one.id].tokens for one in alone.requests), "from the prefix cache"
            assert sum(outcome.cached_tokens for outcome in again.values()) > 0


def drive(
    core: EngineCore, requests: list[Request], had: dict[str, tuple[int, ...]], late: bool
) -> dict[str, list[int]]:
    """All tokens of requests that have some of them already; `late`: they come one by one, the urgent ones last."""
    tokens = {name: list(ids) for name, ids in had.items()}
    coming = list(reversed(requests))
    while coming or core.has_work():
        for one in [coming.pop()] if late and coming else coming:
            core.add(one)
            core._scheduler._roster.sequences[one.id].output_ids.extend(had[one.id])
        coming = coming if late else []
        for update in core.step().updates:
            assert update.error is None
            tokens[update.request_id].extend(update.token_ids)
        core.check_integrity()
    core.settle()
    assert core.num_states() == core.stats().kv_blocks_used == 0
    return tokens


def test_preempted_requests_replay_their_open_block(worker: Worker, alone: Undisturbed) -> None:
    """Small pools push requests out: those whose tables grow, and those that more urgent ones come to replace."""
    core = Ladder(worker, num_blocks=9).core
    requests = [replace(one, priority=-i) for i, one in enumerate(alone.requests)]
    tokens = drive(core, requests, {one.id: () for one in requests}, late=True)
    assert tokens == {name: outcome.tokens for name, outcome in alone.outcomes.items()}
    assert core.stats().preemptions > 3


def test_requests_go_on_from_inside_a_block(worker: Worker, alone: Undisturbed) -> None:
    """Wherever they were cut: before the first token, inside the open block, at its end, before the last token."""
    rng = random.Random(3)
    for cuts in ((0, 1, 8, 20), (3, 9, 16, 17)):
        had = {one.id: tuple(alone.outcomes[one.id].tokens[: rng.choice(cuts)]) for one in alone.requests}
        for name, tokens in drive(Ladder(worker).core, alone.requests, had, late=False).items():
            assert tokens == alone.outcomes[name].tokens, f"{name}: resumed after {len(had[name])} tokens"


def test_aborts_leave_nothing_behind(worker: Worker, alone: Undisturbed) -> None:
    rng = random.Random(2)
    requests = [replace(one, id=f"{one.id}.{turn}") for turn in range(2) for one in alone.requests]
    ladder = Ladder(worker, num_blocks=14, seqs=6)

    def abort_some(step: int) -> None:
        if step % 4 == 0:
            ladder.core.abort([rng.choice(requests).id])

    outcomes = ladder.run(requests, abort_some)
    finishes = {str(outcome.finish) for outcome in outcomes.values()}
    assert len(finishes) > 1 and "None" not in finishes
    for one in requests:
        whole = alone.outcomes[one.id.partition(".")[0]].tokens
        assert outcomes[one.id].tokens == whole[: len(outcomes[one.id].tokens)]
