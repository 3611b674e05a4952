"""Messages and the sockets between a front process and an engine process, without the process."""

from __future__ import annotations

import asyncio
import logging
import threading

import msgspec
import pytest

from engine.cluster.channel import PIECE, EngineChannel, FrontChannel, framed, pair
from engine.cluster.messages import (
    TO_ENGINE,
    TO_FRONT,
    Abort,
    Add,
    Check,
    CheckReply,
    Fatal,
    Heartbeat,
    MalformedMessage,
    Ready,
    Shutdown,
    decode,
    encode,
)
from engine.types import (
    Capacity,
    DecodeTraits,
    EngineStats,
    FinishReason,
    Phase,
    Request,
    SamplingParams,
    SeqUpdate,
    StepReport,
    TokenLogprob,
)
from tests.unit.served_engine import until

SAMPLING = SamplingParams(
    max_tokens=3,
    stop=("é", "\n"),
    logit_bias=((1, 2.5),),
    allowed_token_ids=(1, 2),
    bad_words=((1,), (2, 3)),
    seed=-(2**63),
)
LOGPROB = TokenLogprob(5, -1.5, 2, ((4, -0.5), (5, -1.5)))
FROM_FRONT = (
    Add((Request("r", (1, 2, 3), SAMPLING, (2,), 1, "g", -4, "salt", 12.5),)),
    Abort(("a", "b")),
    Check(7),
    Shutdown(),
)
FROM_ENGINE = (
    Phase("weights", 1.5, 1 << 30, "fp16"),
    Ready(Capacity(8, 16, 64, 100, DecodeTraits(3, False, False))),
    StepReport((SeqUpdate("r", (5,), (LOGPROB,), (LOGPROB,), FinishReason.STOP, 5),), EngineStats(steps=3)),
    Heartbeat(3, None),
    CheckReply(7, 0, 1, 2, 3, "x"),
    Fatal("KeyError", "'a'"),
)


@pytest.mark.parametrize("message", FROM_FRONT, ids=lambda m: type(m).__name__)
def test_front_messages_survive_the_trip(message: Add | Abort | Check | Shutdown) -> None:
    assert decode(encode(message), TO_ENGINE) == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda m: type(m).__name__)
def test_engine_messages_survive_the_trip(
    message: Phase | Ready | StepReport | Heartbeat | CheckReply | Fatal,
) -> None:
    assert decode(encode(message), TO_FRONT) == message


MALFORMED = (
    (b"?", b"\x80"),
    (b"\0", b""),
    (b"a", b""),
    (b"a", b"\xff\xfe"),
    (b"a", b"\x81\xa8requests\xc0"),  # the right field of the wrong type
    (b"a", b"\x81\xa8requests\x91\x80"),  # a request without fields
    (b"x", b"\x81\xabrequest_ids\x91\xa1\xff"),  # no UTF-8
    (b"a", b"\x91" * 100_000 + b"\xc0"),  # nested without end
    (b"a", b"cos\nsystem\n(S'true'\ntR."),  # a pickle
    encode(FROM_ENGINE[0]),  # travels the wrong way
)


@pytest.mark.parametrize("message", MALFORMED)
def test_what_is_malformed_is_an_error_of_that_message(message: tuple[bytes, bytes]) -> None:
    with pytest.raises(MalformedMessage):
        decode(message, TO_ENGINE)


class Ends:
    """Both ends in one process."""

    def __init__(self) -> None:
        ours, theirs = pair()
        self.got: list[object] = []
        self.front, self.engine = FrontChannel(self.got.append), EngineChannel(theirs)
        self._ours = ours

    async def __aenter__(self) -> Ends:
        await self.front.open(self._ours)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.engine.close()
        self.front.close()
        await self.front.ended.wait()

    async def received(self, count: int) -> list[object]:
        """What the engine's end has received, once it is so many messages."""
        seen: list[object] = []
        while len(seen) < count:
            await asyncio.sleep(0)  # the front's end writes when the loop turns
            seen += self.engine.receive(block=False)
        return seen


