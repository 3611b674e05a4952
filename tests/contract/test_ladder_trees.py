"""The equality ladder, crossed with draft trees: whatever path the target takes through them, no token changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from engine.config import DraftConfig
from engine.protocols import DraftAsk, DraftProposal, Options, Worker
from engine.registry import DRAFTERS
from engine.types import SpeculationParams
from tests.contract import oracle
from tests.contract.ladder import Ladder, assert_same, load_worker, request
from tests.contract.test_ladder import SAMPLING, alone
from tests.contract.test_ladder_speculation import learn, repeating
from tests.tiny import FAMILIES, save_tiny

MAX_DRAFT = 5
NODES = 12
CHOSEN: dict[str, dict[str, Any]] = {
    "batched": {},
    "lag 1, chunked": {"lag": 1, "chunk": 16},
    "preempted, lag 1": {"lag": 1, "num_blocks": 6, "chunk": 64},
    "three at a time": {"seqs": 3, "prefix_cache": False},
}
CASES = [
    *((family, "greedy") for family in FAMILIES),
    *(("llama", sampling) for sampling in SAMPLING if sampling != "greedy"),
]
RANKS = (0, 0, 0, 1, 2, 3)  # where the right token is among the options; the last is none of them


class BranchingDrafter(oracle.OracleDrafter):
    """Knows the answers, but not which of its options they are."""

    def propose(self, asks: Sequence[DraftAsk], sampler: object = None, width: int = 0) -> DraftProposal:
        if not width:
            return super().propose(asks)
        tokens = torch.empty(len(asks), MAX_DRAFT, 3, dtype=torch.int64)
        for i, ask in enumerate(asks):
            start = self._lengths[ask.request_id]
            truth = (oracle.ANSWERS.get(ask.request_id, []) + [0] * (start + MAX_DRAFT))[start : start + MAX_DRAFT]
            for step, token in enumerate(truth):
                others = self._rng.sample([other for other in range(256) if other != token], 3)
                others.insert(self._rng.choice(RANKS), token)
                tokens[i, step] = torch.tensor(others[:3])
        log_probs = torch.tensor([0.55, 0.25, 0.15]).log().expand(tokens.shape)
        lengths = tuple(min(ask.limit, MAX_DRAFT) for ask in asks)
        chain = tokens[:, :, 0].masked_fill(torch.arange(MAX_DRAFT) >= torch.tensor(lengths).unsqueeze(1), -1)
        return DraftProposal(chain, lengths, options=Options(tokens, log_probs))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Worker]]:
    """One checkpoint of a family, served without a drafter, and with trees in every step that could have one."""

    @cache
    def workers(family: str) -> dict[str, Worker]:
        folder = save_tiny(family, tmp_path_factory.mktemp(family))
        drafts = {"": None, "trees": DraftConfig("branching", max_draft=MAX_DRAFT, tree=NODES, adaptive=False)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DRAFTERS, "branching", "tests.contract.test_ladder_trees:BranchingDrafter")
            return {name: load_worker(folder, memory="8MiB", threads=1, draft=draft) for name, draft in drafts.items()}

    return workers


@pytest.fixture
def workers(load: Callable[[str], dict[str, Worker]]) -> dict[str, Worker]:
    return load("llama")


@pytest.mark.parametrize(("family", "sampling"), CASES)
def test_trees_change_no_token(load: Callable[[str], dict[str, Worker]], family: str, sampling: str) -> None:
    workers = load(family)
    requests = repeating(sampling)
    expected = alone(workers[""], requests)
    learn(expected, requests)
    drafted = accepted = 0
    for name, options in CHOSEN.items():
        ladder = Ladder(workers["trees"], **options)
        ties = assert_same(expected, ladder.run(requests))
        assert ties == 0, f"{name}: {ties} near-ties in fp32"
        assert ("preempted" in name) == (ladder.stats.preemptions > 0), f"{name}: {ladder.stats.preemptions}"
        assert len(ladder.stats.spec_accepted_at) == MAX_DRAFT
        assert sum(ladder.stats.spec_accepted_at) == ladder.stats.spec_accepted
        drafted, accepted = drafted + ladder.stats.spec_drafted, accepted + ladder.stats.spec_accepted
    assert accepted > 300 and drafted > 2 * accepted, (drafted, accepted)


def test_a_prefix_hit_finds_what_plain_decoding_would_have_left(workers: dict[str, Worker]) -> None:
    """Blocks are published after the accepted path was moved to its places."""
    requests = repeating("greedy")
    expected = alone(workers[""], requests)
    learn(expected, requests)
    ladder = Ladder(workers["trees"])
    ladder.run(requests)
    longer = [replace(one, id=f"{one.id}+", prompt_ids=(*one.prompt_ids, *expected[one.id].tokens)) for one in requests]
    cold = alone(workers[""], longer)
    learn(cold, longer)
    warm = ladder.run(longer)
    assert assert_same(cold, warm) == 0
    assert sum(warm[one.id].cached_tokens for one in longer) > 100


def test_requests_bound_depth_and_nodes(workers: dict[str, Worker]) -> None:
    """A request's max_draft holds for its trees, beside others that have none or larger ones."""
    requests = repeating("seeded")
    expected = alone(workers[""], requests)
    learn(expected, requests)
    wishes = [SpeculationParams(max_draft=most) for most in (1, 2, 4, 50)] + [SpeculationParams(enabled=False)]
    mixed = [replace(one, speculation=wishes[i % len(wishes)]) for i, one in enumerate(requests)]
    assert assert_same(expected, Ladder(workers["trees"]).run(mixed)) == 0
    for wish in wishes[:3]:
        ladder = Ladder(workers["trees"])
        assert assert_same(expected, ladder.run([replace(one, speculation=wish) for one in requests])) == 0
        most = wish.bound(NODES)
        assert [count > 0 for count in ladder.stats.spec_accepted_at] == [at < most for at in range(MAX_DRAFT)]
        assert ladder.stats.spec_drafted <= most * ladder.stats.spec_rounds


@pytest.mark.parametrize("lag", [0, 1])
def test_stops_and_logprobs_inside_an_accepted_path(workers: dict[str, Worker], lag: int) -> None:
    prompt = [(i * 29) % 256 for i in range(20)]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 2, "logprobs": 3, "repetition_penalty": 1.3}
    plain = alone(workers[""], [request("x", prompt, 24, **options)])["x"].tokens
    requests = []
    for cut in range(1, 16, 3):
        requests.append(request(f"s{cut}", prompt, 24, stop_token_ids=(plain[cut],), prompt_logprobs=1, **options))
        requests.append(request(f"m{cut}", prompt, cut, **options))
        least = request(f"n{cut}", prompt, 24, stop_token_ids=(plain[cut],), min_tokens=cut + 2, **options)
        requests += [least, replace(request(f"e{cut}", prompt, 24, **options), eos_ids=(plain[cut],))]
    expected = alone(workers[""], requests)
    learn(expected, requests)
    ladder = Ladder(workers["trees"], lag=lag)
    got = ladder.run(requests)
    assert ladder.stats.spec_accepted > 60
    for name, want in expected.items():
        have = got[name]
        assert (have.tokens, have.finish) == (want.tokens, want.finish), name
        for a, b in zip(want.logprobs + want.prompt_logprobs, have.logprobs + have.prompt_logprobs, strict=True):
            assert (a.token_id, a.rank, len(a.top)) == (b.token_id, b.rank, len(b.top))
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
