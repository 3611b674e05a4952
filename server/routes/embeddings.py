"""POST /v1/embeddings."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.body import GuardedRoute
from server.embeddings import embedding_answer, embedding_requests
from server.prompts import in_thread_if
from server.reads import read_all
from server.schemas_reading import EmbeddingBody
from server.service import service_of
from server.streaming import CLIENT_GONE, Gone

router = APIRouter(route_class=GuardedRoute, tags=["reading"])

INLINE_VECTORS = 64


@router.post("/v1/embeddings", response_class=Response)
async def create_embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Vectors of texts or token ids: the mean of the model's last hidden states, or the last one."""
    service = service_of(request)
    engine = service.engine(body.model)
    wanted = await embedding_requests(body, engine, service)
    try:
        reads = await read_all(request, engine, wanted, "input")
    except Gone:
        return Response(status_code=CLIENT_GONE)
    many = len(reads) > INLINE_VECTORS
    data = await in_thread_if(many, lambda: msgspec.json.encode(embedding_answer(body, engine, reads)))
    return Response(data, media_type="application/json")
