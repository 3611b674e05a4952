"""A streamed answer of an OpenAI-compatible server: bytes become events, events become chunks with a time each.

Times are seconds of `time.monotonic()`. An event belongs to the piece of bytes that completed it: how a server or
the network cuts the bytes changes nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import msgspec

Piece = tuple[float, bytes]  # when some bytes arrived, and the bytes
DONE = b"[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r")


class BenchmarkError(Exception):
    """A server can't be measured: it does not answer, answers with an error, or does not do what was asked."""


class RequestFailed(BenchmarkError):
    """One request failed. `kind` is a short word to count it by: connect, timeout, cut, http_503, error_event ..."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Chunk:
    """One streamed event that carries a part of the answer. `total` is the count of tokens so far, where told."""

    at: float
    text: str
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """A finished request. `chunks` is never empty."""

    sent: float
    ended: float
    chunks: tuple[Chunk, ...]
    prompt_tokens: int
    completion_tokens: int

    @property
    def first_chunk(self) -> Chunk:
        """The first chunk with text in it: an empty one may be a header in disguise."""
        return next((chunk for chunk in self.chunks if chunk.text), self.chunks[0])

    @property
    def first_token(self) -> float:
        """Seconds from sending the request to its first token."""
        return self.first_chunk.at - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring chunks with text: the inter-token latencies that a reader sees."""
        return [later.at - chunk.at for chunk, later in pairwise(chunk for chunk in self.chunks if chunk.text)]

    @property
    def per_token(self) -> float | None:
        """Mean seconds per output token after the first (TPOT); None for answers of one token."""
        texts = [chunk.at for chunk in self.chunks if chunk.text]
        if self.completion_tokens < 2 or len(texts) < 2:
            return None
        return (texts[-1] - texts[0]) / (self.completion_tokens - 1)

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one. Raises BenchmarkError for an answer that came in one piece."""
        first, last = self.first_chunk, self.chunks[-1]
        if last.at <= first.at:
            raise BenchmarkError("the answer came in one piece: there is no decode rate to measure")
        return (self.completion_tokens - (first.total or 1)) / (last.at - first.at)


class EventSplitter:
    """The data of server-sent events out of bytes that may be cut anywhere (WHATWG HTML, 9.2.6)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that this piece completes; comments and other fields are left out."""
        text = self._rest + piece
        held = b"\r" if text.endswith(b"\r") else b""  # perhaps the first half of a line's end
        text = text.removesuffix(held)
        *lines, rest = _LINE_END.split(text) if b"\r" in text else text.split(b"\n")
        self._rest = rest + held
        found = []
        for line in lines:
            if not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
        return found

    def last(self) -> list[bytes]:
        """At the end of the stream: an event that lacks its blank line is no event, unless it is the closing one."""
        line = self._rest.rstrip(b"\r").removeprefix(b"data:").strip()
        return [DONE] if DONE in (line, *self._data) else []


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def piece(self) -> str:
        """The text of a chunk, of a completion or a chat, thoughts included: they are tokens, too."""
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning_content or self.delta.reasoning or ""


class _Error(msgspec.Struct):
    message: str = "no message"


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: Usage | None = None
    error: _Error | str | None = None


_decoder = msgspec.json.Decoder(_Event)


class AnswerReader:
    """Takes in one streamed answer while it arrives: about 3 microseconds a chunk, a small part of what HTTP costs."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.usage: Usage | None = None
        self._splitter = EventSplitter()
        self._done = False  # the stream said [DONE]
        self._finished = False  # a choice told why it ended

    def feed(self, at: float, data: bytes) -> None:
        """Bytes that arrived at `at`. Raises RequestFailed for an error event, or one that is no completion chunk."""
        for event in self._splitter.feed(data):
            self._take(at, event)

    def close(self) -> None:
        """The stream has ended. Raises RequestFailed unless it was whole; a server may leave out [DONE]."""
        self._done = self._done or bool(self._splitter.last())
        if not (self.chunks and (self._done or self._finished)):
            raise RequestFailed("cut", "the stream ended before it was complete")

    def _take(self, at: float, data: bytes) -> None:
        if self._done:
            return
        if data == DONE:
            self._done = True
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise RequestFailed("malformed", f"an event is no completion chunk: {error}") from error
        if event.error is not None:
            message = event.error if isinstance(event.error, str) else event.error.message
            raise RequestFailed("error_event", message)
        self.usage = event.usage or self.usage
        if event.choices:
            total = event.usage.completion_tokens if event.usage else None
            self.chunks.append(Chunk(at, "".join(choice.piece() for choice in event.choices), total))
            self._finished = self._finished or any(choice.finish_reason for choice in event.choices)


def read_answer(sent: float, pieces: Iterable[Piece], max_tokens: int) -> Timing:
    """The timing of a stream from its stamped bytes. Raises BenchmarkError unless it is whole and as long as asked."""
    reader, ended = AnswerReader(), sent
    for ended, data in pieces:
        reader.feed(ended, data)
    reader.close()
    return exact_timing(sent, ended, reader, max_tokens)


def exact_timing(sent: float, ended: float, reader: AnswerReader, max_tokens: int) -> Timing:
    """The timing of an answer that was read to its end. Raises BenchmarkError unless it is as long as asked."""
    usage = reader.usage
    if usage is None:
        raise BenchmarkError("the server does not tell the usage of a stream")
    if usage.completion_tokens != max_tokens:
        raise BenchmarkError(f"asked for {max_tokens} tokens past any end of sequence, got {usage.completion_tokens}")
    return Timing(sent, ended, tuple(reader.chunks), usage.prompt_tokens, usage.completion_tokens)


def events(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The data of each server-sent event, with the time at which it was complete; comments are left out."""
    splitter = EventSplitter()
    for at, data in pieces:
        for event in splitter.feed(data):
            yield at, event
