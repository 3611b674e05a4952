"""Chat messages, and the two bodies that hold them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.reasoning.schemas import TemplateThinking, ThinkingFields
from server.schemas import Body, GenerationBody, Int32
from server.schemas_sampling import Alternatives
from server.schemas_tools import ToolChoiceFields, ToolFields

MAX_MESSAGES = 4096


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    type: Literal["refusal"]
    refusal: str


def _text_of(part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal") else None
    if isinstance(text, str):
        return text
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise PydanticCustomError(
            "unsupported_parameter", f"content parts of type '{kind[:64]}' are not supported; this server takes text"
        )
    raise PydanticCustomError("content_type", 'content parts must look like {"type": "text", "text": "..."}')


def _join_parts(value: object) -> str | None:
    """A content of parts becomes one string, a line break between two parts."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be a string or a list of content parts")
    return "\n".join(map(_text_of, value))


Content = Annotated[
    str | None,
    PlainValidator(_join_parts, json_schema_input_type=str | list[str | TextPart | RefusalPart] | None),
]


class FunctionCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in the history of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class TemplateFields(TemplateThinking, ToolFields):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatBody(TemplateFields, ToolChoiceFields, ThinkingFields, GenerationBody):
    messages: Messages
    max_completion_tokens: Int32 | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    echo: bool | None = Field(None, description="Put the message that is continued in front of the answer.")


class TokenizeBody(TemplateFields, Body):
    """Text under `prompt`, or a conversation under `messages`."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
