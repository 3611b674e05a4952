"""From a /v1/responses body to a chat, so that both have the same checks and the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from server.convert import Job, chat_job
from server.errors import invalid, lacking, refused
from server.naming import Names, Rule, built
from server.parts import Fields
from server.responses.items import History
from server.responses.schemas import AllowedTools, FunctionTool, NamedTool, ResponsesBody
from server.responses.truncation import fitted, kept
from server.schemas import SamplingBody
from server.schemas_chat import ChatBody
from server.service import Service

RULES: tuple[Rule, ...] = (
    (r"max_(completion_)?tokens", "max_output_tokens"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"tools(\[\d+\])\.function", r"tools\1"),
    (r"tool_choice\.function", "tool_choice"),
    (r"logprobs", "include"),
)
LOGPROBS = "message.output_text.logprobs"
# What clients ask for in any case; there is nothing of it to leave out or to put in.
INCLUDABLE = frozenset(
    (LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
     "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
     "code_interpreter_call.outputs")
)  # fmt: skip
INSTEAD: Mapping[str, str] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": f"include: ['{LOGPROBS}']",
    "functions": "tools",
    "function_call": "tool_choice",
}
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "n",
            "best_of",
            "echo",
            "prompt_logprobs",
            "logprob_token_ids",
            "stream_interval",
            "return_token_ids",
            "return_tokens_as_token_ids",
        ),
        "it is for endpoints with choices",
    ),
    "conversation": "conversations are not kept here; use previous_response_id",
    "prompt": "prompt templates are not kept here",
    "moderation": "there is no moderation",
    "context_management": "a conversation is not compacted",
    "background_options": "responses do not run in the background",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request. Items, of its input and before it, are as the API lists them; `names` are the client's."""

    job: Job
    items: tuple[Fields, ...]
    before: tuple[Fields, ...]
    names: Names


async def responses_job(body: ResponsesBody, before: Sequence[Fields], service: Service) -> Plan:
    """`before`: the items of the responses that this one goes on from. Raises ApiError in the client's names."""
    _check(body)
    history = History()
    if body.instructions is not None:
        history.say("system", body.instructions, "instructions")
    earlier = history.read(before, "previous_response_id")
    given = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    listed = history.read(given, "input")
    names = Names("input", history.origins, RULES)
    fields, messages, head = _chat_fields(body), history.messages, kept(history.messages)

    async def job_from(start: int) -> Job:
        asked = built(ChatBody, {**fields, "messages": [*messages[:head], *messages[start:]]})
        return await chat_job(asked, service)

    with names.told():
        job = await (fitted(messages, job_from) if body.truncation == "auto" else job_from(head))
    return Plan(job, tuple(listed), tuple(earlier), names)


def _check(body: ResponsesBody) -> None:
    given = body.extras()
    for name in given:
        if name in INSTEAD:
            raise refused(name, f"use {INSTEAD[name]}")
        if name in REFUSED and not (name == "n" and given[name] == 1):
            raise refused(name, REFUSED[name])
    if body.background:
        raise refused("background", "responses do not run in the background; use stream")
    if any(traced is not None and traced.trace for traced in (body.speculation, body.diffusion)):
        name = "speculation" if body.speculation is not None and body.speculation.trace else "diffusion"
        raise refused(f"{name}.trace", "traces are for /v1/chat/completions")
    for i, name in enumerate(body.include or ()):
        if name not in INCLUDABLE:
            raise invalid(f"include[{i}]", f"there are {', '.join(sorted(INCLUDABLE))}")


def _chat_fields(body: ResponsesBody) -> Fields:
    """All but the messages."""
    shared = {name: getattr(body, name) for name in SamplingBody.model_fields}
    reasoning = body.reasoning
    scored = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    tools, choice = chat_tools(body)
    return {
        **body.extras(),
        **shared,
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": True if scored else None,
        "top_logprobs": body.top_logprobs if scored else None,
        "response_format": response_format(body),
        "reasoning_effort": None if reasoning is None else reasoning.effort,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
    }


def response_format(body: ResponsesBody) -> Fields | None:
    form = None if body.text is None else body.text.format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    for name, value in (("name", form.name), ("schema", form.schema_)):
        if value is None:
            raise lacking(f"text.format.{name}")
    named = {"name": form.name, "description": form.description, "schema": form.schema_, "strict": form.strict}
    return {"type": "json_schema", "json_schema": {name: value for name, value in named.items() if value is not None}}


def function_tools(body: ResponsesBody) -> list[FunctionTool]:
    """Raises ApiError for tools that would have to run on the server."""
    found = []
    for i, tool in enumerate(body.tools or ()):
        if isinstance(kind := tool.get("type"), str) and kind != "function":
            reason = "tools of this type are not supported; this server has those of the type function"
            raise refused(f"tools[{i}].type", reason)
        try:
            found.append(FunctionTool.model_validate(tool))
        except ValidationError as error:
            located = [{**one, "loc": ("tools", i, *one["loc"])} for one in error.errors(include_url=False)]
            raise RequestValidationError(located) from error
    return found


def chat_tools(body: ResponsesBody) -> tuple[list[Fields] | None, object]:
    """`tools` and `tool_choice` of the chat."""
    tools: list[Fields] = [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in function_tools(body)
    ]
    choice: object = body.tool_choice
    if isinstance(choice, NamedTool):
        choice = _named(choice)
    elif isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
    elif not tools and choice in ("auto", "none"):  # what happens anyway
        choice = None
    return tools or None, choice


def _named(tool: NamedTool) -> Fields:
    return {"type": "function", "function": {"name": tool.name}}
