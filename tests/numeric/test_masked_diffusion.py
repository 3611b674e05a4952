"""Full-attention models (LLaDA, and Dream with its shift) against the plain sampler, step for step."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from engine.diffusion import CACHES, FULL, DiffusionParams, DiffusionSpec
from engine.registry import RULES
from engine.runtime.rng import Draw, Purpose, uniform_rows
from engine.types import Request
from tests.denoising import MASK, Outcome, Rig, network, request
from tests.numeric.plain_denoising import Choice, PlainNetwork, State, full_attention

KNOBS = {"threshold": ("threshold", 0.6), "dynamic": ("threshold", 0.7), "frechet": ("delta", 0.25)}
KNOBS |= dict.fromkeys(("factor", "factor_compat"), ("factor", 1.0))
CACHES_OF_FULL = CACHES[FULL]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain() -> PlainNetwork:
    return PlainNetwork(network())


def params(rule: str, cache: str, block: int, canvas: int, steps: int = 0) -> DiffusionParams:
    knobs = (KNOBS[rule],) if rule in KNOBS else ()
    return DiffusionParams(rule, knobs, cache, block, canvas, steps)


def choice(one: Request, dream: bool = False) -> Choice:
    """What the plain sampler makes of a request's parameters."""
    wish = one.diffusion
    blocks = wish.canvas / wish.block_length
    steps = max(1, round(wish.steps / blocks)) if wish.steps else 0

    def order(position: int, step: int) -> float:
        draw = Draw(one.sampling.seed, one.choice, position, Purpose.ORDER, step)
        return float(uniform_rows([draw], 1, "cpu")[0, 0])

    return Choice(
        wish.rule, MASK, dict(wish.knobs).get(KNOBS.get(wish.rule, ("", 0.0))[0], 0.0), steps, dream, order=order
    )


