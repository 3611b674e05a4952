"""Answers that were measured, kept in files: a run that was cut off goes on, and runs beside each other share theirs.

A line of JSON for every variant, written when its last case is answered. What an entry is of (the checkpoints' bytes,
the task, every setting of the request) is its key: another is never taken for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.diffusion_confidence import Histogram
from benchmarks.diffusion_figures import Sample
from benchmarks.stream import BenchmarkError


class Answered(msgspec.Struct, frozen=True):
    """What all cases got from one variant. `histogram`: of confidences, where they were counted."""

    key: str
    samples: list[Sample]
    histogram: Histogram | None = None


class Kept:
    """The entries of all `files`; new ones are added to the first. Without files nothing is kept."""

    def __init__(self, files: Sequence[Path] = ()) -> None:
        """Raises BenchmarkError for a file that holds something else; a last line that was cut off is left out."""
        self._file = files[0] if files else None
        self._entries: dict[str, Answered] = {}
        for file in files:
            whole, _, rest = (file.read_bytes() if file.exists() else b"").rpartition(b"\n")
            if rest and file == self._file:
                file.write_bytes(whole + b"\n" * bool(whole))
            for line in whole.splitlines():
                try:
                    entry = msgspec.json.decode(line, type=Answered)
                except msgspec.MsgspecError as error:
                    raise BenchmarkError(f"--samples {file}: {error}") from error
                self._entries[entry.key] = entry

    def find(self, key: str) -> Answered | None:
        return self._entries.get(key)

    def add(self, entry: Answered) -> None:
        self._entries[entry.key] = entry
        if self._file is not None:
            with self._file.open("ab") as opened:
                opened.write(msgspec.json.encode(entry) + b"\n")


def digest(folder: Path) -> str:
    """Of a checkpoint's configuration, weights and tokenizer, as far as they are files of its folder."""
    found = hashlib.blake2s(digest_size=8)
    for file in sorted(file for kind in ("*.json", "*.safetensors") for file in folder.glob(kind)):
        found.update(file.name.encode())
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "blake2s").digest())
    return found.hexdigest()


def key_of(*parts: object) -> str:
    """A short name of all that an entry is of."""
    return hashlib.blake2s(repr(parts).encode(), digest_size=12).hexdigest()
