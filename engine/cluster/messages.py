"""What the front process and an engine process say to each other, and how it becomes bytes.

A message is one kind byte and the msgpack of one dataclass, decoded against its type. Nothing is ever unpickled, and
a body that does not fit its type is an error of that message alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from engine.config import EngineConfig
from engine.types import Capacity, Phase, Request, StepReport


class MalformedMessage(ValueError):
    """No message: an unknown kind, or a body that does not fit its type."""


# ---- before the sockets: two lines of JSON on the child's stdin ------------------------------------------


@dataclass(frozen=True, slots=True)
class Boot:
    """First line: enough to import everything while the front process still looks for the checkpoint.

    `worker` is "module:Class", or empty for the registry's own. `socket`: the file that the child has inherited.
    """

    config: EngineConfig
    worker: str
    socket: int


@dataclass(frozen=True, slots=True)
class Load:
    """Second line: the resolved folder of the checkpoint."""

    folder: str


# ---- front to engine -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Add:
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Ids that are unknown or already finished are ignored."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """Recount every block and reply with a `CheckReply` of the same token; for tests and debugging."""

    token: int


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Forget every published block; answered by a `ControlReply` with their number."""

    token: int


@dataclass(frozen=True, slots=True)
class StartProfile:
    """Record steps into a new folder `folder`, until `StopProfile`, `seconds` have passed or `steps` were made.

    Answered by a `ControlReply`.
    """

    token: int
    folder: str
    seconds: float
    steps: int


@dataclass(frozen=True, slots=True)
class StopProfile:
    """Write what was recorded; answered by a `ControlReply` with the number of steps, or an error if none runs."""

    token: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave now; whatever still runs is lost."""


# ---- engine to front (besides Phase during start-up and StepReport after each step) ------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent once a second by a thread of its own. `busy_since`: start of the step under way, None when idle."""

    steps: int
    busy_since: float | None


@dataclass(frozen=True, slots=True)
class CheckReply:
    token: int
    running: int
    waiting: int
    blocks_used: int
    device_states: int
    error: str = ""  # what `check_integrity` found


@dataclass(frozen=True, slots=True)
class ControlReply:
    token: int
    count: int = 0
    error: str = ""  # what stood in the way


@dataclass(frozen=True, slots=True)
class Fatal:
    """Last words of an engine process. `kind` is the class name of the error, `text` its message."""

    kind: str
    text: str


ToEngine = Add | Abort | Check | ResetPrefixCache | StartProfile | StopProfile | Shutdown
ToFront = Phase | Ready | StepReport | Heartbeat | CheckReply | ControlReply | Fatal
M = TypeVar("M")

_TO_ENGINE: dict[bytes, type[ToEngine]] = {
    b"a": Add,
    b"x": Abort,
    b"c": Check,
    b"e": ResetPrefixCache,
    b"b": StartProfile,
    b"w": StopProfile,
    b"q": Shutdown,
}
_TO_FRONT: dict[bytes, type[ToFront]] = {
    b"p": Phase,
    b"r": Ready,
    b"s": StepReport,
    b"h": Heartbeat,
    b"k": CheckReply,
    b"o": ControlReply,
    b"f": Fatal,
}
_KINDS: dict[type, bytes] = {kind: key for table in (_TO_ENGINE, _TO_FRONT) for key, kind in table.items()}
_ENCODER = msgspec.msgpack.Encoder()
# One table per direction: a message that travels the wrong way is malformed too.
TO_ENGINE = {key: msgspec.msgpack.Decoder(kind) for key, kind in _TO_ENGINE.items()}
TO_FRONT = {key: msgspec.msgpack.Decoder(kind) for key, kind in _TO_FRONT.items()}


def encode(message: ToEngine | ToFront) -> tuple[bytes, bytes]:
    """The kind and the body of a message."""
    return _KINDS[type(message)], _ENCODER.encode(message)


def decode(message: tuple[bytes, bytes | memoryview], table: Mapping[bytes, msgspec.msgpack.Decoder[M]]) -> M:
    """The message of a kind and a body; `table` is TO_ENGINE or TO_FRONT. Raises MalformedMessage."""
    key, body = message
    decoder = table.get(key)
    if decoder is None:
        raise MalformedMessage(f"unknown kind {key!r}")
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"kind {key!r}: {error}") from error
