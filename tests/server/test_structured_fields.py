"""Every field that constrains an answer: what it comes to, and what a bad value gets."""

from __future__ import annotations

import json

import pytest

from engine.grammar import WHITESPACE, Grammar
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving

pytestmark = pytest.mark.asyncio

ENDPOINTS = ((CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION))
POINT: Json = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
SPACED = {"whitespace_pattern": WHITESPACE}
COMPACT = {"whitespace_pattern": ""}
TABS = {"whitespace_pattern": r"\t?"}
GBNF = 'root ::= "yes" | "no"'
LARK = 'start: "yes" | "no"\n'


def schema_format(schema: object, **more: object) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": schema, **more}}}


def of_schema(schema: Json, spacing: Json = SPACED) -> Grammar:
    return Grammar("json", json.dumps({**schema, "x-guidance": spacing}, separators=(",", ":"), ensure_ascii=False))


CONSTRAINED: tuple[tuple[Json, Grammar], ...] = (
    (schema_format(POINT), of_schema(POINT)),
    (schema_format(POINT, strict=True, description="a point"), of_schema(POINT)),
    (schema_format(POINT, strict=False), of_schema(POINT)),
    (schema_format(None), of_schema({"type": "object"})),
    (schema_format(True), of_schema({})),
    ({"response_format": {"type": "json_object"}}, of_schema({"type": "object"})),
    ({"response_format": {"type": "json_object", "schema": POINT}}, of_schema(POINT)),
    ({"structured_outputs": {"json": POINT}}, of_schema(POINT)),
    ({"structured_outputs": {"json": json.dumps(POINT)}}, of_schema(POINT)),
    ({"structured_outputs": {"json": POINT, "disable_any_whitespace": True}}, of_schema(POINT, COMPACT)),
    ({"structured_outputs": {"json": POINT, "whitespace_pattern": r"\t?"}}, of_schema(POINT, TABS)),
    ({"structured_outputs": {"json": POINT, "regex": None, "disable_fallback": True}}, of_schema(POINT)),
    ({"structured_outputs": {"json_object": True}}, of_schema({"type": "object"})),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, Grammar("regex", "[ab]{3}")),
    ({"structured_outputs": {"choice": ["yes", "no", "yes"]}}, Grammar("lark", LARK)),
    ({"structured_outputs": {"choice": ['"\n\\', "é", ""]}}, Grammar("lark", 'start: "\\"\\n\\\\" | "é" | ""\n')),
    ({"structured_outputs": {"grammar": LARK}}, Grammar("lark", LARK)),
    ({"structured_outputs": {"grammar": GBNF}}, Grammar("lark", '%llguidance {}\nstart: T0\nT0: "yes" | "no"\n')),
    ({"guided_json": POINT, "guided_decoding_backend": "outlines"}, of_schema(POINT)),
    ({"guided_json": POINT, "guided_whitespace_pattern": r"\t?"}, of_schema(POINT, TABS)),
    ({"guided_regex": "[ab]{3}"}, Grammar("regex", "[ab]{3}")),
    ({"guided_choice": ["yes", "no"]}, Grammar("lark", LARK)),
    ({"guided_grammar": LARK}, Grammar("lark", LARK)),
    ({"json_schema": POINT}, of_schema(POINT)),
    ({"json_schema": json.dumps(POINT)}, of_schema(POINT)),
    ({"regex": "[ab]{3}"}, Grammar("regex", "[ab]{3}")),
    ({"ebnf": GBNF}, Grammar("lark", '%llguidance {}\nstart: T0\nT0: "yes" | "no"\n')),
    ({"grammar": LARK}, Grammar("lark", LARK)),
    ({"response_format": {"type": "text"}, "regex": "[ab]{3}"}, Grammar("regex", "[ab]{3}")),
)


async def test_each_field_becomes_a_grammar() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for url, base in ENDPOINTS:
            for fields, grammar in CONSTRAINED:
                response = await client.post(url, json={**base, **fields})
                assert response.status_code == 200, (fields, response.text)
                assert engine.submitted[-1].sampling.grammar == grammar, fields


