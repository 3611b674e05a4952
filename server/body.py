"""Request bodies: read with a bound, parsed strictly, and only after the caller may ask at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server import idempotency
from server.auth import CALLER
from server.errors import ApiError
from server.limits import Limited
from server.service import service_of

MAX_DEPTH = 64
MAX_CONTAINERS = 500_000  # arrays and objects cost 64 bytes each for 2 sent
CLOSE = {"connection": "close"}  # what is left of the body is not worth reading


def parse_json(data: bytes) -> object:
    """Parse UTF-8 JSON. Refuses NaN, Infinity, lone surrogates, integers of hundreds of digits and deep nesting.

    Raises ApiError 400.
    """
    if not data.strip():
        raise ApiError(400, "The request body is empty.", code="invalid_json")
    containers = data.count(b"[") + data.count(b"{")
    if containers > MAX_CONTAINERS:
        raise ApiError(400, "The JSON body holds too many arrays and objects.", code="invalid_json")
    try:
        value: object = msgspec.json.decode(data)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise ApiError(400, "The request body is not valid UTF-8.", code="invalid_json") from None
    except msgspec.MsgspecError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}", code="invalid_json") from None
    if containers > MAX_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        children: list[object] = []
        for node in level:
            inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
            children.extend(child for child in inner if type(child) in (list, dict))
        if not children:
            return
        level = children
    raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError(400, f"The JSON body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


class JSONRequest(Request):
    """A request whose body is bounded in size and time."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            settings = service_of(self).settings
            try:
                async with asyncio.timeout(settings.body_timeout):
                    self._body = await self._read(settings.max_body_bytes)
            except TimeoutError:
                raise ApiError(
                    408, f"The request body did not arrive within {settings.body_timeout:g} seconds.", headers=CLOSE
                ) from None
        return self._body

    async def json(self) -> object:
        return parse_json(await self.body())

    def seen(self) -> str:
        """The beginning of a body that was read, for logs."""
        return ascii(self._body[:200].decode("utf-8", "replace")) if hasattr(self, "_body") else "''"

    async def _read(self, limit: int) -> bytes:
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > limit):
            raise _too_large(limit)
        data = bytearray()
        async for chunk in self.stream():
            data += chunk
            if len(data) > limit:
                raise _too_large(limit)
        return bytes(data)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large", headers=CLOSE)


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        message = f"Send JSON with 'Content-Type: application/json'; got '{media_type[:100]}'."
        raise ApiError(415, message, code="unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, "Compressed request bodies are not supported.", code="unsupported_media_type")


def _admit(request: Request) -> None:
    """Count a request with a body against its caller's limits. Raises Limited."""
    service = service_of(request)
    try:
        service.accounts.admit(request.scope)
    except Limited as error:
        service.metrics.limited(error.key, error.limit)
        raise


class GuardedRoute(APIRoute):
    """Checks the key, that the server is ready and the media type, in this order, before it reads a body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            service = service_of(request)
            headers = request.headers
            request.scope[CALLER] = service.keys.check(headers.get("authorization"), headers.get("x-api-key"))
            service.lifecycle.check_ready()
            if self.body_field is not None:
                _admit(request)
                _check_media_type(request)
            try:
                return await _once(JSONRequest(request.scope, request.receive), handler)
            except ClientDisconnect:
                return Response(status_code=499)

        return guarded


async def _once(request: Request, handler: Callable[[Request], Coroutine[None, None, Response]]) -> Response:
    """The handler's answer, or the one that it gave to the same Idempotency-Key before."""
    replays = service_of(request).replays
    own = await idempotency.sent(request) if replays.on and request.method == "POST" else None
    if own is None:
        return await handler(request)
    answer = replays.find(own)
    if answer is None:
        with replays.making(own) as keep:
            answer = await handler(request)
            keep(answer)
    return answer
