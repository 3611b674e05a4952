"""The parts of a chat answer as JSON: fragments become the fields of a message, or the deltas of a stream."""

from __future__ import annotations

from collections.abc import Iterable

from server.fragments import Fragment

Fields = dict[str, object]


def message(fragments: Iterable[Fragment]) -> Fields:
    """A whole message. Its content is null where there are calls and no text; `tool_calls` is left out without calls.

    Reasoning stands under both names that clients read.
    """
    texts: dict[str, list[str]] = {"content": [], "reasoning": []}
    calls: dict[int, tuple[Fragment, list[str]]] = {}
    for fragment in fragments:
        if fragment.kind == "call":
            calls.setdefault(fragment.index, (fragment, []))[1].append(fragment.text)
        else:
            texts[fragment.kind].append(fragment.text)
    content = "".join(texts["content"])
    fields: Fields = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    if texts["reasoning"]:
        fields["reasoning"] = fields["reasoning_content"] = "".join(texts["reasoning"])
    if calls:
        fields["tool_calls"] = [_call(first, "".join(pieces)) for _, (first, pieces) in sorted(calls.items())]
    return fields


def deltas(fragments: Iterable[Fragment]) -> list[Fields]:
    """What a stream says of some fragments, in one delta where that is possible.

    The first delta of a call has its name and no arguments, so what comes of them at once goes into a second one.
    """
    found: list[_Delta] = []
    for fragment in fragments:
        if not found or not found[-1].takes(fragment):
            found.append(_Delta())
        found[-1].add(fragment)
    return [delta.fields() for delta in found]


class _Delta:
    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._begun: dict[int, Fragment] = {}
        self._arguments: dict[int, list[str]] = {}

    def takes(self, fragment: Fragment) -> bool:
        return fragment.kind != "call" or fragment.index not in self._begun

    def add(self, fragment: Fragment) -> None:
        if fragment.kind == "content":
            self._content.append(fragment.text)
        elif fragment.kind == "reasoning":
            self._reasoning.append(fragment.text)
        elif fragment.id:
            self._begun[fragment.index] = fragment
        else:
            self._arguments.setdefault(fragment.index, []).append(fragment.text)

    def fields(self) -> Fields:
        fields: Fields = {}
        if self._reasoning:
            fields["reasoning"] = fields["reasoning_content"] = "".join(self._reasoning)
        if self._content:
            fields["content"] = "".join(self._content)
        calls: list[Fields] = [
            {"index": index, "function": {"arguments": "".join(pieces)}} for index, pieces in self._arguments.items()
        ]
        calls += [{"index": index, **_call(first, first.text)} for index, first in self._begun.items()]
        if calls:
            fields["tool_calls"] = calls
        return fields


def _call(first: Fragment, arguments: str) -> Fields:
    return {"id": first.id, "type": "function", "function": {"name": first.name, "arguments": arguments}}