async def test_text_and_nulls_constrain_nothing() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for url, base in ENDPOINTS:
            fields: Json
            for fields in (
                {"response_format": {"type": "text"}},
                {"response_format": None, "structured_outputs": None},
            ):
                assert (await client.post(url, json={**base, **fields})).status_code == 200
                assert engine.submitted[-1].sampling.grammar is None


FORMAT, SCHEMA = "response_format", "response_format.json_schema.schema"
OUTPUTS = "structured_outputs"
INVALID, TYPE, MISSING, UNKNOWN = "invalid_value", "invalid_type", "missing_required_parameter", "unsupported_parameter"
# fields, the field that the error names, its code, words of its message
BAD: tuple[tuple[Json, str, str, str], ...] = (
    ({FORMAT: "json_object"}, FORMAT, TYPE, "dictionary"),
    ({FORMAT: {}}, f"{FORMAT}.type", MISSING, "Missing"),
    ({FORMAT: {"type": 3}}, f"{FORMAT}.type", TYPE, "string"),
    ({FORMAT: {"type": "xml"}}, f"{FORMAT}.type", INVALID, "'json_schema'"),
    ({FORMAT: {"type": "structural_tag", "format": {}}}, f"{FORMAT}.format", UNKNOWN, "json_schema"),
    ({FORMAT: {"type": "structural_tag"}}, f"{FORMAT}.type", INVALID, "not supported"),
    ({FORMAT: {"type": "text", "json_schema": {"name": "a"}}}, f"{FORMAT}.type", INVALID, "beside it"),
    ({FORMAT: {"type": "json_object", "json_schema": {"name": "a"}}}, f"{FORMAT}.type", INVALID, "beside it"),
    ({FORMAT: {"type": "json_object", "schema": 3}}, f"{FORMAT}.schema", TYPE, "JSON schema"),
    ({FORMAT: {"type": "json_schema"}}, f"{FORMAT}.json_schema", MISSING, "Missing"),
    ({FORMAT: {"type": "json_schema", "schema": POINT}}, f"{FORMAT}.json_schema", MISSING, "Missing"),
    ({FORMAT: {"type": "json_schema", "json_schema": {}}}, f"{FORMAT}.json_schema.name", MISSING, "Missing"),
    (schema_format(POINT, name="two words"), f"{FORMAT}.json_schema.name", INVALID, "pattern"),
    (schema_format(POINT, name=""), f"{FORMAT}.json_schema.name", INVALID, "pattern"),
    (schema_format(POINT, strict="yes"), f"{FORMAT}.json_schema.strict", TYPE, "boolean"),
    (schema_format([]), SCHEMA, TYPE, "JSON schema"),
    (schema_format("{}"), SCHEMA, TYPE, "JSON schema"),
    (schema_format(False), SCHEMA, INVALID, "no answer satisfies"),
    (schema_format({"type": "foo"}), SCHEMA, INVALID, "Invalid type: foo"),
    (schema_format({"not": {"type": "string"}}), SCHEMA, INVALID, "unsupported keyword: 'not'"),
    (schema_format({"if": {}, "then": {}}), SCHEMA, INVALID, "unsupported keywords: 'if', 'then'"),
    (schema_format({"type": "array", "uniqueItems": True}), SCHEMA, INVALID, "unsupported keyword: 'uniqueItems'"),
    (schema_format({"type": "string", "format": "regex"}), SCHEMA, INVALID, "unsupported value of 'format': 'regex'"),
    (schema_format({"$ref": "https://example.org/x.json"}), SCHEMA, INVALID, "nothing is fetched"),
    (schema_format({"$ref": "#/$defs/missing"}), SCHEMA, INVALID, "points to nothing"),
    (schema_format({"oneOf": [{"type": "number"}, {"type": "integer"}]}), SCHEMA, INVALID, "'oneOf'"),
    (schema_format({"type": "string", "pattern": "(?=a)b"}), SCHEMA, INVALID, "look-around"),
    (schema_format({"type": "string", "pattern": "(("}), SCHEMA, INVALID, "invalid regular expression: unclosed group"),
    (schema_format({"type": "integer", "minimum": 3, "maximum": 1}), SCHEMA, INVALID, "greater than maximum"),
    (schema_format({"enum": []}), SCHEMA, INVALID, "Unsatisfiable"),
    (schema_format({**POINT, "x-guidance": {"lenient": True}}), SCHEMA, INVALID, "not taken from clients"),
    ({OUTPUTS: []}, OUTPUTS, TYPE, "dictionary"),
    ({OUTPUTS: {}}, OUTPUTS, INVALID, "exactly one"),
    ({OUTPUTS: {"json_object": False}}, OUTPUTS, INVALID, "exactly one"),
    ({OUTPUTS: {"regex": "a", "choice": ["b"]}}, OUTPUTS, INVALID, "exactly one"),
    ({OUTPUTS: {"json": POINT, "structural_tag": "{}"}}, f"{OUTPUTS}.structural_tag", UNKNOWN, "there are json"),
    ({OUTPUTS: {"json": POINT, "disable_additional_properties": True}}, f"{OUTPUTS}.disable_additional_properties",
     UNKNOWN, "there are json"),
    ({OUTPUTS: {"json": "{"}}, f"{OUTPUTS}.json", INVALID, "not the JSON of a schema"),
    ({OUTPUTS: {"json": "3"}}, f"{OUTPUTS}.json", INVALID, "an object or a boolean"),
    ({OUTPUTS: {"json": "[" * 100 + "]" * 100}}, f"{OUTPUTS}.json", INVALID, "nested deeper"),
    ({OUTPUTS: {"json": '{"a": NaN}'}}, f"{OUTPUTS}.json", INVALID, "not the JSON of a schema"),
    ({OUTPUTS: {"json": 3}}, f"{OUTPUTS}.json", TYPE, "JSON schema"),
    ({OUTPUTS: {"regex": ""}}, f"{OUTPUTS}.regex", INVALID, "at least 1"),
    ({OUTPUTS: {"regex": "a\\"}}, f"{OUTPUTS}.regex", INVALID, "incomplete escape"),
    ({OUTPUTS: {"regex": r"a\bc"}}, f"{OUTPUTS}.regex", INVALID, "word boundaries"),
    ({OUTPUTS: {"regex": r"(a)\1"}}, f"{OUTPUTS}.regex", INVALID, "backreferences"),
    ({OUTPUTS: {"regex": r"[^\s\S]"}}, f"{OUTPUTS}.regex", INVALID, "no text satisfies it"),
    ({OUTPUTS: {"regex": "a", "whitespace_pattern": " "}}, f"{OUTPUTS}.whitespace_pattern", INVALID, "JSON only"),
    ({OUTPUTS: {"json": POINT, "whitespace_pattern": "("}}, f"{OUTPUTS}.json", INVALID, "unclosed group"),
    ({OUTPUTS: {"choice": []}}, f"{OUTPUTS}.choice", INVALID, "1 to 1024"),
    ({OUTPUTS: {"choice": "a"}}, f"{OUTPUTS}.choice", TYPE, "list of strings"),
    ({OUTPUTS: {"choice": [1]}}, f"{OUTPUTS}.choice", TYPE, "list of strings"),
    ({OUTPUTS: {"choice": ["a" * 5000]}}, f"{OUTPUTS}.choice", INVALID, "4096"),
    ({OUTPUTS: {"grammar": "hello"}}, f"{OUTPUTS}.grammar", INVALID, "can't be used"),
    ({OUTPUTS: {"grammar": 'a ::= "x"'}}, f"{OUTPUTS}.grammar", INVALID, "rule named 'root'"),
    ({OUTPUTS: {"grammar": "start: start"}}, f"{OUTPUTS}.grammar", INVALID, "no text satisfies it"),
    ({OUTPUTS: {"grammar": '{"grammars": []}'}}, f"{OUTPUTS}.grammar", INVALID, "Lark or GBNF"),
    ({OUTPUTS: {"grammar": "x" * 200_000}}, f"{OUTPUTS}.grammar", INVALID, "at most"),
    ({OUTPUTS: {"json": {"const": "x" * 200_000}}}, f"{OUTPUTS}.json", INVALID, "at most"),
    ({"guided_json": [1]}, "guided_json", TYPE, "JSON schema"),
    ({"guided_regex": 3}, "guided_regex", TYPE, "string"),
    ({"guided_choice": {}}, "guided_choice", TYPE, "list of strings"),
    ({"guided_grammar": "root ::= x"}, "guided_grammar", INVALID, "'x' is used and not defined"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", INVALID, "needs guided_json"),
    ({"regex": "(("}, "regex", INVALID, "unclosed group"),
    ({"json_schema": "nonsense"}, "json_schema", INVALID, "not the JSON of a schema"),
    ({"ebnf": "root ::= ("}, "ebnf", INVALID, "not closed"),
    ({"grammar": {"type": "json"}}, "grammar", TYPE, "string"),
    ({"guided_json": POINT, "guided_regex": "a"}, "guided_regex", INVALID, "guided_json already"),
    ({FORMAT: {"type": "json_object"}, "ebnf": GBNF}, "ebnf", INVALID, "response_format.type already"),
    ({"structural_tag": "{}"}, "structural_tag", UNKNOWN, "use response_format"),
    ({"response_schema": POINT}, "response_schema", UNKNOWN, "use response_format"),
    ({"guided_decoding": {"json": POINT}}, "guided_decoding", UNKNOWN, "use response_format"),
)  # fmt: skip


async def test_bad_values_name_their_field_and_never_pass_unconstrained() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for url, base in ENDPOINTS:
            for fields, param, code, words in BAD:
                error = error_of(await client.post(url, json={**base, **fields}), 400)
                assert (error["param"], error["code"]) == (param, code), (fields, error)
                assert words in error["message"], (fields, error)
                assert len(error["message"]) < 620
    assert not engine.submitted


async def test_remarks_are_no_constraints() -> None:
    """What the JSON Schema standard calls an annotation is left out; a property or a constant of that name is not."""
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "integer", "format": "int32"},
            "secret": {"type": "string", "format": "password"},
            "list": {"type": "array", "uniqueItems": False, "items": {"anyOf": [{"type": "string", "format": "path"}]}},
            "when": {"type": "string", "format": "date"},
            "fixed": {"const": {"format": "int32", "uniqueItems": False}},
        },
        "$defs": {"a": {"format": "byte"}},
    }
    engine = FakeEngine()
    async with serving(engine) as client:
        assert (await client.post(CHAT_URL, json={**CHAT, **schema_format(schema)})).status_code == 200
    grammar = engine.submitted[-1].sampling.grammar
    assert grammar is not None
    found = json.loads(grammar.text)
    assert found["properties"] == {
        "format": {"type": "integer"},
        "secret": {"type": "string"},
        "list": {"type": "array", "items": {"anyOf": [{"type": "string"}]}},
        "when": {"type": "string", "format": "date"},
        "fixed": {"const": {"format": "int32", "uniqueItems": False}},
    }
    assert found["$defs"] == {"a": {}}


async def test_what_leaves_no_choice_to_the_grammar_is_refused_beside_it() -> None:
    async with serving() as client:
        for url, base in ENDPOINTS:
            fields: Json
            for fields, param in (
                ({"ignore_eos": True}, "ignore_eos"),
                ({"allowed_token_ids": [5]}, "allowed_token_ids"),
            ):
                response = await client.post(url, json={**base, "regex": "a", **fields})
                assert error_of(response, 400)["param"] == param
