"""The items of an input, and how they become the messages of a chat."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import ApiError, invalid
from server.parts import Fields

MAX_ITEMS = 4096
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal", "summary_text": "text"}
TEXT_PARTS["reasoning_text"] = "text"

Parts = str | list[dict[str, object]]


class _Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Parts


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str


class OutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Parts


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: list[dict[str, object]] = []
    content: list[dict[str, object]] | None = None


KINDS: Mapping[str, type[_Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "reasoning": ReasoningItem,
}


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


class History:
    """Messages as /v1/chat/completions takes them, and of each where it stood in what the client sent."""

    def __init__(self) -> None:
        self.messages: list[Fields] = []
        self.origins: list[str] = []
        self._thought = ""  # goes into the assistant's message behind it

    def say(self, role: str, text: str, origin: str) -> None:
        self._add({"role": role, "content": text}, origin)

    def read(self, items: Sequence[Mapping[str, object]], where: str) -> list[Fields]:
        """Add items; returns them as the API lists them. `where`: the field that they stand in, if the client may
        have made a mistake there. Raises ApiError and RequestValidationError."""
        return [self._read(item, f"{where}[{i}]" if where == "input" else where) for i, item in enumerate(items)]

    def _read(self, fields: Mapping[str, object], origin: str) -> Fields:
        kind = fields.get("type", "message")
        model = KINDS.get(kind) if isinstance(kind, str) else None
        if model is None:
            reason = f"items of this type are not supported; there are {', '.join(KINDS)}"
            if kind == "item_reference":
                reason = "there are no references here; send the item itself, or previous_response_id"
            raise invalid(f"{origin}.type", reason)
        try:
            item = model.model_validate(fields)
        except ValidationError as error:
            raise RequestValidationError(
                [{**one, "loc": (origin, *one["loc"])} for one in error.errors(include_url=False)]
            ) from error
        match item:
            case MessageItem():
                return self._message(item, origin)
            case CallItem():
                return self._call(item, origin)
            case OutputItem():
                return self._output(item, origin)
            case _:
                assert isinstance(item, ReasoningItem)
                return self._reasoning(item, origin)

    def _message(self, item: MessageItem, origin: str) -> Fields:
        text, own = joined(item.content, f"{origin}.content"), item.role == "assistant"
        self.say(item.role, text, origin)
        part: Fields = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        content = [part if own else {"type": "input_text", "text": text}]
        named = {"id": item.id or new_id("msg"), "type": "message", "status": "completed"}
        return {**named, "role": item.role, "content": content}

    def _call(self, item: CallItem, origin: str) -> Fields:
        """It goes into the assistant's message before it, if there is one."""
        if not self.messages or self.messages[-1]["role"] != "assistant" or self._thought:
            self._add({"role": "assistant", "content": None}, origin)
        calls = self.messages[-1].setdefault("tool_calls", [])
        assert isinstance(calls, list)
        function = {"name": item.name, "arguments": item.arguments}
        calls.append({"id": item.call_id, "type": "function", "function": function})
        return {**item.model_dump(), "id": item.id or new_id("fc"), "status": "completed"}

    def _output(self, item: OutputItem, origin: str) -> Fields:
        text = joined(item.output, f"{origin}.output")
        self._add({"role": "tool", "tool_call_id": item.call_id, "content": text}, origin)
        return {**item.model_dump(), "id": item.id or new_id("fco"), "output": text, "status": "completed"}

    def _reasoning(self, item: ReasoningItem, origin: str) -> Fields:
        where = "summary" if item.content is None else "content"
        self._thought = joined(item.summary if item.content is None else item.content, f"{origin}.{where}")
        return {**item.model_dump(), "id": item.id or new_id("rs")}

    def _add(self, message: Fields, origin: str) -> None:
        if message["role"] == "assistant" and self._thought:
            message["reasoning"] = self._thought
        self._thought = ""
        self.messages.append(message)
        self.origins.append(origin)


def joined(parts: Parts, where: str) -> str:
    """The text of a content, a line break between two parts. Raises ApiError for what is not text."""
    if isinstance(parts, str):
        return parts
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type")
        text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
        if not isinstance(text, str):
            name = f"{where}[{i}]"
            if isinstance(kind, str) and kind not in TEXT_PARTS:
                message = f"Unsupported part in '{name}': this server takes text."
                raise ApiError(400, message, param=f"{name}.type", code="unsupported_parameter")
            raise invalid(name, "must have a type and a text")
        texts.append(text)
    return "\n".join(texts)
