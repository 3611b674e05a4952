"""One engine process, started by `cluster/client.py` as `engine.cluster.process`.

The parent writes two lines of JSON to stdin (`Boot`, then `Load`) and keeps the pipe open: its end is how the
process learns that the parent has died, however it died. Everything after that goes over the channel.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

import msgspec

from engine.cluster.channel import EngineChannel
from engine.cluster.compiling import CompileStage
from engine.cluster.controls import Controls
from engine.cluster.memory import calm_collector, peak_memory
from engine.cluster.messages import (
    Abort,
    Add,
    Boot,
    Check,
    CheckReply,
    Fatal,
    Heartbeat,
    Load,
    Ready,
    ResetPrefixCache,
    Shutdown,
    StartProfile,
    StopProfile,
)
from engine.core import EngineCore
from engine.errors import IntegrityError
from engine.registry import WORKERS, resolve
from engine.types import FinishReason, Phase

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.protocols import Worker, WorkerFactory

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
QUIET_SECONDS = 0.5  # without work


def main() -> int:
    """Serve until told to stop; the exit status is 0 for an orderly end."""
    began = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGTERM, _terminate)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s engine: %(name)s: %(message)s")
    stdin = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  # stays open as long as the process lives
    boot = msgspec.json.decode(stdin.readline(), type=Boot)
    prepare_threads(boot.config)
    channel = EngineChannel(socket.socket(fileno=boot.socket))
    pulse = Pulse(channel)
    pulse.start()
    try:
        factory = _worker_factory(boot.worker)
        channel.send(Phase("engine imports", time.monotonic() - began, peak_memory()))
        line = stdin.readline()
        if not line:
            _leave_orphaned()
        threading.Thread(target=_exit_with_parent, daemon=True, name="parent-watch").start()
        folder = Path(msgspec.json.decode(line, type=Load).folder)
        _run(factory(boot.config, folder, channel.send), boot.config, channel, pulse)
        return 0
    except Exception as error:
        logger.exception("the engine process ends")
        channel.send(Fatal(type(error).__name__, str(error)))
        return 1
    finally:
        pulse.stop()
        channel.close()


def _run(worker: Worker, config: EngineConfig, channel: EngineChannel, pulse: Pulse) -> None:
    try:
        core = EngineCore(worker, config)
        calm_collector()
        channel.send(Ready(worker.capacity()))
        serve(core, channel, pulse)
    finally:
        worker.close()


def serve(core: EngineCore, channel: EngineChannel, pulse: Pulse) -> None:
    """Take in messages, step while there is work, wait on the socket when there is none; until Shutdown.

    The recount of all blocks waits for a real pause: with many of them it would keep the next request waiting.
    """
    settled, controls, stage = True, Controls(core), CompileStage(core.prepare, channel.wake)
    while True:
        idle = not core.has_work()
        messages = channel.receive(block=idle, seconds=None if settled and not controls.recording else QUIET_SECONDS)
        _take_compiled(core, stage)
        if idle and not messages and not settled and not core.has_work():
            core.settle()
            settled = True
        if idle:
            controls.note()
        for message in messages:
            match message:
                case Add(requests) if any(request.sampling.grammar is not None for request in requests):
                    stage.add(requests)
                case Add(requests):
                    for request in requests:
                        core.add(request)
                case Abort(request_ids):
                    for request_id in stage.abort(request_ids):
                        core.refuse(request_id, FinishReason.ABORT)
                    core.abort(request_ids)
                case Check(token):
                    channel.send(_check(core, token, stage.waiting))
                case ResetPrefixCache() | StartProfile() | StopProfile():
                    channel.send(controls.answer(message))
                case Shutdown():
                    return
        if core.has_work():
            with pulse:
                report = core.step()
            channel.send(report)
            controls.note(report.stats)
            settled = False


def _take_compiled(core: EngineCore, stage: CompileStage) -> None:
    for batch in stage.take():
        for request in batch.requests:
            if batch.error:
                core.refuse(request.id, FinishReason.ERROR, batch.error)
            else:
                core.add(request)


def _check(core: EngineCore, token: int, compiling: int) -> CheckReply:
    stats, error = core.stats(), ""
    try:
        core.check_integrity()
    except IntegrityError as found:
        error = str(found)
    return CheckReply(token, stats.running, stats.waiting + compiling, stats.kv_blocks_used, core.num_states(), error)


class Pulse(threading.Thread):
    """Sends a Heartbeat every second, also while a step runs. As a context manager it marks one step."""

    def __init__(self, channel: EngineChannel) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._channel = channel
        self._ended = threading.Event()
        self._steps = 0
        self._busy_since: float | None = None

    def run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._channel.send(Heartbeat(self._steps, self._busy_since))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def __enter__(self) -> None:
        self._busy_since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._steps += 1
        self._busy_since = None


def _worker_factory(name: str) -> WorkerFactory:
    """Import the worker class; this is what brings torch into the process."""
    table, key = ({name: name}, name) if name else (WORKERS, "local")
    return cast("WorkerFactory", resolve(table, key, "worker"))


def prepare_threads(config: EngineConfig) -> None:
    """OpenMP reads these once, when torch is imported; what the user has set wins."""
    # Threads that spin at a barrier starve their neighbours on a small machine, this server's own front process
    # among them: a step took 5 to 10 times longer beside one busy core. A short spin is worth having: 2000 turns reach
    # over the operations between two matrix products (18.3 -> 15.8 ms a step of the demo model, with 1000 and 2000),
    # and cost a seventh beside a busy core (29 -> 34 ms); 5000 gain little more (14.8) and cost much (52).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if config.parallel.threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(config.parallel.threads))


def _exit_with_parent() -> NoReturn:
    """Wait for the end of stdin, which is the end of the parent, and leave at once."""
    while os.read(0, 1):
        pass
    _leave_orphaned()


def _leave_orphaned() -> NoReturn:
    os._exit(1)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the clearing up short
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
