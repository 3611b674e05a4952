"""The fields that say what an answer must look like. What they come to is settled by `structured.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 4096


def _check_schema(value: object) -> object:
    if isinstance(value, dict | bool):
        return value
    raise PydanticCustomError("schema_type", "must be a JSON schema: an object or a boolean")


def _check_schema_or_text(value: object) -> object:
    if isinstance(value, dict | bool | str):
        return value
    raise PydanticCustomError("schema_type", "must be a JSON schema: an object, a boolean, or a string of its JSON")


def _check_choices(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise PydanticCustomError("choice_type", "must be a list of strings")
    if not 1 <= len(value) <= MAX_CHOICES or any(len(choice) > MAX_CHOICE_CHARS for choice in value):
        raise PydanticCustomError(
            "value_error", f"must hold 1 to {MAX_CHOICES} strings of at most {MAX_CHOICE_CHARS} characters"
        )
    return tuple(dict.fromkeys(value))


_SCHEMA = {"anyOf": [{"type": "object", "additionalProperties": True}, {"type": "boolean"}]}
_SCHEMA_OR_TEXT = {"anyOf": [*_SCHEMA["anyOf"], {"type": "string"}]}
_CHOICES = {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": {"type": "string"}}

Schema = Annotated[object, PlainValidator(_check_schema), WithJsonSchema(_SCHEMA)]
SchemaOrText = Annotated[object, PlainValidator(_check_schema_or_text), WithJsonSchema(_SCHEMA_OR_TEXT)]
Choices = Annotated[tuple[str, ...], PlainValidator(_check_choices), WithJsonSchema(_CHOICES)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchema(BaseModel):
    """OpenAI's envelope of a schema."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: Name
    description: str | None = None
    # "schema" is a method's name in pydantic.
    content: Schema | None = Field(None, alias="schema", description="Default: any JSON object.")
    strict: bool | None = Field(None, description="The answer follows the schema whatever this says.")


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`; `schema` beside a type of json_object is llama.cpp's and others'."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str = Field(json_schema_extra={"enum": ["text", "json_object", "json_schema"]})
    json_schema: JsonSchema | None = None
    content: SchemaOrText | None = Field(None, alias="schema")


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: exactly one constraint, and how white space in JSON is treated."""

    # What else is sent is refused by `structured.py`; null stays "not given".
    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    content: SchemaOrText | None = Field(None, alias="json")
    regex: Text | None = Field(None, description="Of the whole answer, in the syntax of Rust's regex crate.")
    choice: Choices | None = None
    grammar: Text | None = Field(None, description="GBNF (with a rule `root`) or llguidance's Lark (`start`).")
    json_object: bool | None = None
    whitespace_pattern: Text | None = Field(None, description="A regular expression of what may stand between tokens.")
    disable_any_whitespace: bool | None = None


class StructuredFields(BaseModel):
    """At most one of these may constrain an answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = Field(None, description="As structured_outputs.json.")
    guided_regex: Text | None = Field(None, description="As structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="As structured_outputs.choice.")
    guided_grammar: Text | None = Field(None, description="As structured_outputs.grammar.")
    guided_whitespace_pattern: Text | None = Field(None, description="As structured_outputs.whitespace_pattern.")
    json_constraint: SchemaOrText | None = Field(
        None, alias="json_schema", description="As structured_outputs.json: SGLang's and llama.cpp's name."
    )
    regex: Text | None = Field(None, description="As structured_outputs.regex: SGLang's name.")
    ebnf: Text | None = Field(None, description="As structured_outputs.grammar: SGLang's name.")
    grammar: Text | None = Field(None, description="As structured_outputs.grammar: llama.cpp's name.")