def workload() -> list[Request]:
    """Every rule with every cache, over prompts, canvases and blocks of many sizes."""
    rng = random.Random(4)
    found: list[Request] = []
    for rule in RULES:
        for cache in CACHES_OF_FULL:
            block = rng.choice((4, 8, 16))
            canvas = block * rng.randint(2, 3) - rng.choice((0, 0, 1))  # the last block may be cut
            steps = rng.choice((0, canvas // 2, canvas // 3))
            prompt = [rng.randrange(MASK) for _ in range(rng.randint(1, 20))]
            wish = params(rule, cache, block, canvas, steps)
            found.append(request(f"{rule} {cache}", prompt, canvas, wish, seed=len(found)))
    return found


def reference(plain: PlainNetwork, one: Request, shift: bool, dream: bool, **options: bool) -> list[State]:
    wish = one.diffusion
    how = choice(one, dream)
    sampler = full_attention(plain, one.prompt_ids, wish.canvas, wish.block_length, how, wish.cache, shift, **options)
    return list(sampler)


def assert_equal(one: Request, got: Outcome, expected: list[State]) -> None:
    assert got.error is None, one.id
    for step, (have, want) in enumerate(zip(got.states, expected, strict=False)):
        assert have == want, f"{one.id}: step {step} of {len(expected)}"
    assert len(got.states) == len(expected), one.id
    size = len(one.prompt_ids)
    assert got.tokens == [expected[-1][size + i] for i in range(one.sampling.max_tokens)], one.id


@pytest.mark.parametrize(("shift", "dream"), [(False, False), (True, True)], ids=["llada", "dream"])
def test_every_rule_and_cache_step_for_step(plain: PlainNetwork, shift: bool, dream: bool, full: bool) -> None:
    """In one ragged batch, and alone: the same steps as the plain sampler, and one pass for each of them."""
    rig = Rig(DiffusionSpec(FULL, MASK, 8, shift=shift, dream_schedule=dream), network(), num_blocks=300, seqs=64)
    requests = workload()
    expected = {one.id: reference(plain, one, shift, dream) for one in requests}
    assert sum(len(states) for states in expected.values()) > 250
    together = rig.run(requests)
    for one in requests:
        assert_equal(one, together[one.id], expected[one.id])
        assert together[one.id].passes.forwards == len(expected[one.id]), "a pass too many"
    for one in requests if full else requests[::4]:
        assert_equal(one, rig.run([one])[one.id], expected[one.id])


@pytest.mark.parametrize("cache", CACHES_OF_FULL)
def test_passes_feed_what_their_cache_asks_for(plain: PlainNetwork, cache: str) -> None:
    """k commits of a block cost k whole passes; or one, and k - 1 from its start on; or one, and k - 1 of the block."""
    one = request("x", [5, 9, 2, 2, 7], 32, params("factor", cache, 8, 32))
    rig = Rig(DiffusionSpec(FULL, MASK), network())
    got = rig.run([one])["x"]
    rounds, at = [0, 0, 0, 0], 0
    for state in got.states:
        rounds[at] += 1
        at += len(state) == 8 * (at + 1)
    per_pass = [{"none": 37, "prefix": 32 - 8 * block, "dual": 8}[cache] for block in range(4)]
    assert min(rounds) > 1
    assert got.passes.forwards == sum(rounds)
    assert got.passes.positions == sum(37 + (k - 1) * fed for k, fed in zip(rounds, per_pass, strict=True))


def test_caches_differ_and_refreshing_always_is_exact(plain: PlainNetwork) -> None:
    """The plain sampler's own caches, filled in every step, are no caches: a test of the reference above."""
    wishes = {cache: request("x", [3, 1, 4, 1, 5], 24, params("factor", cache, 8, 24)) for cache in CACHES_OF_FULL}
    exact = reference(plain, wishes["none"], False, False)
    for cache in ("prefix", "dual"):
        assert reference(plain, wishes[cache], False, False, refresh_always=True) == exact
        assert reference(plain, wishes[cache], False, False) != exact


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_blocks_of_one_token_need_no_cache(cache: str, shift: bool) -> None:
    """Each step is then a whole pass, whatever the cache: tokens one after another, as without any."""
    rig = Rig(DiffusionSpec(FULL, MASK, shift=shift), network())
    runs = [rig.run([request("x", [8, 8, 1], 9, params("threshold", name, 1, 9))])["x"] for name in ("none", cache)]
    assert runs[0].states == runs[1].states
    assert runs[1].passes.forwards == 9 and runs[1].passes.positions == 9 * 12


def test_a_step_commits_all_that_a_loose_rule_allows() -> None:
    rig = Rig(DiffusionSpec(FULL, MASK), network())
    wish = DiffusionParams("threshold", (("threshold", 0.0),), "dual", 8, 24)
    got = rig.run([request("x", [1, 2], 24, wish)])["x"]
    assert [len(state) for state in got.states] == [8, 16, 24]
    assert got.passes.forwards == 3, "a block that its first pass fills needs no other"


def test_the_answer_ends_at_its_stop_and_at_max_tokens(plain: PlainNetwork) -> None:
    """An end token stops it once no mask is left before it; what stands behind it in the block is not told."""
    rig = Rig(DiffusionSpec(FULL, MASK), network())
    wish = params("threshold", "dual", 8, 24)
    whole = rig.run([request("x", [4, 40, 13], 24, wish)])["x"]
    stop = whole.tokens[9]
    first = whole.tokens.index(stop)
    ended = rig.run([request("x", [4, 40, 13], 24, wish, eos_ids=(stop,))])["x"]
    assert ended.tokens == whole.tokens[: first + 1] and ended.finish == "stop"
    assert ended.passes.forwards < whole.passes.forwards
    cut = rig.run([request("x", [4, 40, 13], 18, wish)])["x"]
    assert cut.tokens == whole.tokens[:18] and cut.finish == "length"
