"""From the fields that constrain an answer to one grammar: OpenAI's, vLLM's new and old ones, SGLang's, llama.cpp's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.grammar import WHITESPACE, Grammar
from engine.types import SamplingParams
from server.body import parse_json
from server.contract import Engine
from server.errors import ApiError, invalid, lacking, refused
from server.gbnf import GrammarError, is_gbnf, lark_of
from server.schemas_structured import ResponseFormat, StructuredFields, StructuredOutputs

OPTIONS = "x-guidance"  # where a schema tells the grammar engine how to treat white space
MAX_DEPTH = 64
MAX_TEXT = 128 * 1024
# Formats of the JSON Schema standard. Those that can't be enforced are refused by the grammar engine, by name; others,
# such as OpenAPI's "int32" or "password", are remarks by the standard's own words.
_STANDARD = frozenset(
    ("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
     "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex")
)  # fmt: skip
# Where schemas stand in a schema: alone, in lists, or under names that are not keywords.
_ALONE = ("items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames",
          "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar, and the client's name of the field that it comes from."""

    grammar: Grammar
    param: str


async def constrained(sampling: SamplingParams, fields: StructuredFields, engine: Engine) -> SamplingParams:
    """With the grammar that the fields ask for. Raises ApiError and InvalidRequest for what no answer can follow."""
    if not any(getattr(fields, name) is not None for name in StructuredFields.model_fields):
        return sampling
    found = await asyncio.to_thread(constraint_of, fields)
    if found is None:
        return sampling
    if engine.info.diffusion is not None:
        raise refused(found.param, "this model denoises its answers, and can't be held to a grammar")
    await engine.check_grammar(found.grammar, found.param)
    return replace(sampling, grammar=found.grammar)


def constraint_of(fields: StructuredFields) -> Constraint | None:
    """What constrains the answer; None if nothing does. Raises ApiError for bad ones, and for two."""
    found = list(_constraints(fields))
    if len(found) > 1:
        raise invalid(
            found[1].param, f"an answer can follow one constraint only, and there is {found[0].param} already"
        )
    if fields.guided_whitespace_pattern is not None and (not found or found[0].param != "guided_json"):
        raise invalid("guided_whitespace_pattern", "needs guided_json")
    return found[0] if found else None


def schema_text(schema: object, param: str, spacing: str = WHITESPACE) -> str:
    """The JSON of a schema for a `Grammar` of kind "json" or an inline `%json` in Lark.

    `schema` is a dict, a boolean, or a string of JSON. Remarks that would be taken for constraints are left out.
    `spacing`: a regular expression of what may stand between the tokens of JSON; empty: nothing.
    Raises ApiError that names `param`.
    """
    if isinstance(schema, str):
        schema = _parsed(schema, param)
    if schema is True:
        schema = {}
    if schema is False:
        raise invalid(param, "no answer satisfies the schema false")
    if not isinstance(schema, dict):
        raise invalid(param, "must be a JSON schema: an object or a boolean")
    if OPTIONS in schema:
        raise invalid(param, f"'{OPTIONS}' is not taken from clients")
    options = {"whitespace_pattern": spacing}
    return json.dumps({**_cleaned(schema), OPTIONS: options}, ensure_ascii=False, separators=(",", ":"))


def _constraints(fields: StructuredFields) -> Iterator[Constraint]:
    if fields.response_format is not None:
        yield from _of_format(fields.response_format)
    if fields.structured_outputs is not None:
        yield _of_outputs(fields.structured_outputs)
    for name, schema in (("guided_json", fields.guided_json), ("json_schema", fields.json_constraint)):
        if schema is not None:
            yield _json(schema, name, fields.guided_whitespace_pattern or WHITESPACE)
    if fields.guided_choice is not None:
        yield _choice(fields.guided_choice, "guided_choice")
    for name, pattern in (("guided_regex", fields.guided_regex), ("regex", fields.regex)):
        if pattern is not None:
            yield Constraint(Grammar("regex", pattern), name)
    for name, text in (("guided_grammar", fields.guided_grammar), ("ebnf", fields.ebnf), ("grammar", fields.grammar)):
        if text is not None:
            yield _grammar(text, name)


