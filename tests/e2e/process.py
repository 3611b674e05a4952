"""The real command, in a process group of its own, and everything that it could leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import httpx

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "server")
START_SECONDS = 90.0  # generous: the machine may be busy, and the first start converts the demo model
END_SECONDS = 30.0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Poll until `condition` holds. Raises AssertionError naming `what` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Process ids whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:  # it has ended meanwhile
                continue
            if int(parent) == pid:
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    """Does the process exist, and is it no zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


class ServerProcess:
    """`slipstream serve` with `arguments`. As a context manager it is killed at the end if it still runs.

    It gets a temporary directory of its own, so that what it leaves there can be seen; `temporary` is its name.
    With `unread`, its output goes into a pipe that nobody reads any more.
    """

    def __init__(self, *arguments: str, port: int = 0, temporary: str = "tmp", unread: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="e2e-")
        self.temporary = Path(self._folder.name, temporary)
        self.temporary.mkdir()
        self._out, self._err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        self.url = f"http://127.0.0.1:{port}" if port else ""
        with self._out.open("wb") as out, self._err.open("wb") as err, _unread_pipe() as pipe:
            self._process = subprocess.Popen(
                [*COMMAND, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)],
                cwd=ROOT,
                env=_environment(self.temporary),
                stdin=subprocess.DEVNULL,
                stdout=pipe if unread else out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(encoding="utf-8")

    @property
    def log(self) -> str:
        return self._err.read_text(encoding="utf-8")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def engine_pid(self) -> int:
        """Its one engine process; another child may be there to check grammars."""
        mark = b"engine.cluster.process"
        (pid,) = (pid for pid in children(self.pid) if mark in Path(f"/proc/{pid}/cmdline").read_bytes())
        return pid

    def wait_ready(self) -> ServerProcess:
        """Wait for /ready, and before it for the start-up table if that alone knows the port."""

        def told_where() -> bool:
            assert self._process.poll() is None, f"the server ended with {self._process.returncode}:\n{self.log}"
            found = re.search(r" at (http://127\.0\.0\.1:\d+)/v1 [^\0]*\ncurl ", self.output)
            self.url = self.url or (found[1] if found is not None else "")
            return bool(self.url)

        def ready() -> bool:
            try:
                return told_where() and httpx.get(f"{self.url}/ready", timeout=10).status_code == 200
            except httpx.ConnectError:
                return False

        wait_until(told_where, "the start-up table", START_SECONDS)
        wait_until(ready, "/ready", START_SECONDS)
        return self

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """To the server alone, or as Ctrl-C does to everything it has started."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = END_SECONDS) -> int:
        """Its exit status."""
        return self._process.wait(seconds)

    def processes(self) -> list[int]:
        """Every process that it has started and that has not ended, told by the temporary directory they share."""
        mark = f"TMPDIR={self.temporary}\0".encode()
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _carries(entry, mark)]

    def assert_gone(self) -> None:
        """No process that it has started is left, and no socket or directory of its own (torch leaves one)."""
        wait_until(lambda: not self.processes(), "the end of every process that the server has started", 10)
        wait_until(lambda: not self.left_over(), f"{self.temporary} to be cleared", 10)

    def left_over(self) -> list[Path]:
        """Sockets, and whatever carries the server's name."""
        return [path for path in self.temporary.rglob("*") if path.is_socket() or path.name.startswith("slipstream")]

    def assert_clean_end(self, number: signal.Signals = signal.SIGTERM, *, group: bool = False) -> None:
        """End it with a signal: exit status 0, no process and no file left, and no failure in its log."""
        self.send(number, group=group)
        assert self.wait() == 0, self.log[-3000:]
        self.assert_gone()
        lines = self.log.splitlines()
        bad = [i for i, line in enumerate(lines) if re.search(r"Traceback| ERROR |^ERROR|Warning:|leaked", line)]
        assert not bad, "\n".join(lines[bad[0] - 2 : bad[0] + 40])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:  # pytest shows it beside the failure
            print(f"--- the server's output\n{self.output[-2000:]}\n--- its log\n{self.log[-4000:]}")  # noqa: T201
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)
        self._folder.cleanup()


@contextlib.contextmanager
def _unread_pipe() -> Iterator[int]:
    """The end to write to of a pipe that has no other end."""
    read, write = os.pipe()
    os.close(read)
    try:
        yield write
    finally:
        os.close(write)


def _environment(temporary: Path) -> dict[str, str]:
    """A user's: without what `tests/conftest.py` and torch itself set in the process of the tests."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_CACHE_DIR")
    return {**{k: v for k, v in os.environ.items() if k not in ours}, "TMPDIR": str(temporary)}


def _carries(process: Path, mark: bytes) -> bool:
    try:
        return mark in (process / "environ").read_bytes()
    except OSError:  # another user's, or it has ended meanwhile
        return False


def run_command(*arguments: str, given: str = "", seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run one `slipstream` command to its end; `given` is its standard input."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, input=given, capture_output=True, text=True, timeout=seconds, check=False
    )
