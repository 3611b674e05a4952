"""What the HTTP half asks of its parts: an engine, its tokenizer, and a place for metrics.

`engine.async_engine.AsyncEngine` and `server.metrics.Metrics` satisfy these; tests put lighter objects in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from engine.grammar import Grammar
from engine.protocols import EngineObserver
from engine.types import EngineStats, Health, ModelInfo, Phase, Request, TokenEvent


class Tokenizer(Protocol):
    """Text to ids and back. Called from several threads at once."""

    @property
    def info(self) -> Mapping[str, object]:
        """As tokenizer_config.json has it, with the chat template."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def is_special(self, token_id: int) -> bool: ...

    def added_id(self, text: str) -> int | None:
        """The token that stands for this text and no other, if there is one."""
        ...

    def template_mentions(self, text: str) -> bool:
        """Does the source of the chat template hold this text?"""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
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

    async def check_grammar(self, grammar: Grammar, param: str = "grammar") -> None:
        """Raises InvalidRequest that names `param` where no answer can follow it, and Overloaded."""
        ...

    def add_observer(self, observer: EngineObserver) -> None: ...

    @property
    def stats(self) -> EngineStats:
        """As its last step has left them."""
        ...

    def cancel(self, wanted: Callable[[str], bool]) -> Sequence[str]:
        """End the requests whose ids are wanted: their streams raise Cancelled. Returns these ids."""
        ...

    def operator(self) -> Operator:
        """Raises EngineDead."""
        ...

    async def drain(self, timeout: float) -> object:
        """Refuse new requests, wait at most `timeout` seconds for those in flight, then end the rest."""
        ...

    async def close(self) -> None: ...


class Operator(Protocol):
    """What an operator asks of an engine. All of it raises ControlRefused and EngineDead."""

    async def reset_prefix_cache(self) -> int:
        """Returns how many blocks could be found until now."""
        ...

    async def start_profile(self, folder: Path, seconds: float, steps: int) -> None:
        """Record steps into a new folder until `stop_profile`, or one of the bounds is reached."""
        ...

    async def stop_profile(self) -> int:
        """Returns how many steps were recorded."""
        ...


class Metrics(Protocol):
    """Where numbers go. `handler` is a route's path template, or "none" where no route matched."""

    def observer(self, model_name: str, info: ModelInfo) -> EngineObserver: ...

    def watch(self, model_name: str, healthy: Callable[[], bool]) -> None: ...

    def observe_http(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None: ...

    def watch_key(self, key: str, running: Callable[[], int]) -> None:
        """Expose an API key's series under its name."""
        ...

    def limited(self, key: str, limit: str) -> None:
        """A request was refused with 429; `limit` is one of `limits.LIMITS`."""
        ...

    def render(self) -> tuple[bytes, str]:
        """The body and content type of `GET /metrics`."""
        ...
