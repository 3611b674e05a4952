"""The output of a batch: a line for each request, appended as it is answered, in any order.

A run that was killed leaves at most half a line. The next one keeps the good lines, drops the rest, and asks again for
what is missing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from engine.errors import ConfigError
from server.batch.lines import BadLine
from server.parts import Fields


class _Answer(msgspec.Struct):
    status_code: int


class _Line(msgspec.Struct):
    """What is read of a line to know whether it is good."""

    custom_id: str
    response: _Answer | None
    error: msgspec.Raw | None = None

    @property
    def good(self) -> bool:
        told = self.error is None or bytes(self.error) == b"null"
        return told and self.response is not None and self.response.status_code == 200


class Output:
    """The file, open for appending and locked, so that no two runs write to it. `done`: what it has answers to.

    Raises ConfigError where another run has it, OSError where it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        self._file = _locked(path)
        self._keep_good_lines()

    def answered(self, custom_id: str, status: int, request_id: str, body: object) -> None:
        self._append(custom_id, {"status_code": status, "request_id": request_id, "body": body}, None)

    def failed(self, line: BadLine) -> None:
        self._append(line.custom_id, None, {"code": line.code, "message": line.message})

    def _append(self, custom_id: str | None, response: Fields | None, error: Fields | None) -> None:
        fields = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id}
        line = msgspec.json.encode({**fields, "response": response, "error": error}) + b"\n"
        while line:  # in one piece, but on a disk that is full
            line = line[os.write(self._file, line) :]

    def _keep_good_lines(self) -> None:
        """Rewrite the file where it has other lines; a new file takes its place all at once."""
        kept, dropped = self._sorted_out()
        if not dropped:
            return
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.tmp")
        with aside.open("wb") as file, self.path.open("rb") as old:
            for start, end in kept:
                old.seek(start)
                file.write(old.read(end - start))
            file.flush()
            os.fsync(file.fileno())
        new = _locked(aside)
        aside.replace(self.path)
        os.close(self._file)
        self._file = new

    def _sorted_out(self) -> tuple[list[tuple[int, int]], int]:
        """Where the good lines stand, in bytes, and how many lines are not good."""
        kept, dropped = [], 0
        decoder = msgspec.json.Decoder(_Line)
        for start, text in _with_starts(self.path):
            try:
                line = decoder.decode(text)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                line = None
            if line is None or not text.endswith(b"\n") or not line.good or line.custom_id in self.done:
                dropped += 1
            else:
                self.done.add(line.custom_id)
                kept.append((start, start + len(text)))
        return kept, dropped

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _locked(path: Path) -> int:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise ConfigError(f"{path}: another run is writing to this file") from None
    return file


def _with_starts(path: Path) -> Iterator[tuple[int, bytes]]:
    start = 0
    with path.open("rb") as file:
        for line in file:
            yield start, line
            start += len(line)
