"""Block-causal models (SDAR; Fast-dLLM v2 with sub-blocks and shift) against the plain sampler, step for step."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from engine.diffusion import BLOCK_CAUSAL, DiffusionParams, DiffusionSpec
from engine.registry import RULES
from engine.types import Request
from tests.denoising import MASK, Outcome, Rig, network, request
from tests.numeric.plain_denoising import Choice, PlainNetwork, State, block_causal
from tests.numeric.test_masked_diffusion import KNOBS, choice

SPECS = {
    "sdar": DiffusionSpec(BLOCK_CAUSAL, MASK, 4),
    "sub-blocks": DiffusionSpec(BLOCK_CAUSAL, MASK, 16, sub_block=4),
    "shift": DiffusionSpec(BLOCK_CAUSAL, MASK, 8, shift=True),
    "v2": DiffusionSpec(BLOCK_CAUSAL, MASK, 16, sub_block=8, shift=True, tempered=True),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain() -> PlainNetwork:
    return PlainNetwork(network())


def workload(spec: DiffusionSpec, caches: tuple[str, ...] = ("block", "dual")) -> list[Request]:
    """Every rule and cache; prompts that end at a block's end, and inside one."""
    rng, length = random.Random(spec.block_length), spec.block_length
    found: list[Request] = []
    for rule in RULES:
        for cache in caches:
            size = length * rng.randint(0, 2) + rng.choice((0, 0, 1, length - 1))
            prompt = [rng.randrange(MASK) for _ in range(max(size, 1))]
            canvas = 3 * length
            wish = DiffusionParams(
                rule, (KNOBS[rule],) if rule in KNOBS else (), cache, length, canvas, rng.choice((0, canvas // 2))
            )
            found.append(request(f"{rule} {cache}", prompt, canvas - rng.randint(0, 5), wish, seed=len(found)))
    return found


def reference(
    plain: PlainNetwork, one: Request, spec: DiffusionSpec, how: Choice | None = None, **options: bool
) -> list[State]:
    sampler = block_causal(
        plain,
        one.prompt_ids,
        one.sampling.max_tokens,
        spec.block_length,
        how or choice(one),
        spec.sub_block,
        one.diffusion.cache if spec.sub_block else "block",
        spec.shift,
        **options,
    )
    return list(sampler)


def assert_equal(one: Request, got: Outcome, expected: list[State]) -> None:
    """The engine may end inside a block, the reference only at a block's end."""
    assert got.error is None, one.id
    for step, (have, want) in enumerate(zip(got.states, expected, strict=False)):
        assert have == want, f"{one.id}: step {step} of {len(expected)}"
    size = len(one.prompt_ids)
    assert got.tokens == [expected[-1][size + i] for i in range(one.sampling.max_tokens)], one.id
    assert len(expected[len(got.states) - 1]) >= one.sampling.max_tokens


@pytest.mark.parametrize("name", SPECS)
def test_every_rule_and_cache_step_for_step(plain: PlainNetwork, name: str, full: bool) -> None:
    """The reference's last passes over closed blocks are passes of their own: fusing them changes nothing."""
    spec = SPECS[name]
    rig = Rig(spec, network(), num_blocks=300, seqs=64)
    requests = workload(spec)
    expected = {one.id: reference(plain, one, spec) for one in requests}
    together = rig.run(requests)
    for one in requests:
        assert_equal(one, together[one.id], expected[one.id])
        assert together[one.id].passes.forwards == len(together[one.id].states), "a pass too many"
    for one in requests if full else requests[::5]:
        assert_equal(one, rig.run([one])[one.id], expected[one.id])


@pytest.mark.parametrize("name", SPECS)
def test_the_cache_of_closed_blocks_is_exact(plain: PlainNetwork, name: str) -> None:
    """As a reference that keeps nothing and computes all blocks anew in every step."""
    spec = SPECS[name]
    for one in workload(spec, ("block",))[::3]:
        assert reference(plain, one, spec, recompute=True) == reference(plain, one, spec)


@pytest.mark.parametrize("shift", [False, True])
def test_cached_prefixes_end_where_page_and_block_do(shift: bool) -> None:
    """Pages of 8, blocks of 12: the KV of positions 8 to 15 belongs to a prefix of 12 tokens, that of 24 to no less."""
    spec = DiffusionSpec(BLOCK_CAUSAL, MASK, 12, shift=shift)
    shared = [(7 * i + 3) % MASK for i in range(30)]
    other = [*shared[:20], *[40, 41, 42, 43], *shared[24:]]  # the second half of a block is another one
    wish = DiffusionParams("factor", (), "block", 12, 12)
    prompts = {"first": shared, "other": other, "longer": [*shared[:24], 1, 2, 3]}
    requests = [request(name, prompt, 12, wish) for name, prompt in prompts.items()]
    cold = Rig(spec, network())
    rig = Rig(spec, network(), prefix_cache=True)
    for one, cached in zip(requests, (0, 0, 24), strict=True):
        got = rig.run([one])[one.id]
        assert got.tokens == cold.run([one])[one.id].tokens, one.id
        assert got.cached_tokens == cached, one.id


@pytest.mark.parametrize("name", ["sdar", "v2"])
def test_chunks_and_passes_are_as_many_as_they_must_be(name: str) -> None:
    """Prompts come in whole blocks; then each pass denoises, and none is spent on a closed block alone."""
    spec = SPECS[name]
    length = spec.block_length
    prompt = [(5 * i) % MASK for i in range(6 * length + 1)]
    wish = DiffusionParams("factor", (), "block", length, 2 * length)
    whole = Rig(spec, network()).run([request("x", prompt, 2 * length, wish)])["x"]
    assert whole.passes.forwards == len(whole.states)
    cut = Rig(spec, network(), chunk=2 * length + 3).run([request("x", prompt, 2 * length, wish)])["x"]
    assert cut.states == whole.states
    assert cut.passes.forwards == len(whole.states) + 3 and cut.passes.positions == whole.passes.positions
