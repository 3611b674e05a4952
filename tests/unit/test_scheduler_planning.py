"""What a step runs: chunks, the token budget, priorities, memory, and speculation's reserved positions."""

from __future__ import annotations

import random

import pytest

from engine.types import DecodeTraits, FinishReason, StepPlan
from tests.unit.fakes import (
    AutoregressiveDevice,
    Driver,
    SpeculativeDevice,
    expected,
    make_request,
    make_scheduler,
)


def driver(*, lag: int = 0, device: type[AutoregressiveDevice] = AutoregressiveDevice, **sizes: object) -> Driver:
    blocks = sizes.setdefault("blocks", 16)
    scheduler = make_scheduler(device.traits, **sizes)  # type: ignore[arg-type]
    return Driver(scheduler, device(blocks, random.Random(1)), lag)  # type: ignore[arg-type]


def shares(plan: StepPlan) -> dict[str, tuple[int, int]]:
    """By request: where its share starts and how many known tokens it feeds."""
    return {item.request_id: (item.start, len(item.tokens)) for item in plan.items}


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    run = driver(budget=8)
    run.scheduler.add(make_request("a", 19, 2))
    assert [shares(run.step())["a"] for _ in range(4)] == [(0, 8), (8, 8), (16, 3), (19, 1)]
    assert [len(update.token_ids) for update in run.updates["a"]] == [1, 1], "a chunk without a token is no news"


@pytest.mark.parametrize("lag", [0, 1])
def test_chunks_are_exact_and_sampling_is_pending_when_results_are_late(lag: int) -> None:
    run = driver(lag=lag, budget=8)
    run.scheduler.add(make_request("a", 12, 4))
    items = [run.step().items[0] for _ in range(4)]
    assert [(item.start, len(item.tokens)) for item in items[:2]] == [(0, 8), (8, 4)]
    assert not items[0].pending and not items[1].pending
    assert [(item.start, item.pending) for item in items[2:]] == [(12, bool(lag)), (13, bool(lag))]
    run.drain()
    assert run.tokens("a") == expected(make_request("a", 12, 4), 64)[0]


def test_decodes_come_before_chunks_whatever_their_order() -> None:
    run = driver(budget=4, seqs=4)
    run.scheduler.add(make_request("b", 3, 9, arrival=2.0))
    run.step()
    run.scheduler.add(make_request("a", 9, 9, arrival=1.0))
    assert shares(run.step()) == {"b": (3, 1), "a": (0, 3)}
    assert shares(run.step()) == {"b": (4, 1), "a": (3, 3)}


def test_lookahead_shrinks_before_a_decode_is_left_out() -> None:
    run = driver(device=SpeculativeDevice, budget=8, blocks=30)
    for name in "abc":
        run.scheduler.add(make_request(name, 2, 20))
    assert [item.lookahead for item in run.step().items] == [5, 0]
    assert [item.lookahead for item in run.step().items] == [1, 1, 1], "half of what two decodes leave lets c in"
    assert [item.lookahead for item in run.step().items] == [1, 1, 1], "the whole of what three decodes leave"


def test_more_sequences_than_the_budget_has_tokens_are_never_run_together() -> None:
    run = driver(budget=2, seqs=8)
    for name in "abcd":
        run.scheduler.add(make_request(name, 1, 3, cache_salt=name))
    run.drain()
    assert all(len(run.tokens(name)) == 3 for name in "abcd")


def test_places_are_limited_by_max_num_seqs() -> None:
    run = driver(seqs=2)
    for name in "abc":
        run.scheduler.add(make_request(name, 4, 2))
    assert shares(run.step()).keys() == {"a", "b"}
    stats = run.scheduler.stats()
    assert (stats.running, stats.waiting) == (2, 1)
    run.step()
    assert shares(run.step()).keys() == {"c"}


def test_priority_goes_before_arrival_and_arrival_before_order_of_coming() -> None:
    run = driver(seqs=1)
    for name, priority, arrival in (("d", 1, 0.0), ("c", 0, 3.0), ("b", 0, 2.0), ("e", 1, 1.0), ("a", -1, 9.0)):
        run.scheduler.add(make_request(name, 4, 1, priority=priority, arrival=arrival))
    assert [run.step().items[0].request_id for _ in range(5)] == list("abcde")


def test_the_last_in_order_is_preempted_and_goes_on_where_it_was() -> None:
    run = driver(blocks=6)
    run.scheduler.add(make_request("a", 8, 12, seed=1))
    run.scheduler.add(make_request("b", (1, 2, 3, 4, 5, 6, 7, 8), 12, seed=2))
    plans = [run.step() for _ in range(6)]
    preempting = next(plan for plan in plans if "b" in plan.dropped)
    assert shares(preempting).keys() == {"a"}
    done = len(run.tokens("b"))
    plan = next(plan for _ in range(20) if (plan := run.step()).admitted)
    (again,) = plan.admitted
    assert again.request.id == "b" and list(again.output_ids) == run.tokens("b")[:done]
    assert shares(plan)["b"] == (4, 4 + done), "of what it had computed, the tail was taken and the head is found"
    run.drain()
    assert run.tokens("b") == expected(make_request("b", 8, 12, seed=2), 24)[0]
    assert [run.updates[name][-1].preemptions for name in "ab"] == [0, 1]
    stats = run.scheduler.stats()
    assert (stats.preemptions, stats.prefix_queries, stats.prefix_hits) == (1, 16, 0), "own blocks are no hits"


