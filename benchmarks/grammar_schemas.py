"""Random JSON schemas: every keyword that people use, nested, from a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Callable

Schema = dict[str, object]

WORDS = ("name", "size", "tags", "kind", "items", "price", "note", "größe", "a b", 'quo"te', "id", "next")
PATTERNS = (r"^[a-z]{1,8}$", r"^[A-Z][a-z]*-\d{2,4}$", r"^(red|green|blue)$", r"^\+?[0-9 ]{3,9}$", r"[xyz]{2}", r"^é*$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
CONSTANTS: tuple[object, ...] = (None, True, 0, -1, 2.5, "", "ü", "two words", [1, "a"], {"k": [None]})


class Schemas:
    """A source of schemas. The same seed gives the same ones.

    Texts and lists are bounded, so that a model that draws at random finds an end.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._defs: dict[str, Schema] = {}

    def one(self) -> Schema:
        """An object's schema, most of the time."""
        self._defs = {}
        if self._rng.random() < 0.25:
            self._defs = {"node": {}, "leaf": self._leaf()}
            self._defs["node"] = self._node()
        schema = self._object(2) if self._rng.random() < 0.8 else self._any(2)
        return {**schema, "$defs": self._defs} if self._defs else schema

    def _any(self, depth: int) -> Schema:
        kinds: list[Callable[[], Schema]] = [self._leaf, self._leaf]
        if depth > 0:
            kinds += [lambda: self._object(depth - 1), lambda: self._array(depth - 1), lambda: self._union(depth - 1)]
        if self._defs:
            kinds.append(lambda: {"$ref": f"#/$defs/{self._rng.choice(list(self._defs))}"})
        return self._rng.choice(kinds)()

    def _leaf(self) -> Schema:
        return self._rng.choice((self._string, self._integer, self._number, self._constant, self._plain))()

    def _plain(self) -> Schema:
        return {"type": self._rng.choice(("boolean", "null", ["boolean", "null"]))}

    def _constant(self) -> Schema:
        if self._rng.random() < 0.4:
            return {"const": self._rng.choice(CONSTANTS)}
        return {"enum": self._rng.sample(CONSTANTS, self._rng.randint(1, 5))}

    def _string(self) -> Schema:
        rng = self._rng
        match rng.randrange(4):
            case 0:
                return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12}
            case 1:
                return {"type": "string", "format": rng.choice(FORMATS), "title": "a remark"}
            case 2:
                low = rng.randrange(4)
                return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(12)}
        return {"type": ["string", "null"], "maxLength": rng.randint(1, 10), "default": None}

    def _integer(self) -> Schema:
        rng, low = self._rng, self._rng.randint(-1000, 1000)
        match rng.randrange(4):
            case 0:
                return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
            case 1:
                return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 99)}
            case 2:
                return {"type": "integer", "multipleOf": rng.randint(2, 9), "minimum": 0, "maximum": 999}
        return {"type": "integer"}

    def _number(self) -> Schema:
        rng, low = self._rng, round(self._rng.uniform(-50, 50), 2)
        match rng.randrange(3):
            case 0:
                return {"type": "number", "minimum": low, "maximum": round(low + rng.uniform(0.5, 99), 3)}
            case 1:
                return {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}
        return {"type": "number"}

    def _object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(WORDS, rng.randint(1, 4))
        schema: Schema = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        required = [name for name in names if rng.random() < 0.6]
        if required or rng.random() < 0.5:
            schema["required"] = required
        extra = rng.randrange(4)
        if extra < 2:
            schema["additionalProperties"] = False
        elif extra == 2:
            schema |= {"additionalProperties": self._leaf(), "maxProperties": len(names) + 1, "required": names}
        else:
            schema |= {"patternProperties": {"^x-[a-c]$": self._leaf()}, "additionalProperties": False}
        return schema

    def _array(self, depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.25:
            return {
                "type": "array",
                "prefixItems": [self._leaf(), self._any(depth)],
                "items": False,
                "minItems": rng.randint(0, 2),
            }
        low = rng.randrange(3)
        return {"type": "array", "items": self._any(depth), "minItems": low, "maxItems": low + rng.randrange(3)}

    def _union(self, depth: int) -> Schema:
        rng = self._rng
        match rng.randrange(3):
            case 0:
                return {"anyOf": [self._any(depth) for _ in range(rng.randint(2, 3))]}
            case 1:
                kinds = [self._tagged(kind, depth) for kind in ("circle", "line")]
                return {"oneOf": kinds, "discriminator": {"propertyName": "kind"}}
        return {"allOf": [self._part("left", depth), self._part("right", depth)]}

    def _tagged(self, kind: str, depth: int) -> Schema:
        return {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": self._any(depth)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }

    def _part(self, name: str, depth: int) -> Schema:
        return {"type": "object", "properties": {name: self._any(depth)}, "required": [name], "maxProperties": 3}

    def _node(self) -> Schema:
        """One that refers to itself: a list or a tree."""
        more: Schema = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        names = ("next",) if self._rng.random() < 0.5 else ("left", "right")
        return {
            "type": "object",
            "properties": {"value": self._leaf(), **dict.fromkeys(names, more)},
            "required": ["value", *names],
            "additionalProperties": False,
        }
