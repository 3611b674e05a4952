"""What questions are about, as one text: a string, parts of texts and JSON, a conversation with its tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.errors import invalid

MAX_LEVELS = 32  # of containers in one input_json part
MAX_VALUES = 10_000
MAX_JSON_BYTES = 256 << 10
MAX_ITEMS = 4096

_CALLS = {"function_call_output": "function_call", "custom_tool_call_output": "custom_tool_call"}
_TEXTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


class TextPart(BaseModel):
    type: Literal["input_text", "output_text"]
    text: str


class JsonPart(BaseModel):
    type: Literal["input_json"]
    data: dict[str, object] | list[dict[str, object]]


def json_text(value: object) -> str:
    """Compact JSON. Raises PydanticCustomError for more than the API allows."""
    level: list[object] = [value]
    values = 0
    for _ in range(MAX_LEVELS + 1):
        values += len(level)
        if values > MAX_VALUES:
            raise PydanticCustomError("value_error", f"an input_json may hold at most {MAX_VALUES} values")
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
        if not level:
            break
    else:
        raise PydanticCustomError("value_error", f"an input_json may be nested at most {MAX_LEVELS} levels deep")
    data = msgspec.json.encode(value)
    if len(data) > MAX_JSON_BYTES:
        raise PydanticCustomError("value_error", f"an input_json may have at most {MAX_JSON_BYTES} bytes")
    return data.decode()


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise PydanticCustomError("content_type", 'parts must look like {"type": "input_text", "text": "..."}')
    if kind in _TEXTS:
        text = part.get(_TEXTS[kind])
        if isinstance(text, str):
            return text
        raise PydanticCustomError("content_type", f"a part of type '{kind}' needs a string '{_TEXTS[kind]}'")
    if kind == "input_json":
        data = part.get("data")
        rows = data if isinstance(data, list) else [data]
        if rows and all(isinstance(row, dict) for row in rows):
            return json_text(data)
        raise PydanticCustomError("content_type", "a part of type 'input_json' needs an object or a list of objects")
    reason = "this server takes text and JSON"
    raise PydanticCustomError("unsupported_parameter", f"parts of type '{kind[:64]}' are not supported; {reason}")


def _joined(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(map(_part_text, value))
    raise PydanticCustomError("content_type", "must be a string or a list of parts")


# A string, or a list of parts that becomes one, with a line break between two parts.
Evidence = Annotated[str, PlainValidator(_joined, json_schema_input_type=str | list[TextPart | JsonPart])]


class Item(BaseModel):
    """A message, a tool call or what a tool said."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"] = (
        "message"
    )
    role: Literal["user", "developer", "system", "assistant"] | None = None
    content: Evidence | None = None
    name: str | None = None
    call_id: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: Evidence | None = None


Items = Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS)]


def transcript(items: Sequence[Item]) -> str:
    """A single user message is its text; several items become a transcript, each behind a line that says whose it is.

    Raises ApiError for an item that lacks something, and for an output without its call.
    """
    if len(items) == 1 and items[0].type == "message" and items[0].role == "user":
        return _needed(items[0].content, "input[0].content")
    calls: dict[str, str] = {}
    return "\n\n".join(_entries(items, calls))


def _entries(items: Sequence[Item], calls: dict[str, str]) -> Iterable[str]:
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if item.type == "message":
            yield f"[{_needed(item.role, f'{where}.role')}]\n{_needed(item.content, f'{where}.content')}"
            continue
        call_id = _needed(item.call_id, f"{where}.call_id")
        if item.type in _CALLS:
            if calls.get(call_id) != _CALLS[item.type]:
                raise invalid(f"{where}.call_id", f"matches no {_CALLS[item.type]} of an earlier item")
            yield f"[tool result {call_id}]\n{_needed(item.output, f'{where}.output')}"
            continue
        field = "arguments" if item.type == "function_call" else "input"
        given = _needed(item.arguments if field == "arguments" else item.input, f"{where}.{field}")
        calls[call_id] = item.type
        yield f"[tool call {call_id}: {_needed(item.name, f'{where}.name')}]\n{given}"


def _needed(value: str | None, where: str) -> str:
    if value is None:
        raise invalid(where, "is missing")
    return value
