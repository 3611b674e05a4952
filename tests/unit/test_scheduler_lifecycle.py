"""Aborts in every state, groups of choices, and what leaves while steps are in flight."""

from __future__ import annotations

import random

import pytest

from engine.scheduling.scheduler import Scheduler
from engine.types import FinishReason, SeqResult, StepOutput
from tests.unit.fakes import AutoregressiveDevice, Driver, expected, make_request, make_scheduler


def driver(lag: int = 0, *, blocks: int = 16, budget: int = 64, seqs: int = 8) -> Driver:
    scheduler = make_scheduler(blocks=blocks, budget=budget, seqs=seqs)
    return Driver(scheduler, AutoregressiveDevice(blocks, random.Random(1)), lag)


def running(plan_items: tuple[object, ...]) -> list[str]:
    return [item.request_id for item in plan_items]  # type: ignore[attr-defined]


# ---- aborts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_an_abort_before_any_step_of_a_chunked_prompt_and_its_decode(steps: int, lag: int) -> None:
    """0: waiting; 1 and 2: within the prompt; 3 and 4: decoding; at lag 1 with a step in flight."""
    run = driver(lag, budget=8)
    run.scheduler.add(make_request("a", 20, 9))
    for _ in range(steps):
        run.step()
    assert run.scheduler.abort("a")
    assert not run.scheduler.abort("a"), "it can only end once"
    run.scheduler.check_integrity()
    run.drain()
    assert run.finish("a") is FinishReason.ABORT
    assert len(run.updates["a"]) == 1 + max(0, steps - lag - 2)


def test_unknown_and_finished_ids_cannot_be_aborted() -> None:
    run = driver()
    assert not run.scheduler.abort("a")
    run.scheduler.add(make_request("a", 4, 1))
    run.drain()
    assert not run.scheduler.abort("a")


def test_an_abort_with_a_step_in_flight_keeps_its_blocks_until_that_step_ended() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 9))
    plan = scheduler.schedule()
    assert scheduler.abort("a")
    assert scheduler.stats().kv_blocks_used == 2
    assert scheduler.schedule().dropped == ()
    updates = scheduler.update(StepOutput(plan.step, (SeqResult("a", (1,), 8),)))
    assert [(update.finish, update.token_ids) for update in updates] == [(FinishReason.ABORT, ())]
    assert scheduler.stats().kv_blocks_used == 0
    assert scheduler.schedule().dropped == ("a",)


def preempted_in_flight(lag_steps: int = 2) -> tuple[Scheduler, list[int]]:
    """Two sequences of which the second was preempted while it has a step in flight."""
    scheduler = make_scheduler(blocks=4)
    scheduler.add(make_request("a", 7, 9))
    scheduler.add(make_request("b", (1, 2, 3, 4, 5, 6, 7), 9))
    steps = [scheduler.schedule().step for _ in range(lag_steps)]
    scheduler.update(StepOutput(steps[0], (SeqResult("a", (1,), 7), SeqResult("b", (1,), 7))))
    plan = scheduler.schedule()
    assert plan.items == (), "a waits for the blocks of b, which a step in flight still uses"
    scheduler.check_integrity()
    assert scheduler.stats().preemptions == 1 and scheduler.stats().waiting == 1
    return scheduler, steps


def test_a_preempted_sequence_keeps_the_tokens_of_its_step_in_flight() -> None:
    scheduler, steps = preempted_in_flight()
    updates = scheduler.update(StepOutput(steps[1], (SeqResult("a", (2,), 8), SeqResult("b", (2,), 8))))
    assert [(u.request_id, u.token_ids) for u in updates] == [("a", (2,)), ("b", (2,))]
    plan = scheduler.schedule()
    assert plan.dropped == ("b",) and running(plan.items) == ["a"]
    assert scheduler.abort("a")
    scheduler.update(StepOutput(plan.step, (SeqResult("a", (3,), 9),)))
    (admission,) = scheduler.schedule().admitted
    assert admission.request.id == "b" and admission.output_ids == (1, 2)


def test_an_abort_of_a_preempted_sequence_with_a_step_in_flight() -> None:
    scheduler, steps = preempted_in_flight()
    assert scheduler.abort("b")
    scheduler.check_integrity()
    assert scheduler.stats().waiting == 0
    results = (SeqResult("a", (2,), 8), SeqResult("b", (2,), 8))
    updates = scheduler.update(StepOutput(steps[1], results))
    assert [(u.request_id, u.finish) for u in updates] == [("b", FinishReason.ABORT), ("a", None)]
    scheduler.check_integrity()
    plan = scheduler.schedule()
    assert plan.dropped == ("b",) and running(plan.items) == ["a"]


def test_an_abort_of_a_preempted_sequence_that_waits_again() -> None:
    run = driver(blocks=4)
    run.scheduler.add(make_request("a", 7, 9, seed=1))
    run.scheduler.add(make_request("b", (1, 2, 3, 4, 5, 6, 7), 9, seed=2))
    while not run.scheduler.stats().preemptions:
        run.step()
    assert run.scheduler.stats().waiting == 1
    assert run.scheduler.abort("b")
    run.drain()
    assert run.finish("b") is FinishReason.ABORT and run.finish("a") is FinishReason.LENGTH


