"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.body import GuardedRoute
from server.choices import CompletionChoices
from server.convert import completion_job
from server.schemas import CompletionBody
from server.service import service_of
from server.streaming import respond

router = APIRouter(route_class=GuardedRoute, tags=["generation"])


@router.post("/v1/completions", response_class=Response)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continue texts or token ids; with `stream`, as server-sent events."""
    service = service_of(request)
    job = await completion_job(body, service)
    quiet = service.settings.keep_alive_seconds
    return await respond(request, body, job, CompletionChoices(body, job), "prompt", quiet)
