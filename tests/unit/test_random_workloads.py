"""Random workloads of all decoding styles over a KV memory that checks every read.

Whatever the scheduler chooses to run, cut, preempt or share, every request must get exactly its own tokens and
one ending, and at the end every block and all device state must be back.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from engine.diffusion import DiffusionParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.roster import Roster
from engine.scheduling.scheduler import Scheduler
from engine.types import (
    EngineStats,
    FinishReason,
    Request,
    ScheduledSeq,
    SeqResult,
    Sequence,
    SequenceStatus,
    SpeculationParams,
)
from tests.unit.denoising_fakes import BlockCausal, Canvas, OddBlocks
from tests.unit.fakes import (
    AutoregressiveDevice,
    Driver,
    SpeculativeDevice,
    State,
    expected,
    make_request,
    make_scheduler,
    truth,
)

NUM_WORKLOADS = 12  # of each style and lag; 300 under --full
NUM_REQUESTS = 14

STYLES = {
    "autoregressive": AutoregressiveDevice,
    "speculative": SpeculativeDevice,
    "canvas": Canvas,
    "block-causal": BlockCausal,
    "odd blocks": OddBlocks,
}


@dataclass(frozen=True)
class Case:
    """A seeded workload: what the pool and the limits are, and what happens to the requests."""

    device: type[AutoregressiveDevice]
    lag: int
    seed: int

    def run(self) -> EngineStats:
        rng = random.Random(self.seed)
        blocks, traits = rng.choice((9, 12, 18)), self.device.traits
        model_len = rng.choice((34, blocks * 4))
        budget = rng.choice((34, 50, 96) if traits.canvas else (16, 30, 96) if traits.denoises else (9, 30, 96))
        scheduler = make_scheduler(
            traits,
            blocks=blocks,
            model_len=model_len,
            prefix_cache=rng.random() < 0.8,
            seqs=rng.choice((2, 6, 9)),
            budget=budget,
            costs=rng.choice(((), ((1, 1.0), (8, 1.4), (64, 5.0)))),
            draft_costs=rng.choice(((), (), ((1, 0.1), (8, 0.4)))),
        )
        driver = Driver(scheduler, self.device(blocks, rng), self.lag)
        limit = min(model_len, blocks * 4)
        if traits.denoises and not traits.canvas:
            limit -= limit % traits.unit
        requests = [_settled(rng, request, min(limit, budget), traits.canvas) for request in _requests(rng)]
        faults = rng.random() < 0.3
        self._feed(driver, rng, list(requests), faults)
        driver.drain()
        for request in requests:
            _check(driver, request, limit)
        return scheduler.stats()

    def _feed(self, driver: Driver, rng: random.Random, arriving: list[Request], faults: bool) -> None:
        """Requests arrive over the first steps, some are aborted in whatever state they are, some steps fail.

        Now and then the prefix cache is forgotten.
        """
        known = [request.id for request in arriving]
        while arriving or rng.random() < 0.9:
            for _ in range(rng.randint(0, 3)):
                if arriving:
                    driver.scheduler.add(arriving.pop(0))
            if rng.random() < 0.06:
                driver.scheduler.abort(rng.choice(known))
            if rng.random() < 0.04:
                driver.scheduler.reset_prefix_cache()
                driver.scheduler.check_integrity()
            if faults and rng.random() < 0.05:
                driver.fails.add(rng.choice(known))
            driver.failing_step |= faults and rng.random() < 0.02
            driver.step()


def _requests(rng: random.Random) -> list[Request]:
    common = tuple(rng.randrange(50) for _ in range(12))
    requests: list[Request] = []
    while len(requests) < NUM_REQUESTS:
        prompt = common[: rng.choice((0, 7, 12))] + tuple(rng.randrange(50_000) for _ in range(rng.randint(1, 14)))
        size = rng.choice((1, 1, 1, 3))
        for choice in range(size):
            requests.append(_request(rng, len(requests), prompt, choice, f"g{len(requests) - choice}"))
    return requests


def _request(rng: random.Random, number: int, prompt: tuple[int, ...], choice: int, group: str) -> Request:
    request = make_request(
        f"r{number}",
        prompt,
        rng.randint(1, 30),
        seed=number + 1,
        choice=choice,
        group=group,
        min_tokens=rng.choice((0, 0, 3)),
        priority=rng.choice((0, 0, 0, 1, -1)),
        cache_salt=rng.choice(("", "", "a")),
        speculation=SpeculationParams(enabled=rng.random() < 0.8, max_draft=rng.choice((None, None, 0, 2, 9))),
    )
    stop = truth(request, len(prompt) + rng.randint(0, 20))
    return make_request(
        request.id,
        prompt,
        request.sampling.max_tokens,
        seed=number + 1,
        choice=choice,
        group=group,
        min_tokens=request.sampling.min_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        speculation=request.speculation,
        **rng.choice(({}, {"eos_ids": (stop,)}, {"stop_token_ids": (stop,)})),
    )


def _settled(rng: random.Random, request: Request, most: int, canvas: bool) -> Request:
    """The request as `validate` hands it to an engine that denoises; `most`: tokens of prompt and canvas."""
    if not canvas:
        return replace(request, diffusion=DiffusionParams(cache=rng.choice(("block", "dual"))))
    cache, length = rng.choice(("none", "prefix", "dual", "dual")), rng.choice((4, 6, 8))
    whole = min(-(-request.sampling.max_tokens // length) * length, most - len(request.prompt_ids))
    copies = rng.random() < 0.2 and len(request.prompt_ids) + whole + length <= most
    wish = DiffusionParams(
        cache=cache, block_length=length, canvas=whole, verify="masked_copy" if copies else "confidence"
    )
    sampling = replace(request.sampling, max_tokens=min(request.sampling.max_tokens, whole))
    return replace(request, sampling=sampling, diffusion=wish)


def _check(driver: Driver, request: Request, limit: int) -> None:
    tokens, finish = expected(request, limit)
    got = driver.tokens(request.id)
    ending = driver.finish(request.id)
    if ending in (FinishReason.ABORT, FinishReason.ERROR):
        assert got == tokens[: len(got)]
        return
    assert (got, ending) == (tokens, finish), request.id
    stop = driver.updates[request.id][-1].stop_token_id
    assert stop == (tokens[-1] if finish is FinishReason.STOP and not request.eos_ids else None)


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_every_request_gets_its_own_tokens_and_every_block_comes_back(style: str, lag: int, full: bool) -> None:
    count = (300 if full else NUM_WORKLOADS) // (1 if lag < 2 else 4)  # 2 is only there to try the arithmetic
    stats = [Case(STYLES[style], lag, seed).run() for seed in range(count)]
    assert sum(s.preemptions for s in stats) > count // 2, "the pools were meant to be too small"
    hits = sum(s.prefix_hits for s in stats)
    assert hits > count * 8 if STYLES[style].traits.prefix_cacheable else hits == 0
    if STYLES[style].traits.denoises:
        assert sum(s.denoise_committed for s in stats) > count * 100
        assert all(s.denoised.forwards >= s.denoise_steps > 0 for s in stats)


# ---- the oracle itself: bugs that were planted must be found -----------------------------------------------


class ClaimsBonus(SpeculativeDevice):
    """Calls the last token of a round computed, though its KV was never written."""

    def commit(self, state: State, tokens: list[int], num_computed: int) -> SeqResult:
        return super().commit(state, tokens, num_computed + bool(tokens))


class KeepsRejected(SpeculativeDevice):
    """Counts every drafted slot as computed, rejected ones too."""

    def run(self, item: ScheduledSeq, state: State) -> SeqResult:
        result = super().run(item, state)
        if result.new_tokens:
            state.num_computed = min(item.start + len(item.tokens) + item.lookahead, len(state.tokens))
        return replace(result, num_computed=state.num_computed)


class IgnoresDropped(AutoregressiveDevice):
    def drop(self, request_ids: tuple[str, ...]) -> None:
        pass


@pytest.mark.parametrize("device", [ClaimsBonus, KeepsRejected, IgnoresDropped])
def test_a_bug_planted_in_the_device_is_found(device: type[AutoregressiveDevice]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(NUM_WORKLOADS):
            Case(device, 0, seed).run()


def _stale_digest(pool: BlockPool, block: int) -> None:
    """Reused blocks can still be found under what they held before."""
    pool._digests[block] = None


def _free_early(roster: Roster, seq: Sequence) -> None:
    """The blocks of a finished sequence go back at once, although a step in flight still writes there."""
    if seq.status is SequenceStatus.FINISHED:
        roster._kv.release(seq)


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [(BlockPool, "_forget", _stale_digest), (Roster, "settle", _free_early)],
    ids=["stale digest after reuse", "blocks freed while in flight"],
)
def test_a_bug_planted_in_the_books_is_found_by_the_device(
    owner: type, name: str, bug: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(owner, name)

    def wrong(self: object, argument: object) -> None:
        bug(self, argument)  # type: ignore[operator]
        if owner is Roster:
            right(self, argument)

    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr(Scheduler, "check_integrity", lambda _: None)  # the fake memory alone must see it
    with pytest.raises(AssertionError):
        for seed in range(NUM_WORKLOADS):
            Case(AutoregressiveDevice, 1, seed).run()
