"""GET /v1/models and /v1/models/{id}; ids may hold slashes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from engine.types import ModelInfo
from server.body import GuardedRoute
from server.diffusion import diffusion_card
from server.service import service_of
from server.speculation import speculation_card

router = APIRouter(route_class=GuardedRoute, tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, object]:
    """All models that this server has."""
    engines = service_of(request).engines.values()
    return {"object": "list", "data": [_card(engine.info) for engine in engines]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> dict[str, object]:
    """One model by its id."""
    return _card(service_of(request).engine(model).info)


def _card(info: ModelInfo) -> dict[str, object]:
    return {
        "id": info.id,
        "object": "model",
        "created": info.created,
        "owned_by": "slipstream",
        "root": info.id,
        "parent": None,
        "max_model_len": info.max_model_len,
        "speculation": speculation_card(info),
        "diffusion": diffusion_card(info),
        "permission": [],
    }
