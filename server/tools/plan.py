"""What a chat request with tools comes to: which may be called, what holds the answer to it, and who reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.types import ModelInfo
from server.contract import Engine
from server.errors import ApiError, invalid
from server.fragments import Manner, Parser, Plain
from server.schemas import default
from server.schemas_tools import Tool, ToolChoice, ToolChoiceFields, ToolFields
from server.structured import OPTIONS, schema_text
from server.tools.calls import Offer
from server.tools.form import Form
from server.tools.forms import FORMS
from server.tools.grammar import Function, Shape, json_rule

# Calls are written as models are taught to write them, on one line.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
_ANYTHING = {"type": "object"}
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "dependentSchemas", "minProperties")
_PROBE = Grammar("regex", "a*")  # is refused where no grammar can be used


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tools that the prompt tells of, by their places in the request, and those of them that may be called."""

    tools: tuple[Tool, ...] = ()
    places: tuple[int, ...] = ()
    mode: str = "none"
    many: bool = True

    @property
    def callable(self) -> tuple[tuple[int, Tool], ...]:
        return tuple((place, self.tools[place]) for place in self.places)


@dataclass(frozen=True, slots=True)
class ToolManner:
    """See `fragments.Manner`."""

    form: Form
    offer: Offer

    def parser(self) -> Parser:
        return self.form.parser(self.offer)


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """`called`: the finish_reason of an answer with calls. `shown`: special tokens that its parser must see."""

    manner: Manner = field(default_factory=Plain)
    grammar: Grammar | None = None
    shown: tuple[int, ...] = ()
    called: str = "tool_calls"


def told_tools(fields: ToolFields, info: ModelInfo) -> tuple[Tool, ...]:
    """The tools of a request, checked. Raises ApiError."""
    tools = tuple(fields.tools or ())
    if tools and not info.tool_parser:
        raise ApiError(
            400, "Unsupported parameter: 'tools': this model is served without tools.", param="tools",
            code="unsupported_parameter",
        )  # fmt: skip
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.function.name in names:
            raise invalid(f"tools[{i}].function.name", "another tool has this name")
        names.add(tool.function.name)
    return tools


def wanted_tools(fields: ToolChoiceFields, info: ModelInfo) -> Wanted:
    """What is to be called. Raises ApiError for choices that contradict the tools."""
    tools = told_tools(fields, info)
    choice = fields.tool_choice or ToolChoice("auto" if tools else "none")
    if choice.mode == "none":
        return Wanted()
    if not tools:
        raise invalid("tool_choice", "needs 'tools'")
    places = {tool.function.name: i for i, tool in enumerate(tools)}
    for name in choice.names or ():
        if name not in places:
            raise invalid("tool_choice", f"there is no tool of the name '{name[:64]}'")
    if choice.names == ():
        raise invalid("tool_choice", "allows no tool")
    chosen = tuple(places.values()) if choice.names is None else tuple(dict.fromkeys(places[n] for n in choice.names))
    # Models that were not taught to call tools do not know when to stop either.
    many = choice.mode != "named" and default(fields.parallel_tool_calls, info.tool_template)
    return Wanted(tools, chosen, choice.mode, many)


async def tool_plan(wanted: Wanted, answer: Grammar | None, engine: Engine) -> ToolPlan:
    """`answer`: what an answer without calls must look like. Raises ApiError and InvalidRequest."""
    if wanted.mode == "none":
        return ToolPlan(grammar=answer)
    form = FORMS[engine.info.tool_parser]
    special = _special(form, engine)
    names = frozenset(tool.function.name for _, tool in wanted.callable)
    offer = Offer(names, None if wanted.many else 1, form.marks[0] in special)
    return ToolPlan(
        manner=ToolManner(form, offer),
        grammar=await _grammar(wanted, _answer_rule(wanted, answer), form, special, engine),
        shown=tuple(special.values()),
        called="stop" if wanted.mode == "named" else "tool_calls",
    )


