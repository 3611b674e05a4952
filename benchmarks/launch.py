"""Start a server as a child, wait until it is ready, end it. Used where the start itself, or its log, is measured."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.stream import BenchmarkError

POLL_SECONDS = 0.02
STOP_SECONDS = 60.0
LOG_TAIL = 3000  # characters of a failed server's log that are shown


@dataclass(frozen=True, slots=True)
class Launched:
    """A running server; `ready_seconds` counts from the start of its process to its first 200."""

    pid: int
    url: str
    log: Path
    ready_seconds: float


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fill_in_port(command: Sequence[str], port: int) -> list[str]:
    """The command with every {port} replaced. Raises BenchmarkError where there is none: it would serve elsewhere."""
    filled = [part.replace("{port}", str(port)) for part in command]
    if filled == list(command):
        raise BenchmarkError("the command does not say {port} anywhere, as in: slipstream serve --port {port}")
    return filled


class ServerProcess:
    """A server command in a POSIX session of its own, its output in `log`. Use it as a context manager."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self.began = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, path: str, timeout: float) -> float:
        """Seconds from the start to the first 200 at `path`. Raises BenchmarkError with the end of its log."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=5) as http:
            while time.monotonic() - self.began < timeout:
                with contextlib.suppress(httpx.TransportError):
                    if http.get(path).status_code == 200:
                        return time.monotonic() - self.began
                if self._process.poll() is not None:
                    raise BenchmarkError(f"the server ended with {self._process.returncode}:\n{self._tail()}")
                time.sleep(POLL_SECONDS)
        raise BenchmarkError(f"the server was not ready within {timeout:.0f} s:\n{self._tail()}")

    def stop(self) -> float:
        """End it and all that it started; returns the seconds that it took to leave. Stopping twice is fine."""
        began = time.monotonic()
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # whatever is left of its session
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return time.monotonic() - began

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]


@contextlib.contextmanager
def running(command: Sequence[str], port: int, log: Path, ready_path: str, timeout: float) -> Iterator[Launched]:
    """A server that is ready, for as long as the block lasts."""
    server = ServerProcess(command, port, log)
    try:
        yield Launched(server.pid, server.url, log, server.wait_ready(ready_path, timeout))
    finally:
        server.stop()
