"""Write one safetensors file tensor by tensor, so that a model is never in memory as a whole.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the raw data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own bound

Float32 = npt.NDArray[np.float32]


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], chunks: Iterator[tuple[str, Iterable[Float32]]]
) -> None:
    """Write float32 tensors. `chunks` yields each name of `shapes`, in that order, with its rows in pieces.

    Raises ModelLoadError when a tensor's pieces do not add up to its shape, and OSError from the disk.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for expected, (name, pieces) in zip(shapes, chunks, strict=True):
            written = sum(file.write(np.ascontiguousarray(piece, dtype="<f4").data) for piece in pieces)
            if name != expected or written != 4 * math.prod(shapes[expected]):
                raise ModelLoadError(f"tensor {name} has {written} bytes, not what its shape says")


def check_safetensors(path: Path) -> None:
    """Check that the header can be read and the file is as long as it says. Raises ModelLoadError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ModelLoadError(f"{path.name} is no safetensors file: its header does not fit the file")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise ModelLoadError(f"{path.name}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{path.name} is no safetensors file: its header is broken") from error
    if any(not isinstance(end, int) for end in ends) or 8 + length + max(ends, default=0) != size:
        raise ModelLoadError(f"{path.name} is cut off or broken: its size does not match its header; fetch it again")
