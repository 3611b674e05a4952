"""The record of `benchmarks.performance`: one JSON file, a part of the report under each name.

Parts are written one by one, so a run that is cut keeps those that it had finished, and a part that is run alone
replaces its own and leaves the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks import report

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class About:
    """Where and how a part was measured. `other_cores`: kept busy by other processes, on average; "" of no error."""

    command: str
    commit: str
    machine: str
    began: str
    minutes: float
    other_cores: float


class Part(msgspec.Struct):
    about: About
    found: Json


class Stopwatch:
    """Times a part, and says where it ran."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._began, self._from = time.strftime("%Y-%m-%d %H:%M %z"), time.monotonic()

    def about(self, other_cores: float) -> About:
        minutes = (time.monotonic() - self._from) / 60
        return About(self._command, report.git_commit(), report.machine(), self._began, minutes, other_cores)


def read(file: Path) -> dict[str, Part]:
    """The parts of an earlier run; none where there is no such file."""
    return msgspec.json.decode(file.read_bytes(), type=dict[str, Part]) if file.exists() else {}


def write(file: Path, parts: Mapping[str, Part]) -> None:
    """All parts, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(parts)) + b"\n")
    partial.replace(file)


def merged(parts: Mapping[str, Part], name: str, about: About, found: Mapping[str, object]) -> dict[str, Part]:
    """With this part in its place. What was measured of other variants before stays where `found` says it may."""
    return {**parts, name: Part(about, dict(found))}


def origin(about: About) -> str:
    """One line below a table."""
    return (
        f"`{about.command}`; {about.machine}; commit {about.commit}; {about.began}, {about.minutes:.0f} min; "
        f"other processes: {about.other_cores:.2f} cores on average"
    )


def plain(values: Iterable[object]) -> list[object]:
    """Dataclasses as JSON has them."""
    return [asdict(value) for value in values]  # type: ignore[call-overload]
