"""Phases of the start-up: how long each takes, and what the process holds after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.runtime.memory import resident_bytes
from engine.types import Phase

OnPhase = Callable[[Phase], None]


@contextmanager
def phase(name: str, on_phase: OnPhase) -> Iterator[list[str]]:
    """Time a phase of the start-up; the body may append a detail for the table."""
    detail: list[str] = []
    begin = time.monotonic()
    yield detail
    on_phase(Phase(name, time.monotonic() - begin, resident_bytes(), "; ".join(detail)))
