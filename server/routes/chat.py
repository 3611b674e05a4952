"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.body import GuardedRoute
from server.choices import ChatChoices
from server.convert import chat_job
from server.schemas_chat import ChatBody
from server.service import service_of
from server.streaming import respond

router = APIRouter(route_class=GuardedRoute, tags=["generation"])


@router.post("/v1/chat/completions", response_class=Response)
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answer a conversation; with `stream`, as server-sent events."""
    service = service_of(request)
    job = await chat_job(body, service)
    quiet = service.settings.keep_alive_seconds
    return await respond(request, body, job, ChatChoices(body, job), "messages", quiet)
