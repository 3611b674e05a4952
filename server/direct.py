"""The short way for the chunks of an event stream: from where they are made to the connection's socket.

ASGI's `send` passes each chunk through the middlewares, none of which has anything to do with it, and through h11,
whose part is to write its length in front. Beside a model that keeps all cores busy every function on the way is cold
and costs ten times what a profile says. So the connection lends a writer in the scope; heads and ends of responses, and
whatever it can't take now, go the usual way.
"""

from __future__ import annotations

from typing import Protocol

from starlette.types import Scope

KEY = "slipstream.chunks"  # in the scope


class ChunkWriter(Protocol):
    """Writes body chunks of the response under way, which must be one without a length."""

    @property
    def sent(self) -> int:
        """Bytes of bodies so far."""
        ...

    def ready(self) -> bool:
        """May a chunk be written now: the head is on its way, the client is there and keeps up."""
        ...

    def write(self, data: bytes) -> None:
        """Only while `ready`; never waits. `data` is not empty."""
        ...


def writer_of(scope: Scope) -> ChunkWriter | None:
    """The connection's own writer; None where another server than ours runs the application."""
    found: ChunkWriter | None = scope.get(KEY)
    return found
