"""Canvases: whole passes that are staggered over the steps, and nobody who waits for long."""

from __future__ import annotations

from collections.abc import Sequence as Many

import pytest

from engine.types import (
    FinishReason,
    ScheduledSeq,
    SeqResult,
)
from tests.unit.denoising_fakes import BlockCausal, Canvas, Denoiser, canvas_request, driver, spans
from tests.unit.fakes import State, expected, make_request


def test_a_canvas_takes_its_blocks_at_the_start_and_needs_no_more() -> None:
    run = driver(blocks=6)
    run.scheduler.add(canvas_request("a", 6, 8))
    run.scheduler.add(canvas_request("b", 6, 8))
    tables = {item.block_ids for _ in range(4) for item in run.step().items}
    assert {len(table) for table in tables} == {4} and len(tables) == 1
    run.drain()
    assert run.scheduler.stats().preemptions == 0


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (canvas_request("a", 20, 13), "need 33, but a step, which runs them whole, holds 32"),
        (canvas_request("a", 20, 9, verify="masked_copy"), "need 33, but a step"),
        (canvas_request("a", 10, 31), "need 41, but the context holds 40"),
        (make_request("a", 4, 4), "no canvas"),
    ],
)
def test_a_canvas_that_can_never_run_ends_with_an_error(request_: object, problem: str) -> None:
    run = driver(budget=32, model_len=40)
    run.scheduler.add(request_)  # type: ignore[arg-type]
    run.drain()
    assert run.finish("a") is FinishReason.ERROR and problem in (run.updates["a"][-1].error or "")


def test_denoise_steps_go_before_whole_passes_and_these_take_turns() -> None:
    run = driver(budget=40, seqs=9)
    for name in "abcdef":
        run.scheduler.add(canvas_request(name, 8, 24, cache="dual", arrival=float(ord(name))))
    assert spans(run.step()) == {"a": (0, 8, 24)}
    assert {name: sum(span[1:]) for name, span in spans(run.step()).items()} == {"a": 4, "b": 32}


class Slow(Canvas):
    """Commits one token a step."""

    def unmask(self, state: State, start: int, block: list[int | None], masked: Many[int]) -> list[int]:
        return super().unmask(state, start, block, masked[:1])


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(("budget", "block"), [(32, 4), (32, 8), (44, 13), (70, 4)])
def test_nobody_waits_for_more_steps_than_there_are_others(cache: str, budget: int, block: int) -> None:
    """Each step has room for one whole pass and a few denoise steps, or for many of these."""
    run = driver(Slow, budget=budget, seqs=9, blocks=200, model_len=32)
    for number in range(8):
        kind = cache if number % 2 else "dual"
        run.scheduler.add(canvas_request(f"r{number}", 4 + number % 3, 26, block=block, cache=kind, seed=number))
    waited: dict[str, int] = {}
    longest = 0
    while run.scheduler.has_work():
        plan = run.step()
        planned = {item.request_id for item in plan.items}
        running = {seq.request.id for seq in run.scheduler._roster.running}
        waited = {name: waited.get(name, 0) + 1 for name in running - planned}
        longest = max(longest, *waited.values(), 0) if waited else longest
    assert 0 < longest <= 7
    assert all(len(run.tokens(f"r{number}")) == 26 for number in range(8))


def test_a_large_canvas_is_not_kept_out_by_denoise_steps() -> None:
    run = driver(budget=60, seqs=9, blocks=200)
    for name in "abc":
        run.scheduler.add(canvas_request(name, 4, 16, block=2))
    for _ in range(3):
        run.step()
    run.scheduler.add(canvas_request("large", 8, 48))
    plans = [run.step() for _ in range(3)]
    first = next(index for index, plan in enumerate(plans) if "large" in spans(plan))
    assert sum(spans(plans[first])["large"]) == 56 and first <= 1
    run.drain()


def test_a_preempted_canvas_takes_its_tokens_along_and_replays_its_open_block() -> None:
    run = driver(blocks=8)
    run.scheduler.add(canvas_request("low", 4, 20, block=8, priority=1, seed=1))
    while not run.tokens("low"):
        run.step()
    run.scheduler.add(canvas_request("urgent", 4, 16, seed=2))
    run.drain()
    assert run.updates["low"][-1].preemptions == 1
    assert run.tokens("low") == expected(make_request("x", 4, 20, seed=1), 400)[0]


def test_a_sequence_ends_with_its_canvas() -> None:
    run = driver()
    run.scheduler.add(canvas_request("a", 4, 10, max_tokens=30))
    run.drain()
    assert len(run.tokens("a")) == 10 and run.finish("a") is FinishReason.LENGTH


def test_choices_of_a_canvas_start_at_once_and_those_of_blocks_wait_for_the_shared_ones() -> None:
    run = driver(budget=90)
    for choice in range(3):
        run.scheduler.add(canvas_request(f"g{choice}", 20, 8, group="g", choice=choice, seed=choice))
    assert list(spans(run.step())) == ["g0", "g1", "g2"]
    run = driver(BlockCausal, budget=24)
    for choice in range(3):
        run.scheduler.add(make_request(f"h{choice}", 7, 1, group="h", choice=choice))
    assert list(spans(run.step())) == ["h0", "h1", "h2"], "a prompt within one block shares nothing"
    run.drain()
    for choice in range(3):
        run.scheduler.add(make_request(f"g{choice}", 21, 20, group="g", choice=choice, seed=choice))
    assert spans(run.step()) == {"g0": (0, 21, 3)}
    assert spans(run.step())["g1"] == (16, 5, 3), "positions 16 to 20 are final with the rest of their block"
    run.drain()
    assert [run.updates[f"g{i}"][-1].cached_tokens for i in range(3)] == [0, 16, 16]


# ---- the oracle itself: bugs that were planted must be found -----------------------------------------------


class ForgetsRefresh(Canvas):
    """Goes on with the next block over the cache of the one before it."""

    def commit(self, state: State, tokens: list[int], num_computed: int) -> SeqResult:
        return super().commit(state, tokens, num_computed or 4)


class ClosesEarly(BlockCausal):
    """Calls a block final when its last token is known, a step before its KV is written from all of them."""

    def commit(self, state: State, tokens: list[int], num_computed: int) -> SeqResult:
        full = (len(state.tokens) + len(tokens)) // 8 * 8
        return super().commit(state, tokens, max(num_computed, full))


class SendsTwice(Canvas):
    """After a preemption, hands over again what the scheduler already has."""

    def unmask(self, state: State, start: int, block: list[int | None], masked: Many[int]) -> list[int]:
        tokens = super().unmask(state, start, block, masked)
        return [token for token in block if token is not None] if tokens else []


@pytest.mark.parametrize("device", [ForgetsRefresh, ClosesEarly, SendsTwice])
def test_a_bug_planted_in_a_device_is_found(device: type[Denoiser]) -> None:
    run = driver(device, blocks=12)
    run.scheduler.add(canvas_request("a", 4, 24, block=8))
    run.scheduler.add(canvas_request("b", 4, 24, block=8, seed=3))
    with pytest.raises(AssertionError):
        run.drain()
        assert run.tokens("a") == expected(make_request("x", 4, 24), 400)[0]


def test_items_of_a_plan_name_each_sequence_once() -> None:
    run = driver(budget=40)
    for name in "abcd":
        run.scheduler.add(canvas_request(name, 8, 24))
    seen: list[ScheduledSeq] = []
    while run.scheduler.has_work():
        items = run.step().items
        assert len({item.request_id for item in items}) == len(items)
        assert sum(len(item.tokens) + item.lookahead for item in items) <= 40
        seen += items
    assert seen
