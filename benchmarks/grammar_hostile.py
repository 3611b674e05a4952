"""Schemas, regular expressions and grammars that are meant to do harm: too deep, too wide, too slow, too large.

For each: must it be refused (True), must it pass (False), or may it be either (None), as long as it is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    kind: str  # as of engine.grammar.Grammar
    text: str
    refused: bool | None = None


def _nested(depth: int, wrap: Callable[[object], object]) -> object:
    schema: object = {"type": "string"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def _chain(length: int, link: Callable[[object], object]) -> object:
    """Definitions, each of which refers to the next one."""
    defs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": {**defs, f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def _array(item: object) -> object:
    return {"type": "array", "items": item}


def _thousand(item: object) -> object:
    return {"type": "array", "items": item, "minItems": 1000}


def _object(value: object) -> object:
    return {"type": "object", "properties": {"a": value}}


def _pair(value: object) -> object:
    return {"type": "array", "prefixItems": [value, value], "items": False, "minItems": 2}


def _names(count: int) -> dict[str, object]:
    return {f"prop{i}": {"type": "string"} for i in range(count)}


def _schemas() -> Iterator[tuple[str, object, bool | None]]:
    word, whole = {"type": "string"}, {"type": "integer"}
    yield "oneOf that overlaps, nested", _nested(20, lambda s: {"oneOf": [s, whole, whole]}), True
    yield "anyOf, nested", _nested(20, lambda s: {"anyOf": [s, whole]}), False
    yield "arrays, nested 60 deep", _nested(60, _array), None
    yield "arrays, nested 400 deep", _nested(400, _array), True
    yield "objects, nested 400 deep", _nested(400, _object), True
    parts = [[{"properties": {f"a{i}{j}": word}, "required": [f"a{i}{j}"]} for j in range(8)] for i in range(8)]
    yield "allOf of anyOf, 8 to the 8th", {"type": "object", "allOf": [{"anyOf": part} for part in parts]}, None
    yield "allOf of patterns", {"allOf": [{"type": "string", "pattern": f"{c}.{{10}}{c}"} for c in "abcdefgh"]}, None
    yield "5000 constants", {"enum": [f"value {i} {i * 7919 % 10007}" for i in range(5000)]}, None
    yield "20000 constants", {"enum": [f"{i}" for i in range(20_000)]}, True
    yield "definitions that double", _chain(30, _pair), None
    yield "allOf that doubles", _chain(24, lambda s: {"allOf": [s, s]}), None
    yield "anyOf that doubles", _chain(24, lambda s: {"anyOf": [s, s]}), None
    yield "a chain of 1000 references", _chain(1000, lambda s: s), True
    yield "a chain of 800 objects", _chain(800, _object), True
    yield "a chain of 800 arrays", _chain(800, _array), True
    yield "a reference to itself", {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, True
    two = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
    yield "references in a circle", {"$defs": two, "$ref": "#/$defs/a"}, True
    yield "itself in allOf", {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, word]}}, "$ref": "#/$defs/a"}, True
    tree = {"type": "object", "properties": {name: {"$ref": "#"} for name in "abc"}}
    yield "a tree without end", tree, False
    yield "a tree that must not end", {**tree, "required": ["a"]}, None
    yield "a reference to the network", {"$ref": "http://127.0.0.1:9/x.json"}, True
    yield "a reference to a file", {"$ref": "file:///etc/passwd"}, True


def _large_schemas() -> Iterator[tuple[str, object, bool | None]]:
    word, whole = {"type": "string"}, {"type": "integer"}
    yield "a billion items", {"type": "array", "minItems": 10**9, "items": whole}, None
    yield "a thousand of a thousand of a thousand items", _nested(3, _thousand), None
    yield "a text of a billion characters", {"type": "string", "minLength": 10**9}, None
    texts = {f"p{i}": {"type": "string", "maxLength": 50_000 + i} for i in range(50)}
    yield "50 long texts", {"type": "object", "properties": texts, "required": [*texts]}, None
    yield "a length beyond 64 bits", {"type": "string", "maxLength": 2**64}, True
    yield "a length below 0", {"type": "string", "maxLength": -1}, True
    yield "multiples of a large prime", {"type": "integer", "multipleOf": 99_991}, None
    primes = [{"type": "integer", "multipleOf": prime} for prime in (10007, 10009, 10037)]
    yield "multiples of many primes", {"allOf": primes}, None
    yield "numbers up to 1e308", {"type": "number", "minimum": -1e308, "maximum": 1e308}, None
    close = {"minimum": 0.1234567890123456, "maximum": 0.1234567890123457}
    yield "bounds that hardly differ", {"type": "number", **close}, None
    yield "1000 optional properties", {"type": "object", "properties": _names(1000)}, None
    yield "3000 optional properties", {"type": "object", "properties": _names(3000)}, None
    yield "1000 required properties", {"properties": _names(1000), "required": list(_names(1000))}, None
    yield "100 patterns of names", {"patternProperties": {f"^x{i}.*y$": word for i in range(100)}}, None
    yield "a hundred thousand properties at least", {"type": "object", "minProperties": 100_000}, None
    yield "a name of 100 KB", {"type": "object", "properties": {"k" * 100_000: word}}, True
    yield "a constant of 100 KB", {"const": "k" * 100_000}, True
    yield "a pattern of repeats of repeats", {"type": "string", "pattern": "^(a{1,1000}b{1,1000}){1,1000}$"}, None
    yield "a pattern that doubles states", {"type": "string", "pattern": "^.*a.{24}$"}, None
    yield "letters of all scripts, 500 of them", {"type": "string", "pattern": r"^\p{L}{1,500}$"}, None
    yield "a backtracker's nightmare", {"type": "string", "pattern": "^(a+)+$"}, False
    yield "look-ahead", {"type": "string", "pattern": "^(?=.*[A-Z])(?=.*[0-9]).{8,}$"}, True
    yield "a type that there is not", {"type": "foo"}, True
    yield "nothing is right", {"allOf": [word, whole]}, True
    yield "unknown keywords made lenient", {"not": {}, "x-guidance": {"lenient": True}}, True


_REGEXES: tuple[tuple[str, str, bool | None], ...] = (
    ("stars in stars", "((a*)*)*b", False),
    ("a backtracker's alternatives", "(a|aa)+$", False),
    ("a million letters", "a{1000000}", True),
    ("repeats of repeats of repeats", "((a{1000}){1000}){1000}", True),
    ("a tail that doubles states", "(.*a.{1000})", None),
    ("letters of all scripts, often", r"(\w{1,300}\s\p{Greek}{1,300}){1,300}", None),
    ("200 parentheses", "(" * 200 + "a" + ")" * 200, None),
    ("20000 parentheses", "(" * 20_000 + "a" + ")" * 20_000, True),
    ("5000 stars in each other", "(" * 5_000 + "a" + ")*" * 5_000, True),
    ("8000 alternatives", "|".join(f"w{i}x{i * i}" for i in range(8_000)), None),
    ("8000 optional parts", "".join(f"(a{i})?" for i in range(8_000)), None),
    ("100 KB as they stand", "ab" * 50_000, True),
    ("optional parts that look alike", "a{0,500}b?" * 200, None),
    ("counted in counted, often", "((a{0,9}){0,9}){0,9}" * 50, None),
    ("unclosed", "(((", True),
    ("nothing matches", r"[^\s\S]", True),
    ("look-behind", "(?<=a)b", True),
    ("a reference back", r"(a)\1", True),
    ("a word's border", r"\bfoo\b", True),
    ("a last backslash", "a\\", True),
)


def _lark_chain(length: int, rule: str) -> str:
    lines = [rule.format(i, i + 1) for i in range(length)]
    return f"start: {rule[0]}0\n" + "".join(lines)


def _larks() -> Iterator[tuple[str, str, bool | None]]:
    end, terminal = 'r3000: "y"\n', 'T3000: "y"\n'
    yield "ambiguous without bound", 'start: e\ne: e e | "a" | ""\n', None
    yield "ten of the same, perhaps nothing", 'start: a a a a a a a a a a\na: "" | "x" | a a\n', None
    yield "a rule that is itself", "start: a\na: b\nb: a\n", True
    yield "a chain of 3000 rules", _lark_chain(3000, 'r{}: r{} | "x"\n') + end, True
    yield "a chain of 3000 terminals, one or the other", _lark_chain(3000, 'T{0}: T{1} | "x{0}"\n') + terminal, True
    yield "a chain of 3000 terminals, all at once", _lark_chain(3000, "T{0}: T{1} & /[a-z]*{0}?/\n") + terminal, True
    yield "a chain of 3000 negations", _lark_chain(3000, "T{0}: ~T{1}\n") + terminal, True
    yield "20000 parentheses in Lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000 + "\n", True
    yield "a million repeats", 'start: ("a" "b"){1,1000000}\n', None
    yield "repeats of rules of repeats", 'start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"\n', True
    yield "500 regexes at once", "start: " + " | ".join(f"/[a-z]{{1,{i + 1}}}x/" for i in range(500)) + "\n", None
    rules = "".join(f'r{i}: "k{i}" r{i * 7 % 3000}?\n' for i in range(3000))
    yield "3000 rules at once", "start: " + " | ".join(f"r{i}" for i in range(3000)) + "\n" + rules, None
    yield "a long text that is forced", "start: " + " ".join(f'"a{i}"' for i in range(2000)) + "\n", None
    words = " & ".join(f"/(.|\\n)*w{i}(.|\\n)*/" for i in range(16))
    yield "16 words in any order", f"start: T\nT: {words}\n", None
    yield "a deep schema inside", "start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000 + "\n", True
    yield "llguidance's own form", '{"grammars":[{"json_schema":{"type":"object"}}]}', True
    yield "not Lark", 'start: "', True
    yield "no start", 'foo: "a"\n', True
    yield "nothing at all", "", True


HOSTILE: tuple[Case, ...] = (
    *(Case(name, "json", json.dumps(schema), refused) for name, schema, refused in (*_schemas(), *_large_schemas())),
    Case("100,000 deep, never closed", "json", '{"items":' * 12_000, True),
    Case("no object", "json", "[]", True),
    *(Case(name, "regex", text, refused) for name, text, refused in _REGEXES),
    *(Case(name, "lark", text, refused) for name, text, refused in _larks()),
)
