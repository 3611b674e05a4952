"""What a client may send to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from server.responses.items import MAX_ITEMS, CallItem, MessageItem, OutputItem, ReasoningItem
from server.schemas import Count, Int32, SamplingBody

MAX_METADATA = 16

Listed = list[dict[str, object]]


def _check_input(value: object) -> object:
    if isinstance(value, str) and value:
        return value
    if value in ("", []):
        raise PydanticCustomError("value_error", "the input is empty")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise PydanticCustomError("input_type", "must be a string or a list of items")
    if len(value) > MAX_ITEMS:
        raise PydanticCustomError("value_error", f"at most {MAX_ITEMS} items are allowed")
    return value


Item = MessageItem | CallItem | OutputItem | ReasoningItem
Input = Annotated[str | Listed, PlainValidator(_check_input, json_schema_input_type=str | list[Item])]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=MAX_METADATA)
]


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class FunctionTool(Part):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class NamedTool(Part):
    type: Literal["function"]
    name: str


class AllowedTools(Part):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


def _check_choice(value: object) -> object:
    """Which of the forms it is, so that an error names the field alone."""
    if value is None or value in ("none", "auto", "required"):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    forms: dict[str, type[Part]] = {"function": NamedTool, "allowed_tools": AllowedTools}
    form = forms.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise PydanticCustomError(
            "value_error", "must be none, auto, required, or an object of the type function or allowed_tools"
        )
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PydanticCustomError("value_error", "{where}: {what}", {"where": where, "what": first["msg"]}) from None


Choice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedTools | None,
    PlainValidator(
        _check_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | AllowedTools | None
    ),
]


class TextFormat(Part):
    """`schema`, `name`, `strict` and `description` belong to json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, object] | None = Field(None, alias="schema")
    strict: bool | None = None


class Text(Part):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Part):
    effort: str | None = Field(None, description="As `reasoning_effort` of a chat.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Taken, but nothing is summed up: the reasoning itself stands in its item."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(Part):
    include_obfuscation: bool | None = None


class ResponsesBody(SamplingBody):
    input: Input
    instructions: str | None = Field(None, description="A system message in front, of this response alone.")
    previous_response_id: str | None = Field(None, description="Go on behind this response, which must be kept.")
    max_output_tokens: Int32 | None = None
    max_tool_calls: Count | None = Field(None, description="Taken and told: it is for tools that run on a server.")
    top_logprobs: Count | None = None
    include: Annotated[list[str], Field(max_length=16)] | None = Field(
        None, description="`message.output_text.logprobs` is what there is to include here."
    )
    text: Text | None = None
    tools: Listed | None = Field(None, description="Of the type function.", json_schema_extra={"default": None})
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: the oldest turns are left out where the input does not fit the context."
    )
    metadata: Metadata | None = None
    store: bool | None = Field(None, description="false: the response is not kept. Default: true.")
    background: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    stream_options: StreamOptions | None = None
