"""Beginnings and ends of an engine process: start-up failures, drain, death of either side, nothing left over."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from engine.cluster.messages import CheckReply
from engine.config import EngineConfig, ModelConfig, SchedulerConfig
from engine.errors import EngineDead, ModelLoadError, Overloaded, SlipstreamError, StepFailed
from engine.types import Request, SamplingParams
from tests.unit.fake_worker import FAIL_SUBMIT, Gate, write_checkpoint

WORKER = "tests.unit.fake_worker:FakeWorker"
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(30)]


def build(folder: Path) -> AsyncEngine:
    config = EngineConfig(ModelConfig(str(folder)), SchedulerConfig(max_num_seqs=4))
    return AsyncEngine(config, cache_dir=folder, created=0, worker=WORKER)


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[tuple[AsyncEngine, Gate]]:
    """A gated engine; when it is closed its process and its socket must be gone."""
    engine, gate = build(write_checkpoint(folder, gate=True)), Gate(folder)
    gate.open()
    await engine.start(lambda phase: None)
    gate.shut()
    client = engine._client
    assert client is not None
    yield engine, gate
    await engine.close()
    await engine.close()
    gate.close()
    assert client._process.returncode is not None
    await client._channel.ended.wait()
    with pytest.raises(EngineDead):
        await engine.submit((ask("late"),))


def ask(name: str, *prompt: int, max_tokens: int = 5) -> Request:
    return Request(name, prompt or (65,) * 26, SamplingParams(max_tokens))


async def outcome(engine: AsyncEngine, request: Request) -> str | SlipstreamError:
    """The whole text, or the error that ended it."""
    try:
        async with await engine.submit((request,)) as stream:
            return "".join([event.text async for event in stream])
    except SlipstreamError as error:
        return error


async def test_three_failed_steps_in_a_row_end_the_process(tmp_path: Path) -> None:
    async with started(tmp_path) as (engine, gate):
        gate.open()
        for name in "ab":
            assert isinstance(await outcome(engine, ask(name, FAIL_SUBMIT)), StepFailed)
        assert await outcome(engine, ask("good")) == "abcde"
        errors = [await outcome(engine, ask(name, FAIL_SUBMIT)) for name in "cde"]
        assert [type(error) for error in errors] == [StepFailed, StepFailed, EngineDead]
        assert "3 steps in a row failed" in str(errors[-1])
        health = engine.health()
        assert (health.ok, health.ready) == (False, False) and "3 steps" in health.reason
        with pytest.raises(EngineDead):
            await engine.check()


async def test_a_killed_process_ends_every_stream(tmp_path: Path) -> None:
    async with started(tmp_path) as (engine, gate):
        stream = await engine.submit((ask("partly read"),))
        running = [asyncio.create_task(outcome(engine, ask(name))) for name in "abcdefg"]
        checking = asyncio.create_task(engine.check())
        gate.allow(2)
        assert engine._client is not None
        os.kill(engine._client.pid, signal.SIGINT)  # as Ctrl-C does; the parent's affair
        assert (await anext(stream)).text.startswith("a")
        os.kill(engine._client.pid, signal.SIGKILL)
        for error in [await task for task in running]:
            assert isinstance(error, EngineDead) and "SIGKILL" in str(error)
        with pytest.raises(EngineDead, match="SIGKILL"):
            _ = [event async for event in stream]
        checked = (await asyncio.gather(checking, return_exceptions=True))[0]
        assert isinstance(checked, EngineDead | CheckReply)  # it may have come before the end
        assert not engine.health().ok


async def test_drain_waits_for_what_runs_and_then_ends_the_rest(tmp_path: Path) -> None:
    async with started(tmp_path) as (engine, gate):
        short, long = (
            asyncio.create_task(outcome(engine, ask(name, max_tokens=n))) for name, n in (("s", 3), ("l", 99))
        )
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain(20))
        await asyncio.sleep(0)
        assert (engine.health().ok, engine.health().ready) == (True, False)
        with pytest.raises(Overloaded) as refused:
            await engine.submit((ask("late"),))
        assert refused.value.reason == "draining"
        gate.allow(5)
        assert await short == "abc"
        assert not draining.done() and not long.done()
        await engine.drain(0)  # a second signal
        error = await long
        assert isinstance(error, EngineDead) and "shutting down" in str(error)
        await draining
        gate.open()
        reply = await engine.check()
        assert (reply.running, reply.waiting, reply.error) == (0, 0, "")


async def test_the_heart_beats_during_a_step_and_sigterm_ends_it(tmp_path: Path) -> None:
    async with started(tmp_path) as (engine, _):
        task = asyncio.create_task(outcome(engine, ask("held")))
        assert engine._client is not None
        while engine._client.busy_since is None:
            await asyncio.sleep(0.001)
        os.kill(engine._client.pid, signal.SIGTERM)
        assert "status 0" in str(await task)


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [({"refuse": 1}, ModelLoadError, "scripted refusal"), ({"nonsense": 1}, EngineDead, "TypeError.*nonsense")],
)
async def test_a_worker_that_can_not_load_says_why(
    tmp_path: Path, script: dict[str, Any], kind: type[SlipstreamError], words: str
) -> None:
    engine = build(write_checkpoint(tmp_path, **script))
    with pytest.raises(kind, match=words):
        await engine.start(lambda phase: None)
    assert not engine.health().ok
    with pytest.raises(EngineDead):
        await engine.submit((ask("r"),))


async def test_a_missing_checkpoint_ends_the_start(tmp_path: Path) -> None:
    engine = build(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError):
        await engine.start(lambda phase: None)


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, gate = build(write_checkpoint(tmp_path, gate=True)), None
    starting = asyncio.create_task(engine.start(lambda phase: None))
    while engine._client is None:
        await asyncio.sleep(0.001)
    client, gate = engine._client, Gate(tmp_path)
    assert (engine.health().ok, engine.health().ready) == (True, False)
    with pytest.raises(EngineDead, match="not started"):
        _ = engine.info
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert client._process.returncode is not None
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    gate.close()


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.e2e.test_engine_process import ask, build
async def main():
    engine = build(Path(sys.argv[1]))
    starting = asyncio.create_task(engine.start(lambda phase: None))
    while engine._client is None:
        await asyncio.sleep(0.001)
    if sys.argv[2] == "running":
        await starting
        await engine.submit((ask("endless", max_tokens=400),))
    print(engine._client.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["starting", "running"])
async def test_no_orphan_outlives_a_killed_parent(tmp_path: Path, when: str) -> None:
    folder = write_checkpoint(tmp_path, gate=when == "running")
    gate = Gate(folder) if when == "running" else None
    if gate is not None:
        gate.allow(3)  # the start-up generation and a little more: the engine is stuck in a step when it happens
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), when], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    ended, _, _ = select.select([child], [], [], 20)
    os.close(child)
    assert ended
    if gate is not None:
        gate.close()