def _of_format(asked: ResponseFormat) -> Iterator[Constraint]:
    param = "response_format"
    for name, value in (asked.model_extra or {}).items():
        if value is not None:
            raise _unknown(f"{param}.{name}", "type, json_schema and schema")
    if asked.type == "text":
        if asked.json_schema is not None or asked.content is not None:
            raise invalid(f"{param}.type", "is 'text', and there is a schema beside it")
    elif asked.type == "json_object":
        if asked.json_schema is not None:
            raise invalid(f"{param}.type", "is 'json_object', and there is a json_schema beside it")
        if asked.content is None:
            yield _json({"type": "object"}, f"{param}.type")
        else:
            yield _json(asked.content, f"{param}.schema")
    elif asked.type == "json_schema":
        if asked.json_schema is None:
            path = f"{param}.json_schema"
            raise lacking(path)
        schema = asked.json_schema.content
        yield _json({"type": "object"} if schema is None else schema, f"{param}.json_schema.schema")
    else:
        message = "must be 'text', 'json_object' or 'json_schema'"
        if asked.type == "structural_tag":
            message = "'structural_tag' is not supported; use tools, or structured_outputs.grammar"
        raise invalid(f"{param}.type", message)


def _of_outputs(asked: StructuredOutputs) -> Constraint:
    param = "structured_outputs"
    for name, value in (asked.model_extra or {}).items():
        if name in ("disable_fallback", "_backend", "_backend_was_auto") or value in (None, False):
            continue  # there is one backend, and nothing to fall back to
        raise _unknown(f"{param}.{name}", "json, regex, choice, grammar and json_object")
    spacing = "" if asked.disable_any_whitespace else asked.whitespace_pattern or WHITESPACE
    found: list[Constraint] = []
    if asked.content is not None:
        found.append(_json(asked.content, f"{param}.json", spacing))
    if asked.json_object:
        found.append(_json({"type": "object"}, f"{param}.json_object", spacing))
    if asked.regex is not None:
        found.append(Constraint(Grammar("regex", asked.regex), f"{param}.regex"))
    if asked.choice is not None:
        found.append(_choice(asked.choice, f"{param}.choice"))
    if asked.grammar is not None:
        found.append(_grammar(asked.grammar, f"{param}.grammar"))
    if len(found) != 1:
        raise invalid(param, "must have exactly one of json, regex, choice, grammar and json_object")
    if asked.whitespace_pattern is not None and found[0].grammar.kind != "json":
        raise invalid(f"{param}.whitespace_pattern", "is for JSON only")
    return found[0]


def _unknown(path: str, known: str) -> ApiError:
    return ApiError(
        400, f"Unsupported parameter: '{path}'; there are {known}.", param=path, code="unsupported_parameter"
    )


def _json(schema: object, param: str, spacing: str = WHITESPACE) -> Constraint:
    return Constraint(Grammar("json", schema_text(schema, param, spacing)), param)


def _choice(choices: Sequence[str], param: str) -> Constraint:
    """One of some texts, as they are."""
    options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return Constraint(Grammar("lark", f"start: {options}\n"), param)


def _grammar(text: str, param: str) -> Constraint:
    if len(text) > MAX_TEXT:
        raise invalid(param, f"may have at most {MAX_TEXT} characters")
    if not is_gbnf(text):
        return Constraint(Grammar("lark", text), param)
    try:
        return Constraint(Grammar("lark", lark_of(text)), param)
    except GrammarError as error:
        raise invalid(param, str(error)) from None


def _parsed(text: str, param: str) -> object:
    try:
        return parse_json(text.encode())
    except ApiError as error:
        reason = (
            str(error.detail).removeprefix("The request body is not valid JSON: ").removeprefix("The JSON body is ")
        )
        raise invalid(param, f"is a string, and not the JSON of a schema: {reason.rstrip('.')}") from None


def _cleaned(schema: Mapping[str, object], depth: int = 0) -> dict[str, object]:
    """Without what asks for nothing: `uniqueItems: false`, and formats that the standard does not know."""
    found: dict[str, object] = {}
    for key, value in schema.items():
        if key == "uniqueItems" and value is False:
            continue
        if key == "format" and isinstance(value, str) and value not in _STANDARD:
            continue
        found[key] = _inner(key, value, depth) if depth < MAX_DEPTH else value
    return found


def _inner(key: str, value: object, depth: int) -> object:
    if isinstance(value, dict) and key in _ALONE:
        return _cleaned(value, depth + 1)
    if isinstance(value, list) and key in _LISTED:
        return [_cleaned(item, depth + 1) if isinstance(item, dict) else item for item in value]
    if isinstance(value, dict) and key in _NAMED:
        return {name: _cleaned(item, depth + 1) if isinstance(item, dict) else item for name, item in value.items()}
    return value
