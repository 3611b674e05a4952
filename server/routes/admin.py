"""Control endpoints, for operators alone: they exist only where the settings hold an admin key.

An API key opens none of them. Every call is one line in the log of `server.audit`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.body import JSONRequest
from server.contract import Engine
from server.errors import REQUEST_ID, ApiError, invalid
from server.service import Service, service_of
from server.streaming import CLIENT_GONE

audit = logging.getLogger("server.audit")

PROFILE_STEPS = 2000  # a trace of torch's operations grows by megabytes in a hundred steps
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")


class AdminRoute(APIRoute):
    """Asks for an admin key, and writes down who did what."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            outcome, asked = "refused", JSONRequest(request.scope, request.receive)
            try:
                service_of(request).admins.check(request.headers.get("authorization"))
                response = await handler(asked)
                outcome = "done" if response.status_code < 400 else "refused"
                return response
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            finally:
                client = request.client.host if request.client is not None else "a unix socket"
                what = f"{request.method} {request.url.path!a} {asked.seen()}"
                audit.warning("%s by %s: %s (%s)", what, ascii(client), outcome, request.scope.get(REQUEST_ID))

        return guarded


router = APIRouter(route_class=AdminRoute, tags=["administration"], include_in_schema=False)


class OfModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: str | None = None  # this one alone, in place of all


class AbortBody(OfModel):
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    all: bool = False


class ProfileBody(OfModel):
    action: Literal["start", "stop"]
    seconds: Annotated[float, Field(gt=0, le=300)] = 10.0


@router.get("/admin/requests")
async def list_requests(request: Request) -> dict[str, object]:
    """What is being answered: ids, whose it is, and for how long. Nothing of what was asked."""
    now, leases = time.monotonic(), service_of(request).accounts.leases
    rows = [
        {
            "request_id": lease.exchange,
            "ids": lease.request_ids,
            "key": lease.account.name,
            "path": lease.path,
            "seconds": round(now - lease.began, 3),
        }
        for lease in sorted(leases, key=lambda lease: lease.began)
    ]
    return {"requests": rows}


@router.post("/admin/abort")
async def abort(body: AbortBody, request: Request) -> dict[str, object]:
    """End requests: all of them, or those of one id, which may be that of the answer or its X-Request-Id."""
    if (body.request_id is None) is not body.all:
        raise invalid("request_id", 'send one, or "all": true')
    service = service_of(request)
    known = {body.request_id} | {
        own for lease in service.accounts.leases if lease.exchange == body.request_id for own in lease.request_ids
    }
    wanted = (lambda _: True) if body.all else partial(_is_one_of, known)
    ended = [own for engine in _engines(service, body.model).values() for own in engine.cancel(wanted)]
    return {"aborted": len(ended)}


@router.post("/admin/reset_prefix_cache")
async def reset_prefix_cache(request: Request, body: OfModel | None = None) -> dict[str, object]:
    """Let no request find what was computed for others until now. Running requests keep what they hold."""
    engines = _engines(service_of(request), body.model if body is not None else None)
    return {"blocks": {name: await engine.operator().reset_prefix_cache() for name, engine in engines.items()}}


@router.post("/admin/drain")
async def drain(request: Request) -> dict[str, object]:
    """Take no new requests, until `undrain`; those in flight go on. /ready says 503, /health stays as it is."""
    return _gate(request, closed=True)


@router.post("/admin/undrain")
async def undrain(request: Request) -> dict[str, object]:
    """Take requests again."""
    return _gate(request, closed=False)


@router.post("/admin/profile")
async def profile(body: ProfileBody, request: Request) -> dict[str, object]:
    """Record steps into a new folder below `server.profile_dir`: `start`, and `stop` to write it before its time."""
    service = service_of(request)
    if service.settings.profile_dir is None:
        raise ApiError(400, "Set server.profile_dir first: recordings go there.", code="not_configured")
    engine = service.engine(body.model)
    name = engine.info.id
    if body.action == "stop":
        return {"model": name, "steps": await engine.operator().stop_profile()}
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = service.settings.profile_dir / f"{_NOT_IN_NAMES.sub('_', name)[:64]}-{stamp}-{time.time_ns() % 10**9:09}"
    await engine.operator().start_profile(folder, body.seconds, PROFILE_STEPS)
    return {"model": name, "folder": str(folder), "seconds": body.seconds, "steps": PROFILE_STEPS}


def _engines(service: Service, model: str | None) -> dict[str, Engine]:
    """The engines that are meant. Raises ApiError 404."""
    return dict(service.engines) if model is None else {model: service.engine(model)}


def _is_one_of(known: set[str | None], request_id: str) -> bool:
    """Of a choice's own id, or of the answer that it is one choice of."""
    return request_id in known or request_id.rpartition("-")[0] in known


def _gate(request: Request, *, closed: bool) -> dict[str, object]:
    service = service_of(request)
    service.lifecycle.paused = closed
    return {"draining": closed, "in_flight": len(service.accounts.leases)}
