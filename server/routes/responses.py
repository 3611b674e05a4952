"""POST /v1/responses, and what can be done with a response that is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from engine.types import TokenEvent
from server.auth import CALLER
from server.body import GuardedRoute
from server.contract import EventStream
from server.errors import ApiError, invalid
from server.logprobs import Spelling
from server.parts import Fields
from server.responses.convert import Plan, responses_job
from server.responses.events import ResponseEvents
from server.responses.schemas import ResponsesBody
from server.responses.shape import Draft, Writer
from server.responses.store import Kept, ResponseStore, Running, missing
from server.service import service_of
from server.streaming import EventStreamResponse, answer, submit
from server.stretches import NamedEvents

router = APIRouter(route_class=GuardedRoute, tags=["responses"])

CANCEL_SECONDS = 5.0  # for a stream to tell its client that it was cancelled


class WatchedStream:
    """An engine's stream that says when it is closed, however that comes."""

    def __init__(self, stream: EventStream, closed: Callable[[], None]) -> None:
        self._stream = stream
        self._closed = closed

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self._stream.__aiter__()

    def divert(self, sink: Callable[[TokenEvent], bool]) -> None:
        self._stream.divert(sink)

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._closed()


class Shelf:
    """Where one request's response goes: nowhere if the client wants it so."""

    def __init__(self, store: ResponseStore, caller: str, wanted: bool) -> None:
        self.store, self.caller, self.wanted = store, caller, wanted

    def before(self, id: str | None) -> list[Fields]:
        """The conversation that a request goes on from. Raises ApiError 404."""
        return [] if id is None else self.store.find(self.caller, id, "previous_response_id").conversation()

    def keep(self, response: Fields, plan: Plan) -> None:
        id = response["id"]
        assert isinstance(id, str)
        if self.wanted:
            encode = msgspec.json.encode
            self.store.keep(self.caller, id, Kept(encode(response), encode(plan.items), encode(plan.before)))


@router.post("/v1/responses", response_class=Response)
async def create_response(body: ResponsesBody, request: Request) -> Response:
    """Answer an input; with `stream`, as server-sent events."""
    service = service_of(request)
    shelf = Shelf(service.responses, request.scope[CALLER], body.store is not False)
    plan = await responses_job(body, shelf.before(body.previous_response_id), service)
    job, draft = plan.job, Draft(body, plan.job)
    writer = Writer(Spelling(job.engine.tokenizer), body.top_logprobs or 0)
    sheet = NamedEvents(job, ResponseEvents(draft, writer, lambda response: shelf.keep(response, plan)))
    with plan.names.told():
        stream = await submit(request, job, "messages")
        if not body.stream:
            return await answer(request, job, stream, sheet)
    watched = WatchedStream(stream, lambda: shelf.store.end(shelf.caller, draft.id))
    if shelf.wanted:
        shelf.store.begin(shelf.caller, draft.id, Running(draft.fields, plan.items, stream.aclose, asyncio.Event()))
    return EventStreamResponse(watched, sheet, service.settings.keep_alive_seconds)


@router.get("/v1/responses/{id}", response_class=Response)
async def retrieve_response(id: str, request: Request, stream: bool = False) -> Response:
    """A response that is kept, or one that is being streamed, as it stands."""
    if stream:
        raise invalid("stream", "a response is streamed once, as it is made")
    store, caller = service_of(request).responses, request.scope[CALLER]
    if (running := store.running(caller, id)) is not None:
        return _json(running.response())
    return Response(store.find(caller, id).response, media_type="application/json")


@router.delete("/v1/responses/{id}", response_class=Response)
async def delete_response(id: str, request: Request) -> Response:
    """Forget a response; what goes on from it already is not changed."""
    if not service_of(request).responses.forget(request.scope[CALLER], id):
        raise missing(id)
    return _json({"id": id, "object": "response", "deleted": True})


@router.post("/v1/responses/{id}/cancel", response_class=Response)
async def cancel_response(id: str, request: Request) -> Response:
    """End a response that is being streamed; what there is of it is kept. Cancelling twice is fine."""
    store, caller = service_of(request).responses, request.scope[CALLER]
    if (running := store.running(caller, id)) is not None:
        await running.cancel()
        try:
            await asyncio.wait_for(running.ended.wait(), CANCEL_SECONDS)
            kept = store.find(caller, id)
        except (TimeoutError, ApiError):  # its client does not read, or has left
            return _json({**running.response(), "status": "cancelled"})
        return Response(kept.response, media_type="application/json")
    response = store.find(caller, id).response
    if msgspec.json.decode(response)["status"] != "cancelled":
        raise ApiError(400, "This response has ended; there is nothing to cancel.", code="invalid_value")
    return Response(response, media_type="application/json")


@router.get("/v1/responses/{id}/input_items", response_class=Response)
async def list_input_items(
    id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """The items that a response was made from, without those of earlier responses; a page of them."""
    store, caller = service_of(request).responses, request.scope[CALLER]
    running = store.running(caller, id)
    encoded = store.find(caller, id).items if running is None else msgspec.json.encode(running.items)
    items: list[dict[str, object]] = msgspec.json.decode(encoded)
    if order == "desc":
        items.reverse()
    ids = [str(item["id"]) for item in items]
    if after is not None and after not in ids:
        raise invalid("after", "is not the id of an item here")
    start = 0 if after is None else ids.index(after) + 1
    page = ids[start : start + limit]
    ends = {"first_id": page[0] if page else "", "last_id": page[-1] if page else ""}
    more = start + limit < len(ids)
    return _json({"object": "list", "data": items[start : start + limit], **ends, "has_more": more})


def _json(fields: Fields) -> Response:
    return Response(msgspec.json.encode(fields), media_type="application/json")
