"""The front process's handle on one engine process: start it, talk to it, notice its end, clean up after it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

import engine
from engine import errors
from engine.cluster.channel import FrontChannel, pair
from engine.cluster.messages import (
    Boot,
    Check,
    CheckReply,
    ControlReply,
    Fatal,
    Heartbeat,
    Load,
    Ready,
    Shutdown,
    ToEngine,
    ToFront,
)
from engine.config import EngineConfig
from engine.errors import ControlRefused, EngineDead, SlipstreamError
from engine.types import Capacity, Phase, StepReport

logger = logging.getLogger(__name__)
R = TypeVar("R", CheckReply, ControlReply)

GRACE_SECONDS = 5.0  # from asking a process to leave to killing it
CHECK_SECONDS = 30.0  # how long `check` waits for the step under way
DRAIN_SECONDS = 1.0  # how long a dead process's last messages may take to come out of the socket
# -P and the explicit root: the process must import the same package as we did, never one of the current directory.
_COMMAND = "import sys; sys.path.append(sys.argv[1]); from engine.cluster.process import main; sys.exit(main())"
_ROOT = str(Path(next(iter(engine.__path__))).resolve().parent)
_TYPED = {kind.__name__: kind for kind in (errors.ConfigError, errors.ModelLoadError, errors.InsufficientMemory)}


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told of what, on the event loop. `on_exit` is called once, with the reason, unless `close` came first."""

    on_phase: Callable[[Phase], None]
    on_report: Callable[[StepReport], None]
    on_exit: Callable[[SlipstreamError], None]


class EngineClient:
    """One engine process as its parent sees it. Belongs to one event loop."""

    def __init__(self, process: asyncio.subprocess.Process, listeners: Listeners) -> None:
        self.heard_at = time.monotonic()  # when its last message came; it sends one a second
        self.busy_since: float | None = None  # start of the step it was in at its last heartbeat
        self._process = process
        self._watcher: asyncio.Task[None]
        self._channel = FrontChannel(self._take)
        self._listeners = listeners
        self._closing = False
        self._fatal: Fatal | None = None
        self._capacity: asyncio.Future[Capacity] = asyncio.get_running_loop().create_future()
        self._checks: dict[int, asyncio.Future[CheckReply]] = {}
        self._controls: dict[int, asyncio.Future[ControlReply]] = {}
        self._tokens = itertools.count()

    @classmethod
    async def launch(cls, config: EngineConfig, worker: str, listeners: Listeners) -> EngineClient:
        """Start a process, which imports `worker` (see Boot) and then waits for `load`."""
        ours, theirs = pair()
        inherited = theirs.fileno()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _COMMAND, _ROOT),
                stdin=asyncio.subprocess.PIPE,
                stdout=2,  # a stray print must not end up in the answer of a command
                start_new_session=True,  # Ctrl-C in a terminal is the parent's to answer
                pass_fds=(inherited,),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        client = cls(process, listeners)
        await client._channel.open(ours)
        client._watcher = asyncio.create_task(client._watch(), name="engine-process-watch")
        client._write(Boot(config, worker, inherited))
        return client

    @property
    def pid(self) -> int:
        return self._process.pid

    async def load(self, folder: Path) -> Capacity:
        """Have the process load the checkpoint, and wait until it is ready or dead. Raises the reason of its death."""
        self._write(Load(str(folder)))
        return await asyncio.shield(self._capacity)

    def send(self, message: ToEngine) -> None:
        """Never waits. Whether the process still lives is `on_exit`'s news, not this one's."""
        self._channel.send(message)

    async def check(self) -> CheckReply:
        """Have it recount its blocks between two steps; for tests and debugging. Raises EngineDead."""
        return await self._ask(self._checks, Check)

    async def control(self, ask: Callable[[int], ToEngine]) -> int:
        """Send what `ask` makes of a token, and wait for its `ControlReply`. Raises ControlRefused and EngineDead."""
        reply = await self._ask(self._controls, ask)
        if reply.error:
            raise ControlRefused(reply.error)
        return reply.count

    async def _ask(self, replies: dict[int, asyncio.Future[R]], ask: Callable[[int], ToEngine]) -> R:
        token = next(self._tokens)
        reply = replies[token] = asyncio.get_running_loop().create_future()
        try:
            self.send(ask(token))
            return await asyncio.wait_for(reply, CHECK_SECONDS)
        except TimeoutError as error:
            raise EngineDead(f"the engine process did not answer within {CHECK_SECONDS:.0f} s") from error
        finally:
            del replies[token]

    async def close(self) -> None:
        """End the process, politely at first, and remove every trace of it."""
        self._closing = True
        try:
            if self._process.returncode is None:
                self._ask_to_leave()
                await asyncio.wait({self._watcher}, timeout=GRACE_SECONDS)
        finally:
            if self._process.returncode is None:
                self._process.kill()
            await asyncio.wait({self._watcher})
            self._channel.close()

    def _ask_to_leave(self) -> None:
        if self._capacity.done():
            self._channel.send(Shutdown())
        else:
            self._process.terminate()  # still loading: it does not listen yet

    def _write(self, line: Boot | Load) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(line) + b"\n")

    def _take(self, message: ToFront) -> None:
        self.heard_at = time.monotonic()
        match message:
            case StepReport():
                self.busy_since = None
                self._listeners.on_report(message)
            case Heartbeat(_, busy_since):
                self.busy_since = busy_since
            case Phase():
                self._listeners.on_phase(message)
            case Ready(capacity):
                if not self._capacity.done():
                    self._capacity.set_result(capacity)
            case CheckReply(token):
                if token in self._checks and not self._checks[token].done():
                    self._checks[token].set_result(message)
            case ControlReply(token):
                if token in self._controls and not self._controls[token].done():
                    self._controls[token].set_result(message)
            case Fatal():
                self._fatal = message

    async def _watch(self) -> None:
        """Wait until the process ends, then say why it did."""
        ended = asyncio.create_task(self._process.wait())
        broken = self._channel.broken
        either: list[asyncio.Future[Exception] | asyncio.Future[int]] = [broken, ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            logger.error("the news of the engine process can't be taken in", exc_info=broken.result())
            self._process.kill()
        status = await ended
        if not self._closing:  # its last words may still be in the socket
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._channel.ended.wait(), DRAIN_SECONDS)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._report_end(self._cause(status))

    def _report_end(self, cause: SlipstreamError) -> None:
        waiting: list[asyncio.Future[Capacity] | asyncio.Future[CheckReply] | asyncio.Future[ControlReply]]
        waiting = [self._capacity, *self._checks.values(), *self._controls.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(cause)
                future.exception()  # nobody may be waiting, and that is fine
        if not self._closing:
            self._listeners.on_exit(cause)

    def _cause(self, status: int) -> SlipstreamError:
        if self._fatal is not None:
            kind = _TYPED.get(self._fatal.kind)
            if kind is not None:
                return kind(self._fatal.text)
            return EngineDead(f"the engine process failed: {self._fatal.kind}: {self._fatal.text}")
        if status < 0:
            hint = "; was the machine out of memory?" if -status == signal.SIGKILL else ""
            return EngineDead(f"the engine process was ended by {signal.Signals(-status).name}{hint}")
        return EngineDead(f"the engine process ended with status {status}; its log says more")
