"""Requests whose grammar is compiled beside the steps: nobody waits for them, and whatever becomes of one is told."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cluster.channel import EngineChannel, Inbox, framed, pair
from engine.cluster.compiling import THREADS
from engine.cluster.messages import TO_FRONT, Abort, Add, Check, CheckReply, Shutdown, ToEngine, ToFront, encode
from engine.cluster.process import Pulse, serve
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.grammar import Grammar
from engine.types import FinishReason, Request, SamplingParams, SeqUpdate, StepReport
from tests.unit.fake_worker import FakeWorker, write_checkpoint

SECONDS = 20.0  # until a test gives up


class Front:
    """The front process's end of an engine that runs in a thread of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_checkpoint(folder)
        self.ends: dict[str, SeqUpdate] = {}
        self._socket, end = pair()
        self._socket.setblocking(True)
        self._socket.settimeout(SECONDS)
        self._inbox = Inbox()
        self._channel = EngineChannel(end)
        worker = FakeWorker(EngineConfig(), self.folder, lambda _: None)
        core = EngineCore(worker, EngineConfig())
        self._thread = threading.Thread(target=serve, args=(core, self._channel, Pulse(self._channel)), daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._socket.sendall(framed(*encode(message)))

    def hear(self) -> list[ToFront]:
        """The next news; what requests end with is noted."""
        messages = self._inbox.feed(self._socket.recv(1 << 16), TO_FRONT)
        for message in messages:
            if isinstance(message, StepReport):
                for update in message.updates:
                    if update.finish is not None:
                        assert update.request_id not in self.ends, "an update after the terminal one"
                        self.ends[update.request_id] = update
        return messages

    def until_ended(self, *names: str) -> None:
        while not self.ends.keys() >= {*names}:
            self.hear()

    def check(self) -> CheckReply:
        self.send(Check(1))
        while True:
            for message in self.hear():
                if isinstance(message, CheckReply):
                    return message

    def settle(self) -> None:
        """Wait until nothing is left of any request."""
        while self.check() != CheckReply(1, 0, 0, 0, 0):
            pass

    def gate(self, name: str) -> int:
        """Grammars of this text are compiled when something is written to it."""
        os.mkfifo(self.folder / name)
        return os.open(self.folder / name, os.O_RDWR)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.send(Shutdown())
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        self._channel.close()
        self._socket.close()


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    made = Front(tmp_path)
    yield made
    made.stop()


def ask(name: str, text: str | None = None, tokens: int = 4) -> Request:
    grammar = None if text is None else Grammar("regex", text)
    return Request(name, (65,) * 26, SamplingParams(tokens, grammar=grammar), arrival=time.monotonic())


def test_nobody_waits_for_a_slow_grammar(front: Front) -> None:
    gate = front.gate("slow")
    front.send(Add((ask("slow", "slow"),)))
    front.send(Add((ask("plain"),)))
    front.until_ended("plain")
    for number in range(20):
        front.send(Add((ask(f"quick{number}", "quick"),)))
    front.until_ended(*(f"quick{number}" for number in range(20)))
    assert "slow" not in front.ends and front.check().waiting == 1
    os.write(gate, b".")
    front.until_ended("slow")  # while nothing else happens: the engine is woken up
    assert {update.finish for update in front.ends.values()} == {FinishReason.LENGTH}
    front.settle()
    os.close(gate)


def test_an_abort_that_overtakes_wins(front: Front) -> None:
    """Of one of several choices, too; and of those that no thread has begun with."""
    gate = front.gate("slow")
    group = [replace(ask(f"g{i}", "slow"), choice=i, group="g") for i in range(3)]
    front.send(Add(tuple(group)))
    for number in range(THREADS + 1):
        front.send(Add((ask(f"later{number}", "slow"),)))
    front.send(Abort(("g0", f"later{THREADS}", "nobody")))
    front.until_ended("g0", f"later{THREADS}")
    assert {update.finish for update in front.ends.values()} == {FinishReason.ABORT}
    for _ in range(10):
        os.write(gate, b".")
    front.until_ended("g1", "g2", *(f"later{number}" for number in range(THREADS)))
    assert sorted(name for name, update in front.ends.items() if update.finish is FinishReason.ABORT) == sorted(
        ["g0", f"later{THREADS}"]
    )
    front.settle()
    os.close(gate)


def test_what_can_not_be_compiled_ends_alone(front: Front) -> None:
    front.send(Add((ask("refused", "refused"), ask("with it"))))
    front.send(Add((ask("broken", "broken"),)))
    front.send(Add((ask("fine", "fine"),)))
    front.until_ended("refused", "with it", "broken", "fine")
    assert "scripted refusal" in (front.ends["refused"].error or "")
    assert "scripted refusal" in (front.ends["with it"].error or "")  # they came as one
    assert "scripted failure" in (front.ends["broken"].error or "")
    assert front.ends["fine"].finish is FinishReason.LENGTH
    front.settle()


@pytest.mark.parametrize("how", ["told", "the front is gone"])
def test_the_engine_leaves_while_a_grammar_is_compiled(front: Front, how: str) -> None:
    gate = front.gate("slow")
    front.send(Add((ask("slow", "slow"),)))
    while not front.check().waiting:
        pass
    if how == "told":
        front.send(Shutdown())
    else:
        front._socket.shutdown(socket.SHUT_WR)
    front._thread.join(SECONDS)
    assert not front._thread.is_alive()
    os.write(gate, b".")
    os.close(gate)


def test_a_wake_up_ends_a_wait_once() -> None:
    end, other = pair()
    channel = EngineChannel(other)
    for _ in range(100_000):  # more than a pipe holds
        channel.wake()
    assert channel.receive(block=True, seconds=SECONDS) == []
    assert channel.receive(block=True, seconds=0.0) == []
    waker = threading.Thread(target=channel.wake)
    waker.start()
    assert channel.receive(block=True) == []
    waker.join()
    end.sendall(framed(*encode(Abort(("a",)))))
    channel.wake()
    assert channel.receive(block=True) == [Abort(("a",))]
    end.close()
    channel.close()
    channel.wake()  # a thread that comes too late
