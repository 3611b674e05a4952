"""Hostile requests to what stands around plain generation: constraints, tools, reasoning, the other endpoints.

Each is a small 4xx that names the field, and after each the same engine process answers as before, with nothing left
in it (`unharmed`). What is bad about sampling fields, prompts, messages, JSON and HTTP is in the files beside this.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.wire import Json, error_of, http, post

pytestmark = pytest.mark.usefixtures("unharmed")

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS, DECISIONS, MESSAGES = "/v1/embeddings", "/v1/decisions", "/v1/messages"
BASES: dict[str, Json] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 4},
    RESPONSES: {"input": "hi", "max_output_tokens": 4},
    EMBEDDINGS: {"input": "hi"},
    MESSAGES: {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
}


def schema_format(schema: object, **fields: Any) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}}


def tool(name: Any = "f", **function: Any) -> Json:
    return {"type": "function", "function": {"name": name, **function}}


def deep(levels: int) -> Json:
    schema: Json = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


FORMATS: dict[str, Json] = {
    "no schema": {"response_format": {"type": "json_schema"}},
    "no type": {"response_format": {}},
    "an unknown type": {"response_format": {"type": "yaml"}},
    "a list": {"response_format": [{"type": "text"}]},
    "a type that is none": schema_format({"type": "wizard"}),
    "a schema that is a number": schema_format(5),
    "a schema that is false": schema_format(False),
    "no name": {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    "an external reference": schema_format({"$ref": "http://127.0.0.1:1/schema.json"}),
    "a file": schema_format({"$ref": "file:///etc/passwd"}),
    "a reference to nothing": schema_format({"$ref": "#/$defs/none"}),
    "an unsupported keyword": schema_format({"not": {"type": "string"}}),
    "a broken pattern": schema_format({"type": "string", "pattern": "(["}),
    "a look-around": schema_format({"type": "string", "pattern": "(?=a)b"}),
    "bounds that exclude each other": schema_format({"type": "integer", "minimum": 5, "maximum": 4}),
    "lengths that exclude each other": schema_format({"type": "string", "minLength": 5, "maxLength": 4}),
    "an empty enum": schema_format({"enum": []}),
    "a chain of 3,000 references": schema_format(
        {"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3000)} | {"a3000": {}}}
    ),
    "10,000 required properties": schema_format(
        {
            "type": "object",
            "properties": {f"p{i}": {"type": "string"} for i in range(10_000)},
            "required": [f"p{i}" for i in range(10_000)],
        }
    ),
    "a schema of a megabyte": schema_format({"enum": ["x" * 1_000_000]}),
    "options of the library": schema_format({"type": "object", "x-guidance": {"lenient": True}}),
    "two constraints": {"structured_outputs": {"regex": "a", "choice": ["a"]}},
    "two fields": {**schema_format({}), "structured_outputs": {"regex": "a"}},
    "no constraint": {"structured_outputs": {}},
    "an empty choice": {"structured_outputs": {"choice": []}},
    "a choice of numbers": {"structured_outputs": {"choice": [1, 2]}},
    "a broken regex": {"structured_outputs": {"regex": "(a"}},
    "a regex of a megabyte": {"structured_outputs": {"regex": "a|" * 500_000 + "a"}},
    "repeats of repeats": {"structured_outputs": {"regex": "((a{1000}){1000}){1000}b" * 20}},
    "a broken grammar": {"structured_outputs": {"grammar": "start: ("}},
    "a grammar without a start": {"structured_outputs": {"grammar": 'rule: "a"'}},
    "a grammar of 5,000 rules in a chain": {
        "structured_outputs": {
            "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"'
        }
    },
    "constrained and endless": {**schema_format({"type": "object"}), "ignore_eos": True},
    "constrained twice": {**schema_format({"type": "object"}), "allowed_token_ids": [5]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_cannot_be_met(tiny: ServerProcess, name: str) -> None:
    fields = FORMATS[name]
    for path in (CHAT, COMPLETIONS):
        error = error_of(post(tiny.url, path, {**BASES[path], **fields}))
        assert error["param"] and str(error["param"]).partition(".")[0] in fields, error


HARD_BUT_FINE: dict[str, Json] = {
    "nested repeats": {"structured_outputs": {"regex": "((a*)*)*b"}},
    "alternatives that overlap": {"structured_outputs": {"regex": "(a|aa|aaa)+b"}},
    "a million letters": {"structured_outputs": {"regex": "a{1000000}"}},
    "60 levels": schema_format(deep(56)),
    "a schema of itself": schema_format({"type": "array", "items": {"$ref": "#"}, "maxItems": 3}),
    "a string of a billion": schema_format({"type": "string", "minLength": 10**9}),
    "an array of a billion": schema_format({"type": "array", "items": {}, "minItems": 10**6}),
    "strict": schema_format({"type": "object", "properties": {}, "additionalProperties": False}, strict=True),
}


@pytest.mark.parametrize("name", HARD_BUT_FINE)
def test_formats_that_are_hard(tiny: ServerProcess, name: str) -> None:
    """Answered, or refused with a field: in either case soon."""
    response = post(tiny.url, CHAT, {**BASES[CHAT], **HARD_BUT_FINE[name], "max_tokens": 40})
    if response.status_code != 200:
        error_of(response)


TOOLS: dict[str, Json] = {
    "none": {"tools": []},
    "no list": {"tools": {"type": "function"}},
    "an unknown type": {"tools": [{"type": "browser"}]},
    "no function": {"tools": [{"type": "function"}]},
    "no name": {"tools": [{"type": "function", "function": {}}]},
    "a name of symbols": {"tools": [tool("f(); drop")]},
    "an empty name": {"tools": [tool("")]},
    "a name of 65": {"tools": [tool("f" * 65)]},
    "two of one name": {"tools": [tool(), tool()]},
    "200 tools": {"tools": [tool(f"f{i}") for i in range(200)]},
    "parameters that are a list": {"tools": [tool(parameters=[])]},
    "parameters of an unknown type": {"tools": [tool(parameters={"type": "wizard"})], "tool_choice": "required"},
    "parameters from elsewhere": {
        "tools": [tool(parameters={"$ref": "http://127.0.0.1:1/x"})],
        "tool_choice": "required",
    },
    "a choice without tools": {"tool_choice": "required"},
    "a choice of nobody": {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "a choice that is a number": {"tools": [tool()], "tool_choice": 5},
    "an unknown choice": {"tools": [tool()], "tool_choice": "sometimes"},
    "functions of old": {"functions": [{"name": "f"}]},
    "a number of calls": {"tools": [tool()], "parallel_tool_calls": 1},
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_that_cannot_be_used(tiny: ServerProcess, name: str) -> None:
    error = error_of(post(tiny.url, CHAT, {**BASES[CHAT], **TOOLS[name]}))
    assert str(error["param"]).partition("[")[0].partition(".")[0] in TOOLS[name], error


OTHERS: list[tuple[str, str, Json]] = [
    (CHAT, "reasoning_effort", {"reasoning_effort": "galactic"}),
    (CHAT, "thinking_token_budget", {"thinking_token_budget": -1}),
    (CHAT, "stop_regex", {"stop_regex": "(["}),
    (CHAT, "stop_regex", {"stop_regex": "x" * 100_000}),
    (RESPONSES, "input", {"input": None}),
    (RESPONSES, "input", {"input": []}),
    (RESPONSES, "input", {"input": [{"type": "wizard"}]}),
    (RESPONSES, "input", {"input": [{"type": "function_call_output", "call_id": "nobody", "output": "x"}]}),
    (RESPONSES, "tools", {"tools": [{"type": "web_search"}]}),
    (RESPONSES, "max_output_tokens", {"max_output_tokens": 0}),
    (RESPONSES, "text", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wizard"}}}}),
    (RESPONSES, "background", {"background": True}),
    (EMBEDDINGS, "input", {"input": ""}),
    (EMBEDDINGS, "input", {"input": []}),
    (EMBEDDINGS, "input", {"input": ["a", ""]}),
    (EMBEDDINGS, "input", {"input": [[1, -1]]}),
    (EMBEDDINGS, "input", {"input": [[2**40]]}),
    (EMBEDDINGS, "input", {"input": "x" * 5000}),
    (EMBEDDINGS, "input", {"input": ["a"] * 3000}),
    (EMBEDDINGS, "encoding_format", {"encoding_format": "hex"}),
    (EMBEDDINGS, "dimensions", {"dimensions": 0}),
    (EMBEDDINGS, "dimensions", {"dimensions": 2**40}),
]


@pytest.mark.parametrize(("path", "param", "fields"), OTHERS, ids=lambda value: str(value)[:40])
def test_other_endpoints(tiny: ServerProcess, path: str, param: str, fields: Json) -> None:
    error = error_of(post(tiny.url, path, {**BASES[path], **fields}))
    assert str(error["param"]).startswith(param), error


def test_what_is_not_there(tiny: ServerProcess) -> None:
    for method, path in (
        ("GET", f"{RESPONSES}/resp_none"),
        ("DELETE", f"{RESPONSES}/resp_none"),
        ("POST", f"{RESPONSES}/resp_none/cancel"),
        ("GET", f"{RESPONSES}/{'x' * 5000}"),
        ("POST", "/admin/abort"),
        ("POST", "/admin/reset_prefix_cache"),
        ("POST", "/admin/drain"),
        ("GET", "/playground/../settings.py"),
        ("GET", "/playground/%2e%2e/settings.py"),
    ):
        response = http().request(method, f"{tiny.url}{path}")
        assert response.status_code == 404, (method, path, response.status_code)
        error_of(response)
    error = error_of(post(tiny.url, RESPONSES, {**BASES[RESPONSES], "previous_response_id": "resp_none"}))
    assert error["param"] == "previous_response_id"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": None},
        {"temperature": 1.5},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "file:///x"}}]}]},
        {"tools": [{"name": "f", "input_schema": {"type": "wizard"}}], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "enabled", "budget_tokens": -5}},
        {"stop_sequences": [""]},
    ],
    ids=str,
)
def test_the_messages_endpoint_says_it_in_its_own_shape(tiny: ServerProcess, fields: Json) -> None:
    response = post(tiny.url, MESSAGES, {**BASES[MESSAGES], **fields})
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["error"]["message"]
    assert len(response.content) < 2000


def test_many_different_schemas_fill_nothing(tiny: ServerProcess) -> None:
    """Each is compiled and kept in bounded caches; the engine's memory is told by the next test's proof of life."""
    for i in range(60):
        answer = post(tiny.url, CHAT, {**BASES[CHAT], **schema_format({"const": f"value {i}"}), "max_tokens": 40})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "stop" and choice["message"]["content"] == f'"value {i}"'