@pytest.mark.asyncio
async def test_both_ends_drop_garbage_and_keep_the_order(caplog: pytest.LogCaptureFixture) -> None:
    async with Ends() as ends:
        for kind, body in MALFORMED[:-1]:
            ends.engine._socket.sendall(framed(kind, body))
            ends.front.send_raw(framed(kind, body))
        said: list[Heartbeat | Fatal] = [Heartbeat(1, 2.0), Fatal("a", "b")]
        for message in said:
            ends.engine.send(message)
        await until(lambda: len(ends.got) == 2)
        assert ends.got == said
        for token in range(100):
            ends.front.send(Check(token))
        assert await ends.received(100) == [Check(token) for token in range(100)]
        assert ends.engine.receive(block=False) == []
    assert any("malformed" in record.message for record in caplog.records if record.levelno == logging.WARNING)


@pytest.mark.asyncio
async def test_messages_come_whole_however_the_bytes_are_cut() -> None:
    prompt = tuple(range(300_000))  # more than a socket takes, and than is read, at once
    long = Add((Request("r", prompt, SAMPLING),))
    async with Ends() as ends:
        assert len(encode(long)[1]) > 2 * PIECE
        for message in (Check(1), long, Check(2)):
            ends.front.send(message)
        assert await ends.received(3) == [Check(1), long, Check(2)]
        data = b"".join(framed(*encode(Check(token))) for token in range(5))
        for place in range(len(data)):
            ends.front.send_raw(data[place : place + 1])
            await asyncio.sleep(0)
        assert await ends.received(5) == [Check(token) for token in range(5)]


@pytest.mark.asyncio
async def test_the_engine_never_waits_for_a_front_that_does_not_read() -> None:
    """All of these are sent before the event loop turns even once; a thread of its own says other things meanwhile."""
    reports = [StepReport((SeqUpdate("r", tuple(range(i, i + 1000))),), EngineStats(steps=i)) for i in range(500)]
    async with Ends() as ends:
        for report in reports[:250]:
            ends.engine.send(report)

        def beats() -> None:
            for i in range(250):
                ends.engine.send(Heartbeat(i, None))

        beat = threading.Thread(target=beats)
        beat.start()
        for report in reports[250:]:
            ends.engine.send(report)
        beat.join()
        assert ends.engine._unsent and not ends.got
        reading = asyncio.create_task(asyncio.to_thread(ends.engine.receive, block=True))  # what was unsent leaves
        await until(lambda: len(ends.got) == 750)
        ends.front.send(Check(0))
        assert await reading == [Check(0)]
    assert [message for message in ends.got if isinstance(message, StepReport)] == reports


@pytest.mark.asyncio
async def test_the_end_of_one_side_is_told_to_the_other() -> None:
    async with Ends() as ends:
        ends.engine.send(Fatal("a", "last words"))
        ends.engine.close()
        await ends.front.ended.wait()
        assert ends.got == [Fatal("a", "last words")]
    async with Ends() as ends:
        ends.front.send(Check(1))
        ends.front._transport.close()  # type: ignore[union-attr]
        await ends.front.ended.wait()
        assert ends.engine.receive(block=True) == [Check(1)]
        assert ends.engine.receive(block=True) == [Shutdown()]
        ends.engine.send(Fatal("nobody", "hears it"))


@pytest.mark.asyncio
async def test_what_a_listener_raises_is_kept() -> None:
    def fail(message: object) -> None:
        raise KeyError(message)

    ours, theirs = pair()
    front, engine = FrontChannel(fail), EngineChannel(theirs)
    await front.open(ours)
    engine.send(Heartbeat(1, None))
    assert isinstance(await front.broken, KeyError)
    engine.close()
    front.close()


def test_a_report_of_a_full_step_costs_little() -> None:
    updates = tuple(SeqUpdate(f"cmpl-{i:032x}", (i,)) for i in range(64))
    _, body = encode(StepReport(updates, EngineStats()))
    assert len(body) < 64 * 256


def test_config_lines_are_json() -> None:
    from engine.cluster.messages import Boot
    from engine.config import EngineConfig

    boot = Boot(EngineConfig(), "m:C", 7)
    line = msgspec.json.encode(boot)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=Boot) == boot
