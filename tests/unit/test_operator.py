"""What an operator may do to a running engine process: cancel, forget the prefix cache, record steps."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig, ModelConfig, SchedulerConfig
from engine.errors import Cancelled, ControlRefused, DuplicateRequest, EngineDead
from engine.types import FinishReason
from tests.unit.fake_worker import Gate, answer, write_checkpoint
from tests.unit.served_engine import WORKER, Engine, ask, read, text

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(30)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), gate=True)
    config = EngineConfig(ModelConfig(str(folder), "fake"), SchedulerConfig(max_num_seqs=4, lag=1))
    engine = AsyncEngine(config, cache_dir=folder, created=7, worker=WORKER)
    with pytest.raises(EngineDead):
        engine.operator()
    started = Engine(engine, Gate(folder))
    started.gate.open()
    await engine.start(lambda _: None)
    started.gate.shut()
    yield started
    await engine.close()
    started.gate.close()


@pytest_asyncio.fixture(loop_scope="module")
async def served(shared: Engine) -> AsyncIterator[Engine]:
    shared.seen.clear()
    yield shared
    await shared.settle()


async def test_cancel_ends_what_is_wanted_and_nothing_else(served: Engine) -> None:
    asked = [ask(26, 400), ask(26, 5), ask(26, 400)]
    streams = [await served.engine.submit([request]) for request in asked]
    gone = {asked[0].id, asked[2].id}
    assert served.engine.cancel(gone.__contains__) == [asked[0].id, asked[2].id]
    assert served.engine.cancel(gone.__contains__) == []
    for stream in (streams[0], streams[2]):
        with pytest.raises(Cancelled):
            await anext(stream)
    served.gate.open()
    assert text([event async for event in streams[1]]) == answer(26, 5)
    reply = await served.engine.check()
    assert (reply.running, reply.waiting, reply.error) == (0, 0, "")  # the process has heard of it
    assert [summary.finish for summary in served.seen.summaries] == [FinishReason.ABORT] * 2 + [FinishReason.LENGTH]
    assert {summary.request_id for summary in served.seen.summaries} == {request.id for request in asked}


async def test_a_running_id_is_refused_and_free_again_afterwards(served: Engine) -> None:
    request = ask(26, 3)
    stream = await served.engine.submit([request])
    with pytest.raises(DuplicateRequest) as refused:
        await served.engine.submit([replace(request, arrival=0.0)])
    assert refused.value.param == "request_id"
    served.gate.open()
    assert text([event async for event in stream]) == answer(26, 3)
    assert text((await read(served.engine, request))[request.id]) == answer(26, 3)


async def test_a_forgotten_prefix_is_not_found_again(served: Engine) -> None:
    served.gate.open()
    prompt = tuple(range(65, 105))
    await read(served.engine, ask(prompt, 2))
    again = (warm := ask(prompt, 2)).id
    assert (await read(served.engine, warm))[again][-1].usage.cached_tokens >= 36
    assert await served.engine.operator().reset_prefix_cache() >= 9
    assert await served.engine.operator().reset_prefix_cache() == 0
    cold = ask(prompt, 2)
    assert (await read(served.engine, cold))[cold.id][-1].usage.cached_tokens == 0


async def test_running_requests_keep_their_blocks(served: Engine) -> None:
    prompt = tuple(range(65, 91))
    request = ask(prompt, 9)
    stream = await served.engine.submit([request])
    served.gate.allow(3)
    await anext(stream)
    reset = asyncio.ensure_future(served.engine.operator().reset_prefix_cache())
    served.gate.open()
    assert await reset > 0
    rest = [event async for event in stream]
    assert rest[-1].usage.completion_tokens == 9
    reply = await served.engine.check()
    assert reply.error == ""


async def test_steps_are_recorded(served: Engine, tmp_path: Path) -> None:
    served.gate.open()
    operator, folder = served.engine.operator(), tmp_path / "made" / "here"
    await operator.start_profile(folder, 60.0, 1000)
    with pytest.raises(ControlRefused, match="under way already"):
        await operator.start_profile(tmp_path / "other", 60.0, 1000)
    await read(served.engine, ask(26, 4))
    steps = await operator.stop_profile()
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == steps >= 5
    assert lines[0]["tokens"] == 26 and lines[0]["running"] == 1
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    with pytest.raises(ControlRefused, match="no recording"):
        await operator.stop_profile()


@pytest.mark.parametrize("seconds, steps", [(60.0, 2), (0.001, 1000)])
async def test_a_recording_ends_by_itself(served: Engine, tmp_path: Path, seconds: float, steps: int) -> None:
    served.gate.open()
    operator, folder = served.engine.operator(), tmp_path / "bounded"
    await operator.start_profile(folder, seconds, steps)
    await read(served.engine, ask(26, 6))

    async def over() -> bool:
        try:
            await operator.start_profile(tmp_path / "next", 60.0, 10)
        except ControlRefused:
            return False
        return True

    while not await over():  # it ends behind a step, or in the next pause
        await asyncio.sleep(0.01)
    await operator.stop_profile()
    assert len((folder / "steps.jsonl").read_text().splitlines()) <= steps


async def test_what_stands_in_the_way_of_a_recording_is_told(served: Engine, tmp_path: Path) -> None:
    served.gate.open()
    operator = served.engine.operator()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(ControlRefused, match="Error"):
            await operator.start_profile(folder, 1.0, 10)
    assert text(next(iter((await read(served.engine, ask(26, 3))).values()))) == answer(26, 3)


async def test_who_asks_a_dead_process_hears_of_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    engine = AsyncEngine(EngineConfig(ModelConfig(str(folder), "fake")), cache_dir=folder, created=7, worker=WORKER)
    await engine.start(lambda _: None)
    assert engine._client is not None
    waiting = asyncio.ensure_future(engine.operator().reset_prefix_cache())
    os.kill(engine._client.pid, signal.SIGKILL)
    with pytest.raises(EngineDead, match="SIGKILL"):
        await waiting
    with pytest.raises(EngineDead):
        engine.operator()
    await engine.close()
