"""Regular expressions that end an answer: a dialect without back-references, matched in linear time as text arrives.

A pattern becomes an automaton (Thompson, "Regular expression search algorithm", 1968) whose states are all followed at
once, so that no pattern can make a match slow, and a match is known at its last character. Patterns are those of
Python's `re` without what needs to look around: literals, escapes, `.`, classes, groups, `|` and quantifiers, and the
flags `(?i)` and `(?s)` at the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

MAX_PATTERN = 256  # characters
MAX_DEPTH = 16  # of groups
MAX_LINKS = 500  # of an automaton: what one character may cost
_MAX_STATES = 1000

Test = Callable[[str], bool]
_CATEGORIES: dict[str, Test] = {
    "d": str.isdecimal,
    "s": str.isspace,
    "w": lambda c: c.isalnum() or c == "_",
    "D": lambda c: not c.isdecimal(),
    "S": lambda c: not c.isspace(),
    "W": lambda c: not (c.isalnum() or c == "_"),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
_HEX = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class Automaton:
    """`tests[s]`: may state s read this character; `ends[s]`: is that a match; `links[s]`: the states it leads to."""

    pattern: str
    tests: tuple[Test, ...]
    ends: tuple[bool, ...]
    links: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]


@lru_cache(maxsize=256)
def compile_stop(pattern: str) -> Automaton:
    """Raises ValueError, with what is wrong for the client, for a pattern that is no such or too large."""
    if not 1 <= len(pattern) <= MAX_PATTERN:
        raise ValueError(f"must hold patterns of 1 to {MAX_PATTERN} characters")
    node = _Reader(pattern).read()
    builder = _Builder()
    begin = builder.add(node, builder.accept)
    return builder.finish(pattern, begin)


# ---- from text to a tree -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parts:
    """One after another, or one of them."""

    nodes: tuple[Node, ...]
    either: bool = False


@dataclass(frozen=True, slots=True)
class _Repeat:
    node: Node
    least: int
    most: int | None


Node = Test | _Parts | _Repeat


class _Reader:
    def __init__(self, pattern: str) -> None:
        flags = re.match(r"\(\?([is]+)\)", pattern)
        self._fold = flags is not None and "i" in flags[1]
        self._dot_all = flags is not None and "s" in flags[1]
        self._text, self._at = pattern, 0 if flags is None else flags.end()

    def read(self) -> Node:
        node = self._choice(0)
        if self._at < len(self._text):
            raise ValueError("has a pattern with a ')' too many")
        return node

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise ValueError("has a pattern that ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _choice(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise ValueError(f"has a pattern with more than {MAX_DEPTH} groups inside each other")
        found = [self._sequence(depth)]
        while self._peek() == "|":
            self._next()
            found.append(self._sequence(depth))
        return _Parts(tuple(found), either=True) if len(found) > 1 else found[0]

    def _sequence(self, depth: int) -> Node:
        found: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            found.append(self._quantified(self._atom(depth)))
        return _Parts(tuple(found))

    def _quantified(self, node: Node) -> Node:
        bounds = re.compile(r"[*+?]|\{(\d{1,4})(,(\d{0,4}))?\}").match(self._text, self._at)
        if bounds is None:
            return node
        self._at = bounds.end()
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(bounds[0], (int(bounds[1] or 0), None))
        if bounds[1] is not None:
            most = least if bounds[2] is None else int(bounds[3]) if bounds[3] else None
        if most is not None and most < least:
            raise ValueError("has a pattern with a repeat whose bounds are the wrong way round")
        if self._peek() in ("*", "+"):
            raise ValueError("has a pattern with two quantifiers, one after the other")
        if self._peek() == "?":  # the first end counts, however eager a part of the pattern is
            self._next()
        return _Repeat(node, least, most)

    def _atom(self, depth: int) -> Node:
        char = self._next()
        if char == "(":
            if self._peek() == "?":
                if self._text[self._at : self._at + 2] != "?:":
                    raise ValueError("has a pattern with a group of a kind that is not supported; (?:...) is")
                self._at += 2
            node = self._choice(depth + 1)
            if self._peek() != ")":
                raise ValueError("has a pattern with a group that is not closed")
            self._next()
            return node
        if char == "[":
            return self._class()
        if char == ".":
            return (lambda _: True) if self._dot_all else (lambda c: c != "\n")
        if char in "^$":
            raise ValueError("has a pattern with an anchor; a pattern may match anywhere in the answer")
        if char in "*+?":
            raise ValueError("has a pattern with a quantifier and nothing before it")
        return self._single(self._escape()) if char == "\\" else self._single(char)

    def _escape(self) -> str | Test:
        """What stands behind a backslash."""
        char = self._next()
        if char in _CATEGORIES:
            return _CATEGORIES[char]
        if char in _HEX:
            digits = self._text[self._at : self._at + _HEX[char]]
            if not re.fullmatch(rf"[0-9a-fA-F]{{{_HEX[char]}}}", digits) or int(digits, 16) > 0x10FFFF:
                raise ValueError(f"has a pattern with a bad \\{char}")
            self._at += len(digits)
            return chr(int(digits, 16))
        if char.isascii() and char.isalnum() and char not in _CONTROLS:
            raise ValueError(f"has a pattern with \\{char}, which is not supported")
        return _CONTROLS.get(char, char)

    def _single(self, what: str | Test) -> Test:
        if not isinstance(what, str):
            return what
        if self._fold:
            low = what.lower()
            return lambda c: c.lower() == low
        return what.__eq__

    def _class(self) -> Test:
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[str, str]] = []
        tests: list[Test] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._member()
            if not isinstance(low, str):
                tests.append(low)
                continue
            high = low
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._next()
                end = self._member()
                if not isinstance(end, str) or end < low:
                    raise ValueError("has a pattern with a bad range in a class")
                high = end
            ranges.append((low, high))
        self._next()
        fold = self._fold

        def holds(char: str) -> bool:
            forms = {char, char.lower(), char.upper()} if fold else (char,)
            within = any(low <= form <= high for form in forms for low, high in ranges)
            return (within or any(test(char) for test in tests)) is not negated

        return holds

    def _member(self) -> str | Test:
        char = self._next()
        return self._escape() if char == "\\" else char


# ---- from the tree to the automaton ------------------------------------------------------------------------


class _Builder:
    """States are built from the end: `add` returns the state that a node begins with and that goes on to `after`."""

    def __init__(self) -> None:
        self.accept = 0
        self._tests: list[Test | None] = [None]  # None: it reads nothing
        self._next: list[list[int]] = [[]]

    def _state(self, test: Test | None, following: Iterable[int]) -> int:
        if len(self._tests) >= _MAX_STATES:
            raise ValueError("has a pattern that is too large")
        self._tests.append(test)
        self._next.append([*following])
        return len(self._tests) - 1

    def add(self, node: Node, after: int) -> int:
        match node:
            case _Parts(nodes, either=True):
                return self._state(None, [self.add(part, after) for part in nodes])
            case _Parts(nodes):
                for part in reversed(nodes):
                    after = self.add(part, after)
                return after
            case _Repeat():
                return self._repeat(node, after)
            case test:
                return self._state(test, (after,))

    def _repeat(self, node: _Repeat, after: int) -> int:
        if node.most is None:
            again = self._state(None, (after,))
            self._next[again].append(self.add(node.node, again))
            after = again
        else:
            for _ in range(node.most - node.least):
                after = self._state(None, (after, self.add(node.node, after)))
        for _ in range(node.least):
            after = self.add(node.node, after)
        return after

    def finish(self, pattern: str, begin: int) -> Automaton:
        readers = [state for state, test in enumerate(self._tests) if test is not None]
        places = {state: place for place, state in enumerate(readers)}
        first, empty = self._reach((begin,), places)
        if empty:
            raise ValueError("has a pattern that matches the empty text")
        reached = [self._reach(self._next[state], places) for state in readers]
        if sum(len(links) for links, _ in reached) + len(first) > MAX_LINKS:
            raise ValueError("has a pattern that is too large")
        tests = tuple(test for test in self._tests if test is not None)
        ends, links = tuple(end for _, end in reached), tuple(links for links, _ in reached)
        return Automaton(pattern, tests, ends, links, first)

    def _reach(self, states: Iterable[int], places: dict[int, int]) -> tuple[tuple[int, ...], bool]:
        """The states that read something and that these lead to without reading; and may the match end here."""
        found: set[int] = set()
        stack = [*states]
        while stack:
            state = stack.pop()
            if state not in found:
                found.add(state)
                if self._tests[state] is None:
                    stack += self._next[state]
        return tuple(sorted(places[state] for state in found if state in places)), self.accept in found


class PatternMatcher:
    """Follows one pattern through a text. `feed` returns how long the match is that ends with this character, or 0."""

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self._alive: dict[int, int] = {}  # state -> how many characters ago its match began, at most
        self.held = 0  # length of the longest end of the text that may become a match

    def feed(self, char: str) -> int:
        automaton = self.automaton
        tests, ends, links = automaton.tests, automaton.ends, automaton.links
        alive: dict[int, int] = {}
        matched = 0
        for state in automaton.first:
            self._alive.setdefault(state, 0)
        for state, length in self._alive.items():
            if tests[state](char):
                length += 1
                if ends[state]:
                    matched = max(matched, length)
                for following in links[state]:
                    if length > alive.get(following, 0):
                        alive[following] = length
        self._alive = alive
        self.held = max(alive.values(), default=0)
        return matched
