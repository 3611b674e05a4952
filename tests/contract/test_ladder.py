"""The equality ladder: whatever else happens around a request, its tokens are the same.

Tiny random models of every family in fp32, greedy and seeded; and the demo model in fp32 and in the default mode.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.protocols import Worker
from engine.types import Request
from tests.contract.ladder import Ladder, Outcome, assert_same, load_worker, request
from tests.tiny import FAMILIES, save_tiny

RUNGS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"chunk": 7},
    "lag 1": {"lag": 1},
    "lag 1, chunked": {"lag": 1, "chunk": 7},
    "preempted": {"num_blocks": 9},
    "preempted, lag 1, chunked": {"num_blocks": 9, "lag": 1, "chunk": 16},
    "no prefix cache": {"prefix_cache": False},
    "three at a time": {"seqs": 3},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 2},
    "seeded": {"temperature": 1.3, "seed": 7},
    "everything": {
        "temperature": 0.9,
        "seed": -3,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.2,
        "logit_bias": ((65, 2.0), (66, -3.0)),
        "bad_words": ((70,), (71, 72)),
        "min_tokens": 4,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return load_worker(save_tiny(request.param, tmp_path_factory.mktemp(request.param)), memory="8MiB", threads=1)


def workload(sampling: str) -> list[Request]:
    """Prompts of 1 to 60 tokens; some share a beginning, two are the same."""
    rng = random.Random(1)
    shared = [rng.randrange(256) for _ in range(40)]
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 16, 17, 33, 60)]
    prompts += [shared, shared + prompts[1], shared]
    options = {"temperature": 0.0, **SAMPLING[sampling]}
    return [request(f"r{i}", prompt, 20, choice=i % 2, **options) for i, prompt in enumerate(prompts)]


def alone(worker: Worker, requests: list[Request]) -> dict[str, Outcome]:
    """Each request by itself, with nothing cached: the undisturbed reference."""
    outcomes: dict[str, Outcome] = {}
    for one in requests:
        outcomes |= Ladder(worker, prefix_cache=False).run([one])
    return outcomes


@pytest.mark.parametrize("sampling", SAMPLING)
def test_tokens_do_not_depend_on_the_surroundings(worker: Worker, sampling: str) -> None:
    requests = workload(sampling)
    expected = alone(worker, requests)
    assert len({tuple(outcome.tokens) for outcome in expected.values()}) > 5, "the workload is too uniform to tell"
    for name, options in RUNGS.items():
        ladder = Ladder(worker, **options)
        ties = assert_same(expected, ladder.run(requests))
        assert ties == 0, f"{name}: {ties} near-ties in fp32"
        assert ("preempted" in name) == (ladder.stats.preemptions > 0), f"{name}: {ladder.stats.preemptions}"


def test_prefix_hit_equals_cold(worker: Worker) -> None:
    requests = workload("greedy")
    expected = alone(worker, requests)
    ladder = Ladder(worker)
    ladder.run(requests)
    again = ladder.run(requests)
    assert assert_same(expected, again) == 0
    # All full blocks of a prompt are found, but never its last token.
    for one in requests:
        assert again[one.id].cached_tokens == (len(one.prompt_ids) - 1) // 16 * 16


def test_seeds_and_choices_make_the_difference(worker: Worker) -> None:
    def draw(seed: int, choice: int) -> list[int]:
        return Ladder(worker).run([request("x", [1, 2, 3], 20, choice, temperature=1.0, seed=seed)])["x"].tokens

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(1, 0)), tuple(draw(2, 0)), tuple(draw(1, 1))}) == 3


def test_logprobs_are_the_same_however_the_prompt_is_cut(worker: Worker) -> None:
    prompt = [(i * 37) % 256 for i in range(45)]
    wanted = request("x", prompt, 6, temperature=0.0, logprobs=3, prompt_logprobs=2)
    whole = Ladder(worker).run([wanted])["x"]
    assert [entry.token_id for entry in whole.prompt_logprobs] == prompt[1:]
    for name in ("chunked", "lag 1, chunked"):
        cut = Ladder(worker, **RUNGS[name]).run([request("y", [3] * 30, 9, temperature=0.0), wanted])["x"]
        assert cut.tokens == whole.tokens
        for a, b in zip(whole.prompt_logprobs + whole.logprobs, cut.prompt_logprobs + cut.logprobs, strict=True):
            assert a.token_id == b.token_id and a.rank == b.rank
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_cached_prefix_does_not_cost_prompt_logprobs(worker: Worker) -> None:
    prompt = [(i * 37) % 256 for i in range(45)]
    ladder = Ladder(worker)
    ladder.run([request("warm", prompt, 2, temperature=0.0)])
    got = ladder.run([request("x", prompt, 2, temperature=0.0, prompt_logprobs=0)])["x"]
    assert [entry.token_id for entry in got.prompt_logprobs] == prompt[1:]


@pytest.mark.parametrize("lag", [0, 1])
def test_random_aborts_leave_nothing_behind(worker: Worker, lag: int) -> None:
    rng = random.Random(lag)
    requests = [
        request(f"r{i}", [rng.randrange(256) for _ in range(rng.randint(1, 50))], rng.randint(1, 40), seed=i)
        for i in range(40)
    ]
    ladder = Ladder(worker, num_blocks=24, chunk=32, lag=lag)

    def abort_some(_: int) -> None:
        ladder.core.abort([rng.choice(requests).id])

    outcomes = ladder.run(requests, abort_some)
    assert all(outcome.finish is not None for outcome in outcomes.values())
    assert len({outcome.finish for outcome in outcomes.values()}) > 1


def test_demo_model_climbs_the_ladder(demo_folder: Path) -> None:
    """fp32, prompts of ordinary length, the rungs that between them hold every disturbance."""
    worker = load_worker(demo_folder, "none")
    rng = random.Random(5)
    shared = [rng.randrange(300, 40_000) for _ in range(70)]
    prompts = [[rng.randrange(300, 40_000) for _ in range(n)] for n in (3, 40)] + [shared, [*shared, 511, 1000]]
    requests = [request(f"r{i}", prompt, 10, temperature=0.0, logprobs=2) for i, prompt in enumerate(prompts)]
    requests += [request(f"s{i}", prompt, 10, temperature=0.8, seed=i) for i, prompt in enumerate(prompts)]
    expected = alone(worker, requests)
    ties = {}
    for name in ("batched", "lag 1, chunked", "preempted"):
        options = {**RUNGS[name], "num_blocks": 15} if name == "preempted" else RUNGS[name]
        ladder = Ladder(worker, **options)
        ties[name] = assert_same(expected, ladder.run(requests))
        assert (name == "preempted") == (ladder.stats.preemptions > 0), f"{name}: {ladder.stats.preemptions}"
    ties["prefix hit"] = assert_same(expected, ladder.run(requests))
    assert sum(ties.values()) == 0, ties
