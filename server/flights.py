"""Requests on their way through the engines: who pays for their tokens, and where their times are written down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from starlette.types import Scope

from engine.types import EngineStats, Request, RequestSummary
from server.contract import Engine, EventStream
from server.limits import Account, lease_of
from server.tracing import Trace, Tracer


@dataclass(frozen=True, slots=True)
class _Flight:
    account: Account | None
    trace: Trace | None


class Flights:
    """Every route submits through this. An observer of all engines, where there is anything to count or to trace."""

    def __init__(self, engines: Iterable[Engine], tracer: Tracer | None, *, counts_tokens: bool) -> None:
        self._tracer = tracer
        self._watches = counts_tokens or tracer is not None
        self._live: dict[str, _Flight] = {}  # by the id of the request: the engine tells of the end of each
        if self._watches:
            for engine in engines:
                engine.add_observer(self)

    async def submit(self, scope: Scope, engine: Engine, requests: Sequence[Request], param: str) -> EventStream:
        """`engine.submit` for the exchange of `scope`. Raises what that raises, and Limited."""
        lease = lease_of(scope)
        if lease is not None:
            lease.request_ids.extend(request.id for request in requests)
        if not self._watches:
            return await engine.submit(requests, param=param)
        account = lease.account if lease is not None else None
        tokens = prompt_tokens(requests)
        if account is not None:
            account.charge(tokens)
        trace = self._tracer.begin(scope, engine.info, requests) if self._tracer is not None else None
        try:
            stream = await engine.submit(requests, param=param)
        except BaseException as error:
            if account is not None:
                account.spend(-tokens)
            if trace is not None:
                trace.refused(error if isinstance(error, Exception) else ConnectionError("the client has left"))
            raise
        flight = _Flight(account, trace)
        self._live.update((request.id, flight) for request in requests)
        return stream

    def on_step(self, stats: EngineStats) -> None:
        """Nothing of it is about one request."""

    def on_tokens(self, count: int, first: bool, interval: float) -> None:
        """Tokens are counted when their request ends."""

    def on_finish(self, summary: RequestSummary) -> None:
        flight = self._live.pop(summary.request_id, None)
        if flight is None:
            return
        if flight.account is not None:
            flight.account.spend(summary.usage.completion_tokens)
        if flight.trace is not None:
            flight.trace.note(summary)

    def on_rejected(self, reason: str) -> None:
        """`submit` has raised it as well."""


def prompt_tokens(requests: Sequence[Request]) -> int:
    """Tokens of their prompts; that of several choices, which share it, is counted once."""
    return sum(map(len, {id(request.prompt_ids): request.prompt_ids for request in requests}.values()))
