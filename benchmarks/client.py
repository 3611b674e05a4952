"""An HTTP client of any OpenAI-compatible server: streamed answers, each part with the time of its arrival.

While a stream runs, the client stamps each piece of bytes first and parses it then: the clock is read before any
work is done. It shares the cores with the server it measures, so it does as little as it can.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import httpx
import msgspec

from benchmarks.prompts import CountTokens, estimate_tokens
from benchmarks.stream import AnswerReader, BenchmarkError, RequestFailed, Timing, exact_timing
from benchmarks.transport import OneConnectionEach

Prompt = str | Sequence[int]
COMPLETIONS = "/v1/completions"
CONNECT_SECONDS = 10.0
READ_SECONDS = 600.0  # between two pieces: a long queue is no error
DETAIL = 500  # characters of an error's text that are kept


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[int]


def completion_body(
    model: str, prompt: Prompt, max_tokens: int, *, usage_each: bool = False, ignore_eos: bool = True
) -> bytes:
    """The JSON of a greedy streamed completion of exactly `max_tokens` tokens.

    `usage_each` asks for the count of tokens with every chunk (an extension that vLLM and Slipstream have).
    `ignore_eos` False leaves that field out, for servers that refuse it.
    """
    options = {"include_usage": True, **({"continuous_usage_stats": True} if usage_each else {})}
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}
    end = {"ignore_eos": True} if ignore_eos else {}
    return msgspec.json.encode({**body, **end, "stream": True, "stream_options": options})


class Server:
    """One measured server. `url` is its root, with or without /v1. Use it as an async context manager.

    `model` is asked for; "" is the first one of /v1/models, where `max_model_len` is found as well, if told.
    `ignore_eos` False is for servers that do not know that field: their model must never end by itself.
    """

    def __init__(
        self,
        name: str,
        url: str,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        model: str = "",
        api_key: str = "",
        ignore_eos: bool = True,
    ) -> None:
        self.name = name
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.max_model_len: int | None = None
        self._ignore_eos = ignore_eos
        self._transport = transport or OneConnectionEach()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={**headers, **({"Authorization": f"Bearer {api_key}"} if api_key else {})},
            timeout=httpx.Timeout(CONNECT_SECONDS, read=READ_SECONDS),
            trust_env=False,
            transport=self._transport,
        )

    async def __aenter__(self) -> Server:
        if self.model:
            return self
        try:
            models = await self._models()
        except BaseException:
            await self._http.aclose()
            raise
        if not models:
            raise BenchmarkError(f"{self.name} serves no model")
        self.model, self.max_model_len = models[0].id, models[0].max_model_len
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def stream(self, path: str, body: bytes, reader: AnswerReader) -> None:
        """Send a request and feed its answer to `reader` as it arrives, to its end. Raises RequestFailed."""
        try:
            async with self._http.stream("POST", path, content=body) as response:
                if response.is_error:
                    text = (await response.aread()).decode(errors="replace")
                    raise RequestFailed(f"http_{response.status_code}", f"HTTP {response.status_code}: {text[:DETAIL]}")
                async for data in response.aiter_raw():
                    reader.feed(time.monotonic(), data)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise RequestFailed("connect", f"{type(error).__name__}: {error}") from error
        except httpx.TimeoutException as error:
            raise RequestFailed("timeout", f"{type(error).__name__}: {error}") from error
        except httpx.HTTPError as error:
            raise RequestFailed("cut", f"{type(error).__name__}: {error}") from error
        reader.close()

    async def complete(self, prompt: Prompt, max_tokens: int) -> Timing:
        """Stream one greedy completion of exactly `max_tokens` tokens. Raises BenchmarkError."""
        body = completion_body(self.model, prompt, max_tokens, ignore_eos=self._ignore_eos)
        reader = AnswerReader()
        sent = time.monotonic()
        try:
            await self.stream(COMPLETIONS, body, reader)
            return exact_timing(sent, time.monotonic(), reader, max_tokens)
        except BenchmarkError as error:
            raise BenchmarkError(f"{self.name}: {error}") from error

    async def tokenize(self, text: str) -> list[int] | None:
        """The ids of a text through POST /tokenize; None where the server has no such endpoint.

        llama.cpp has one with other field names, which answers a body like ours with no tokens: None, too.
        """
        body = msgspec.json.encode({"model": self.model, "prompt": text})
        try:
            response = await self._http.post("/tokenize", content=body)
            if response.status_code in (404, 405):
                return None
            response.raise_for_status()
            return msgspec.json.decode(response.content, type=_Tokens).tokens or None
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise BenchmarkError(f"{self.name}: /tokenize: {error}") from error

    async def forget_connections(self) -> None:
        """Close what is kept alive; for a server that was stopped, and may close them itself once it goes on."""
        if isinstance(self._transport, OneConnectionEach):
            await self._transport.close_idle()

    async def text_of(self, path: str) -> str | None:
        """The body of a plain GET, such as /metrics; None where there is nothing to be had."""
        try:
            response = await self._http.get(path)
        except httpx.HTTPError:
            return None
        return response.text if response.is_success else None

    async def _models(self) -> list[_Model]:
        try:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            return msgspec.json.decode(response.content, type=_Models).data
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise BenchmarkError(f"{self.name}: {self.url}/v1/models: {error}") from error


async def find_counter(servers: Sequence[Server]) -> tuple[CountTokens, str]:
    """A way to count tokens through the first server that has /tokenize, and its name; else an estimate and ""."""
    for server in servers:
        if await server.tokenize("text") is not None:

            async def count(text: str, server: Server = server) -> int:
                return len(await server.tokenize(text) or ())

            return count, server.name
    return estimate_tokens, ""
