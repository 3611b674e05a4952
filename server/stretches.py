"""An answer as a row of stretches, for endpoints whose streams name what they open, grow and close.

/v1/responses writes items and /v1/messages blocks; both are dialects of what is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.types import TokenEvent, TokenLogprob
from server.answers import Fields, Meter, finish_word
from server.convert import Job
from server.errors import ApiError
from server.fragments import Fragment, Kind, is_whole
from server.streaming import sse

Scores = tuple[TokenLogprob, ...]
Events = Iterable[Fields]  # each with its `type`, which is its name on the wire too


@dataclass(slots=True)
class Stretch:
    """What was written of one part without another in between. A call is one for each `id`."""

    kind: Kind
    place: int  # among the stretches of the answer, from 0
    call_id: str = ""
    name: str = ""
    call: int = 0
    pieces: list[str] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)  # of content, where they are asked for

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def takes(self, fragment: Fragment) -> bool:
        return fragment.kind == self.kind and (self.kind != "call" or fragment.index == self.call)


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended. `finish`: stop or length; None where it was cancelled by another request."""

    finish: str | None
    stop_reason: int | str | None
    called: bool  # was a tool called, and can all calls be made?
    usage: Fields  # as chat completions tell it
    reports: Fields


class Dialect(Protocol):
    """How one endpoint names it all."""

    def begun(self) -> Events: ...

    def opened(self, stretch: Stretch) -> Events: ...

    def grown(self, stretch: Stretch, text: str, scores: Scores) -> Events:
        """`text`, not empty, was added; `scores` are of the tokens that came with it, where they are asked for."""
        ...

    def closed(self, stretch: Stretch, cut: bool) -> Events:
        """`cut`: its end is that of the answer, which was cut."""
        ...

    def ended(self, ending: Ending) -> Events: ...

    def failed(self, error: ApiError) -> Events: ...

    def answer(self) -> Fields:
        """The whole answer, after `ended`."""
        ...


class NamedEvents:
    """A `streaming.Sheet` of one choice, in any dialect. Whole answers go the same way and so equal streams."""

    def __init__(self, job: Job, dialect: Dialect) -> None:
        self._dialect = dialect
        self._meter = Meter(job)
        self._parser = job.manner.parser()
        self._open: Stretch | None = None
        self._count = 0
        self._called = False
        self._scores: Scores = ()  # of tokens whose text was not told yet
        self._last: TokenEvent | None = None

    def opening(self) -> bytes:
        return _encode(self._dialect.begun())

    def event(self, event: TokenEvent) -> bytes:
        return _encode(self._taken(event))

    def closing(self) -> bytes:
        return _encode(self._ended())

    def failed(self, error: ApiError) -> bytes:
        return _encode(self._dialect.failed(error))

    def whole(self, events: Sequence[Sequence[TokenEvent]]) -> Fields:
        (own,) = events
        for told in (self._dialect.begun(), *map(self._taken, own), self._ended()):
            for _ in told:
                pass
        return self._dialect.answer()

    def _taken(self, event: TokenEvent) -> Iterator[Fields]:
        finish_word(event.finish)  # raises where there is no answer
        self._meter.note(0, event)
        self._scores += event.logprobs or ()
        fragments = list(self._parser.feed(event.text))
        if event.finish is not None:
            self._last = event
            fragments += self._parser.end()
        yield from self._told(fragments)

    def _told(self, fragments: Sequence[Fragment]) -> Iterator[Fields]:
        """The scores go to the last content among the fragments; tokens of other parts have none to show."""
        runs: list[tuple[Stretch, list[str]]] = []
        for fragment in fragments:
            stretch = runs[-1][0] if runs else self._open
            if stretch is None or not stretch.takes(fragment):
                stretch = self._new(fragment)
            if not runs or runs[-1][0] is not stretch:
                runs.append((stretch, []))
            runs[-1][1].append(fragment.text)
        last = max((i for i, (stretch, _) in enumerate(runs) if stretch.kind == "content"), default=-1)
        for i, (stretch, pieces) in enumerate(runs):
            if stretch is not self._open:
                yield from self._closed(cut=False)
                self._open = stretch
                yield from self._dialect.opened(stretch)
            if text := "".join(pieces):
                scores = self._scores if i == last else ()
                stretch.pieces.append(text)
                stretch.scores.extend(scores)
                yield from self._dialect.grown(stretch, text, scores)
        if runs:
            self._scores = ()

    def _new(self, fragment: Fragment) -> Stretch:
        self._called = self._called or fragment.kind == "call"
        self._count += 1
        return Stretch(fragment.kind, self._count - 1, fragment.id, fragment.name, fragment.index)

    def _closed(self, cut: bool) -> Iterator[Fields]:
        if self._open is not None:
            yield from self._dialect.closed(self._open, cut)
            self._open = None

    def _ended(self) -> Iterator[Fields]:
        finish = None if self._last is None else finish_word(self._last.finish)
        if not self._count:  # an empty answer has a content, too
            self._open = self._new(Fragment("content"))
            yield from self._dialect.opened(self._open)
        if self._open is not None and self._open.kind == "content":
            self._open.scores.extend(self._scores)
        broken = self._open is not None and self._open.kind == "call" and not is_whole(self._open.text)
        yield from self._closed(cut=finish != "stop" or broken)
        called = self._called and not broken
        stop = None if self._last is None else self._last.stop_reason
        yield from self._dialect.ended(Ending(finish, stop, called, self._meter.usage(), self._meter.reports()))


def _encode(events: Events) -> bytes:
    return b"".join(sse(event, str(event["type"])) for event in events)
