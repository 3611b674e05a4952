"""From a /v1/messages body to a chat, so that both have the same checks and the same answers."""

from __future__ import annotations

from collections.abc import Mapping

from engine.types import ModelInfo
from server.convert import Job, chat_job
from server.errors import invalid, lacking, refused
from server.messages.blocks import Turns, system_text
from server.messages.schemas import CountBody, MessagesBody, PromptFields, Tool
from server.naming import Names, Rule, built
from server.parts import Fields
from server.schemas import SamplingBody
from server.schemas_chat import ChatBody
from server.service import Service

RULES: tuple[Rule, ...] = (
    (r"max_completion_tokens", "max_tokens"),
    (r"stop", "stop_sequences"),
    (r"tools(\[\d+\])\.function\.parameters", r"tools\1.input_schema"),
    (r"tools(\[\d+\])\.function", r"tools\1"),
    (r"tool_choice\.function", "tool_choice"),
    (r"response_format\.json_schema", "output_config.format"),
    (r"response_format", "output_config.format"),
    (r"reasoning_effort", "output_config.effort"),
    (r"thinking_token_budget", "thinking.budget_tokens"),
    (r"enable_thinking", "thinking.type"),
)
_CHOICES = "it is for endpoints with choices"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("n", "best_of", "echo", "logprobs", "top_logprobs", "prompt_logprobs"), _CHOICES),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids", "logprob_token_ids"), _CHOICES),
    **dict.fromkeys(("stream_interval", "stream_options"), _CHOICES),
    **dict.fromkeys(("max_completion_tokens",), "use max_tokens"),
    **dict.fromkeys(("response_format",), "use output_config.format"),
    **dict.fromkeys(("reasoning_effort", "reasoning"), "use thinking and output_config.effort"),
    **dict.fromkeys(("functions", "function_call"), "use tools and tool_choice"),
    "stop": "use stop_sequences",
    "container": "nothing runs on the server",
    "mcp_servers": "nothing runs on the server",
    "context_management": "a conversation is not compacted",
}
IGNORED = frozenset(
    ("service_tier", "inference_geo", "cache_control", "diagnostics", "speed", "user_profile_id", "workspace_id",
     "betas")
)  # fmt: skip


async def messages_job(body: MessagesBody | CountBody, service: Service) -> tuple[Job, Names]:
    """The chat that the body asks for. Raises ApiError in the client's names."""
    if isinstance(body, MessagesBody):
        _check(body)
    turns = Turns()
    if body.system is not None:
        turns.say("system", system_text(body.system), "system")
    for i, turn in enumerate(body.messages):
        turns.say(turn.role, turn.content, f"messages[{i}].content")
    names = Names("messages", turns.origins, RULES)
    info = service.engine(body.model).info
    with names.told():
        return await chat_job(built(ChatBody, _chat_fields(body, turns, info)), service), names


def _check(body: MessagesBody) -> None:
    given = body.extras()
    for name, reason in REFUSED.items():
        if name in given or (name == "stop" and body.stop is not None):
            raise refused(name, reason)
    for name in ("speculation", "diffusion"):
        extension = getattr(body, name)
        if extension is not None and extension.trace:
            raise refused(f"{name}.trace", "traces are for /v1/chat/completions")
    if body.max_tokens < 1:
        raise invalid("max_tokens", "must be at least 1")
    thinking = body.thinking
    if thinking is not None and thinking.budget_tokens is not None:
        if thinking.type != "enabled":
            raise invalid("thinking.budget_tokens", "is of the type enabled")
        if not 0 < thinking.budget_tokens < body.max_tokens:
            raise invalid("thinking.budget_tokens", "must be at least 1 and below max_tokens")


def _chat_fields(body: MessagesBody | CountBody, turns: Turns, info: ModelInfo) -> Fields:
    if isinstance(body, MessagesBody):
        taken = {name: value for name, value in body.extras().items() if name not in IGNORED}
        taken |= {name: getattr(body, name) for name in SamplingBody.model_fields}
        taken |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}
    else:
        taken = {"model": body.model, "chat_template_kwargs": body.chat_template_kwargs}
    last = turns.messages[-1]
    return {
        **taken,
        **_thinking(body, info),
        **_tools(body),
        "messages": turns.messages,
        # A conversation that ends with the assistant's words is gone on with from there.
        "continue_final_message": True if last["role"] == "assistant" and "tool_calls" not in last else None,
    }


def _thinking(body: PromptFields, info: ModelInfo) -> Fields:
    """A budget is an upper bound, which a model that has no thinking span keeps by itself."""
    asked, output = body.thinking, body.output_config
    fields: Fields = {}
    if asked is not None:
        fields["enable_thinking"] = asked.type != "disabled"
        if asked.budget_tokens is not None and info.thinking is not None:
            fields["thinking_token_budget"] = asked.budget_tokens
    if output is not None:
        fields["reasoning_effort"] = output.effort
        if output.format is not None:
            schema = {"name": "output", "schema": output.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _tools(body: PromptFields) -> Fields:
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())]
    fields: Fields = {"tools": tools or None}
    choice = body.tool_choice
    if choice is None:
        return fields
    if choice.disable_parallel_tool_use is not None and tools:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    match choice.type:
        case "any":
            fields["tool_choice"] = "required"
        case "tool":
            if choice.name is None:
                raise invalid("tool_choice.name", "is missing")
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        case kind:
            fields["tool_choice"] = kind if tools else None
    return fields


def _tool(tool: Tool, where: str) -> Fields:
    if tool.type not in (None, "custom"):
        raise refused(f"{where}.type", "tools that run on a server are not supported")
    if tool.input_schema is None:
        raise lacking(f"{where}.input_schema")
    named = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in named.items() if value is not None}}
