"""Whether a grammar can be used at all, asked before anything is queued.

A verdict is found in a child process (`probe.py`), which is started with the first grammar, killed when it takes too
long, and started again. Verdicts are kept, the bad ones too: the same text is not tried twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import engine
from engine.errors import InvalidRequest, Overloaded
from engine.grammar import Grammar
from engine.structured.wire import Answer, Ask, Words, receive, send

logger = logging.getLogger(__name__)

MAX_TEXT = 128 * 1024  # bytes of a grammar
SECONDS = 20.0  # for one grammar, if the machine is that busy; its process ends after some of the processor's time
GRACE_SECONDS = 1.0  # from the end of its pipe to its own end
START_SECONDS = 60.0  # for the process to be there
FORGET_SECONDS = 60.0  # a text that took too long may be tried again after this: it may have been the machine
PROBES = 2  # processes, as they are needed
MAX_WAITING = 64  # new grammars at once
MAX_VERDICTS = 4096

# As for engine processes: the same package as ours, never one of the current directory.
_COMMAND = "import sys; sys.path.append(sys.argv[1]); from engine.structured.probe import main; sys.exit(main())"
_ROOT = str(Path(next(iter(engine.__path__))).resolve().parent)


@dataclass(frozen=True, slots=True)
class _Verdict:
    problem: str | None
    until: float = float("inf")


class Probe:
    """One child process, for one caller at a time."""

    def __init__(self, words: Callable[[], Words], seconds: float = SECONDS) -> None:
        self._words = words
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def judge(self, grammar: Grammar) -> _Verdict:
        """Blocks. Raises Overloaded where the process can't be started, or was closed."""
        if self._closed:
            raise _closed()
        if self._process is None or self._process.poll() is not None:
            self._start()
        answer, late = self._exchange(Ask(grammar.kind, grammar.text), self._seconds)
        if answer is not None:
            return _Verdict(answer.problem)
        status = self._end()
        if self._closed:
            raise _closed()
        if late or status == -signal.SIGXCPU:
            return _Verdict("it takes too long to compile", time.monotonic() + FORGET_SECONDS)
        return _Verdict("it is too complex: compiling it takes too much memory or too deep a recursion")

    def _start(self) -> None:
        self._end()
        words = self._words()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, _ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._closed:  # meanwhile
            self._process.kill()
        answer, _ = self._exchange(words, START_SECONDS)
        if answer is None:
            self._end()
            if self._closed:
                raise _closed()
            logger.error("the process that checks grammars does not start")
            raise Overloaded("grammars can't be checked at the moment", "grammar_check", 5.0)

    def _exchange(self, message: Words | Ask, seconds: float) -> tuple[Answer | None, bool]:
        """The answer, or None where the process died; and whether it was killed for being late."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            send(process.stdin, message)
            return receive(process.stdout, Answer), late.is_set()
        except (BrokenPipeError, ValueError):  # it has ended; or another thread has closed its pipes
            return None, late.is_set()
        finally:
            timer.cancel()

    def _end(self) -> int:
        """How the process ended, which has closed its pipe or is to be killed."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return process.wait()

    def release(self) -> None:
        """Give back what `close` has left, once nobody asks any more."""
        self._end()

    def close(self) -> None:
        """From any thread, for good: whoever waits for a verdict gets Overloaded."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
            process.wait()


def _closed() -> Overloaded:
    return Overloaded("the engine was closed", "closed")


class GrammarCheck:
    """The verdicts on the grammars of one model. `words` is asked for its vocabulary when the first one comes.

    `ensure` may be called from any thread; `admit` belongs to an event loop.
    """

    def __init__(self, words: Callable[[], Words], *, seconds: float = SECONDS) -> None:
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._running: dict[bytes, Future[_Verdict]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(PROBES, thread_name_prefix="grammar-check")
        self._probes: queue.LifoQueue[Probe] = queue.LifoQueue()
        self._all = [Probe(words, seconds) for _ in range(PROBES)]
        for probe in self._all:
            self._probes.put(probe)

    async def admit(self, grammar: Grammar, param: str = "grammar") -> None:
        """Raises InvalidRequest that names `param` and what is wrong, and Overloaded where too many wait."""
        running = self._ask(grammar, param)
        if isinstance(running, Future):
            running = await asyncio.shield(asyncio.wrap_future(running))
        _settle(running, grammar, param)

    def ensure(self, grammar: Grammar, param: str = "grammar") -> None:
        """The same, blocking."""
        running = self._ask(grammar, param)
        _settle(running.result() if isinstance(running, Future) else running, grammar, param)

    def close(self) -> None:
        """Ends the processes; whoever waits gets Overloaded. Closing twice is fine."""
        with self._lock:
            self._closed = True
        for probe in self._all:
            probe.close()
        self._pool.shutdown(wait=True)
        for probe in self._all:
            probe.release()

    def _ask(self, grammar: Grammar, param: str) -> _Verdict | Future[_Verdict]:
        data = grammar.text.encode("utf-8", "surrogatepass")
        if len(data) > MAX_TEXT:
            raise InvalidRequest(f"{param} may have at most {MAX_TEXT} bytes", param=param)
        key = hashlib.sha256(grammar.kind.encode() + b"\0" + data).digest()
        with self._lock:
            if self._closed:
                raise _closed()
            verdict = self._verdicts.get(key)
            if verdict is not None and verdict.until > time.monotonic():
                self._verdicts.move_to_end(key)
                return verdict
            running = self._running.get(key)
            if running is None:
                if len(self._running) >= MAX_WAITING:
                    raise Overloaded("too many new grammars wait to be checked", "grammar_check")
                running = self._pool.submit(self._judge, grammar, key)
                self._running[key] = running
        return running

    def _judge(self, grammar: Grammar, key: bytes) -> _Verdict:
        probe = self._probes.get()
        verdict = None
        try:
            verdict = probe.judge(grammar)
            return verdict
        finally:
            self._probes.put(probe)
            with self._lock:
                del self._running[key]
                if verdict is not None:
                    self._verdicts[key] = verdict
                    while len(self._verdicts) > MAX_VERDICTS:
                        self._verdicts.popitem(last=False)


def _settle(verdict: _Verdict, grammar: Grammar, param: str) -> None:
    if verdict.problem is not None:
        what = {"json": "JSON schema", "regex": "regular expression"}.get(grammar.kind, "grammar")
        raise InvalidRequest(f"{param} is a {what} that can't be used: {verdict.problem}", param=param)
