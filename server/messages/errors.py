"""Anthropic's shape of errors, for every path below /v1/messages. What an error is, `server/errors.py` says."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

PATH = "/v1/messages"
KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def speaks(scope: Scope) -> bool:
    """Does the client of this exchange expect Anthropic's shapes? Only its path can say so before it is routed."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == PATH or path.startswith(f"{PATH}/")


def error_fields(status: int, message: str, param: str | None, request_id: str | None = None) -> dict[str, object]:
    """The body of an answer, or an event of a stream. There is no room for a field's name but in the message."""
    if param is not None and param not in message:
        message = f"{param}: {message}"
    kind = KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


SCHEMA = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}
