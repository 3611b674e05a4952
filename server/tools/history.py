"""Conversations with tools as the chat template of a model takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from engine.types import ModelInfo
from server.schemas_tools import Tool, described
from server.tools.form import Form, Written
from server.tools.forms import FORMS

Message = dict[str, object]
_ID_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def conversation(
    messages: Sequence[Message], tools: Sequence[Tool], info: ModelInfo
) -> tuple[list[Message], list[Mapping[str, object]] | None]:
    """The messages, and the tools for a template that tells of them itself.

    For other templates, calls and what they returned become text, and the tools a part of the system message.
    """
    form = FORMS.get(info.tool_parser)
    if form is None:
        return list(messages), None
    if not info.tool_template:
        told = list(_as_text(messages, form))
        return (_with_system(told, tool_prompt(tools, form)) if tools else told), None
    if info.tool_parser == "mistral":
        messages = [_with_short_ids(message) for message in messages]
    elif info.tool_parser == "llama3_json":
        messages = list(_one_by_one(messages))
    return list(messages), [described(tool) for tool in tools] or None


def tool_prompt(tools: Sequence[Tool], form: Form) -> str:
    listed = "\n".join(json.dumps(described(tool), ensure_ascii=False) for tool in tools)
    return (
        "You can call functions to help the user. Each line between <tools> and </tools> describes one of them, with a"
        f" JSON schema of its parameters:\n<tools>\n{listed}\n</tools>\n\n{form.instructions}\n\n"
        "You will be told what it returned. Where no function is of use, answer in words."
    )


def _as_text(messages: Sequence[Message], form: Form) -> Iterator[Message]:
    """Calls in the model's own form, and what tools returned as words of the user, for templates without tools."""
    names: dict[object, object] = {}
    told: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            told.append(f"The function {names.get(message['tool_call_id'])} returned:\n{message['content']}")
            continue
        if told:
            yield {"role": "user", "content": "\n\n".join(told)}
            told = []
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            yield message
            continue
        names |= {call["id"]: call["function"]["name"] for call in calls}
        text = form.written([_written(call) for call in calls])
        said = {key: value for key, value in message.items() if key != "tool_calls"}
        yield {**said, "content": f"{message['content']}\n{text}" if message["content"] else text}
    if told:
        yield {"role": "user", "content": "\n\n".join(told)}


def _written(call: Mapping[str, Mapping[str, object]]) -> Written:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return str(function["name"]), text or "{}"


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".lstrip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The system message in front becomes a part of the first user message, for templates that refuse its role."""
    first, *rest = messages
    for i, message in enumerate(rest):
        if message["role"] == "user":
            rest[i] = {**message, "content": f"{first['content']}\n\n{message['content']}"}
            return rest
    return [{**first, "role": "user"}, *rest]


def _with_short_ids(message: Message) -> Message:
    """Mistral's templates refuse ids of calls that are not nine letters and digits."""
    if isinstance(message.get("tool_call_id"), str):
        message = {**message, "tool_call_id": _short_id(str(message["tool_call_id"]))}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message = {**message, "tool_calls": [{**call, "id": _short_id(str(call["id"]))} for call in calls]}
    return message


def _short_id(name: str) -> str:
    if len(name) == 9 and name.isascii() and name.isalnum():
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return "".join(_ID_CHARACTERS[byte % len(_ID_CHARACTERS)] for byte in digest[:9])


def _one_by_one(messages: Sequence[Message]) -> Iterator[Message]:
    """Llama's templates refuse messages with several calls: each call is told with its result behind it."""
    i = 0
    while i < len(messages):
        message, i = messages[i], i + 1
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or len(calls) < 2:
            yield message
            continue
        results: dict[object, Message] = {}
        while i < len(messages) and messages[i]["role"] == "tool":
            results[messages[i]["tool_call_id"]] = messages[i]
            i += 1
        for number, call in enumerate(calls):
            yield {**message, "content": message["content"] if number == 0 else "", "tool_calls": [call]}
            if call["id"] in results:
                yield results.pop(call["id"])
        yield from results.values()
