"""One line on a terminal that tells how a run goes; silent where nobody looks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TextIO

from benchmarks.serve_load import OK, Sender

REFRESH_SECONDS = 0.5
BAR = 20  # characters


@asynccontextmanager
async def progress(sender: Sender, title: str, total: int | None, stream: TextIO) -> AsyncIterator[None]:
    """Redraw the line for as long as the block lasts, and wipe it away at its end."""
    if not stream.isatty():
        yield
        return
    task = asyncio.ensure_future(_redraw(sender, title, total, stream))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        stream.write("\r\x1b[K")
        stream.flush()


async def _redraw(sender: Sender, title: str, total: int | None, stream: TextIO) -> None:
    began = time.monotonic()
    while True:
        stream.write("\r" + line(sender, title, total, time.monotonic() - began) + "\x1b[K")
        stream.flush()
        await asyncio.sleep(REFRESH_SECONDS)


def line(sender: Sender, title: str, total: int | None, seconds: float) -> str:
    """Such as "8 at once [######              ] 19/64  8 running  131 chunks/s  1 failed  12 s"."""
    done = len(sender.outcomes)
    bar = "#" * round(BAR * done / total) if total else ""
    failed = sum(outcome.kind != OK for outcome in sender.outcomes)
    return "  ".join(
        [
            f"{title} [{bar:<{BAR}}] {done}/{total}" if total else f"{title} {done} done",
            f"{sender.in_flight} running",
            f"{sender.chunks / seconds if seconds else 0:.0f} chunks/s",
            *([f"{failed} failed"] if failed else []),
            f"{seconds:.0f} s",
        ]
    )
