"""The bodies of /v1/decisions (OpenAI's shape) and of /v1/systemone (its open twin)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.decisions.evidence import Evidence, Items
from server.decisions.questions import MAX_CHOICES, MAX_LEVELS, MAX_QUESTIONS
from server.schemas import Body, Int32

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _plain_value(value: object) -> str | bool:
    if isinstance(value, str | bool):
        return value
    raise PydanticCustomError("value_type", "must be a string or a boolean")


Name = Annotated[str, Field(max_length=1024)]
Input = Annotated[Items, BeforeValidator(_as_items, json_schema_input_type=str | Items)]
Value = Annotated[str | bool, PlainValidator(_plain_value, json_schema_input_type=str | bool)]


class Choice(BaseModel):
    model_config = _STRICT

    value: Value
    description: str | None = None


class Level(BaseModel):
    model_config = _STRICT

    label: str
    description: str | None = None


class DecisionQuestion(BaseModel):
    """`choices` belong to questions of type `choice`, `levels` to those of type `score`."""

    model_config = _STRICT

    type: Literal["predicate", "choice", "score"]
    instructions: Evidence
    name: Name | None = None
    choices: Annotated[list[Choice], Field(fail_fast=True, min_length=2, max_length=MAX_CHOICES)] | None = None
    levels: Annotated[list[Level], Field(fail_fast=True, min_length=2, max_length=MAX_LEVELS)] | None = None


class AskingBody(Body):
    """What both have as extensions."""

    joint: bool | None = Field(
        None,
        description="Of a model that denoises: read the answers to all questions from one canvas, in one denoising"
        " step. Default: each question by itself.",
    )
    chat_template_kwargs: dict[str, object] | None = None
    priority: Int32 | None = Field(None, description="Lower runs first.")


class PromptCacheOptions(BaseModel):
    """Accepted and without effect: what is equal at the beginning of prompts is always shared."""

    model_config = ConfigDict(strict=True, extra="ignore")

    mode: Literal["implicit", "explicit"] | None = None
    ttl: str | None = None


class DecisionBody(AskingBody):
    input: Input
    questions: Annotated[list[DecisionQuestion], Field(fail_fast=True, min_length=1, max_length=MAX_QUESTIONS)]
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Prompts share what is cached only under the same key."
    )
    prompt_cache_options: PromptCacheOptions | None = None
    safety_identifier: str | None = Field(None, description="Ignored.")
    diagnostics: bool | None = Field(
        None, description="Add `diagnostics`: of each question, how much of the model's law its labels have."
    )


def _state_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return msgspec.json.encode(value).decode()
    raise PydanticCustomError("state_type", "must be a string, an object or a list")


def shown(value: object) -> str:
    """What an option means: text, or JSON that is shown as such."""
    return "" if value is None else _state_text(value)


def _criteria(value: object) -> dict[str, object] | list[object] | None:
    if value is None:
        return None
    if not isinstance(value, dict | list):
        raise PydanticCustomError("criteria_type", "must be an object or a list")
    if isinstance(value, list) and None in value:
        raise PydanticCustomError("criteria_type", "a level can't be null")
    for part in value.values() if isinstance(value, dict) else value:
        shown(part)
    return value


State = Annotated[str, PlainValidator(_state_text, json_schema_input_type=str | dict[str, object] | list[object])]
Words = Annotated[str, PlainValidator(shown, json_schema_input_type=str | dict[str, object] | list[object] | None)]
Criteria = Annotated[
    dict[str, object] | list[object] | None,
    PlainValidator(_criteria, json_schema_input_type=dict[str, object] | list[object] | None),
]


class SystemQuestion(BaseModel):
    """`criteria`: options and what they mean (choice), levels (score), or what `true` and `false` mean (noul)."""

    model_config = _STRICT

    type: Literal["choice", "noul", "score"]
    instructions: Words = ""
    criteria: Criteria = None


class SystemOneBody(AskingBody):
    state: State
    questions: Annotated[dict[Name, SystemQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)]
    instructions: str | None = Field(None, description="Said before the state, as the system message.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
