"""Tensors in one file that is mapped, not read: safetensors whose data begin at multiples of 64 bytes, with a seal.

The metadata hold a text of the caller's and a seal: the sha256 of the text, of every tensor's name, type, shape and
place, and of the data, piece by piece. So a file that was cut, damaged, or put there by something else is never used.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ALIGNMENT = 64  # bytes: a cache line, and what the widest registers like
PIECE = 16 << 20  # bytes that are hashed at once, by one of several threads
TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
_DTYPES = {name: dtype for dtype, name in TYPES.items()}


class BadWeightFile(Exception):
    """A file is not, or no longer, what `write_file` wrote; the text says why."""


def write_file(path: Path, text: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write contiguous CPU tensors and a text to `path`, which appears whole or not at all. Raises OSError."""
    entries: dict[str, dict[str, object]] = {}
    pieces: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        raw = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")
        size = len(raw)
        entries[name] = _entry(TYPES[tensor.dtype], tensor.shape, end, size)
        pieces.append(raw)
        end += size
        if gap := -end % ALIGNMENT:  # the format wants data without holes
            entries[f"pad.{len(entries)}"] = _entry("U8", (gap,), end, gap)
            pieces.append(memoryview(bytes(gap)))
            end += gap
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, work = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            seal = "0" * 64
            head = _header(text, seal, entries)
            file.write(head)
            for piece in pieces:
                file.write(piece)
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                seal = _seal(text, entries, memoryview(mapped)[len(head) :])
            file.seek(0)
            file.write(_header(text, seal, entries))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(work, 0o644)  # mkstemp makes it private, but the cache may be shared
        os.replace(work, path)
    except BaseException:
        os.unlink(work)
        raise


def map_file(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The text and the tensors of a file, as private views of its pages: nothing is copied until it is written to.

    Raises BadWeightFile, and OSError where there is none.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 16 or length > size - 8:
            raise BadWeightFile("its header does not fit the file")
        raw = file.read(length)
        # Private, so that torch, which knows no read-only tensors, could never change the file.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__")
        text, seal = metadata["text"], metadata["seal"]
        data = memoryview(pages)[8 + length :]
        if (8 + length) % ALIGNMENT or _seal(text, header, data) != seal:
            raise BadWeightFile("its seal is broken")
        tensors = {name: _view(entry, data) for name, entry in header.items() if not name.startswith("pad.")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadWeightFile(f"its header is broken: {error}") from error
    return text, tensors


def _entry(kind: str, shape: tuple[int, ...], start: int, size: int) -> dict[str, object]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, start + size]}


def _header(text: str, seal: str, entries: Mapping[str, object]) -> bytes:
    whole = json.dumps({"__metadata__": {"format": "pt", "text": text, "seal": seal}, **entries}).encode()
    whole += b" " * (-(8 + len(whole)) % ALIGNMENT)
    return struct.pack("<Q", len(whole)) + whole


def _seal(text: str, entries: Mapping[str, object], data: memoryview) -> str:
    def digest(start: int) -> bytes:
        return hashlib.sha256(data[start : start + PIECE]).digest()

    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        parts = b"".join(pool.map(digest, range(0, len(data), PIECE)))
    described = json.dumps([text, len(data), *sorted(entries.items())]).encode()
    return hashlib.sha256(described + parts).hexdigest()


def _view(entry: Mapping[str, object], data: memoryview) -> torch.Tensor:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("a tensor has no place")
    start, end = offsets
    dtype = _DTYPES[str(entry["dtype"])]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's place does not fit its shape")
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[start:end], dtype=dtype).view(shape)
