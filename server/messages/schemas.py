"""What a client may send to /v1/messages, in Anthropic's shape."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.messages.blocks import Blocks
from server.schemas import Body, Int32, SamplingBody, StopInput

MAX_MESSAGES = 4096


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Turn(Part):
    role: Literal["user", "assistant", "system"]
    content: Blocks


class Tool(Part):
    name: str
    description: str | None = None
    input_schema: dict[str, object] | None = None
    strict: bool | None = None
    type: str | None = Field(None, description="custom, the only type that there is here.")


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="Of the type tool.")
    disable_parallel_tool_use: bool | None = None


class Thinking(Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int32 | None = Field(None, description="Of enabled: most tokens to think, below max_tokens.")


class OutputFormat(Part):
    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(Part):
    effort: str | None = None
    format: OutputFormat | None = None


class Metadata(Part):
    user_id: str | None = None


class PromptFields(BaseModel):
    """What the prompt is made of; it is all that is counted."""

    system: Blocks | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesBody(PromptFields, SamplingBody):
    max_tokens: Int32
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_sequences: StopInput = None
    metadata: Metadata | None = None


class CountBody(PromptFields, Body):
    """What makes no difference to the prompt is taken and left out."""

    chat_template_kwargs: dict[str, object] | None = None
