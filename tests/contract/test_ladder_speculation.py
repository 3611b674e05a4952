"""The equality ladder, crossed with speculation: under `strict` no draft, good or bad, changes a token."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import DraftConfig
from engine.protocols import Worker
from engine.registry import DRAFTERS
from engine.types import FinishReason, Request, SpeculationParams
from tests.contract import oracle
from tests.contract.ladder import Ladder, Outcome, assert_same, load_worker, request
from tests.contract.test_ladder import RUNGS, SAMPLING, alone, workload
from tests.tiny import FAMILIES, save_tiny

MAX_DRAFT = 6
# Drafted answers end sooner, so fewer run at once: memory must be scarcer for any of them to be preempted.
TIGHTER = {name: {**rung, "num_blocks": 7} if "preempted" in name else rung for name, rung in RUNGS.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Worker]:
    """One checkpoint, served without a drafter, with a real one, and with one that mostly knows the answers."""
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    DRAFTERS["oracle"] = "tests.contract.oracle:OracleDrafter"
    try:
        drafts = {
            "": None,
            "ngram": DraftConfig("ngram", max_draft=MAX_DRAFT),
            "oracle": DraftConfig("oracle", max_draft=MAX_DRAFT),
        }
        return {name: load_worker(folder, memory="8MiB", threads=1, draft=draft) for name, draft in drafts.items()}
    finally:
        del DRAFTERS["oracle"]


def repeating(sampling: str) -> list[Request]:
    """The ladder's workload, and prompts that repeat themselves, as a look-up drafter likes them."""
    rng = random.Random(3)
    phrase = [rng.randrange(256) for _ in range(9)]
    options = {"temperature": 0.0, **SAMPLING[sampling]}
    more = [phrase * 3, phrase * 5 + phrase[:4], [7] * 30]
    return workload(sampling) + [request(f"p{i}", prompt, 20, **options) for i, prompt in enumerate(more)]


def learn(outcomes: dict[str, Outcome], requests: list[Request]) -> None:
    oracle.ANSWERS.clear()
    oracle.ANSWERS.update({one.id: [*one.prompt_ids, *outcomes[one.id].tokens] for one in requests})


@pytest.mark.parametrize("sampling", SAMPLING)
def test_drafts_change_no_token(workers: dict[str, Worker], sampling: str) -> None:
    requests = repeating(sampling)
    expected = alone(workers[""], requests)
    learn(expected, requests)
    # Seeded answers of random weights do not repeat themselves: look-up would have nothing to say there.
    for drafter in ("ngram", "oracle") if sampling == "greedy" else ("oracle",):
        accepted = 0
        for name, options in TIGHTER.items():
            ladder = Ladder(workers[drafter], **options)
            ties = assert_same(expected, ladder.run(requests))
            assert ties == 0, f"{drafter}, {name}: {ties} near-ties in fp32"
            assert ("preempted" in name) == (ladder.stats.preemptions > 0), f"{name}: {ladder.stats.preemptions}"
            assert ladder.stats.spec_accepted <= ladder.stats.spec_drafted
            accepted += ladder.stats.spec_accepted
        assert accepted > (0 if drafter == "ngram" else 300), f"{drafter}: too few accepts to tell anything"


def test_any_max_draft_gives_the_same_tokens(workers: dict[str, Worker]) -> None:
    """Requests of every bound side by side, and some that switch speculation off."""
    wishes = [SpeculationParams(max_draft=most) for most in (0, 1, 2, MAX_DRAFT, 50)]
    wishes.append(SpeculationParams(enabled=False))
    for sampling in ("greedy", "seeded"):
        requests = repeating(sampling)
        expected = alone(workers[""], requests)
        learn(expected, requests)
        mixed = [replace(one, speculation=wishes[i % len(wishes)]) for i, one in enumerate(requests)]
        ladder = Ladder(workers["oracle"])
        assert assert_same(expected, ladder.run(mixed)) == 0
        assert len(ladder.stats.spec_accepted_at) == MAX_DRAFT and all(ladder.stats.spec_accepted_at)
        for wish in wishes[:3]:
            few = Ladder(workers["oracle"])
            assert assert_same(expected, few.run([replace(one, speculation=wish) for one in requests])) == 0
            assert [count > 0 for count in few.stats.spec_accepted_at] == [
                at < wish.bound(9) for at in range(MAX_DRAFT)
            ]


def test_prefix_hit_equals_cold(workers: dict[str, Worker]) -> None:
    """Blocks that a speculating request has published hold what plain decoding would have put there."""
    requests = repeating("greedy")
    expected = alone(workers[""], requests)
    learn(expected, requests)
    ladder = Ladder(workers["oracle"])
    ladder.run(requests)
    longer = [replace(one, id=f"{one.id}+", prompt_ids=(*one.prompt_ids, *expected[one.id].tokens)) for one in requests]
    cold = alone(workers[""], longer)
    learn(cold, longer)
    warm = ladder.run(longer)
    assert assert_same(cold, warm) == 0
    assert sum(warm[one.id].cached_tokens for one in longer) > 100


