"""For operators and probes: /health, /ready, /ping, /version, /metrics and /load. Open without a key; none generates.

Some load balancers probe with HEAD, so all of them answer it.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from engine.types import EngineStats
from server.lifecycle import State
from server.service import service_of
from server.version import version

router = APIRouter(tags=["operations"])


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


@router.head("/load", include_in_schema=False)
@router.get("/load")
async def load(request: Request) -> dict[str, object]:
    """How busy the server is. `server_load`, as vLLM has it: requests that are being answered."""
    service = service_of(request)
    return {
        "server_load": len(service.accounts.leases),
        "draining": service.lifecycle.paused or service.lifecycle.state is State.DRAINING,
        "models": {name: _levels(engine.stats) for name, engine in service.engines.items()},
    }


def _levels(stats: EngineStats) -> dict[str, object]:
    used, total = stats.kv_blocks_used, stats.kv_blocks_total
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_cache_usage": round(used / total, 4) if total else 0.0,
        "kv_blocks": total,
    }


@router.head("/ping", include_in_schema=False)
@router.post("/ping", response_class=Response)
@router.get("/ping", response_class=Response)
async def ping(request: Request) -> Response:
    """200 while /health says so, else 503; without a body, as some platforms want it."""
    healthy = (await health(request)).status_code == 200
    return Response(status_code=200 if healthy else 503)


@router.head("/is_sleeping", include_in_schema=False)
@router.get("/is_sleeping")
async def is_sleeping() -> dict[str, bool]:
    """Never: there is no sleep mode. Routers of vLLM's kind ask."""
    return {"is_sleeping": False}
