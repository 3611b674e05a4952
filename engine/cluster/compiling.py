"""Requests that are not ready for the engine yet: what they need is compiled beside the steps, by other threads."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import SimpleQueue

from engine.errors import InvalidRequest
from engine.types import Request

logger = logging.getLogger(__name__)

THREADS = 2  # a slow grammar must not keep a quick one waiting
STACK = 16 << 20  # bytes: compilers go as deep as rules refer to each other


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that came together, and that the engine gets together: they may be choices of one prompt."""

    requests: list[Request]
    error: str = ""  # why none of them can run


class CompileStage:
    """`add`, `abort` and `take` are called from one thread. The others are started by the first batch, and never end.

    Requests without a grammar have no business here.
    """

    def __init__(self, prepare: Callable[[Request], None], wake: Callable[[], None]) -> None:
        """`prepare`: see `protocols.Worker`; `wake` is called after each batch, by another thread."""
        self._prepare = prepare
        self._wake = wake
        self._todo: SimpleQueue[Batch] = SimpleQueue()
        self._done: deque[Batch] = deque()
        self._waiting: list[Batch] = []
        self._threads: list[threading.Thread] = []

    @property
    def waiting(self) -> int:
        """Requests that were not taken yet."""
        return sum(len(batch.requests) for batch in self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        if not self._threads:
            self._start()
        batch = Batch([*requests])
        self._waiting.append(batch)
        self._todo.put(batch)

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Forget these, even if they are being compiled. Returns the ids that were here."""
        wanted, found = frozenset(request_ids), []
        for batch in self._waiting:
            found += [request.id for request in batch.requests if request.id in wanted]
            batch.requests = [request for request in batch.requests if request.id not in wanted]
        return found

    def take(self) -> list[Batch]:
        """Those that are done with. Each comes once."""
        taken = []
        while self._done:
            batch = self._done.popleft()
            self._waiting.remove(batch)
            taken.append(batch)
        return taken

    def _start(self) -> None:
        before = threading.stack_size(STACK)
        try:
            for number in range(THREADS):
                self._threads.append(threading.Thread(target=self._work, daemon=True, name=f"compile-{number}"))
                self._threads[-1].start()
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        while True:
            batch = self._todo.get()
            try:
                for request in batch.requests[:]:  # `abort` may put a shorter list in place of it
                    self._prepare(request)
            except InvalidRequest as error:
                batch.error = error.message
            except Exception as error:  # whatever it was, it ends these requests and not the thread
                logger.exception("a grammar could not be compiled")
                batch.error = f"{type(error).__name__}: {error}"
            self._done.append(batch)
            self._wake()