def test_choices_and_logprobs_are_those_of_plain_decoding(workers: dict[str, Worker]) -> None:
    requests = []
    for choice in range(3):
        one = request(
            "x", [9, 8, 7, 6, 5] * 7, 16, choice, temperature=0.7, seed=5, logprobs=3, prompt_logprobs=2, top_p=0.95
        )
        requests.append(replace(one, id=f"x{choice}", group="x"))
    expected = alone(workers[""], requests)
    learn(expected, requests)
    assert len({tuple(outcome.tokens) for outcome in expected.values()}) == 3
    for options in (RUNGS["batched"], RUNGS["lag 1, chunked"]):
        ladder = Ladder(workers["oracle"], **options)
        got = ladder.run(requests)
        assert ladder.stats.spec_accepted > 5
        for name, want in expected.items():
            have = got[name]
            assert have.tokens == want.tokens
            pairs = zip(want.logprobs + want.prompt_logprobs, have.logprobs + have.prompt_logprobs, strict=True)
            for a, b in pairs:
                assert (a.token_id, a.rank, len(a.top)) == (b.token_id, b.rank, len(b.top))
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
def test_stops_inside_an_accepted_block_end_it_there(workers: dict[str, Worker], lag: int) -> None:
    """End-of-sequence, stop ids, min_tokens and max_tokens, each at every place that a round may have."""
    prompt = [(i * 29) % 256 for i in range(20)]
    plain = alone(workers[""], [request("x", prompt, 24, temperature=1.0, seed=2)])["x"].tokens
    requests = []
    for cut in range(1, 20):
        stop = plain[cut]
        requests.append(request(f"s{cut}", prompt, 24, temperature=1.0, seed=2, stop_token_ids=(stop,)))
        requests.append(request(f"m{cut}", prompt, cut, temperature=1.0, seed=2))
        least = request(f"n{cut}", prompt, 24, temperature=1.0, seed=2, stop_token_ids=(stop,), min_tokens=cut + 2)
        requests.append(least)
        requests.append(replace(request(f"e{cut}", prompt, 24, temperature=1.0, seed=2), eos_ids=(stop,)))
    expected = alone(workers[""], requests)
    learn(expected, requests)
    got = Ladder(workers["oracle"], lag=lag).run(requests)
    for name, want in expected.items():
        assert (got[name].tokens, got[name].finish) == (want.tokens, want.finish), name
    assert {outcome.finish for outcome in got.values()} == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.parametrize("lag", [0, 1])
def test_random_aborts_leave_nothing_behind(workers: dict[str, Worker], lag: int) -> None:
    rng = random.Random(lag)
    oracle.ANSWERS.clear()
    requests = [
        request(f"r{i}", [rng.randrange(4) for _ in range(rng.randint(1, 50))], rng.randint(1, 40), seed=i)
        for i in range(40)
    ]
    ladder = Ladder(workers["ngram"], num_blocks=24, chunk=32, lag=lag)
    outcomes = ladder.run(requests, lambda _: ladder.core.abort([rng.choice(requests).id]))
    assert all(outcome.finish is not None for outcome in outcomes.values())


def test_demo_model_climbs_the_ladder_with_ngram(demo_folder: Path) -> None:
    """fp32, text that repeats itself; greedy and seeded."""
    plain = load_worker(demo_folder, "none")
    rng = random.Random(5)
    shared = [rng.randrange(300, 40_000) for _ in range(12)]
    prompts = [shared * 3, [*shared, 511, 1000, *shared], [rng.randrange(300, 40_000) for _ in range(40)]]
    requests = [request(f"r{i}", prompt, 24, temperature=0.0, logprobs=2) for i, prompt in enumerate(prompts)]
    requests += [request(f"s{i}", prompt, 24, temperature=0.3, seed=i) for i, prompt in enumerate(prompts)]
    expected = alone(plain, requests)
    del plain
    worker = load_worker(demo_folder, "none", draft=DraftConfig("ngram", max_draft=8))
    ties, accepted = {}, 0
    for name in ("batched", "lag 1, chunked", "preempted"):
        options = {**RUNGS[name], "num_blocks": 15} if name == "preempted" else RUNGS[name]
        ladder = Ladder(worker, **options)
        ties[name] = assert_same(expected, ladder.run(requests))
        assert (name == "preempted") == (ladder.stats.preemptions > 0), f"{name}: {ladder.stats.preemptions}"
        accepted += ladder.stats.spec_accepted
    assert sum(ties.values()) == 0 and accepted > 20, (ties, accepted)
