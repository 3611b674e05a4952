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
async def health(request: Request, model: str | None = None) -> JSONResponse:
    """200 while engines are alive and make progress, else 503 with the reason. Draining is healthy.

    Of several models, one that has died does not take the others down: the status is "degraded" until none is left.
    `?model=` asks of one model alone.
    """
    lifecycle, models = service_of(request).lifecycle, _asked(request, model)
    trouble = lifecycle.trouble(models)
    if not trouble:
        return JSONResponse({"status": "ok"})
    if len(trouble) < len(models):
        return JSONResponse({"status": "degraded", "reason": _joined(trouble)})
    return JSONResponse({"status": "unhealthy", "reason": _joined(trouble), "phase": lifecycle.phase}, 503)


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request, model: str | None = None) -> JSONResponse:
    """200 once every model has generated a token and until the server drains or none is left, else 503 with the reason.

    `?model=` asks of one model alone.
    """
    models = _asked(request, model)
    reasons = service_of(request).lifecycle.unready(models)
    if not reasons:
        return JSONResponse({"status": "ready"})
    if len(reasons) < len(models):
        return JSONResponse({"status": "degraded", "reason": _joined(reasons)})
    return JSONResponse({"status": "not ready", "reason": _joined(reasons)}, 503)


def _asked(request: Request, model: str | None) -> list[str]:
    """The models that a probe is about. Raises ApiError 404."""
    service = service_of(request)
    if model is None:
        return list(service.engines)
    service.engine(model)
    return [model]


def _joined(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


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
