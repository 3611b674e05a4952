"""Requests that read and do not write (`engine/reading.py`), many of one client at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from engine.reading import Readout
from engine.types import Request, Usage
from server.answers import finish_word
from server.contract import Engine, EventStream
from server.service import service_of
from server.streaming import or_gone

WAVE = 128  # requests of one client that are in the engine at once: whoever sends more waits for them, not the others


@dataclass(frozen=True, slots=True)
class Read:
    readout: Readout
    usage: Usage


async def read_all(http: HttpRequest, engine: Engine, requests: Sequence[Request], param: str) -> list[Read]:
    """What the requests have read, in their order; `param` is the client's name of the prompt in errors.

    Raises Gone when the client has left, and whatever the engine says of the requests: then nothing of them is left.
    """
    found: dict[str, Read] = {}
    for first in range(0, len(requests), WAVE):
        wave = requests[first : first + WAVE]
        stream = await service_of(http).flights.submit(http.scope, engine, wave, param)
        async with aclosing(stream):
            found.update(await or_gone(http.receive, _collect(stream)))
    return [found[request.id] for request in requests]


async def _collect(stream: EventStream) -> Mapping[str, Read]:
    found: dict[str, Read] = {}
    async for event in stream:
        finish_word(event.finish)  # raises for an end that is no answer
        if event.reading is not None:
            found[event.request_id] = Read(event.reading, event.usage)
    return found
