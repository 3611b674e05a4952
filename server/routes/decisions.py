"""POST /v1/decisions, and POST /v1/systemone, which says the same in other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server import unsupported
from server.answers import Fields
from server.body import GuardedRoute
from server.decisions.answers import decision_answer, decision_case, system_answer, system_case
from server.decisions.asking import Case, ask
from server.decisions.questions import Weighed
from server.decisions.schemas import AskingBody, DecisionBody, SystemOneBody
from server.reads import Read, read_all
from server.schemas import default
from server.service import service_of
from server.streaming import CLIENT_GONE, Gone

router = APIRouter(route_class=GuardedRoute, tags=["reading"])

Answer = Callable[[str, Sequence[Weighed], Sequence[Read]], Fields]


@router.post("/v1/decisions", response_class=Response)
async def create_decision(body: DecisionBody, request: Request) -> Response:
    """Answer questions about an input: how probable each of the allowed answers is, without writing any text."""
    return await _decide(request, body, decision_case(body), lambda *found: decision_answer(body, *found))


@router.post("/v1/systemone", response_class=Response)
async def create_structured_decision(body: SystemOneBody, request: Request) -> Response:
    """The same with a `state` and named questions of the types choice, noul and score."""
    return await _decide(request, body, system_case(body), lambda *found: system_answer(body, *found))


async def _decide(request: Request, body: AskingBody, case: Case, answer: Answer) -> Response:
    service = service_of(request)
    engine = service.engine(body.model)
    unsupported.check(body, 1, service.unknown_fields)
    asked = await ask(case, engine, service)
    try:
        reads = await read_all(request, engine, asked.requests, case.param)
    except Gone:
        return Response(status_code=CLIENT_GONE)
    found = answer(default(body.model, engine.info.id), asked.weighed(reads), reads)
    return Response(msgspec.json.encode(found), media_type="application/json")
