"""What the HTTP half asks of its parts: an engine, its tokenizer, and a place for metrics.

`engine.async_engine.AsyncEngine` and `server.metrics.Metrics` satisfy these; tests put lighter objects in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

from engine.protocols import EngineObserver
from engine.types import Health, ModelInfo, Phase, Request, TokenEvent


class Tokenizer(Protocol):
    """Text to ids and back. Called from several threads at once."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def is_special(self, token_id: int) -> bool: ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Apply the chat template. Raises InvalidRequest for messages that the template refuses."""
        ...


class EventStream(Protocol):
    """The merged events of the requests of one `submit`. Closing it early cancels what is not finished."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    def divert(self, sink: Callable[[TokenEvent], bool]) -> None:
        """Offer each event to `sink` first, which takes it at once or says False."""
        ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """One served model. `info` and `tokenizer` are there once `start` has returned."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def health(self) -> Health: ...

    async def start(self, on_phase: Callable[[Phase], None]) -> None: ...

    async def submit(self, requests: Sequence[Request], *, param: str = "prompt") -> EventStream:
        """Queue all or none; `param` is the client's name of the prompt in errors.

        Raises InvalidRequest, Overloaded or EngineDead before anything is queued.
        """
        ...

    def add_observer(self, observer: EngineObserver) -> None: ...

    async def drain(self, timeout: float) -> object:
        """Refuse new requests, wait at most `timeout` seconds for those in flight, then end the rest."""
        ...

    async def close(self) -> None: ...


class Metrics(Protocol):
    """Where numbers go. `handler` is a route's path template, or "none" where no route matched."""

    def observer(self, model_name: str, info: ModelInfo) -> EngineObserver: ...

    def watch(self, model_name: str, healthy: Callable[[], bool]) -> None: ...

    def observe_http(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None: ...

    def render(self) -> tuple[bytes, str]:
        """The body and content type of `GET /metrics`."""
        ...
