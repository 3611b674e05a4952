"""What results mean: stops, counts, log-probabilities, errors, and steps that fail as a whole."""

from __future__ import annotations

import pytest

from engine.errors import IntegrityError, InvalidRequest
from engine.scheduling.scheduler import Scheduler
from engine.types import (
    Capacity,
    DecodeTraits,
    FinishReason,
    Request,
    SeqResult,
    SeqUpdate,
    StepOutput,
    TokenLogprob,
)
from tests.unit.fakes import VOCAB, make_request, make_scheduler


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, -1.0, 1)


def step(scheduler: Scheduler, **results: SeqResult) -> tuple[SeqUpdate, ...]:
    """One step at lag 0 in which each planned request, by id, has the given result."""
    plan = scheduler.schedule()
    assert {item.request_id for item in plan.items} == results.keys()
    updates = scheduler.update(StepOutput(plan.step, tuple(results.values())))
    scheduler.check_integrity()
    return updates


def several(request: Request, *tokens: int) -> SeqUpdate:
    """Give a request these tokens as one result of a speculative step; the update that comes of it."""
    scheduler = make_scheduler(DecodeTraits(lookahead=9))
    scheduler.add(request)
    size = len(request.prompt_ids)
    result = SeqResult("a", tokens, size + len(tokens) - 1, tuple(map(logprob, tokens)))
    (update,) = step(scheduler, a=result)
    assert update.logprobs == tuple(map(logprob, update.token_ids))
    assert (update.finish is None) == scheduler.has_work() or scheduler.schedule().dropped == ("a",)
    return update


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.mark.parametrize(
    ("request_", "kept", "finish", "stop_token"),
    [
        (make_request("a", max_tokens=9), 5, None, None),
        (make_request("a", max_tokens=9, eos_ids=(8, 3)), 3, STOP, None),
        (make_request("a", max_tokens=9, stop_token_ids=(4, 2)), 2, STOP, 2),
        (make_request("a", max_tokens=9, eos_ids=(2,), stop_token_ids=(2,)), 2, STOP, None),
        (make_request("a", max_tokens=9, eos_ids=(4,), stop_token_ids=(3,)), 3, STOP, 3),
        (make_request("a", max_tokens=3), 3, LENGTH, None),
        (make_request("a", max_tokens=3, eos_ids=(4,)), 3, LENGTH, None),
        (make_request("a", max_tokens=3, eos_ids=(3,)), 3, STOP, None),
        (make_request("a", max_tokens=9, eos_ids=(2, 4), min_tokens=2), 4, STOP, None),
        (make_request("a", max_tokens=9, stop_token_ids=(1, 2, 3), min_tokens=3), 5, None, None),
        (make_request("a", 61, max_tokens=9), 3, LENGTH, None),
        (make_request("a", max_tokens=0), 0, LENGTH, None),
    ],
)
def test_a_result_is_cut_behind_the_token_that_ends_it(
    request_: Request, kept: int, finish: FinishReason | None, stop_token: int | None
) -> None:
    update = several(request_, 1, 2, 3, 4, 5)
    assert update.token_ids == (1, 2, 3, 4, 5)[:kept]
    assert (update.finish, update.stop_token_id) == (finish, stop_token)


def test_min_tokens_counts_over_all_steps() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, 9, eos_ids=(7,), min_tokens=2))
    endings = [step(scheduler, a=SeqResult("a", (7,), 4 + index))[0].finish for index in range(3)]
    assert endings == [None, None, STOP]


def test_tokens_behind_a_stop_are_never_published() -> None:
    scheduler = make_scheduler(DecodeTraits(lookahead=9))
    scheduler.add(make_request("a", 4, 9, eos_ids=(2,)))
    step(scheduler, a=SeqResult("a", (1, 2, 3, 4, 5), 8))
    step(scheduler)
    scheduler.add(make_request("b", (*range(100, 104), 1, 2, 3, 4, 5), 9))
    (item,) = scheduler.schedule().items
    assert item.start == 4


def test_a_prompt_that_is_only_scored_is_computed_to_its_end() -> None:
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("a", 12, 0, prompt_logprobs=0))
    scores = tuple(logprob(token) for token in range(101, 112))
    (first,) = step(scheduler, a=SeqResult("a", (), 8, prompt_logprobs=scores[:8]))
    (last,) = step(scheduler, a=SeqResult("a", (1,), 12, prompt_logprobs=scores[8:]))
    assert (first.finish, last.finish, last.token_ids) == (None, LENGTH, ())
    assert (first.prompt_logprobs, last.prompt_logprobs) == (scores[:8], scores[8:])


def test_every_update_tells_of_the_cache_and_the_start() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_request(name, 9, 1))
        (update,) = step(scheduler, **{name: SeqResult(name, (1,), 9)})
        assert (update.cached_tokens, update.scheduled_at) == ({"a": 0, "b": 8}[name], 5.0)
    stats = scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (18, 8)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (make_request("a", ()), "empty"),
        (make_request("a", (1, VOCAB)), "vocabulary"),
        (make_request("a", (-1, 2)), "vocabulary"),
        (make_request("a", 40), "context of 40"),
        (make_request("a", 41, 0), "context of 40"),
    ],
)
def test_a_request_that_can_never_run_ends_with_an_error(request_: Request, error: str) -> None:
    scheduler = make_scheduler(model_len=40)
    scheduler.add(request_)
    assert scheduler.has_work()
    (update,) = step(scheduler)
    assert update.finish is FinishReason.ERROR and error in (update.error or "")
    assert not scheduler.has_work()


