"""One streamed request to any OpenAI-compatible server, and when each part of its answer arrived.

While a stream runs, its bytes are only stamped and kept; they are parsed when it has ended. A client that parses
shares the cores with the server it measures, and would stamp late. Times are seconds of `time.monotonic()`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import httpx
import msgspec

Piece = tuple[float, bytes]  # when some bytes arrived, and the bytes
Prompt = str | Sequence[int]


class BenchmarkError(Exception):
    """A server can't be measured: it does not answer, answers with an error, or does not do what was asked."""


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
    def decode_rate(self) -> float:
        """Tokens per second after the first one. Raises BenchmarkError for an answer that came in one piece."""
        first, last = self.first_chunk, self.chunks[-1]
        if last.at <= first.at:
            raise BenchmarkError("the answer came in one piece: there is no decode rate to measure")
        return (self.completion_tokens - (first.total or 1)) / (last.at - first.at)


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    text: str | None = None


class _Error(msgspec.Struct):
    message: str = "no message"


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: _Error | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[int]


def completion_body(model: str, prompt: Prompt, max_tokens: int, *, usage_each: bool = False) -> bytes:
    """The JSON of a greedy streamed completion of exactly `max_tokens` tokens.

    `usage_each` asks for the count of tokens with every chunk (an extension that vLLM and Slipstream have).
    """
    options = {"include_usage": True, **({"continuous_usage_stats": True} if usage_each else {})}
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return msgspec.json.encode({**body, "stream": True, "stream_options": options})


class Server:
    """One measured server. `url` is its root, with or without /v1. Use it as an async context manager."""

    def __init__(self, name: str, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.name = name
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(10, read=600),  # a long queue is no error
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> Server:
        try:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            models = msgspec.json.decode(response.content, type=_Models).data
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            await self._http.aclose()
            raise BenchmarkError(f"{self.name}: {self.url}/v1/models: {error}") from error
        if not models:
            raise BenchmarkError(f"{self.name} serves no model")
        self.model = models[0].id
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def complete(self, prompt: Prompt, max_tokens: int) -> Timing:
        """Stream one greedy completion of exactly `max_tokens` tokens. Raises BenchmarkError."""
        body = completion_body(self.model, prompt, max_tokens)
        pieces: list[Piece] = []
        sent = time.monotonic()
        try:
            async with self._http.stream("POST", "/v1/completions", content=body) as response:
                async for data in response.aiter_raw():
                    pieces.append((time.monotonic(), data))
        except httpx.HTTPError as error:
            raise BenchmarkError(f"{self.name}: {type(error).__name__}: {error}") from error
        if response.is_error:
            text = b"".join(data for _, data in pieces).decode(errors="replace")
            raise BenchmarkError(f"{self.name}: HTTP {response.status_code}: {text[:500]}")
        try:
            return read_answer(sent, pieces, max_tokens)
        except BenchmarkError as error:
            raise BenchmarkError(f"{self.name}: {error}") from error

    async def tokenize(self, text: str) -> list[int] | None:
        """The ids of a text through POST /tokenize; None where the server has no such endpoint."""
        body = msgspec.json.encode({"model": self.model, "prompt": text})
        try:
            response = await self._http.post("/tokenize", content=body)
            if response.status_code in (404, 405):
                return None
            response.raise_for_status()
            return msgspec.json.decode(response.content, type=_Tokens).tokens
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise BenchmarkError(f"{self.name}: /tokenize: {error}") from error


def read_answer(sent: float, pieces: Sequence[Piece], max_tokens: int) -> Timing:
    """The timing of a stream from its stamped bytes. Raises BenchmarkError unless it is whole and as long as asked."""
    chunks: list[Chunk] = []
    usage: _Usage | None = None
    done = False
    for at, data in events(pieces):
        if data == b"[DONE]":
            done = True
            break
        try:
            event = msgspec.json.decode(data, type=_Event)
        except msgspec.DecodeError as error:
            raise BenchmarkError(f"an event is no completion chunk: {error}") from error
        if event.error is not None:
            raise BenchmarkError(event.error.message)
        usage = event.usage or usage
        if event.choices:
            total = event.usage.completion_tokens if event.usage else None
            chunks.append(Chunk(at, event.choices[0].text or "", total))
    if not (done and chunks):
        raise BenchmarkError("the stream ended before it was complete")
    if usage is None:
        raise BenchmarkError("the server does not tell the usage of a stream")
    if usage.completion_tokens != max_tokens:
        raise BenchmarkError(f"asked for {max_tokens} tokens past any end of sequence, got {usage.completion_tokens}")
    return Timing(sent, pieces[-1][0], tuple(chunks), usage.prompt_tokens, usage.completion_tokens)


def events(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The data of each server-sent event, with the time at which its line was complete; comments are left out."""
    rest = b""
    for at, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            field, _, value = line.rstrip(b"\r").partition(b":")
            if field == b"data":
                yield at, value.strip()