def _special(form: Form, engine: Engine) -> Mapping[str, int]:
    """The marks that are special tokens; of those behind the first one, only what the template knows too."""
    tokenizer, found = engine.tokenizer, {}
    for mark in form.marks:
        token = tokenizer.added_id(mark)
        foreign = engine.info.tool_template and mark != form.marks[0] and not tokenizer.template_mentions(mark)
        if token is not None and tokenizer.is_special(token) and not foreign:
            found[mark] = token
    return found


def _answer_rule(wanted: Wanted, answer: Grammar | None) -> str | None:
    """See `Shape.answer`."""
    if wanted.mode != "auto":
        return None
    if answer is None:
        return ""
    if answer.kind != "json":
        raise invalid("tools", "can't be combined with this constraint; a JSON schema in response_format can")
    return f"%json {answer.text}"


async def _grammar(
    wanted: Wanted, answer: str | None, form: Form, special: Mapping[str, int], engine: Engine
) -> Grammar | None:
    """None where the model decides, and no grammar can hold it: its calls are read as they come."""
    auto = answer == ""
    if engine.info.diffusion is not None:
        if auto:
            return None
        raise invalid("tool_choice", "this model denoises its answers: it can't be made to call a tool, use 'auto'")
    try:
        await engine.check_grammar(_PROBE, "tool_choice")
    except InvalidRequest:
        if auto:
            return None
        raise
    # Schemas may be large: the loop serves others meanwhile.
    schemas = await asyncio.to_thread(lambda: [_schema(place, tool) for place, tool in wanted.callable])
    pairs = zip(wanted.callable, schemas, strict=True)
    functions = [await _function(place, tool, schema, engine) for (place, tool), schema in pairs]
    try:
        return await _checked(functions, wanted, answer, form, special, engine)
    except InvalidRequest:
        if not auto or any(tool.function.strict for _, tool in wanted.callable):
            raise
    free = [Function(function.name, {**_ANYTHING, OPTIONS: _SPACING}) for function in functions]
    return await _checked(free, wanted, answer, form, special, engine)


async def _checked(
    functions: Sequence[Function],
    wanted: Wanted,
    answer: str | None,
    form: Form,
    special: Mapping[str, int],
    engine: Engine,
) -> Grammar:
    shape = Shape(tuple(functions), wanted.many, answer, special)
    grammar = Grammar("lark", await asyncio.to_thread(form.grammar, shape))
    await engine.check_grammar(grammar, "tools")
    return grammar


def _schema(place: int, tool: Tool) -> Mapping[str, object]:
    """What the arguments of a tool are held to. Raises ApiError."""
    parameters, param = tool.function.parameters, _param(place)
    if not parameters:
        return {**_NOTHING, OPTIONS: _SPACING}
    if parameters.get("type", "object") != "object":
        raise invalid(param, "must be the schema of an object")
    return {"type": "object", **json.loads(schema_text(_closed(parameters), param)), OPTIONS: _SPACING}


def _param(place: int) -> str:
    return f"tools[{place}].function.parameters"


async def _function(place: int, tool: Tool, schema: Mapping[str, object], engine: Engine) -> Function:
    """Where only a part of the schema can be enforced, that part is; a strict tool is refused then.

    Raises InvalidRequest that names the parameters.
    """
    try:
        await engine.check_grammar(Grammar("json", json.dumps(schema)), _param(place))
    except InvalidRequest:
        lenient = {**schema, OPTIONS: {**_SPACING, "lenient": True}}
        if tool.function.strict or not await _holds(json_rule(lenient), engine):
            raise
        schema = lenient
    return Function(tool.function.name, schema)


async def _holds(rule: str, engine: Engine) -> bool:
    try:
        await engine.check_grammar(Grammar("lark", f"start: {rule}\n"))
    except InvalidRequest:
        return False
    return True


def _closed(schema: Mapping[str, object]) -> Mapping[str, object]:
    """A schema that lists its properties and says nothing of others has no others: models make up enough as it is."""
    if "properties" not in schema or "additionalProperties" in schema or any(name in schema for name in _COMBINING):
        return schema
    return {**schema, "additionalProperties": False}
