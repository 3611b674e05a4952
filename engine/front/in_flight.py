"""The requests that the front process has given to an engine and not seen the end of."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.errors import Cancelled, EngineDead, SlipstreamError, StepFailed
from engine.front.event_stream import EventStream
from engine.front.output import RequestOutput
from engine.protocols import EngineObserver
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import FinishReason, Request, SeqUpdate, TokenEvent

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    output: RequestOutput
    stream: EventStream


class InFlight:
    """Routes each update to its request's stream and tells the observers. Belongs to one event loop."""

    def __init__(self, observers: Sequence[EngineObserver]) -> None:
        self.observers = observers
        self.queued = 0  # requests of which the engine has said nothing yet
        self.queued_tokens = 0  # prompt tokens of those
        self.idle = asyncio.Event()
        self.idle.set()
        self._live: dict[str, _Live] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    def add(self, requests: Sequence[Request], tokenizer: Tokenizer, stream: EventStream) -> None:
        choices = Counter(request.group for request in requests if request.group)
        for request in requests:
            self._live[request.id] = _Live(RequestOutput(request, tokenizer, choices.get(request.group, 1)), stream)
            self.queued += 1
            self.queued_tokens += len(request.prompt_ids)
        if requests:
            self.idle.clear()

    def take(self, updates: Iterable[SeqUpdate], now: float) -> list[str]:
        """Pass the news on. Returns the ids that a stop string has ended, which the engine must be told to abort.

        News of a request that is gone (aborted, or over by a stop string) is surplus and dropped.
        """
        ended = []
        for update in updates:
            live = self._live.get(update.request_id)
            if live is None:
                continue
            self._unqueue(live)
            if update.finish is FinishReason.ERROR:
                self._fail(live, StepFailed(update.error or "the request failed inside the engine"), now)
                continue
            since = live.output.last_news
            try:
                event = live.output.take(update, now)
            except Exception:  # of the detokenizer, say: it must not cost the others their news
                logger.exception("the output of request %s can't be used", update.request_id)
                self._fail(live, StepFailed("the output of this request could not be turned into text"), now)
                ended.append(update.request_id)
                continue
            if event is None:
                continue
            self._tell_tokens(event, now - since)
            live.stream.put(event)
            if event.finish is not None:
                self._remove(live, event.finish, now)
                if update.finish is None:
                    ended.append(update.request_id)
        return ended

    def drop(self, request_ids: Iterable[str], now: float) -> list[str]:
        """Forget requests whose client has gone; returns those that were still live."""
        found = [self._live[request_id] for request_id in request_ids if request_id in self._live]
        for live in found:
            self._unqueue(live)
            self._remove(live, FinishReason.ABORT, now)
        return [live.output.request.id for live in found]

    def cancel(self, wanted: Callable[[str], bool], now: float) -> list[str]:
        """End the requests whose ids are wanted with a Cancelled of their own; returns these ids."""
        found = [live for request_id, live in self._live.items() if wanted(request_id)]
        for live in found:
            self._unqueue(live)
            self._fail(live, Cancelled("the request was cancelled by an operator"), now, FinishReason.ABORT)
        return [live.output.request.id for live in found]

    def fail_all(self, reason: str, finish: FinishReason, now: float) -> list[str]:
        """End every request with an EngineDead of its own; returns their ids."""
        failed = list(self._live.values())
        for live in failed:
            self._unqueue(live)
            self._fail(live, EngineDead(reason), now, finish)
        return [live.output.request.id for live in failed]

    def _fail(self, live: _Live, error: SlipstreamError, now: float, finish: FinishReason = FinishReason.ERROR) -> None:
        live.stream.fail(live.output.request.id, error)
        self._remove(live, finish, now)

    def _unqueue(self, live: _Live) -> None:
        if not live.output.started:
            live.output.started = True
            self.queued -= 1
            self.queued_tokens -= len(live.output.request.prompt_ids)

    def _remove(self, live: _Live, finish: FinishReason, now: float) -> None:
        del self._live[live.output.request.id]
        if not self._live:
            self.idle.set()
        if self.observers:
            summary = live.output.summary(finish, now)
            for observer in self.observers:
                observer.on_finish(summary)

    def _tell_tokens(self, event: TokenEvent, interval: float) -> None:
        count = len(event.token_ids)
        if count:
            for observer in self.observers:
                observer.on_tokens(count, event.usage.completion_tokens == count, interval)
