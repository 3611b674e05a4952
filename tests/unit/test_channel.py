"""Messages and the sockets between a front process and an engine process, without the process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from engine.cluster.channel import EngineChannel, FrontChannel
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
    (),
    (b"a",),
    (b"a", b"", b""),
    (b"?", b"\x80"),
    (b"", b""),
    (b"a" * 1000, b""),
    (b"a", b""),
    (b"a", b"\xff\xfe"),
    (b"a", b"\x81\xa8requests\xc0"),  # the right field of the wrong type
    (b"a", b"\x81\xa8requests\x91\x80"),  # a request without fields
    (b"x", b"\x81\xabrequest_ids\x91\xa1\xff"),  # no UTF-8
    (b"a", b"\x91" * 100_000 + b"\xc0"),  # nested without end
    (b"a", b"cos\nsystem\n(S'true'\ntR."),  # a pickle
    encode(FROM_ENGINE[0]),  # travels the wrong way
)


@pytest.mark.parametrize("frames", MALFORMED)
def test_malformed_frames_are_errors_of_that_message(frames: tuple[bytes, ...]) -> None:
    with pytest.raises(MalformedMessage):
        decode(frames, TO_ENGINE)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # the paths of unix sockets must be short
        yield Path(name)


@pytest.mark.asyncio
async def test_both_ends_drop_garbage_and_keep_the_order(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    front = FrontChannel(directory)
    front.send(Check(-1))  # nobody is there yet
    engine = EngineChannel(directory)
    beat = engine.sender()
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.connect(f"ipc://{directory / 'to_front'}")
        for frames in MALFORMED[1:-1]:
            stranger.send_multipart(frames)
        beat.send(Heartbeat(1, 2.0))
        engine.send(Fatal("a", "b"))
        got = [await front.receive(), await front.receive()]
        stranger.linger = 0
    assert sorted(map(repr, got)) == sorted(map(repr, [Heartbeat(1, 2.0), Fatal("a", "b")]))
    for frames in MALFORMED[1:]:
        front._sender.send_multipart(frames)
    for token in range(100):
        front.send(Check(token))
    seen: list[object] = []
    while len(seen) < 101:
        seen += engine.receive(block=True)
    assert seen == [Check(token) for token in range(-1, 100)]
    assert engine.receive(block=False) == []
    assert any("malformed" in record.message for record in caplog.records if record.levelno == logging.WARNING)
    beat.close()
    engine.close()
    front.close()


def test_a_report_of_a_full_step_costs_little() -> None:
    updates = tuple(SeqUpdate(f"cmpl-{i:032x}", (i,)) for i in range(64))
    _, body = encode(StepReport(updates, EngineStats()))
    assert len(body) < 64 * 256


def test_config_lines_are_json() -> None:
    from engine.cluster.messages import Boot
    from engine.config import EngineConfig

    boot = Boot(EngineConfig(), "m:C", "/tmp/x y")
    line = msgspec.json.encode(boot)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=Boot) == boot