def test_an_id_may_come_back_in_the_plan_that_drops_it() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    scheduler.abort("a")
    scheduler.add(make_request("a"))
    plan = scheduler.schedule()
    assert plan.dropped == ("a",) and [a.request.id for a in plan.admitted] == ["a"]
    updates = scheduler.update(StepOutput(plan.step, (SeqResult("a", (1,), 4),)))
    assert [update.finish for update in updates] == [FinishReason.ABORT, None]


# ---- late results ------------------------------------------------------------------------------------------


def test_a_finished_sequence_leaves_after_its_surplus_step() -> None:
    run = driver(1)
    request = make_request("a", 4, 9, seed=3)
    stop = expected(request, 64)[0][1]
    run.scheduler.add(make_request("a", 4, 9, seed=3, eos_ids=(stop,)))
    for _ in range(3):
        run.step()
    assert run.finish("a") is FinishReason.STOP and len(run.in_flight) == 1
    assert run.scheduler.stats().kv_blocks_used > 0 and "a" in run.device.states
    plan = run.step()
    assert not plan.items and not plan.dropped and run.scheduler.stats().kv_blocks_used == 0
    assert run.step().dropped == ("a",)
    run.drain()
    assert len(run.tokens("a")) == 2


# ---- groups ------------------------------------------------------------------------------------------------


def add_group(run: Driver, prompt: int = 20, size: int = 3) -> None:
    for choice in range(size):
        run.scheduler.add(make_request(f"g{choice}", prompt, 4, group="g", choice=choice, seed=choice))


def test_followers_wait_for_the_leaders_prompt_and_hit_its_blocks() -> None:
    run = driver(budget=8)
    add_group(run)
    run.scheduler.add(make_request("other", (1, 2, 3), 9, seed=9))
    assert running(run.step().items) == ["g0"]
    assert run.scheduler.stats().waiting == 3
    assert running(run.step().items) == ["g0"]
    plan = run.step()
    assert running(plan.items) == ["g0", "other"], "held followers block nobody"
    plan = run.step()
    assert {item.request_id: item.start for item in plan.items} == {"g0": 20, "other": 3, "g1": 16, "g2": 16}
    run.drain()
    assert [run.updates[f"g{i}"][-1].cached_tokens for i in range(3)] == [0, 16, 16]
    assert [run.tokens(f"g{i}") for i in range(3)] == [
        expected(make_request("x", 20, 4, seed=i), 64)[0] for i in range(3)
    ]


@pytest.mark.parametrize("how", ["abort", "error", "fail_step"])
def test_followers_go_on_when_their_leader_leaves(how: str) -> None:
    run = driver(budget=8)
    add_group(run)
    run.step()
    if how == "abort":
        run.scheduler.abort("g0")
    elif how == "error":
        run.fails.add("g0")
    else:
        run.failing_step = True
    run.drain()
    assert run.finish("g0") is (FinishReason.ABORT if how == "abort" else FinishReason.ERROR)
    assert [run.finish("g1"), run.finish("g2")] == [FinishReason.LENGTH] * 2


def test_a_leader_that_ends_with_its_first_token_frees_its_followers() -> None:
    run = driver()
    run.scheduler.add(make_request("g0", 20, 1, group="g"))
    run.scheduler.add(make_request("g1", 20, 3, group="g", choice=1))
    run.drain()
    assert run.updates["g1"][-1].cached_tokens == 16


def test_followers_without_a_leader_or_behind_a_ready_one_are_not_held() -> None:
    run = driver()
    run.scheduler.add(make_request("g1", 20, 2, group="g", choice=1))
    assert running(run.step().items) == ["g1"]
    add_group(run, size=1)
    run.step()
    run.scheduler.add(make_request("g2", 20, 2, group="g", choice=2))
    assert "g2" in running(run.step().items)


def test_prompts_without_a_block_to_share_are_not_held() -> None:
    run = driver()
    add_group(run, prompt=4)
    assert running(run.step().items) == ["g0", "g1", "g2"]


def test_a_held_follower_can_be_aborted() -> None:
    run = driver(budget=8)
    add_group(run)
    run.step()
    assert run.scheduler.abort("g1")
    run.scheduler.check_integrity()
    assert run.scheduler.stats().waiting == 1
    run.drain()
    assert run.finish("g1") is FinishReason.ABORT and len(run.tokens("g2")) == 4


def test_a_preempted_leader_still_leads() -> None:
    run = driver(blocks=9, budget=8)
    for choice in range(2):
        run.scheduler.add(make_request(f"g{choice}", 20, 4, group="g", choice=choice, priority=1, seed=choice))
    run.step()
    run.scheduler.add(make_request("urgent", (5,) * 20, 4, seed=7))
    run.drain()
    assert run.updates["g0"][-1].preemptions == 1
    assert [run.finish(name) for name in ("g0", "g1", "urgent")] == [FinishReason.LENGTH] * 3
    assert run.updates["g1"][-1].cached_tokens == 16
