"""AsyncEngine over a real engine process with a fake worker: streams, cancellation, limits, failures."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import pytest
import pytest_asyncio

from engine.async_engine import AsyncEngine
from engine.cluster.channel import framed
from engine.config import EngineConfig, ModelConfig, SchedulerConfig
from engine.errors import ContextLengthExceeded, InvalidRequest, Overloaded, StepFailed
from engine.front.output import RequestOutput
from engine.types import (
    FinishReason,
    Phase,
    SeqUpdate,
    SpeculationParams,
    SpeculationReport,
    TokenEvent,
    Usage,
)
from tests.unit.fake_worker import EARLY_EOS, EOS, FAIL_REQUEST, FAIL_RESULT, Gate, answer, write_checkpoint
from tests.unit.served_engine import WORKER, Engine, ask, read, text, until

SCHEDULER = SchedulerConfig(
    max_num_seqs=4, max_batched_tokens=16, max_queued_requests=20, max_queued_tokens=600, stall_seconds=0.05
)
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(30)]


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["lag 0", "lag 1, lookahead 3"])
async def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    late = request.param != "lag 0"
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), gate=True, lookahead=3 if late else 0)
    config = EngineConfig(ModelConfig(str(folder), "fake"), replace(SCHEDULER, lag=int(late)))
    engine = AsyncEngine(config, cache_dir=folder, created=7, worker=WORKER)
    started = Engine(engine, Gate(folder))
    started.gate.open()
    phases: list[Phase] = []
    await engine.start(phases.append)
    started.gate.shut()
    assert [phase.name for phase in phases if phase.name in ("fake weights", "first token")] == [
        "fake weights",
        "first token",
    ]
    yield started
    await engine.close()
    started.gate.close()


@pytest_asyncio.fixture(loop_scope="module")
async def served(shared: Engine) -> AsyncIterator[Engine]:
    shared.seen.clear()
    yield shared
    await shared.settle()


async def test_info_and_health(served: Engine) -> None:
    info = served.engine.info
    assert (info.id, info.created, info.max_model_len, info.vocab_size) == ("fake", 7, 512, 257)
    assert info.eos_ids == (EOS,)
    health = served.engine.health()
    assert (health.ok, health.ready, health.reason) == (True, True, "")


async def test_many_requests_at_once(served: Engine) -> None:
    served.gate.open()
    asked = [ask(prompt, max_tokens) for prompt, max_tokens in itertools.product((1, 7, 26, 45), (1, 4, 9))]
    streams = await asyncio.gather(*(read(served.engine, request) for request in asked))
    for request, stream in zip(asked, streams, strict=True):
        events = stream[request.id]
        prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
        assert text(events) == answer(prompt, wanted)
        assert [token for event in events for token in event.token_ids] == list(answer(prompt, wanted).encode())
        assert [event.finish for event in events][-1] is FinishReason.LENGTH
        assert events[-1].usage == Usage(prompt, wanted, events[-1].usage.cached_tokens)
        assert [offset for event in events for offset in event.offsets] == list(range(wanted))
    assert sum(count for count, _ in served.seen.tokens) == sum(r.sampling.max_tokens for r in asked)
    assert sum(first for _, first in served.seen.tokens) == len(asked)
    for summary in served.seen.summaries:
        assert summary.first_token is not None and min(summary.queue, summary.prefill, summary.decode) >= 0
        assert summary.e2e == pytest.approx(summary.queue + summary.prefill + summary.decode)


async def test_one_stream_merges_several_requests(served: Engine) -> None:
    served.gate.open()
    asked = [replace(ask(5, 3), group="g", choice=choice) for choice in range(3)]
    events = await read(served.engine, *asked)
    assert [text(events[request.id]) for request in asked] == [answer(5, 3)] * 3
    assert [summary.n for summary in served.seen.summaries] == [3, 3, 3]
    assert await read(served.engine) == {}


async def test_end_of_sequence_and_its_absence(served: Engine) -> None:
    served.gate.open()
    stopping, going_on = ask((EARLY_EOS, 65), 30), ask((EARLY_EOS, 65), 6, ignore_eos=True)
    events = await read(served.engine, stopping, going_on)
    assert (events[stopping.id][-1].finish, events[stopping.id][-1].stop_reason) == (FinishReason.STOP, None)
    assert "eos" not in text(events[stopping.id])
    assert events[going_on.id][-1].finish is FinishReason.LENGTH


async def test_stop_ids_and_stop_strings(served: Engine) -> None:
    served.gate.open()
    by_id, by_text = ask(26, 20, stop_token_ids=(ord("d"),)), ask(26, 20, stop=("bc", "zz"), logprobs=0)
    kept = ask(26, 20, stop=("bc",), include_stop_str_in_output=True)
    events = await read(served.engine, by_id, by_text, kept)
    assert events[by_id.id][-1].stop_reason == ord("d")
    last = events[by_text.id][-1]
    assert (text(events[by_text.id]), last.finish, last.stop_reason) == ("a", FinishReason.STOP, "bc")
    assert last.usage.completion_tokens == 3  # a and the two of the stop; the engine's surplus does not count
    assert sum(len(event.token_ids) for event in events[by_text.id]) == 3
    assert sum(len(event.logprobs or ()) for event in events[by_text.id]) == 3
    assert text(events[kept.id]) == "abc"
    assert {s.finish for s in served.seen.summaries} == {FinishReason.STOP}


async def test_the_report_of_drafting_comes_with_the_last_event(served: Engine) -> None:
    """With a lookahead, each step drafts three tokens, all of which stand."""
    served.gate.open()
    asked = replace(ask(26, 12), speculation=SpeculationParams(report=True))
    *others, last = (await read(served.engine, asked))[asked.id]
    drafted = (4, True) in served.seen.tokens
    assert [count for count, _ in served.seen.tokens] == ([4] * 3 if drafted else [1] * 12)
    report = SpeculationReport(3, 9, 9, (0, 0, 0, 3)) if drafted else SpeculationReport()
    assert last.speculation == replace(report, tokens=12)
    assert [event.speculation for event in others] == [None] * len(others)
    plain = ask(26, 4)
    assert (await read(served.engine, plain))[plain.id][-1].speculation is None


async def test_the_report_of_drafting_stops_at_a_stop_string(served: Engine) -> None:
    served.gate.open()
    asked = replace(ask(26, 40, stop=("c",)), speculation=SpeculationParams(report=True))
    last = (await read(served.engine, asked))[asked.id][-1]
    drafted = SpeculationReport(1, 3, 3, (0, 0, 0, 1))  # of abc and the target's d, which is cut off
    report = drafted if (3, True) in served.seen.tokens else SpeculationReport()
    assert last.speculation == replace(report, tokens=3)


async def test_a_stop_string_ends_the_request_in_the_engine_too(served: Engine) -> None:
    begun = served.engine.stats.steps
    served.gate.allow(8)
    await read(served.engine, ask(26, 480, stop=("cd",)))
    # The abort is sent by now, and this follows it on the same way. Free steps would race with both: one at a time.
    answer_behind_abort = asyncio.create_task(served.engine.check())

    def moved_past(steps: int) -> bool:
        return answer_behind_abort.done() or served.engine.stats.steps > steps

    while not answer_behind_abort.done():
        seen = served.engine.stats.steps
        served.gate.allow(1)
        await until(partial(moved_past, seen))
    assert (await answer_behind_abort).running == 0
    assert served.engine.stats.steps - begun < 60, "all 480 tokens take 120 steps or more"
    await served.settle()


async def test_prompt_logprobs_come_once_with_the_first_event(served: Engine) -> None:
    served.gate.open()
    asked = ask(tuple(range(65, 105)), 8, prompt_logprobs=0)  # three steps of prefill
    first, *others = (await read(served.engine, asked))[asked.id]
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    assert [entry.token_id for entry in first.prompt_logprobs[1:] if entry] == list(range(66, 105))
    assert all(event.prompt_logprobs is None for event in others)


async def test_events_arrive_while_the_rest_is_computed(served: Engine) -> None:
    async with await served.engine.submit((ask(max_tokens=12),)) as stream:
        served.gate.allow(2)
        first = await anext(stream)
        assert 0 < len(first.text) < 12 and first.finish is None
        served.gate.open()
        assert first.text + "".join([event.text async for event in stream]) == answer(26, 12)


async def test_a_failure_in_the_front_process_ends_one_request(served: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = ask(26, 300), ask(26, 5)
    take = RequestOutput.take

    def broken(self: RequestOutput, update: SeqUpdate, now: float) -> TokenEvent | None:
        if self.request.id == bad.id:
            raise RuntimeError("a detokenizer's bug")
        return take(self, update, now)

    monkeypatch.setattr(RequestOutput, "take", broken)
    served.gate.open()
    outcomes = await asyncio.gather(read(served.engine, bad), read(served.engine, good), return_exceptions=True)
    assert isinstance(outcomes[0], StepFailed)
    assert isinstance(outcomes[1], dict) and text(outcomes[1][good.id]) == answer(26, 5)


async def test_events_that_pile_up_become_one_and_hold_up_nobody(served: Engine) -> None:
    slow, quick = ask(26, 12, logprobs=0), ask(26, 4)
    async with await served.engine.submit((slow,)) as stream:
        served.gate.open()
        assert text((await read(served.engine, quick))[quick.id]) == answer(26, 4)
        await until(lambda: len(served.seen.summaries) == 2)
        events = [event async for event in stream]
    assert len(events) == 1
    assert (events[0].text, events[0].finish, events[0].usage.completion_tokens) == (
        answer(26, 12),
        FinishReason.LENGTH,
        12,
    )
    assert events[0].offsets == tuple(range(12)) and len(events[0].logprobs or ()) == 12


@pytest.mark.parametrize("steps", range(6))
async def test_leaving_at_any_step_aborts(served: Engine, steps: int) -> None:
    """While queued, in each chunk of the prefill, and while decoding; another request goes on undisturbed."""
    stays = ask(26, 6)
    begun = served.seen.steps
    async with await served.engine.submit((stays,)) as stream:
        async with await served.engine.submit([ask(45, 40) for _ in range(5)]):  # more than may run
            served.gate.allow(steps)
            await until(lambda: served.seen.steps >= begun + steps - 1)
        await served.settle()
        assert "".join([event.text async for event in stream]) == answer(26, 6)
    assert [s.finish for s in served.seen.summaries].count(FinishReason.ABORT) == 5


async def test_a_cancelled_reader_aborts(served: Engine) -> None:
    reading = asyncio.create_task(read(served.engine, ask(), ask()))
    stream = await served.engine.submit((ask(),))  # without `async with`
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    for task in (reading, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await served.settle()
    assert [s.finish for s in served.seen.summaries] == [FinishReason.ABORT] * 3
    assert [event async for event in stream] == []


async def test_the_queue_has_limits(served: Engine) -> None:
    async with await served.engine.submit([ask(1) for _ in range(18)]):
        for size, reason, length in ((3, "max_num_queued_reqs", 1), (2, "max_num_queued_tokens", 300)):
            with pytest.raises(Overloaded) as refused:
                await served.engine.submit([ask(length) for _ in range(size)])
            assert refused.value.reason == reason and refused.value.retry_after > 0
        async with await served.engine.submit([ask(1), ask(1)]):
            assert served.seen.rejected == ["max_num_queued_reqs", "max_num_queued_tokens"]
    with pytest.raises(InvalidRequest, match="at most 20"):
        await served.engine.submit([ask(1) for _ in range(21)])  # could never be taken
    await served.settle()
    served.gate.open()
    room_again = [ask(1) for _ in range(20)]
    assert len(await read(served.engine, *room_again)) == 20


async def test_bad_requests_are_refused_before_anything_is_queued(served: Engine) -> None:
    engine, good = served.engine, ask()
    for bad, kind in (
        (ask(()), InvalidRequest),
        (ask((257,)), InvalidRequest),
        (ask(512), ContextLengthExceeded),
        (ask(temperature=float("nan")), InvalidRequest),
        (good, InvalidRequest),  # the same id twice
        (ask(stop=("\ud800",)), InvalidRequest),
    ):
        with pytest.raises(kind):
            await engine.submit((good, bad), param="messages")
    async with await engine.submit((good,)):
        with pytest.raises(InvalidRequest, match="running already"):
            await engine.submit((good,))
    assert len(served.seen.summaries) == 1


async def test_a_failed_step_ends_its_own_requests(served: Engine) -> None:
    served.gate.open()
    good, alone = ask(26, 5), ask((FAIL_REQUEST, 65))
    outcomes = await asyncio.gather(read(served.engine, alone), read(served.engine, good), return_exceptions=True)
    assert isinstance(outcomes[0], StepFailed) and "one request" in str(outcomes[0])
    assert isinstance(outcomes[1], dict) and text(outcomes[1][good.id]) == answer(26, 5)
    with pytest.raises(StepFailed, match="scripted failure of result"):
        await read(served.engine, ask((FAIL_RESULT, 65)))
    again = ask(26, 5)
    assert text((await read(served.engine, again))[again.id]) == answer(26, 5)
    assert [s.finish for s in served.seen.summaries].count(FinishReason.ERROR) == 2


async def test_garbage_on_the_wire_is_dropped(served: Engine) -> None:
    client = served.engine._client
    assert client is not None
    for kind, body in ((b"a", b"\xff"), (b"?", b""), (b"a", b"cos\nsystem\n(S'true'\ntR.")):
        client._channel.send_raw(framed(kind, body))
    served.gate.open()
    asked = ask(26, 2)
    assert text((await read(served.engine, asked))[asked.id]) == "ab"


async def test_work_without_progress_is_unhealthy(served: Engine) -> None:
    async with await served.engine.submit((ask(),)):
        await until(lambda: not served.engine.health().ok)
        assert "no progress" in served.engine.health().reason
        served.gate.open()
        await until(lambda: served.engine.health().ok)


async def test_200_requests_with_random_cancels_leave_nothing(served: Engine) -> None:
    served.gate.open()

    async def one(number: int) -> None:
        while True:
            try:
                stream = await served.engine.submit((ask(1 + number % 30, 1 + number % 17),))
            except Overloaded:
                await asyncio.sleep(0)
                continue
            async with stream:
                for _ in range(number * 7 % 5):
                    if await anext(stream, None) is None:
                        break
            return

    await asyncio.gather(*map(one, range(200)))
    await served.settle()
    assert len(served.seen.summaries) == 200
