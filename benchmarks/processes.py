"""What the processes of this machine use, read from /proc: CPU seconds beside a measurement, memory of a tree."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 0.05
_LISTEN = "0A"  # the state of a listening socket in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class Process:
    """`own` and `reaped` are CPU seconds: its own, and those of its children that have ended."""

    pid: int
    parent: int
    group: int  # the id of its POSIX session
    started: int  # in ticks since boot; with the pid it names a process for good
    own: float
    reaped: float


Table = Mapping[int, Process]


def parse_stat(text: str) -> Process:
    """One /proc/<pid>/stat. The name may hold anything, so fields are counted from its last bracket."""
    pid = int(text.partition(" ")[0])
    fields = text[text.rindex(")") + 2 :].split()
    user, system, children_user, children_system = (int(field) for field in fields[11:15])
    own, reaped = (user + system) / TICKS, (children_user + children_system) / TICKS
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), own, reaped)


def process_table() -> dict[int, Process]:
    """All processes that can be seen from here."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            try:
                process = parse_stat((entry / "stat").read_text(encoding="utf-8", errors="replace"))
            except (OSError, ValueError):  # it has ended meanwhile
                continue
            found[process.pid] = process
    return found


def family(table: Table, roots: Collection[int]) -> set[int]:
    """The roots, all that descends from them, and everything in a session that one of them leads."""
    found = {pid for pid, process in table.items() if pid in roots or process.group in roots}
    while more := {pid for pid, process in table.items() if process.parent in found} - found:
        found |= more
    return found


def listeners(url: str) -> set[int]:
    """The local processes that listen on the port of `url`; empty for a server elsewhere."""
    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
        return set()
    port = parts.port or (443 if parts.scheme == "https" else 80)
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    return {pid for pid in process_table() if sockets & set(_open_files(pid))}


def _listening_inodes(port: int) -> Iterable[str]:
    for name in ("tcp", "tcp6"):
        path = PROC / "net" / name
        for line in path.read_text(encoding="ascii").splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _open_files(pid: int) -> list[str]:
    try:
        return [os.readlink(entry) for entry in (PROC / str(pid) / "fd").iterdir()]
    except OSError:  # it has ended, or belongs to somebody else
        return []


def used_by_others(before: Table, after: Table, excluded: Collection[int]) -> float:
    """CPU seconds that the processes outside `excluded` used between two tables.

    What a process used counts for its parent once it has ended, so a sum over everything living misses nothing
    that was waited for. Where nobody waits, a whole past falls out of that sum: then what the living ones used
    themselves is the better bound.
    """
    first = {pid: process for pid, process in before.items() if pid not in excluded}
    last = {pid: process for pid, process in after.items() if pid not in excluded}
    total = sum(p.own + p.reaped for p in last.values()) - sum(p.own + p.reaped for p in first.values())
    living = 0.0
    for pid, process in last.items():
        known = first.get(pid)
        same = known is not None and known.started == process.started
        living += process.own - (known.own if known is not None and same else 0.0)
    return max(total, living, 0.0)


class OtherLoad:
    """Around a measurement: how many cores everything but the measured server and this process kept busy.

    `cores` is there once the block has ended. A server that waits for its turn counts as "other".
    """

    def __init__(self, measured: Collection[int]) -> None:
        self._roots = {*measured, os.getpid()}
        self.cores = 0.0

    def __enter__(self) -> OtherLoad:
        self._before = process_table()
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._began
        after = process_table()
        excluded = family(self._before, self._roots) | family(after, self._roots)
        self.cores = used_by_others(self._before, after, excluded) / seconds if seconds else 0.0


def memory_now(roots: Collection[int]) -> int:
    """Bytes that the roots and all that descends from them hold together (PSS: shared pages are counted once)."""
    return sum(map(_share, family(process_table(), roots)))


def signal_family(roots: Collection[int], number: signal.Signals) -> None:
    """Send a signal to the roots and all that descends from them, those included that are born meanwhile."""
    reached: set[int] = set()
    while new := family(process_table(), roots) - reached:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        reached |= new


class MemorySampler:
    """The memory of a process and all its descendants, sampled from a thread until `stop`.

    `peak` is the largest sum of PSS seen, in bytes: shared pages are counted once, and a peak between two samples
    is missed. `upper_bound` adds up the highest resident size of every process, whenever each had it, with
    shared pages counted again for each: the truth lies between the two.
    """

    def __init__(self, root: int) -> None:
        self.peak = 0
        self._root = root
        self._highest: dict[tuple[int, int], int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="memory-sampler")
        self._thread.start()

    @property
    def upper_bound(self) -> int:
        return sum(self._highest.values())

    def stop(self) -> None:
        """Take a last sample and end."""
        self._ended.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        table = process_table()
        members = family(table, {self._root})
        for pid in members:
            key = (pid, table[pid].started)
            highest = max(self._highest.get(key, 0), _kilobytes(PROC / str(pid) / "status", "VmHWM:"))
            self._highest = {**self._highest, key: highest}  # replaced, as another thread may be reading it
        self.peak = max(self.peak, sum(map(_share, members)))


def _share(pid: int) -> int:
    return _kilobytes(PROC / str(pid) / "smaps_rollup", "Pss:")


def _kilobytes(path: Path, field: str) -> int:
    """A field of a /proc file in bytes; 0 where the process has ended or is a zombie."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)
