"""What a chat request says of tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_TOOLS = 128


def _check_type(value: object) -> object:
    if isinstance(value, str) and value != "function":
        raise PydanticCustomError(
            "unsupported_parameter", f"tools of the type '{value[:64]}' are not supported; this server has 'function'"
        )
    return value


class FunctionTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}\z")]
    description: str | None = None
    parameters: dict[str, object] | None = Field(None, description="A JSON schema of an object. Default: no arguments.")
    strict: bool | None = Field(
        None, description="true: a schema that can't be enforced in full is an error. Calls follow it as far as it can."
    )


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Annotated[Literal["function"], BeforeValidator(_check_type)]
    function: FunctionTool


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What must be called, and which of the tools may be at all (None: all)."""

    mode: Literal["none", "auto", "required", "named"]
    names: tuple[str, ...] | None = None


def _read_choice(value: object) -> ToolChoice | None:
    match value:
        case None | ToolChoice():
            return value
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice("named", (name,))
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            return ToolChoice(mode, tuple(_allowed(tools)))
        case str():
            raise PydanticCustomError("value_error", "must be 'none', 'auto', 'required', or an object")
        case {"type": str(kind)} if kind not in ("function", "allowed_tools"):
            raise PydanticCustomError(
                "unsupported_parameter", f"choices of the type '{kind[:64]}' are not supported; this server has"
                " 'function' and 'allowed_tools'",
            )  # fmt: skip
    raise PydanticCustomError(
        "tool_choice_type",
        'must look like {"type": "function", "function": {"name": "..."}}, or like {"type": "allowed_tools",'
        ' "allowed_tools": {"mode": "auto" or "required", "tools": [{"type": "function", "function": {"name":'
        ' "..."}}]}}',
    )


def _allowed(tools: Iterable[object]) -> Iterable[str]:
    for tool in tools:
        match tool:
            case {"type": "function", "function": {"name": str(name)}}:
                yield name
            case _:
                raise PydanticCustomError(
                    "tool_choice_type",
                    'allowed tools must look like {"type": "function", "function": {"name": ...}}',
                )


Tools = Annotated[list[Tool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]
ToolChoiceInput = Annotated[
    ToolChoice | None, PlainValidator(_read_choice, json_schema_input_type=str | dict[str, object] | None)
]


class ToolFields(BaseModel):
    """The tools that a prompt tells of."""

    tools: Tools | None = Field(None, description="Functions that the model may call.")


class ToolChoiceFields(ToolFields):
    tool_choice: ToolChoiceInput = Field(
        None,
        description="none; auto: the model decides (the default with tools); required: it calls at least one; or a"
        " function by its name: that one is called, once.",
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call. Default: true.")


def described(tool: Tool) -> Mapping[str, object]:
    """A tool as templates and prompts show it."""
    function = tool.function
    fields: dict[str, object] = {"name": function.name}
    if function.description is not None:
        fields["description"] = function.description
    fields["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": fields}


def size_of(tool: Tool) -> int:
    """Characters that it takes in a prompt, about."""
    return len(msgspec.json.encode(described(tool)))
