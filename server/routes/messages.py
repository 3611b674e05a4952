"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.body import GuardedRoute
from server.messages.convert import messages_job
from server.messages.events import MessageEvents
from server.messages.schemas import CountBody, MessagesBody
from server.service import service_of
from server.streaming import EventStreamResponse, answer, submit
from server.stretches import NamedEvents

router = APIRouter(route_class=GuardedRoute, tags=["messages"])


@router.post("/v1/messages", response_class=Response)
async def create_message(body: MessagesBody, request: Request) -> Response:
    """Answer a conversation; with `stream`, as server-sent events."""
    service = service_of(request)
    job, names = await messages_job(body, service)
    sheet = NamedEvents(job, MessageEvents(job))
    with names.told():
        stream = await submit(request, job, "messages")
        if not body.stream:
            return await answer(request, job, stream, sheet)
    return EventStreamResponse(stream, sheet, service.settings.keep_alive_seconds)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
    """How many tokens the prompt has, template and tools included."""
    job, _ = await messages_job(body, service_of(request))
    return {"input_tokens": len(job.prompts[0].ids)}
