"""From what a client wrote to token ids: texts, ids, and conversations through the chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from engine.errors import InvalidRequest
from engine.types import ModelInfo
from server import unsupported
from server.contract import Engine
from server.errors import ApiError, invalid
from server.reasoning.settle import template_variables
from server.schemas import CompletionBody, default
from server.schemas_chat import Message, TemplateFields, TokenizeBody, ToolCall
from server.schemas_sampling import PromptCut
from server.schemas_tools import Tool, size_of
from server.service import Service
from server.tools.history import conversation, without_system
from server.tools.plan import told_tools

INLINE_CHARS = 16_384  # longer texts are tokenized in a thread, so that other streams go on

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the client wrote, where it wrote text."""

    ids: tuple[int, ...]
    text: str | None = None


async def tokenize(body: TokenizeBody, service: Service) -> tuple[Engine, list[int]]:
    """The ids of a text or of a conversation."""
    engine = service.engine(body.model)
    unsupported.check(body, 1, service.unknown_fields)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either 'prompt' or 'messages'")
    if body.messages is not None:
        special, tools = bool(body.add_special_tokens), told_tools(body, engine.info)
        return engine, await encode_messages(engine, body.messages, body, service, special, tools)
    assert body.prompt is not None
    check_length(len(body.prompt), engine, service, "prompt")
    encode, special = engine.tokenizer.encode, default(body.add_special_tokens, True)
    text = body.prompt
    return engine, await in_thread_if(len(text) > INLINE_CHARS, lambda: encode(text, add_special_tokens=special))


def check_length(size: int, engine: Engine, service: Service, param: str) -> None:
    """Refuse a text of `size` characters that can't fit before a tokenizer spends time on it."""
    limit = engine.info.max_model_len
    if size > limit * service.settings.max_chars_per_token:
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens. However, your {param} has {size} characters,"
            f" which is far more than fits. Please reduce the length of the {param}.",
            param=param,
            code="context_length_exceeded",
        )


async def encode_messages(
    engine: Engine,
    messages: Sequence[Message],
    fields: TemplateFields,
    service: Service,
    add_special_tokens: bool,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Apply the chat template; `tools`: those that the model is told of. Raises ApiError and InvalidRequest."""
    if add_special_tokens:
        raise invalid("add_special_tokens", "the chat template adds the special tokens of a chat")
    checked = _plain_messages(messages)
    size = sum(map(_size, messages)) + sum(map(size_of, tools))
    check_length(size, engine, service, "messages")
    plain, shown = conversation(checked, tools, engine.info)
    going_on = bool(fields.continue_final_message)
    if going_on and fields.add_generation_prompt:
        raise invalid("continue_final_message", "excludes add_generation_prompt")
    prompt = default(fields.add_generation_prompt, not going_on)
    template = template_variables(fields, engine.tokenizer)
    encode = engine.tokenizer.encode_chat
    ours = tools and shown is None and checked[0]["role"] != "system"

    def rendered() -> list[int]:
        try:
            return encode(plain, prompt, going_on, template, shown)
        except InvalidRequest:
            if not ours:
                raise
            return encode(without_system(plain), prompt, going_on, template)

    return await in_thread_if(size > INLINE_CHARS, rendered)


def _size(message: Message) -> int:
    calls = sum(len(call.function.arguments) for call in message.tool_calls or ())
    return calls + sum(len(text or "") for text in (message.content, message.reasoning_content, message.reasoning))


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Messages as templates expect them: developer is system, arguments of calls are mappings."""
    plain: list[dict[str, object]] = []
    calls: set[str] = set()
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise invalid(f"{where}.content", f"a message of the role '{message.role}' needs a content")
        entry: dict[str, object] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content or "",
        }
        for name in ("name", "reasoning_content", "reasoning"):
            if (value := getattr(message, name)) is not None:
                entry[name] = value
        if message.tool_calls:
            entry["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
            calls.update(call.id for call in message.tool_calls)
        if message.role == "tool":
            if message.tool_call_id not in calls:
                raise invalid(f"{where}.tool_call_id", "matches no tool call of an earlier message")
            entry["tool_call_id"] = message.tool_call_id
        plain.append(entry)
    return plain


def _plain_call(call: ToolCall) -> dict[str, object]:
    name, arguments = call.function.name, call.function.arguments
    try:
        parsed: object = msgspec.json.decode(arguments or "{}")
    except (msgspec.MsgspecError, RecursionError):
        parsed = arguments
    function = {"name": name, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {"id": call.id, "type": "function", "function": function}


async def encode_prompts(body: CompletionBody, engine: Engine, service: Service) -> tuple[Prompt, ...]:
    """The prompts of a completions request, in order. Raises ApiError and InvalidRequest."""
    given: list[str] | list[list[int]]
    single = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    given = [body.prompt] if single else body.prompt  # type: ignore[assignment]  # the schema has checked
    check_limit("prompt", len(given), service.settings.max_prompts, "entries")
    for item in given:
        if isinstance(item, str):
            check_length(len(item), engine, service, "prompt")
        if len(item) == 0:
            raise invalid("prompt", "a prompt is empty")
    special = default(body.add_special_tokens, True)

    def encode() -> tuple[Prompt, ...]:
        return tuple(
            Prompt(tuple(engine.tokenizer.encode(item, add_special_tokens=special)), item)
            if isinstance(item, str)
            else Prompt(tuple(item))
            for item in given
        )

    return await in_thread_if(sum(map(len, given)) > INLINE_CHARS, encode)


def cut(prompt: Prompt, asked: PromptCut, info: ModelInfo, room: int = 1) -> Prompt:
    """At most as many tokens as are asked for; `room`: of the answer, where all that fits is asked for.

    Raises ApiError for a length that the model can't take.
    """
    wanted, most = asked.truncate_prompt_tokens, info.max_model_len
    if wanted is None:
        if asked.truncation_side is not None:
            raise invalid("truncation_side", "needs 'truncate_prompt_tokens'")
        return prompt
    if wanted == 0 or wanted > most:
        raise invalid("truncate_prompt_tokens", f"must be -1, or from 1 to {most}, the model's context length")
    kept = max(1, most - room) if wanted == -1 else wanted
    if len(prompt.ids) <= kept:
        return prompt
    return Prompt(prompt.ids[:kept] if asked.truncation_side == "right" else prompt.ids[-kept:])


async def in_thread_if(long: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if long else work()


def check_limit(param: str, value: int | None, limit: int, what: str = "") -> None:
    """Raises ApiError 400 for a value above a limit that an operator has set."""
    if value is not None and value > limit:
        raise invalid(param, f"must be at most {limit}{' ' + what if what else ''}; got {value}")
