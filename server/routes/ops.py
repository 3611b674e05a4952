"""For operators and probes: /health, /ready, /version, /metrics and the root. Open without a key; none generates.

Some load balancers probe with HEAD, so all of them answer it.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.service import service_of
from server.version import version

router = APIRouter(tags=["operations"])


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def root() -> dict[str, str]:
    """Something to see in a browser."""
    return {"name": "slipstream", "version": version(), "docs": "/docs", "api": "/v1"}


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engines are alive and make progress, else 503 with the reason. Draining is healthy."""
    lifecycle = service_of(request).lifecycle
    trouble = lifecycle.trouble()
    if not trouble:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unhealthy", "reason": trouble, "phase": lifecycle.phase}, 503)


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 once every model has generated a token and until the server drains, else 503 with the reason."""
    reason = service_of(request).lifecycle.unready()
    return JSONResponse({"status": "not ready", "reason": reason}, 503) if reason else JSONResponse({"status": "ready"})


@router.head("/version", include_in_schema=False)
@router.get("/version")
async def show_version() -> dict[str, str]:
    """The version of this server."""
    return {"version": version()}


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus metrics, under vLLM's names where there is one."""
    body, content_type = service_of(request).metrics.render()
    return Response(body, headers={"content-type": content_type})
