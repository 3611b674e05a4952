"""What the HTTP half asks of whoever writes traces; `otel.py` is the one there is, imported only where it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.types import Scope

from engine.types import ModelInfo, Request, RequestSummary


class Trace(Protocol):
    """The trace of the requests of one submission."""

    def note(self, summary: RequestSummary) -> None:
        """One of them has ended; with the last one the trace is complete."""
        ...

    def refused(self, error: Exception) -> None:
        """None of them was taken."""
        ...


class Tracer(Protocol):
    def begin(self, scope: Scope, info: ModelInfo, requests: Sequence[Request]) -> Trace:
        """Requests are about to be submitted, for the exchange of `scope`."""
        ...

    def close(self) -> None:
        """Send what is left; may wait for some seconds."""
        ...
