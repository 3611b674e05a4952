"""EventStream: what the caller of `AsyncEngine.submit` iterates over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType

from engine.front.output import merge
from engine.types import TokenEvent


class EventStream:
    """The events of one or more requests, merged; it ends after the last event of each.

    Leaving it early in any way (`aclose`, the end of its `async with`, a cancelled wait) aborts what is
    unfinished. It never holds up the engine: events of one request that pile up become one. An engine that
    died or a request that failed is raised from the iteration, after the events that came before. To wait with
    a time limit, put `asyncio.wait` around a task of `anext(stream)`; `wait_for` would cancel, and so abort.
    """

    def __init__(self, request_ids: Iterable[str], abort: Callable[[frozenset[str]], None]) -> None:
        self._unfinished = set(request_ids)
        self._abort = abort
        self._pending: dict[str, list[TokenEvent]] = {}
        self._sink: Callable[[TokenEvent], bool] | None = None
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None

    def divert(self, sink: Callable[[TokenEvent], bool]) -> None:
        """Offer each event to `sink` as it comes, before any iteration sees it: no task has to wake up for it.

        `sink` must not wait; what it says False to is left to the iteration, and so is what comes behind it until the
        iteration has caught up. What it raises is raised from the iteration.
        """
        self._sink = sink

    def put(self, event: TokenEvent) -> None:
        """From the engine's side; never waits."""
        if self._pending or not self._taken(event):
            self._pending.setdefault(event.request_id, []).append(event)
            self._wake()
        if event.finish is not None:
            self._unfinished.discard(event.request_id)
            self._wake()

    def _taken(self, event: TokenEvent) -> bool:
        if self._sink is None:
            return False
        try:
            return self._sink(event)
        except Exception as error:  # whatever it was, it ends this stream and not the engine's news of others
            self._sink = None
            self.fail(event.request_id, error)
            return True

    def fail(self, request_id: str, error: Exception) -> None:
        """The request is over without a last event. The first error is the one that is raised."""
        self._unfinished.discard(request_id)
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._pending:
            if self._error is not None:
                await self.aclose()
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            except asyncio.CancelledError:
                await self.aclose()
                raise
            finally:
                self._news = None
        return merge(self._pending.pop(next(iter(self._pending))))

    async def aclose(self) -> None:
        """Abort what is unfinished and forget what was not read. Closing twice is fine."""
        unfinished, self._unfinished = frozenset(self._unfinished), set()
        self._sink = None
        self._pending.clear()
        if unfinished:
            self._abort(unfinished)
        self._wake()

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