def test_a_prompt_larger_than_the_pool_ends_with_an_error_and_blocks_nobody() -> None:
    scheduler = make_scheduler(blocks=4, model_len=100)
    scheduler.add(make_request("a", 16))
    scheduler.add(make_request("b", 15, 1))
    updates = step(scheduler, b=SeqResult("b", (1,), 15))
    assert [(u.request_id, u.finish) for u in updates] == [("a", FinishReason.ERROR), ("b", LENGTH)]
    assert "KV cache, which holds 16 tokens" in (updates[0].error or "")


def test_an_error_ends_one_request_alone_and_leaves_nothing_in_the_cache() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 9))
    scheduler.add(make_request("b", (7,) * 8, 2))
    step(scheduler, a=SeqResult("a", (1,), 8), b=SeqResult("b", (1,), 8))
    updates = step(scheduler, a=SeqResult("a", (2,), 9, error="NaN"), b=SeqResult("b", (2,), 9))
    assert [(u.request_id, u.token_ids, u.finish, u.error) for u in updates] == [
        ("a", (), FinishReason.ERROR, "NaN"),
        ("b", (2,), LENGTH, None),
    ]
    scheduler.add(make_request("c", 9, 1))
    scheduler.add(make_request("d", (7,) * 9, 1))
    plan = scheduler.schedule()
    assert plan.dropped == ("a", "b")
    assert [item.start for item in plan.items] == [0, 8]


def test_a_missing_result_is_an_error_of_that_request() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    plan = scheduler.schedule()
    (update,) = scheduler.update(StepOutput(plan.step, ()))
    assert update.finish is FinishReason.ERROR and "no result" in (update.error or "")


def test_a_failed_step_ends_everyone_in_it_and_nobody_else() -> None:
    scheduler = make_scheduler(seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, 8, 4))
    plan = scheduler.schedule()
    updates = scheduler.fail_step(plan.step, "out of memory")
    assert [(u.request_id, u.finish, u.error) for u in updates] == [
        ("a", FinishReason.ERROR, "out of memory"),
        ("b", FinishReason.ERROR, "out of memory"),
    ]
    scheduler.check_integrity()
    plan = scheduler.schedule()
    assert plan.dropped == ("a", "b") and [(i.request_id, i.start) for i in plan.items] == [("c", 0)]


def test_a_step_that_fails_behind_another_leaves_the_later_one_as_surplus() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 9))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.items[0].pending
    assert len(scheduler.fail_step(first.step, "broken")) == 1
    scheduler.check_integrity()
    assert scheduler.stats().kv_blocks_used > 0, "the later step still writes there"
    assert not (plan := scheduler.schedule()).items and not plan.dropped
    assert scheduler.update(StepOutput(second.step, (SeqResult("a", (1,), 9),))) == ()
    assert scheduler.stats().kv_blocks_used == 0
    assert scheduler.schedule().dropped == ("a",)


def test_steps_must_come_back_in_order() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 9))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(IntegrityError, match="oldest step in flight is 0"):
        scheduler.update(StepOutput(second.step, ()))
    with pytest.raises(IntegrityError, match="step 7"):
        scheduler.fail_step(7, "?")
    assert len(scheduler.update(StepOutput(first.step, (SeqResult("a", (1,), 8),)))) == 1


def test_an_id_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        scheduler.add(make_request("a"))


def test_prompt_log_probabilities_come_once_even_after_a_preemption() -> None:
    scheduler = make_scheduler(blocks=8, budget=10)
    scores = tuple(logprob(token) for token in range(101, 128))
    scheduler.add(make_request("b", (7,) * 4, 2))
    scheduler.add(make_request("a", 28, 1, prompt_logprobs=0))
    first = step(scheduler, b=SeqResult("b", (1,), 4), a=SeqResult("a", (), 6, prompt_logprobs=scores[:6]))
    step(scheduler, b=SeqResult("b", (1,), 5))
    assert scheduler.stats().preemptions == 1, "b took the block it needed"
    second = step(scheduler, a=SeqResult("a", (), 14, prompt_logprobs=scores[4:14]))
    third = step(scheduler, a=SeqResult("a", (), 24, prompt_logprobs=scores[14:24]))
    (last,) = step(scheduler, a=SeqResult("a", (1,), 28, prompt_logprobs=scores[24:]))
    assert [update.prompt_logprobs for update in (first[1], *second, *third, last)] == [
        scores[:6],
        scores[6:14],
        scores[14:24],
        scores[24:],
    ]
    assert last.finish is LENGTH and last.preemptions == 1 and scheduler.stats().prefix_queries == 4


def test_check_integrity_tells_what_is_wrong() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 9))
    step(scheduler, a=SeqResult("a", (1,), 8))
    (seq,) = scheduler._roster.running
    scheduler._kv.pool.release(seq.block_ids[0])
    with pytest.raises(AssertionError, match="0 references, but 1 sequences hold it"):
        scheduler.check_integrity()


def test_the_pool_guards_where_the_context_is_larger() -> None:
    capacity = Capacity(4, 4, 100, VOCAB, DecodeTraits())
    assert capacity.max_model_len > capacity.num_blocks * capacity.block_size
    scheduler = make_scheduler(blocks=4, model_len=100)
    scheduler.add(make_request("a", 14, 50))
    updates = [step(scheduler, a=SeqResult("a", (1,), 14 + index))[0] for index in range(2)]
    assert [update.finish for update in updates] == [None, LENGTH]
