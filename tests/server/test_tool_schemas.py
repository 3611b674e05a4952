"""What is refused of tools and choices, and the schemas of parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.server.fake_engine import make_tokenizer
from tests.server.harness import CHAT_URL, Json, error_of, serving
from tests.server.tool_models import BODY, CLOCK, MARKS, WEATHER, Shared, engine_of

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    shared = Shared(make_tokenizer(marks=MARKS))
    yield shared
    shared.end()


REFUSED: list[tuple[Json, str]] = [
    ({"tools": []}, "tools"),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
    ({"tool_choice": "required", "tools": None}, "tool_choice"),
    ({"tool_choice": "auto", "tools": None}, "tool_choice"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [3]}}}, "tool_choice"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"structured_outputs": {"regex": "a"}}, "tools"),
]


async def test_what_is_refused(shared: Shared) -> None:
    engine = engine_of(shared, "hermes")
    async with serving(engine) as client:
        for fields, param in REFUSED:
            error = error_of(await client.post(CHAT_URL, json={**BODY, **fields}), 400)
            assert error["param"] == param, (fields, error)
    assert engine.submitted == []


EXAMPLES: list[Json] = [  # fields whose errors show what they should look like
    {"tool_choice": {"type": "function"}},
    {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [3]}}},
    {"messages": [{"role": "user", "content": [5]}]},
]


async def test_examples_in_errors_can_be_copied(shared: Shared) -> None:
    async with serving(engine_of(shared, "hermes")) as client:
        for fields in EXAMPLES:
            message = error_of(await client.post(CHAT_URL, json={**BODY, **fields}), 400)["message"]
            examples = re.split(" must look like |, or like ", message)[1:]
            shown = [json.loads(example.replace('"auto" or ', "").replace("...}", '"..."}')) for example in examples]
            assert shown and all("type" in example for example in shown), message


SCHEMAS: list[tuple[Json, bool, bool]] = [  # parameters, are they taken, are they taken strictly
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "^a+$"}}}, True, True),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "integer"}}}, True, True),
    ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, True, False),
    ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, True, False),
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, False, False),
    ({"type": "string"}, False, False),
    ({"type": "foo"}, False, False),
    ({"type": "object", "properties": {"a": {"$ref": "http://localhost/x"}}}, False, False),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, False, False),
    ({"type": "object", "x-guidance": {"lenient": True}}, False, False),
]


async def test_schemas_of_parameters(shared: Shared) -> None:
    """What can't be enforced is left to the model, unless the tool is strict; what makes no sense is an error."""
    engine = engine_of(shared)
    async with serving(engine) as client:
        for parameters, taken, strictly in SCHEMAS:
            for strict, good in ((None, taken), (True, strictly)):
                tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}
                response = await client.post(CHAT_URL, json={**BODY, "tools": [CLOCK, tool], "tool_choice": "required"})
                if good:
                    assert response.status_code == 200, (parameters, strict, response.text)
                else:
                    error = error_of(response, 400)
                    assert error["param"] == "tools[1].function.parameters", (parameters, strict, error)