def test_nobody_is_admitted_in_a_step_in_which_memory_was_short() -> None:
    run = driver(blocks=6)
    run.scheduler.add(make_request("a", 8, 3))
    run.scheduler.add(make_request("b", (7,) * 16, 3, priority=1))
    run.step()
    run.scheduler.add(make_request("c", (9,) * 4, 3))
    plan = run.step()
    assert plan.dropped == ("b",) and not plan.admitted
    assert [admission.request.id for admission in run.step().admitted] == ["c"]
    run.drain()


def test_a_waiting_request_pushes_out_a_lower_priority_only_when_memory_is_short() -> None:
    run = driver(blocks=8)
    run.scheduler.add(make_request("low", 12, 20, priority=1, seed=1))
    run.scheduler.add(make_request("same", (9,) * 12, 8, seed=2))
    run.step()
    run.scheduler.add(make_request("urgent", (7,) * 12, 4, seed=3))
    run.step()
    assert run.scheduler.stats().preemptions == 1
    plan = run.step()
    assert plan.dropped == ("low",) and [a.request.id for a in plan.admitted] == ["urgent"]
    run.drain()
    assert run.updates["low"][-1].preemptions == 1 and run.updates["same"][-1].preemptions == 0


def test_blocks_on_their_way_back_are_awaited_before_the_next_is_pushed_out() -> None:
    run = driver(lag=1, blocks=10)
    for name in ("low1", "low2"):
        run.scheduler.add(make_request(name, (int(name[3]),) * 12, 4, priority=1))
    run.step()
    run.scheduler.add(make_request("urgent", (7,) * 16, 2))
    run.drain()
    assert [run.updates[name][-1].preemptions for name in ("low1", "low2")] == [0, 1]


def test_an_earlier_arrival_pushes_out_nobody_of_its_own_priority() -> None:
    run = driver(blocks=8)
    run.scheduler.add(make_request("late", 12, 8))
    run.step()
    run.scheduler.add(make_request("early", (7,) * 24, 4, arrival=-1.0))
    run.drain()
    assert run.scheduler.stats().preemptions == 0


@pytest.mark.parametrize(("blocks", "seqs"), [(12, 3), (40, 2)], ids=["in vain", "for a place"])
def test_nobody_is_pushed_out_in_vain_or_for_a_place(blocks: int, seqs: int) -> None:
    run = driver(blocks=blocks, seqs=seqs)
    run.scheduler.add(make_request("low", 3, 3, priority=1))
    run.scheduler.add(make_request("first", (9,) * 28, 4, priority=-1))
    run.step()
    run.scheduler.add(make_request("urgent", (7,) * 40, 4, priority=-1))
    run.drain()
    assert run.scheduler.stats().preemptions == 0
    assert all(run.finish(name) is FinishReason.LENGTH for name in ("low", "first", "urgent"))


def test_speculation_reserves_two_lookaheads_when_results_are_late() -> None:
    run = driver(device=SpeculativeDevice, lag=1, blocks=20)
    run.scheduler.add(make_request("a", 6, 40))
    first, second = run.step().items[0], run.step().items[0]
    assert (first.start, first.lookahead, first.pending) == (0, 5, False)
    assert (second.start, second.lookahead, second.pending) == (11, 5, True)
    assert len(second.block_ids) * 4 >= 11 + 1 + 5
    run.drain()


@pytest.mark.parametrize("lag", [0, 1])
def test_no_step_is_planned_past_the_limit(lag: int) -> None:
    run = driver(lag=lag)
    run.scheduler.add(make_request("a", 4, 3))
    plans = [run.step() for _ in range(3)]
    assert [len(plan.items) for plan in plans] == [1, 1, 1]
    assert run.step().items == ()
    run.drain()
    assert run.finish("a") is FinishReason.LENGTH


def test_a_sequence_alone_may_fill_the_whole_pool_and_ends_there() -> None:
    run = driver(blocks=3, model_len=100)
    run.scheduler.add(make_request("a", 5, 50))
    run.drain()
    assert len(run.tokens("a")) == 7 and run.finish("a") is FinishReason.LENGTH


def test_an_admission_leaves_a_watermark_to_those_that_run() -> None:
    run = driver(blocks=200, model_len=800, budget=900)
    run.scheduler.add(make_request("a", 400, 400))
    run.scheduler.add(make_request("b", (1,) * 396, 4))
    assert shares(run.step()).keys() == {"a"}, "99 blocks for b would leave 1, and 2 have to be left"


def test_plans_share_the_table_and_never_copy_the_prompt() -> None:
    run = driver(blocks=40, budget=128)
    run.scheduler.add(make_request("a", 101, 20))
    first, second, third = run.step().items[0], run.step().items[0], run.step().items[0]
    assert len(first.tokens) == 101 and len(second.tokens) == 1
    assert second.block_ids is third.block_ids


def test_traits_switch_the_prefix_cache_off() -> None:
    scheduler = make_scheduler(DecodeTraits(prefix_cacheable=False))
    run = Driver(scheduler, AutoregressiveDevice(16, random.Random(1)))
    for name in "ab":
        scheduler.add(make_request(name, 12, 2))
        run.drain()
    assert run.updates["b"][-1].cached_tokens == 0 and scheduler.stats().kv_blocks_cached == 0
