"""AsyncEngine: the front process's side of one served model. Everything here runs on one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from engine.cluster.client import EngineClient, Listeners
from engine.cluster.memory import peak_memory
from engine.cluster.messages import Abort, Add, CheckReply
from engine.cluster.operator import Operator
from engine.config import EngineConfig, SchedulerConfig
from engine.core import model_info
from engine.errors import DuplicateRequest, EngineDead, InvalidRequest, Overloaded, SlipstreamError
from engine.front.event_stream import EventStream
from engine.front.in_flight import InFlight
from engine.grammar import Grammar
from engine.hub.diffusion import find_spec
from engine.hub.drafts import settle_draft
from engine.hub.resolve import resolve
from engine.protocols import EngineObserver
from engine.structured.check import GrammarCheck
from engine.structured.wire import Words
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import (
    EngineStats,
    FinishReason,
    Health,
    ModelInfo,
    Phase,
    Request,
    SamplingParams,
    StepReport,
)
from engine.validate import validate

__all__ = ["AsyncEngine", "EventStream"]

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 10.0  # without a heartbeat; there should be one every second
OFFLOAD_TOKENS = 16384  # prompts longer than this together are checked in a thread


class AsyncEngine:
    """One model, served by an engine process of its own.

    `created` (unix seconds) is what the API reports for the model. `worker` ("module:Class") is what the
    process runs in place of the registry's own; tests put a fake one there.
    """

    def __init__(self, config: EngineConfig, *, cache_dir: Path, created: int, worker: str = "") -> None:
        self._config = replace(config, cache_dir=str(cache_dir))
        self._cache_dir = cache_dir
        self._created = created
        self._worker = worker
        self._observers: list[EngineObserver] = []
        self._in_flight = InFlight(())
        self._client: EngineClient | None = None
        self._tokenizer: Tokenizer | None = None
        self._info: ModelInfo | None = None
        self._stats = EngineStats()
        self._grammars = GrammarCheck(lambda: Words.of(self.tokenizer, self.info.vocab_size, self.info.eos_ids))
        self._dead: SlipstreamError | None = None
        self._draining = False
        self._ready = False
        self._progress = time.monotonic()  # of the last step, or of the end of idleness

    # ---- start ---------------------------------------------------------------------------------------------

    async def start(self, on_phase: Callable[[Phase], None]) -> None:
        """Find the checkpoint, start the process and generate one token. Raises what stood in the way, typed."""
        try:
            config = await asyncio.to_thread(settle_draft, self._config, self._cache_dir, logger.info)
            # The process imports its libraries while the checkpoint is looked for.
            listeners = Listeners(on_phase, self._on_report, self._on_exit)
            self._client = await EngineClient.launch(config, self._worker, listeners)
            began = time.monotonic()
            folder = await asyncio.to_thread(resolve, self._config.model.path, self._cache_dir, logger.info)
            on_phase(Phase("checkpoint", time.monotonic() - began, peak_memory(), str(folder)))
            capacity, tokenizer = await asyncio.gather(
                self._client.load(folder), asyncio.to_thread(_load_tokenizer, folder, config)
            )
            self._tokenizer = tokenizer
            forms = tokenizer.thinking_form, tokenizer.tool_form
            self._info = model_info(config, capacity, tokenizer.eos_ids, self._created, *forms)
            began = time.monotonic()
            await self._first_token()
            on_phase(Phase("first token", time.monotonic() - began, peak_memory()))
        except BaseException:
            await self.close()
            raise
        self._in_flight.observers = self._observers
        self._ready = True

    async def _first_token(self) -> None:
        """Readiness is a real generation, through every part that a client's request will use."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = Request("start-up", (0,), sampling)
        async with await self.submit((request,)) as stream:
            async for _ in stream:
                pass

    # ---- what callers ask ----------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise EngineDead("the engine has not started yet")
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise EngineDead("the engine has not started yet")
        return self._tokenizer

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def add_observer(self, observer: EngineObserver) -> None:
        """Observers hear of everything after the start-up generation."""
        self._observers.append(observer)

    def health(self) -> Health:
        if self._dead is not None:
            return Health(False, False, str(self._dead))
        client = self._client
        if self._info is None or client is None:
            return Health(True, False, "starting")
        now, stall = time.monotonic(), self._config.scheduler.stall_seconds
        if now - client.heard_at > max(stall, SILENCE_SECONDS):
            return Health(False, False, f"the engine process has said nothing for {now - client.heard_at:.0f} s")
        if len(self._in_flight) and now - self._progress > stall:
            step = "" if client.busy_since is None else f"; its step has run for {now - client.busy_since:.0f} s"
            return Health(False, False, f"{len(self._in_flight)} requests and no progress{step}")
        if self._draining:
            return Health(True, False, "draining")
        return Health(True, self._ready, "" if self._ready else "starting")

    async def submit(self, requests: Sequence[Request], *, param: str = "prompt") -> EventStream:
        """Queue the requests together, or raise and queue none of them.

        `param` is the client's name of the prompt in errors. Raises InvalidRequest, Overloaded and EngineDead.
        """
        self._check_open()
        info = self.info
        if sum(len(request.prompt_ids) for request in requests) > OFFLOAD_TOKENS:
            fitted = await asyncio.to_thread(_prepare, requests, info, param)
            self._check_open()
        else:
            fitted = _prepare(requests, info, param)
        for grammar in {request.sampling.grammar for request in fitted} - {None}:
            await self.check_grammar(cast(Grammar, grammar))
            self._check_open()
        for request in fitted:
            if request.id in self._in_flight:
                raise DuplicateRequest(f"a request with the id {request.id!r} is running already", param="request_id")
        _check_room(fitted, self._config.scheduler, self._in_flight, self._observers)
        stream = EventStream((request.id for request in fitted), self._abort)
        if fitted:
            self._open_client().send(Add(fitted))
            if not len(self._in_flight):
                self._progress = time.monotonic()  # until now there was no progress to make
            self._in_flight.add(fitted, self.tokenizer, stream)
        return stream

    async def check_grammar(self, grammar: Grammar, param: str = "grammar") -> None:
        """Can answers follow it? Raises InvalidRequest that names `param`, and Overloaded where too many wait."""
        await self._grammars.admit(grammar, param)

    async def check(self) -> CheckReply:
        """Have the process recount its blocks between two steps; for tests and debugging. Raises EngineDead."""
        return await self._open_client().check()

    def cancel(self, wanted: Callable[[str], bool]) -> list[str]:
        """End the requests whose ids are wanted: their callers get a Cancelled. Returns these ids."""
        cancelled = self._in_flight.cancel(wanted, time.monotonic())
        self._send_abort(cancelled)
        return cancelled

    def operator(self) -> Operator:
        """What else an operator may ask. Raises EngineDead."""
        return Operator(self._open_client())

    # ---- end -----------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> None:
        """Take nothing new, let what runs finish for `timeout` seconds, then end the rest with EngineDead."""
        self._draining = True
        try:
            await asyncio.wait_for(self._in_flight.idle.wait(), timeout)
        except TimeoutError:
            self._end_all("the server is shutting down and this request had not finished")

    async def close(self) -> None:
        """End the process and every request; `submit` raises from then on. Closing twice is fine."""
        self._dead = self._dead or EngineDead("the engine was closed")
        self._end_all(str(self._dead))
        self._grammars.close()
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    # ---- inside --------------------------------------------------------------------------------------------

    def _open_client(self) -> EngineClient:
        if self._dead is not None:
            raise EngineDead(str(self._dead))
        if self._client is None:
            raise EngineDead("the engine has not started yet")
        return self._client

    def _check_open(self) -> None:
        self._open_client()
        if self._draining:
            raise Overloaded("the server is shutting down", reason="draining", retry_after=5.0)

    def _abort(self, request_ids: Iterable[str]) -> None:
        self._send_abort(self._in_flight.drop(request_ids, time.monotonic()))

    def _end_all(self, reason: str) -> None:
        self._send_abort(self._in_flight.fail_all(reason, FinishReason.ABORT, time.monotonic()))

    def _send_abort(self, request_ids: Sequence[str]) -> None:
        if request_ids and self._client is not None:
            self._client.send(Abort(tuple(request_ids)))

    def _on_report(self, report: StepReport) -> None:
        self._progress, self._stats = time.monotonic(), report.stats
        self._send_abort(self._in_flight.take(report.updates, self._progress))
        for observer in self._in_flight.observers:
            observer.on_step(report.stats)

    def _on_exit(self, error: SlipstreamError) -> None:
        logger.error("%s", error)
        self._dead = error
        self._in_flight.fail_all(str(error), FinishReason.ERROR, time.monotonic())


