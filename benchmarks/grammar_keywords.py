"""One small schema for each keyword of JSON Schema, with an instance that it takes and one that it does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keyword:
    name: str
    schema: dict[str, object]
    good: object
    bad: object


_AB: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
_TEXT: dict[str, object] = {"type": "string"}


def _text(**more: object) -> dict[str, object]:
    return {"type": "string", **more}


def _array(**more: object) -> dict[str, object]:
    return {"type": "array", "items": {"type": "integer"}, **more}


KEYWORDS: tuple[Keyword, ...] = (
    Keyword("type", {"type": "integer"}, 3, "x"),
    Keyword("type, several", {"type": ["integer", "null"]}, None, "x"),
    Keyword("enum", {"enum": [1, "a", None]}, "a", "b"),
    Keyword("enum of objects", {"enum": [{"a": 1}, {"a": 2}]}, {"a": 2}, {"a": 3}),
    Keyword("const", {"const": {"a": [1, None]}}, {"a": [1, None]}, {"a": [1]}),
    Keyword("minimum", {"type": "integer", "minimum": 3}, 3, 2),
    Keyword("maximum", {"type": "integer", "maximum": 30}, 30, 31),
    Keyword("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 0.5}, 0.51, 0.5),
    Keyword("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 0.5}, 0.49, 0.5),
    Keyword("minimum of a number", {"type": "number", "minimum": -1.25}, -1.25, -1.3),
    Keyword("multipleOf", {"type": "integer", "multipleOf": 7}, 14, 15),
    Keyword("minLength", _text(minLength=3), "äöü", "äö"),
    Keyword("maxLength", _text(maxLength=3), "äöü", "äöüx"),
    Keyword("pattern", _text(pattern="^[a-c]{2}$"), "ab", "ad"),
    Keyword("pattern without anchors", _text(pattern="b"), "abc", "ac"),
    Keyword("pattern and length", _text(pattern="^[a-c]*$", minLength=3), "abc", "ab"),
    Keyword("format date", _text(format="date"), "2024-02-29", "2024-13-01"),
    Keyword("format time", _text(format="time"), "12:30:59Z", "25:00:00Z"),
    Keyword("format date-time", _text(format="date-time"), "2024-02-29T12:30:59Z", "2024-02-29"),
    Keyword("format email", _text(format="email"), "a@b.org", "ab.org"),
    Keyword("format uuid", _text(format="uuid"), "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
    Keyword("format ipv4", _text(format="ipv4"), "10.0.0.1", "10.0.0.256"),
    Keyword("format ipv6", _text(format="ipv6"), "::1", "::g"),
    Keyword("format uri", _text(format="uri"), "http://a.org/x?y", "not a uri"),
    Keyword("format hostname", _text(format="hostname"), "a.org", "-a-"),
    Keyword("format duration", _text(format="duration"), "P3DT2H", "3 days"),
    Keyword("items", _array(), [1, 2], [1, "x"]),
    Keyword("prefixItems", {"type": "array", "prefixItems": [_TEXT, {"type": "null"}]}, ["a", None], [1, None]),
    Keyword("items false", {"type": "array", "prefixItems": [_TEXT], "items": False}, ["a"], ["a", 1]),
    Keyword("minItems", _array(minItems=2), [1, 2], [1]),
    Keyword("maxItems", _array(maxItems=2), [1, 2], [1, 2, 3]),
    Keyword("uniqueItems", _array(uniqueItems=True), [1, 2], [1, 1]),
    Keyword("contains", {"type": "array", "contains": {"const": 1}}, [2, 1], [2]),
    Keyword("unevaluatedItems", {"prefixItems": [_TEXT], "unevaluatedItems": False, "type": "array"}, ["a"], ["a", 1]),
    Keyword("properties", _AB, {"a": 1, "b": 2}, {"a": "x"}),
    Keyword("required", {**_AB, "required": ["b"]}, {"b": 2}, {"a": 1}),
    Keyword("additionalProperties", {**_AB, "additionalProperties": False}, {"a": 1}, {"a": 1, "c": 2}),
    Keyword("additionalProperties, a schema", {**_AB, "additionalProperties": _TEXT}, {"a": 1, "c": "x"}, {"c": 3}),
    Keyword("additional ones by default", {**_AB, "required": ["a"]}, {"a": 1, "c": None}, {"c": None}),
    Keyword("properties in another order", {**_AB, "required": ["a", "b"]}, {"b": 1, "a": 2}, {"b": 1}),
    Keyword(
        "patternProperties", {"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, {"x1": 1}, {"x1": ""}
    ),
    Keyword("propertyNames", {"type": "object", "propertyNames": {"pattern": "^[a-c]$"}}, {"a": 1}, {"d": 1}),
    Keyword("minProperties", {"type": "object", "minProperties": 2}, {"a": 1, "b": 2}, {"a": 1}),
    Keyword("maxProperties", {"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    Keyword("dependentRequired", {**_AB, "dependentRequired": {"a": ["b"]}}, {"a": 1, "b": 2}, {"a": 1}),
    Keyword("unevaluatedProperties", {**_AB, "unevaluatedProperties": False}, {"a": 1}, {"c": 1}),
    Keyword("anyOf", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "x"),
    Keyword("oneOf, disjoint", {"oneOf": [{"type": "integer"}, {"type": "null"}]}, None, "x"),
    Keyword(
        "oneOf that overlaps", {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]}, 10, 5
    ),
    Keyword("allOf", {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]}, 5, 10),
    Keyword(
        "allOf of objects",
        {"allOf": [{**_AB, "required": ["a"]}, {"properties": {"c": _TEXT}, "required": ["c"]}]},
        {"a": 1, "c": "x"},
        {"a": 1},
    ),
    Keyword("not", {"type": "string", "not": {"const": "a"}}, "b", "a"),
    Keyword("if, then", {**_AB, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"a": 1, "b": 2}, {"a": 1}),
    Keyword("$ref to $defs", {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}, 3, "x"),
    Keyword("$ref to definitions", {"definitions": {"n": {"type": "integer"}}, "$ref": "#/definitions/n"}, 3, "x"),
    Keyword(
        "$ref to itself",
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]},
        [None, [None]],
        [[1]],
    ),
    Keyword("$anchor", {"$defs": {"n": {"$anchor": "here", "type": "integer"}}, "$ref": "#here"}, 3, "x"),
    Keyword("false", {"type": "object", "properties": {"a": False}}, {}, {"a": 1}),
    Keyword("no type", {"minimum": 3}, "x", 2),
)
