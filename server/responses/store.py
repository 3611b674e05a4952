"""Responses that are kept for a while, in memory, so that clients can read them again and go on from them.

Bounded in number and in bytes; what was not used for longest goes first. Each API key sees its own alone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from server.errors import ApiError
from server.parts import Fields

OVERHEAD = 1024  # bytes that an entry costs beside its JSON


@dataclass(frozen=True, slots=True)
class Kept:
    """A response that has ended: JSON, as that is an eighth of the size of the objects.

    `items`: of its input. `before`: items of all inputs and outputs that it went on from.
    """

    response: bytes
    items: bytes
    before: bytes

    @property
    def size(self) -> int:
        return len(self.response) + len(self.items) + len(self.before) + OVERHEAD

    def conversation(self) -> list[Fields]:
        """All items up to its own output, in order."""
        before: list[Fields] = msgspec.json.decode(self.before)
        items: list[Fields] = msgspec.json.decode(self.items)
        output: list[Fields] = msgspec.json.decode(self.response)["output"]
        return [*before, *items, *output]


@dataclass(frozen=True, slots=True)
class Running:
    """One that is streamed at the moment. `ended` is set when it is no more."""

    response: Callable[[], Fields]
    items: tuple[Fields, ...]
    cancel: Callable[[], Awaitable[None]]
    ended: asyncio.Event


Key = tuple[str, str]  # who asks, and the response's id


class ResponseStore:
    """Changed by the event loop alone. `caller` is what `KeyRing.check` says."""

    def __init__(self, most: int, most_bytes: int) -> None:
        """Keeps at most `most` responses of together `most_bytes`; 0 keeps none."""
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._running: dict[Key, Running] = {}
        self.size = 0  # bytes

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, caller: str, id: str, kept: Kept) -> None:
        self.forget(caller, id)
        if kept.size > self._most_bytes or not self._most:
            return
        self._kept[caller, id] = kept
        self.size += kept.size
        while len(self._kept) > self._most or self.size > self._most_bytes:
            self.size -= self._kept.popitem(last=False)[1].size

    def forget(self, caller: str, id: str) -> bool:
        """Was there one?"""
        kept = self._kept.pop((caller, id), None)
        self.size -= 0 if kept is None else kept.size
        return kept is not None

    def find(self, caller: str, id: str, param: str | None = None) -> Kept:
        """Raises ApiError 404; `param` is the field that named it, if one did."""
        kept = self._kept.get((caller, id))
        if kept is None:
            raise missing(id, param)
        self._kept.move_to_end((caller, id))
        return kept

    def begin(self, caller: str, id: str, running: Running) -> None:
        self._running[caller, id] = running

    def end(self, caller: str, id: str) -> None:
        running = self._running.pop((caller, id), None)
        if running is not None:
            running.ended.set()

    def running(self, caller: str, id: str) -> Running | None:
        return self._running.get((caller, id))


def missing(id: str, param: str | None = None) -> ApiError:
    code = "response_not_found" if param is None else "previous_response_not_found"
    message = f"No response with the id '{id[:100]}' is kept here."
    return ApiError(404, message, param=param, code=code)
