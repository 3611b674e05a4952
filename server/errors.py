"""The one place where errors become HTTP. Every body has OpenAI's shape: {"error": {message, type, param, code}}.

Below /v1/messages it is Anthropic's, made of the same (`messages/errors.py`).

| cause | status | type | code |
| --- | --- | --- | --- |
| InvalidRequest and children, a field of a wrong type or value | 400 | invalid_request_error | per error |
| no key or a wrong one | 401 | invalid_request_error | invalid_api_key |
| unknown path or model | 404 | invalid_request_error | not_found, model_not_found |
| DuplicateRequest: the request_id is that of a running request | 409 | invalid_request_error | request_id_in_use |
| the caller's limits are reached | 429 + Retry-After | requests, tokens | rate_limit_exceeded |
| Cancelled by an operator | 503, not to be retried | server_error | request_cancelled |
| Overloaded, EngineDead, starting, draining | 503 + Retry-After | server_error | per error |
| StepFailed, anything unexpected | 500 | server_error | internal_error |

A failure that would come again on a retry is a 4xx, or a 500 marked `x-should-retry: false`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from engine.errors import (
    Cancelled,
    ControlRefused,
    DuplicateRequest,
    EngineDead,
    InvalidRequest,
    Overloaded,
    StepFailed,
)
from server.messages import errors as messages

log = logging.getLogger(__name__)

REQUEST_ID = "slipstream.request_id"  # in the scope of every exchange: the X-Request-Id of its response

MAX_MESSAGE = 600  # characters of an error message; the rest of what a client sent is not echoed
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
INTERNAL = "The server had an error while processing this request."


class ApiError(HTTPException):
    """An answer other than 200. Its `type` follows from the status, unless `kind` says it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(status, shorten(message, MAX_MESSAGE), headers=dict(headers or {}))
        self.param = shorten(param, 100) if param is not None else None
        self.code = code
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, object]:
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"Invalid value for '{param}': {message}.", param=param, code="invalid_value")


def refused(param: str, reason: str) -> ApiError:
    """Something that is known and not done here; to ignore it would give the client another answer than it wants."""
    return ApiError(400, f"Unsupported parameter: '{param}': {reason}.", param=param, code="unsupported_parameter")


def lacking(param: str) -> ApiError:
    return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def unavailable(message: str, code: str, retry_after: float = 1.0) -> ApiError:
    return ApiError(503, message, code=code, headers={"retry-after": str(max(1, math.ceil(retry_after)))})


def to_api_error(error: Exception) -> ApiError:
    """The answer for any exception. Unexpected ones say nothing of themselves; they belong in the log."""
    match error:
        case ApiError():
            return error
        case DuplicateRequest():
            never = {"x-should-retry": "false"}
            return ApiError(409, error.message, param=error.param, code="request_id_in_use", headers=never)
        case InvalidRequest():
            return ApiError(400, error.message, param=error.param, code=error.code or "invalid_value")
        case Overloaded():
            return unavailable(str(error), "overloaded", error.retry_after)
        case EngineDead():
            return unavailable("The model is not available at the moment; please retry.", "engine_unavailable", 5)
        case Cancelled():
            message = "The request was cancelled by the server's operator."
            return ApiError(503, message, code="request_cancelled", headers={"x-should-retry": "false"})
        case ControlRefused():
            return ApiError(409, f"The engine refused: {error}.", code="control_refused")
        case StepFailed():
            message = "The model failed on this request; other requests are not affected."
            return ApiError(500, message, code="internal_error", headers={"x-should-retry": "false"})
        case RequestValidationError():
            return _from_validation(error.errors())
        case HTTPException():
            code = _CODES.get(error.status_code, "invalid_request")
            return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        case _:
            return ApiError(500, INTERNAL, code="internal_error", headers={"x-should-retry": "false"})


def field_path(location: Sequence[object]) -> str:
    """("messages", 0, "content") as a client writes it: messages[0].content."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _from_validation(errors: Sequence[Mapping[str, object]]) -> ApiError:
    """The first thing wrong with a body. Only that one is told, and nothing of its value is echoed."""
    first = errors[0]
    location = first["loc"]
    assert isinstance(location, tuple)
    path = field_path(location[1:] if location[:1] in (("body",), ("path",), ("query",)) else location)
    kind, message = str(first["type"]), str(first["msg"])
    if kind == "missing":
        if not path:
            return ApiError(400, "The request body is empty.", code="invalid_json")
        return lacking(path)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    if kind in ("array_above_max_length", "string_above_max_length", "unsupported_parameter"):
        code = kind
    where = f"Invalid value for '{path}': " if path else "Invalid request body: "
    return ApiError(400, where + message, param=path or None, code=code)


def error_response(error: Exception, scope: Scope) -> Response:
    """In the shape of the path that was asked for, whether there is one or not."""
    answer = to_api_error(error)
    body = answer.body()
    if messages.speaks(scope):
        body = messages.error_fields(answer.status_code, answer.detail, answer.param, scope.get(REQUEST_ID))
    return Response(msgspec.json.encode(body), answer.status_code, answer.headers, media_type="application/json")


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Register one handler for all errors that a route may raise on purpose. `routes`: all that the application has."""

    async def handle(request: Request, error: Exception) -> Response:
        response = error_response(error, request.scope)
        if response.status_code == 405:  # the framework names the methods of the first route with that path alone
            found = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
            methods = {name for route in found for name in getattr(route, "methods", None) or ()}
            response.headers["allow"] = ", ".join(sorted(methods))
        return response

    for kind in (
        *(HTTPException, RequestValidationError, InvalidRequest),
        *(Overloaded, EngineDead, StepFailed, Cancelled, ControlRefused),
    ):
        app.add_exception_handler(kind, handle)


_NULLABLE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}