def _check_room(
    requests: Sequence[Request], limits: SchedulerConfig, in_flight: InFlight, observers: Iterable[EngineObserver]
) -> None:
    """Raise for requests that the queue has no room for."""
    tokens = sum(len(request.prompt_ids) for request in requests)
    for reason, queued, new, limit in (
        ("max_num_queued_reqs", in_flight.queued, len(requests), limits.max_queued_requests),
        ("max_num_queued_tokens", in_flight.queued_tokens, tokens, limits.max_queued_tokens),
    ):
        what = "requests" if reason == "max_num_queued_reqs" else "prompt tokens"
        if new > limit:
            raise InvalidRequest(f"this asks for {new} {what} at once; at most {limit} are taken", param="n")
        if queued + new > limit:
            for observer in observers:
                observer.on_rejected(reason)
            raise Overloaded(f"the queue is full: {queued} {what} wait, at most {limit} may", reason)


def _load_tokenizer(folder: Path, config: EngineConfig) -> Tokenizer:
    """It must know the mask token of a diffusion model, whose text is no more than text in a prompt."""
    spec = find_spec(folder, config.model.diffusion)
    return Tokenizer.load(folder, mask_id=None if spec is None else spec.mask_id)


def _prepare(requests: Sequence[Request], info: ModelInfo, param: str) -> tuple[Request, ...]:
    """The requests checked and completed with what only the front process knows."""
    now, fitted = time.monotonic(), []
    for request in requests:
        request = validate(request, info, param=param)
        eos_ids = () if request.sampling.ignore_eos else info.eos_ids
        fitted.append(replace(request, eos_ids=eos_ids, arrival=request.arrival or now))
    if len({request.id for request in fitted}) < len(fitted):
        raise InvalidRequest("two requests share one id", param="request_id")
    return tuple(fitted)
