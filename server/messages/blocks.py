"""Content blocks of Anthropic's messages, and how they become the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from server.errors import ApiError, invalid
from server.parts import Fields

Listed = list[dict[str, object]]


def _check_blocks(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(block, dict) for block in value)):
        return value
    raise PydanticCustomError("content_type", "must be a string or a list of blocks")


Blocks = Annotated[str | Listed, PlainValidator(_check_blocks, json_schema_input_type=str | Listed)]


class Turns:
    """Messages as /v1/chat/completions takes them, and of each where it stood in what the client sent."""

    def __init__(self) -> None:
        self.messages: list[Fields] = []
        self.origins: list[str] = []

    def say(self, role: str, content: str | Listed, origin: str) -> None:
        """One turn; the results of tools in it become messages of their own, in front of what follows them."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[Fields] = []
        blocks: Listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for i, block in enumerate(blocks):
            where = f"{origin}[{i}]"
            match block.get("type"), role:
                case "text", _:
                    texts.append(_text(block, "text", where))
                case "tool_result", "user":
                    self._flush(role, texts, origin)
                    self._result(block, where)
                case "tool_use", "assistant":
                    calls.append(_call(block, where))
                case "thinking", "assistant":
                    thoughts.append(_text(block, "thinking", where))
                case "redacted_thinking", "assistant":
                    pass  # nobody can read it
                case _:
                    raise _unsupported(block.get("type"), role, where)
        extras: Fields = {}
        if thoughts:
            extras["reasoning"] = "\n".join(thoughts)
        if calls:
            extras["tool_calls"] = calls
        self._flush(role, texts, origin, extras, last=not blocks or bool(texts or extras))

    def _flush(
        self, role: str, texts: list[str], origin: str, extras: Fields | None = None, last: bool = False
    ) -> None:
        if not (texts or last):
            return
        content = "\n".join(texts) if texts or not (extras or {}).get("tool_calls") else None
        self.messages.append({"role": role, "content": content, **(extras or {})})
        self.origins.append(origin)
        texts.clear()

    def _result(self, block: Mapping[str, object], where: str) -> None:
        content = block.get("content", "")
        if isinstance(content, list):
            parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
            content = "\n".join(parts)
        if not isinstance(content, str):
            raise invalid(f"{where}.content", "must be a string or a list of text blocks")
        failed = "Error: " if block.get("is_error") is True else ""
        called = _text(block, "tool_use_id", where)
        self.messages.append({"role": "tool", "tool_call_id": called, "content": failed + content})
        self.origins.append(f"{where}.tool_use_id")


def system_text(system: str | Sequence[Mapping[str, object]]) -> str:
    if isinstance(system, str):
        return system
    return "\n".join(_part(block, f"system[{i}]") for i, block in enumerate(system))


def _part(block: object, where: str) -> str:
    """The text of a block in a place where there are only texts."""
    if not isinstance(block, dict) or block.get("type") != "text":
        raise _unsupported(block.get("type") if isinstance(block, dict) else None, "this place", where)
    return _text(block, "text", where)


def _call(block: Mapping[str, object], where: str) -> Fields:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid(f"{where}.input", "must be an object")
    function = {"name": _text(block, "name", where), "arguments": msgspec.json.encode(arguments).decode()}
    return {"id": _text(block, "id", where), "type": "function", "function": function}


def _text(block: Mapping[str, object], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name}", "must be a string")
    return value


def _unsupported(kind: object, place: str, where: str) -> ApiError:
    if not isinstance(kind, str):
        return invalid(f"{where}.type", "a block needs a type")
    reason = f"blocks of the type '{kind[:64]}' are not supported in {place}; this server takes text"
    return ApiError(400, f"Invalid value for '{where}': {reason}.", param=where, code="unsupported_parameter")
