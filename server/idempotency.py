"""Idempotency-Key: a request that is sent again, with the same key and body, gets the answer that was made already.

Whole answers only, for a while and within bounds; a stream, an error and whatever was too large are made anew. A key
belongs to the caller and the path that it came with. Status codes are those of the IETF's draft of this header.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from server.auth import CALLER
from server.errors import ApiError

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"
MAX_KEY = 255
MOST_ANSWERS, MOST_BYTES, MOST_OF_ONE = 1024, 32 << 20, 4 << 20


@dataclass(frozen=True, slots=True)
class Sent:
    """One request with a key. `name` is whose key it is, `body` what was sent; both are digests."""

    name: bytes
    body: bytes


async def sent(request: Request) -> Sent | None:
    """None for a request without a key; reads the body of one that has it. Raises ApiError 400."""
    key = request.headers.get(HEADER)
    if key is None:
        return None
    if not 0 < len(key) <= MAX_KEY:
        raise ApiError(400, f"Give an Idempotency-Key of 1 to {MAX_KEY} bytes.", param=HEADER, code="invalid_value")
    owner = "\0".join((request.scope[CALLER], request.method, request.url.path, key))
    return Sent(_digest(owner.encode("utf-8", "replace")), _digest(await request.body()))


class Replays:
    """Answers that may be asked for again, oldest first. Belongs to one event loop."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._running: dict[bytes, bytes] = {}
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._bytes = 0

    @property
    def on(self) -> bool:
        return self._seconds > 0

    def find(self, request: Sent) -> Response | None:
        """The answer, if it was made already. Raises ApiError 409 while it is made, 422 for another body."""
        while self._kept and self._clock() - next(iter(self._kept.values())).since >= self._seconds:
            self._drop_oldest()
        kept = self._kept.get(request.name)
        known = kept.request if kept is not None else self._running.get(request.name)
        if known is None:
            return None
        if known != request.body:
            message = "This Idempotency-Key came with another body before; take a new one."
            raise ApiError(422, message, param=HEADER, code="idempotency_key_reused")
        if kept is None:
            message = "The request with this Idempotency-Key is still running; please retry."
            raise ApiError(409, message, param=HEADER, code="idempotency_key_in_use", headers={"retry-after": "1"})
        return Response(kept.answer, headers={REPLAYED: "true", "content-type": kept.media_type})

    @contextmanager
    def making(self, request: Sent) -> Iterator[Callable[[Response], None]]:
        """While an answer is made. Call what this gives with the answer."""
        self._running[request.name] = request.body
        try:
            yield lambda answer: self._keep(request, answer)
        finally:
            del self._running[request.name]

    def _keep(self, request: Sent, answer: Response) -> None:
        data = getattr(answer, "body", None)  # a stream has none
        if answer.status_code != 200 or not isinstance(data, bytes) or len(data) > MOST_OF_ONE:
            return
        media_type = answer.headers.get("content-type", "application/json")
        self._kept[request.name] = _Kept(request.body, self._clock(), data, media_type)
        self._bytes += len(data)
        while self._bytes > MOST_BYTES or len(self._kept) > MOST_ANSWERS:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._bytes -= len(kept.answer)


@dataclass(frozen=True, slots=True)
class _Kept:
    request: bytes  # digest of its body
    since: float
    answer: bytes
    media_type: str


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
