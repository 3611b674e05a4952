"""Sequences that are denoised: where their steps end, waiting for results, blocks one by one, and the books."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from engine.scheduling.spans import reach
from engine.types import (
    DecodeTraits,
    FinishReason,
    Passes,
    SeqResult,
    Sequence,
    SeqUpdate,
    StepOutput,
    StepPlan,
)
from tests.unit.denoising_fakes import BlockCausal, Canvas, Denoiser, canvas_request, driver, spans
from tests.unit.fakes import expected, make_request, make_scheduler

# ---- where a step ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "end"), [(1, 8), (7, 8), (8, 16), (9, 16), (16, 24)])
def test_a_block_causal_step_ends_with_the_block_of_the_first_open_position(tokens: int, end: int) -> None:
    seq = Sequence(make_request("a", 1), output_ids=[0] * (tokens - 1), num_computed=0)
    assert reach(seq, BlockCausal.traits) == end


@pytest.mark.parametrize(
    ("cache", "computed", "output", "end"),
    [
        ("none", 0, 0, 15), ("none", 0, 9, 15), ("prefix", 0, 5, 15), ("prefix", 9, 5, 15), ("dual", 0, 5, 15),
        ("dual", 5, 0, 9), ("dual", 5, 3, 9), ("dual", 9, 4, 13), ("dual", 9, 7, 13), ("dual", 13, 8, 15),
    ],
)  # fmt: skip
def test_a_canvas_step_ends_with_the_canvas_or_with_its_open_block(
    cache: str, computed: int, output: int, end: int
) -> None:
    """A prompt of 5, a canvas of 10, blocks of 4: the last block is cut."""
    seq = Sequence(canvas_request("a", 5, 10, cache=cache), output_ids=[0] * output, num_computed=computed)
    assert reach(seq, Canvas.traits) == end


def test_whole_passes_hold_room_for_masked_copies_and_for_a_drafters_blocks() -> None:
    copies = canvas_request("a", 5, 10, verify="masked_copy")
    drafted = DecodeTraits(chunkable=False, prefix_cacheable=False, denoises=True, canvas=True, unit=8)
    assert reach(Sequence(copies), Canvas.traits) == 15 + 4
    assert reach(Sequence(copies, num_computed=5), Canvas.traits) == 9
    seq = Sequence(canvas_request("a", 5, 10))
    assert reach(seq, drafted) == 16
    seq.num_computed = 5
    assert reach(seq, drafted) == 8, "the drafter's blocks are counted from 0"
    seq.output_ids = [0] * 9
    assert reach(seq, drafted) == 16


# ---- block by block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "shares"),
    [
        (20, [(0, 16, 0), (16, 4, 4)]),
        (24, [(0, 16, 0), (16, 8, 8)]),  # the last block would fit, but not with the one behind it
        (30, [(0, 16, 0), (16, 14, 2)]),
        (34, [(0, 16, 0), (16, 16, 0), (32, 2, 6)]),
        (9, [(0, 9, 7)]),
    ],
)
@pytest.mark.parametrize("lag", [0, 1])
def test_prompts_are_cut_where_blocks_end_and_before_the_last_one(
    prompt: int, shares: list[tuple[int, int, int]], lag: int
) -> None:
    run = driver(BlockCausal, lag=lag, budget=18)
    run.scheduler.add(make_request("a", prompt, 20))
    assert [spans(run.step()).get("a") for _ in shares] == shares, "chunks need no results of each other"
    run.drain()
    assert run.tokens("a") == expected(make_request("a", prompt, 20), 400)[0]


@pytest.mark.parametrize("device", [Canvas, BlockCausal])
def test_a_step_that_denoises_is_awaited(device: type[Denoiser]) -> None:
    run = driver(device, lag=1)
    run.scheduler.add(canvas_request("a", 4, 12))
    assert len(run.step().items) == 1 and run.step().items == () and len(run.step().items) == 1
    run.drain()


def test_a_block_may_pass_the_limit_but_never_the_pool_or_the_context() -> None:
    for blocks, model_len, kept in ((100, 400, 5), (4, 400, 5), (3, 400, 0), (4, 15, 0), (5, 23, 5)):
        run = driver(BlockCausal, blocks=blocks, model_len=model_len)
        run.scheduler.add(make_request("a", 10, 5))
        run.drain()
        assert len(run.tokens("a")) == kept
        assert run.finish("a") is (FinishReason.LENGTH if kept else FinishReason.ERROR)
    run = driver(BlockCausal, blocks=5, model_len=23)
    run.scheduler.add(make_request("a", 10, 50))
    run.drain()
    assert len(run.tokens("a")) == 6, "the block from 16 on does not fit"


def test_an_opening_block_brings_the_closed_one_along() -> None:
    run = driver(BlockCausal)
    run.scheduler.add(make_request("a", 3, 40))
    opened = [span for _ in range(50) for span in spans(run.step()).values()]
    assert {start for start, _, _ in opened} == {0, 8, 16, 24, 32, 40}
    assert all(start % 8 == 0 and fed + ahead in (8, 16) for start, fed, ahead in opened)
    assert any(fed + ahead == 16 for start, fed, ahead in opened)


def test_a_budget_without_room_for_two_blocks_is_a_mistake_of_the_configuration() -> None:
    make_scheduler(BlockCausal.traits, budget=16)
    with pytest.raises(ConfigError, match=r"scheduler\.max_batched_tokens: 15 has no room for two blocks of 8 tokens"):
        make_scheduler(BlockCausal.traits, budget=15)


def test_requests_share_whole_blocks_alone() -> None:
    run = driver(BlockCausal)
    prompt = tuple(range(100, 120))
    for name, ids in (("a", prompt), ("b", prompt), ("c", (*prompt[:13], 7, *prompt[14:]))):
        run.scheduler.add(make_request(name, ids, 3))
        run.drain()
    assert [run.updates[name][-1].cached_tokens for name in "abc"] == [0, 16, 8]


def test_denoise_steps_go_before_chunks_whatever_their_order() -> None:
    run = driver(BlockCausal, budget=32)
    run.scheduler.add(make_request("b", 6, 40, arrival=2.0))
    run.step()
    run.scheduler.add(make_request("a", 90, 9, arrival=1.0))
    plans = [spans(run.step()) for _ in range(4)]
    assert all(plan.keys() == {"a", "b"} for plan in plans)
    assert [plan["a"][0] for plan in plans] == [0, *(sum(plan["a"][:2]) for plan in plans[:3])]
    assert all(plan["a"][1] in (16, 24) and plan["a"][2] == 0 for plan in plans), "what the step of b leaves"


def results(plan: StepPlan, **tokens: tuple[int, ...]) -> StepOutput:
    """Each item closes the blocks it was given, and commits the given tokens."""
    ends = {item.request_id: (item.start + len(item.tokens)) // 8 * 8 for item in plan.items}
    return StepOutput(plan.step, tuple(SeqResult(name, tokens.get(name, ()), end) for name, end in ends.items()))


def test_a_sequence_planned_out_of_its_turn_is_never_pushed_out_of_its_step() -> None:
    """`b` comes first, as the step before had no room for it; `a` then waits one step for its memory."""
    scheduler = make_scheduler(BlockCausal.traits, blocks=8, budget=24)
    for name in "acb":
        scheduler.add(make_request(name, 4, 30))
    scheduler.update(results(scheduler.schedule(), c=(1, 2, 3, 4)))
    plan = scheduler.schedule()
    assert spans(plan) == {"a": (0, 4, 4), "c": (0, 8, 8)}
    scheduler.update(results(plan, a=(1, 2, 3, 4)))
    plan = scheduler.schedule()
    assert list(spans(plan)) == ["b", "c"] and scheduler.stats().preemptions == 0
    scheduler.update(results(plan))
    plan = scheduler.schedule()
    assert spans(plan) == {"a": (0, 8, 8), "c": (8, 0, 8)} and plan.dropped == ("b",)
    scheduler.check_integrity()


# ---- the books ---------------------------------------------------------------------------------------------


def test_passes_add_up_over_steps_without_tokens_too() -> None:
    scheduler = make_scheduler(BlockCausal.traits, budget=16)
    scheduler.add(make_request("a", 20, 6, eos_ids=(9,)))
    results = [
        SeqResult("a", (), 8, passes=Passes(forwards=1, positions=8)),
        SeqResult("a", (), 16, passes=Passes(forwards=1, positions=16)),
        SeqResult("a", (5,), 16, passes=Passes(forwards=1, draft_forwards=2, verifies=1, remasked=3, positions=8)),
        SeqResult("a", (6, 9, 7), 16, passes=Passes(forwards=1, positions=8)),
    ]
    updates: list[SeqUpdate] = []
    for result in results:
        plan = scheduler.schedule()
        assert plan.items
        updates += scheduler.update(StepOutput(plan.step, (result,)))
        scheduler.check_integrity()
    assert [update.token_ids for update in updates] == [(5,), (6, 9)] and updates[-1].finish is FinishReason.STOP
    assert updates[-1].passes == Passes(4, 2, 1, 3, 40)
    stats = scheduler.stats()
    assert (stats.denoised, stats.denoise_steps, stats.denoise_committed) == (Passes(4, 2, 1, 3, 40), 3, 3)


def test_other_pipelines_say_nothing_of_passes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, 1))
    plan = scheduler.schedule()
    (update,) = scheduler.update(StepOutput(plan.step, (SeqResult("a", (1,), 4),)))
    assert update.passes is None and scheduler.stats().denoise_steps == 0
